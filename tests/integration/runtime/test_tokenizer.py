"""Encoding and decoding against what the original gives: the conformance data, transformers' slow LlamaTokenizer,
`sentencepiece` itself and, for byte-level BPE, the `tokenizers` package. The tokenizers here are tiny and made for the
tests, except the conformance checkpoint's."""

import io
import itertools
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
import transformers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from export.tokenizer.convert import export_tokenizer
from runtime.errors import UserError
from runtime.text.template import VICUNA_V1, first_turn, next_turn
from runtime.text.tokenizer import Tokenizer

CORPUS = [
    "A chat between a curious user and an artificial intelligence assistant.",
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    "USER: What is the total amount? ASSISTANT: It is 1,234.50 < 2,000 > 12.",
    "USER: Describe this image. ASSISTANT: A cat    sits on a table, next to a red vase.",
    "def f(x):\n    return {k: v for k, v in x.items()}  # indented\n",
    "Le café est à côté de la naïve forêt; über Ångström. 你好世界 今日は",
] * 4
FRAGMENTS = [
    *(
        "hello",
        "world",
        " ",
        "  ",
        "    ",
        "\n",
        "\t",
        "▁",
        "a",
        "é",
        "e\u0301",
        "你好",
        "😀",
        "👩‍👩‍👧",
        "\x00",
        "\x7f",
        "\u3000",
        "ﬁ",
    ),
    *("<s>", "</s>", "<unk>", "<pad>", "<tool>", "<strip>", "<foo>", "<foo bar>", "<ctl>", "<0x41>", "<", "</"),
    *("USER:", " ASSISTANT:", "The user's questions", "1,234.50", "def f(x):\n    return", "."),
]
BYTES = [
    0x00,
    0x0A,
    0x41,
    0x7F,
    0x80,
    0xBD,
    0xBF,
    0xC1,
    0xC3,
    0xE0,
    0xE2,
    0x82,
    0xAC,
    0xED,
    0xA0,
    0xEF,
    0xF0,
    0x9F,
    0xF4,
    0xFF,
]

slow_tokenizer = pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) >= 5,
    reason="transformers 5 has no slow LlamaTokenizer to compare with; run with transformers 4.57",
)


def train_sentencepiece(**options) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, minloglevel=2, hard_vocab_limit=False, **options
    )
    return model.getvalue()


LLAMA_LIKE = {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
SPACE_RUNS = {"allow_whitespace_only_pieces": True}
SYMBOLS = {"user_defined_symbols": ["<foo>", "<foo bar>"], "control_symbols": ["<ctl>"]}
MODELS = {
    "bpe": {"model_type": "bpe", "vocab_size": 600, **LLAMA_LIKE, **SPACE_RUNS},
    "bpe with symbols": {"model_type": "bpe", "vocab_size": 600, **LLAMA_LIKE, **SPACE_RUNS, **SYMBOLS},
    "bpe by default": {"model_type": "bpe", "vocab_size": 300, **SYMBOLS},
    "unigram": {"model_type": "unigram", "vocab_size": 500, **LLAMA_LIKE},
    "unigram by default": {"model_type": "unigram", "vocab_size": 250, **SYMBOLS},
}


def entry(content: str, special: bool = True, **flags: bool) -> dict:
    plain = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    return {"content": content, "special": special, **plain, **flags}


def write_checkpoint(folder: Path, model: bytes, legacy: bool, add_prefix_space: bool = True) -> Path:
    """A checkpoint with two special tokens and an ordinary one beyond the SentencePiece vocabulary."""
    size = sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size()
    added = [entry("<unk>"), entry("<s>"), entry("</s>")]
    added += [entry("<pad>"), entry("<tool>", special=False), entry("<strip>", lstrip=True, rstrip=True)]
    ids = [0, 1, 2, size, size + 1, size + 2]
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": legacy,
        "add_prefix_space": add_prefix_space,
        "pad_token": "<pad>",
        "additional_special_tokens": ["<strip>"],
        "added_tokens_decoder": dict(zip(map(str, ids), added, strict=True)),
    }
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(model)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "bos_token_id": 1, "eos_token_id": 2}))
    return folder


def load(checkpoint: Path, out: Path) -> Tokenizer:
    section = export_tokenizer(checkpoint, out)
    return Tokenizer(out / "tokenizer.json", json.loads(json.dumps(section)))


@pytest.fixture(scope="module")
def trained() -> dict[str, bytes]:
    return {name: train_sentencepiece(**options) for name, options in MODELS.items()}


@pytest.fixture(scope="module")
def llama(trained, tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("llama")
    return load(write_checkpoint(folder / "checkpoint", trained["bpe"], legacy=False), folder / "out")


@pytest.fixture
def original(conformance, tmp_path) -> Tokenizer:
    return load(conformance / "checkpoint", tmp_path / "out")


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    detokenizer = tokenizer.detokenizer()
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.flush()]


# Conformance data


def cases(conformance: Path) -> list[tuple[dict, dict[str, np.ndarray]]]:
    reference = json.loads((conformance / "reference.json").read_text())
    return [(case, dict(np.load(conformance / f"case{i}.npz"))) for i, case in enumerate(reference["cases"])]


def test_conversations_get_the_originals_ids(original, conformance):
    for case, arrays in cases(conformance):
        count = case["visual_tokens"]
        text = first_turn(VICUNA_V1, case["prompt"], images=1)
        ids = original.encode_prompt(text, [count])
        at = ids.index(-1)
        assert ids[at : at + count] == [-1 - i for i in range(count)]
        assert [*ids[:at], -200, *ids[at + count :]] == arrays["input_ids"].ravel().tolist()


def test_answers_get_the_originals_text(original, conformance):
    for case, arrays in cases(conformance):
        pieces = streamed(original, arrays["generated_ids"].ravel().tolist())
        assert "".join(pieces) == case["generated_text"]


def test_numpy_ids_decode_like_ints(original, conformance):
    case, arrays = cases(conformance)[0]
    assert original.decode(arrays["generated_ids"].ravel()) == case["generated_text"]


# Prompts


def test_image_embeds_are_numbered_over_all_images(llama):
    ids = llama.encode_prompt("one <image> two <image><image>", [2, 3, 1])
    assert [i for i in ids if i < 0] == [-1, -2, -3, -4, -5, -6]
    chunks = ["one ", " two "]
    assert ids[: ids.index(-1)] == llama.encode(chunks[0])
    assert ids[ids.index(-2) + 1 : ids.index(-3)] == llama.encode(chunks[1], bos=False)


def test_bos_comes_once(llama):
    ids = llama.encode_prompt("<image>\nWhat is this? <image> And this?", [1, 1])
    assert ids[0] == llama.bos_token_id == 1
    assert ids.count(1) == 1


@pytest.mark.parametrize(("text", "images"), [("no placeholder", [4]), ("<image>", []), ("<image><image>", [1, 2, 3])])
def test_placeholders_must_match_images(llama, text, images):
    with pytest.raises(UserError, match=rf"{text.count('<image>')} <image> .* {len(images)} image"):
        llama.encode_prompt(text, images)


def test_lone_surrogate_is_the_callers_fault(llama):
    with pytest.raises(UserError, match=r"'\\udc80' is a lone surrogate"):
        llama.encode("abc\udc80")


@slow_tokenizer
@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("add_prefix_space", [True, False])
def test_like_slow_llama_tokenizer(trained, tmp_path, model, legacy, add_prefix_space):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", trained[model], legacy, add_prefix_space)
    slow = transformers.LlamaTokenizer.from_pretrained(checkpoint)
    tokenizer = load(checkpoint, tmp_path / "out")
    rng = random.Random(1)

    texts = ["".join(rng.choices(FRAGMENTS, k=rng.randint(1, 8))) for _ in range(300)]
    assert {text: tokenizer.encode(text) for text in texts} == {text: slow(text).input_ids for text in texts}

    byte_ids = [slow.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in BYTES]
    spaces = [slow.convert_tokens_to_ids(piece) for piece in ("▁", "▁▁", "▁▁▁▁", "▁a", "<ctl>")]
    added = [0, 1, 2, *slow.added_tokens_decoder]
    sources = [byte_ids, spaces, added, range(slow.sp_model.get_piece_size())]
    for _ in range(400):
        ids = [rng.choice(rng.choice(sources)) for _ in range(rng.randint(0, 12))]
        assert "".join(streamed(tokenizer, ids)) == slow.decode(ids, skip_special_tokens=True), ids


@slow_tokenizer
@pytest.mark.parametrize("legacy", [True, False])
def test_prompt_like_llava_tokenizer_image_token(trained, tmp_path, legacy):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", trained["bpe"], legacy)
    slow = transformers.LlamaTokenizer.from_pretrained(checkpoint)
    tokenizer = load(checkpoint, tmp_path / "out")
    for text in ["<image>", "a<image>b", " <image>\n\n<image> ", "x <image></s><image><pad> y", "<s> <image><s>"]:
        chunks = [slow(chunk).input_ids[1:] for chunk in text.split("<image>")]
        expected = [slow.bos_token_id, *chunks[0]]
        for number, chunk in enumerate(chunks[1:], 1):
            expected += [-number, *chunk]
        assert tokenizer.encode_prompt(text, [1] * (len(chunks) - 1)) == expected


@slow_tokenizer
@pytest.mark.parametrize("legacy", [True, False])
def test_follow_up_turn_is_a_stretch_of_the_conversation(trained, tmp_path, legacy):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", trained["bpe"], legacy)
    slow = transformers.LlamaTokenizer.from_pretrained(checkpoint)
    tokenizer = load(checkpoint, tmp_path / "out")
    so_far = first_turn(VICUNA_V1, "What is this?", images=0) + " A cat."
    for question in ["Describe it.", " spaces ", "\nline", "▁", "</s>"]:
        more = next_turn(VICUNA_V1, question)
        assert (
            slow(so_far).input_ids + tokenizer.encode_prompt(more, [], continued=True) == slow(so_far + more).input_ids
        )


def test_follow_up_turn_may_bring_an_image(llama):
    ids = llama.encode_prompt("</s>USER: <image>\nAnd this? ASSISTANT:", [3], continued=True)
    assert ids[0] == 2
    assert ids.count(1) == 0
    assert ids[ids.index(-1) : ids.index(-3) + 1] == [-1, -2, -3]
    assert ids[ids.index(-3) + 1 :] == llama.encode("\nAnd this? ASSISTANT:", bos=False)


# SentencePiece decoding


def test_every_short_run_of_bytes_decodes_like_sentencepiece(trained, llama):
    processor = sentencepiece.SentencePieceProcessor(model_proto=trained["bpe"])
    first = processor.piece_to_id("<0x00>")
    letter = processor.piece_to_id("a")
    for run in itertools.product(BYTES, repeat=3):
        ids = [letter, *(first + byte for byte in run), letter]
        assert llama.decode(ids) == processor.decode(ids), run


def test_character_comes_once_and_whole(llama):
    ids = [llama.encode("a", bos=False)[0], *llama.encode("😀", bos=False)[-4:]]
    assert streamed(llama, ids) == ["a", "", "", "", "😀", ""]


def test_special_token_does_not_cut_a_character(llama):
    euro = llama.encode("€", bos=False)[-3:]
    assert streamed(llama, [euro[0], 2, *euro[1:]]) == ["", "", "", "€", ""]


def test_unfinished_character_is_replaced_byte_by_byte(llama):
    start = llama.encode("😀", bos=False)[-4:-1]
    letter = llama.encode("a", bos=False)[0]
    assert streamed(llama, start) == ["", "", "", "\ufffd\ufffd\ufffd"]
    assert streamed(llama, [*start[:2], letter]) == ["", "", "\ufffd\ufffd a", ""]


def test_leading_space_goes_with_the_first_piece_only(llama):
    word = llama.encode("a", bos=False)[0]
    assert llama.decode([word, word]) == "a a"
    assert streamed(llama, [2, word, word]) == ["", "a", " a", ""]


def test_ordinary_added_token_is_text(llama):
    tool = llama.encode("<tool>", bos=False)[-1]
    word = llama.encode("a", bos=False)[0]
    assert llama.decode([word, tool, word]) == "a <tool> a"


@pytest.mark.parametrize("family", ["llama", "byte_level"])
def test_bytes_of_tokens_joined_are_the_text(family, request):
    tokenizer = request.getfixturevalue(family)
    for text in ("The total, 日本 and 😀", "a  b\n c"):
        ids = tokenizer.encode(text, bos=False)
        assert b"".join(map(tokenizer.token_bytes, ids)).removeprefix(b" " * (family == "llama")) == text.encode()
    assert tokenizer.token_bytes(10**9) == b"", "no such token"


def test_ids_outside_the_vocabulary_have_no_text(llama, byte_level):
    word = llama.encode("a", bos=False)[0]
    assert streamed(llama, [word, 10**6, -1, word]) == ["a", "", "", " a", ""]
    word = byte_level.encode("a")[0]
    assert streamed(byte_level, [word, 10**6, -1, word]) == ["a", "", "", "a", ""]


# Byte-level BPE


@pytest.fixture(scope="module")
def byte_level_file(tmp_path_factory) -> Path:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken("<tool call>", normalized=False), AddedToken("é", normalized=False)])
    file = tmp_path_factory.mktemp("byte_level") / "tokenizer.json"
    tokenizer.save(str(file))
    return file


@pytest.fixture(scope="module")
def byte_level(byte_level_file, tmp_path_factory) -> Tokenizer:
    (byte_level_file.parent / "config.json").write_text(json.dumps({"eos_token_id": 0}))
    return load(byte_level_file.parent, tmp_path_factory.mktemp("out"))


def test_byte_level_decodes_like_tokenizers(byte_level, byte_level_file):
    reference = tokenizers.Tokenizer.from_file(str(byte_level_file))
    rng = random.Random(2)
    alphabet = [reference.token_to_id(char) for char in pre_tokenizers.ByteLevel.alphabet()]
    added = list(reference.get_added_tokens_decoder())
    sources = [alphabet, alphabet, added, range(reference.get_vocab_size())]
    for _ in range(4000):
        ids = [rng.choice(rng.choice(sources)) for _ in range(rng.randint(0, 12))]
        assert "".join(streamed(byte_level, ids)) == reference.decode(ids, skip_special_tokens=True), ids


def test_byte_level_encodes_like_tokenizers(byte_level, byte_level_file):
    reference = tokenizers.Tokenizer.from_file(str(byte_level_file))
    for text in ["", " ", "a", "▁ literal", "<|im_start|>user\nhi<|im_end|>\n", "é 😀\x00", "a<tool call>b"]:
        assert byte_level.encode(text) == reference.encode(text).ids
        assert byte_level.encode_prompt(text, [], continued=True) == reference.encode(text).ids


def test_byte_level_character_comes_once_and_whole(byte_level):
    pieces = streamed(byte_level, byte_level.encode("😀"))
    assert [piece for piece in pieces if piece] == ["😀"]
    start = byte_level.encode("😀")[:-1]
    assert streamed(byte_level, start)[-1] == "\ufffd"


def test_tokenizer_without_bos_adds_none(byte_level):
    assert byte_level.bos_token_id is None
    text = "<|im_start|>user\n<image>\nhi<|im_end|>"
    ids = byte_level.encode_prompt(text, [1])
    before, after = text.split("<image>")
    assert ids == [*byte_level.encode(before), -1, *byte_level.encode(after)]


def test_truncation_and_padding_of_the_training_are_off(byte_level_file, tmp_path):
    tokenizer = tokenizers.Tokenizer.from_file(str(byte_level_file))
    text = "a chat between a curious user and an artificial intelligence assistant"
    expected = tokenizer.encode(text).ids
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    shutil.copy(byte_level_file.parent / "config.json", tmp_path)
    assert load(tmp_path, tmp_path / "out").encode(text) == expected


# Manifest


@pytest.fixture
def exported(trained, tmp_path) -> tuple[Path, dict]:
    section = export_tokenizer(
        write_checkpoint(tmp_path / "checkpoint", trained["bpe"], legacy=False), tmp_path / "out"
    )
    return tmp_path / "out" / "tokenizer.json", section


@pytest.mark.parametrize(
    "key",
    [
        "family",
        "bos_token_id",
        "eos_token_ids",
        "special_ids",
        "prefix",
        "strip_first_piece",
        "strip_start",
        "surfaces",
    ],
)
def test_manifest_key_missing_or_wrong(exported, key):
    file, section = exported
    with pytest.raises(UserError, match=f"no '{key}'"):
        Tokenizer(file, {name: value for name, value in section.items() if name != key})
    with pytest.raises(UserError, match=f"'{key}' is 1.5"):
        Tokenizer(file, {**section, key: 1.5})


@pytest.mark.parametrize("wrong", [[[2]], [{}], [True], ["2"]])
@pytest.mark.parametrize("key", ["eos_token_ids", "special_ids"])
def test_ids_that_are_none(exported, key, wrong):
    file, section = exported
    with pytest.raises(UserError, match=f"'{key}' is .*expected token ids"):
        Tokenizer(file, {**section, key: wrong})


def test_surfaces_of_no_id(exported):
    file, section = exported
    with pytest.raises(UserError, match="'surfaces' has 'x'"):
        Tokenizer(file, {**section, "surfaces": {"x": ""}})


def test_unknown_family(exported):
    file, section = exported
    with pytest.raises(UserError, match="'wordpiece' is unknown"):
        Tokenizer(file, {**section, "family": "wordpiece"})


def test_unreadable_file(exported, tmp_path):
    _, section = exported
    (tmp_path / "broken.json").write_text("{")
    for file in (tmp_path / "broken.json", tmp_path / "missing.json"):
        with pytest.raises(UserError, match=file.name):
            Tokenizer(file, section)
