"""Encoding and decoding against what the original gives: the conformance data, `sentencepiece` and, for byte-level BPE,
the `tokenizers` package."""

import itertools
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, pre_tokenizers

from runtime.errors import UserError
from runtime.text.template import VICUNA_V1, first_turn, next_turn
from runtime.text.tokenizer import Tokenizer
from tests.support.tiny_tokenizers import (
    MODELS,
    SPECIAL_TOKENS,
    add_tokens,
    change,
    export_and_load,
    sentencepiece_checkpoint,
    texts,
    train_byte_level,
    train_sentencepiece,
)

BYTES = bytes.fromhex("000a417f80bdbfc1c3e0e282aceda0eff09ff4ff")


@pytest.fixture(scope="module")
def model() -> bytes:
    return train_sentencepiece(**MODELS["bpe, runs of spaces"])


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory) -> Path:
    folder = sentencepiece_checkpoint(tmp_path_factory.mktemp("llama") / "checkpoint", model)
    add_tokens(folder, sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size())
    return folder


@pytest.fixture(scope="module")
def llama(checkpoint) -> Tokenizer:
    return load(checkpoint, checkpoint.parent / "out")


def load(checkpoint: Path, out: Path) -> Tokenizer:
    return export_and_load(checkpoint, out)[1]


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


@pytest.mark.parametrize("number", range(4))
def test_like_slow_llama_tokenizer(conformance, tmp_path, number):
    expected = json.loads((conformance / "tokenizer.json").read_text())[number]
    model = (conformance / "checkpoint" / "tokenizer.model").read_bytes()
    checkpoint = sentencepiece_checkpoint(tmp_path / "checkpoint", model, expected["legacy"])
    add_tokens(checkpoint, sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size())
    change(checkpoint / "tokenizer_config.json", add_prefix_space=expected["add_prefix_space"])
    tokenizer = load(checkpoint, tmp_path / "out")
    for text, ids in expected["encoded"]:
        assert tokenizer.encode(text) == ids, text
    for ids, text in expected["decoded"]:
        assert "".join(streamed(tokenizer, ids)) == text, ids


# Prompts


def test_image_embeds_are_numbered_over_all_images(llama):
    ids = llama.encode_prompt("one <image> two <image><image>", [2, 3, 1])
    assert [i for i in ids if i < 0] == [-1, -2, -3, -4, -5, -6]
    chunks = ["one ", " two "]
    assert ids[: ids.index(-1)] == llama.encode(chunks[0])
    assert ids[ids.index(-2) + 1 : ids.index(-3)] == llama.encode(chunks[1], bos=False)


@pytest.mark.parametrize(("text", "images"), [("no placeholder", [4]), ("<image>", []), ("<image><image>", [1, 2, 3])])
def test_placeholders_must_match_images(llama, text, images):
    with pytest.raises(UserError, match=rf"{text.count('<image>')} <image> .* {len(images)} image"):
        llama.encode_prompt(text, images)


def test_lone_surrogate_is_the_callers_fault(llama):
    with pytest.raises(UserError, match=r"'\\udc80' is a lone surrogate"):
        llama.encode("abc\udc80")


@given(chunks=st.lists(texts(*SPECIAL_TOKENS), min_size=1, max_size=4))
def test_text_between_images_is_tokenized_on_its_own(llama, chunks):
    expected = llama.encode(chunks[0])
    for number, chunk in enumerate(chunks[1:], 1):
        expected += [-number, *llama.encode(chunk, bos=False)]
    assert llama.encode_prompt("<image>".join(chunks), [1] * (len(chunks) - 1)) == expected


@given(question=texts(*SPECIAL_TOKENS))
def test_follow_up_turn_is_a_stretch_of_the_conversation(llama, question):
    so_far, more = first_turn(VICUNA_V1, "What is this?", images=0) + " A cat.", next_turn(VICUNA_V1, question)
    assert llama.encode(so_far) + llama.encode_prompt(more, [], continued=True) == llama.encode(so_far + more)


def test_follow_up_turn_may_bring_an_image(llama):
    ids = llama.encode_prompt("</s>USER: <image>\nAnd this? ASSISTANT:", [3], continued=True)
    assert ids[0] == 2
    assert ids.count(1) == 0
    assert ids[ids.index(-1) : ids.index(-3) + 1] == [-1, -2, -3]
    assert ids[ids.index(-3) + 1 :] == llama.encode("\nAnd this? ASSISTANT:", bos=False)


# SentencePiece decoding


def test_every_short_run_of_bytes_decodes_like_sentencepiece(model, llama):
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    first = processor.piece_to_id("<0x00>")
    letter = processor.piece_to_id("a")
    for run in itertools.product(BYTES, repeat=3):
        ids = [letter, *(first + byte for byte in run), letter]
        assert llama.decode(ids) == processor.decode(ids), run


def test_character_comes_once_and_whole(llama, byte_level):
    ids = [llama.encode("a", bos=False)[0], *llama.encode("😀", bos=False)[-4:]]
    assert streamed(llama, ids) == ["a", "", "", "", "😀", ""]
    ids = byte_level.encode("😀")
    assert streamed(byte_level, ids) == [*[""] * (len(ids) - 1), "😀", ""]


def test_special_token_does_not_cut_a_character(llama):
    euro = llama.encode("€", bos=False)[-3:]
    assert streamed(llama, [euro[0], 2, *euro[1:]]) == ["", "", "", "€", ""]


def test_unfinished_character_is_replaced_byte_by_byte(llama):
    start = llama.encode("😀", bos=False)[-4:-1]
    letter = llama.encode("a", bos=False)[0]
    assert streamed(llama, start) == ["", "", "", "\ufffd\ufffd\ufffd"]
    assert streamed(llama, [*start[:2], letter]) == ["", "", "\ufffd\ufffd a", ""]


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
    tokenizer = train_byte_level()
    tokenizer.add_tokens([AddedToken("<tool call>", normalized=False), AddedToken("é", normalized=False)])
    file = tmp_path_factory.mktemp("byte_level") / "tokenizer.json"
    tokenizer.save(str(file))
    return file


@pytest.fixture(scope="module")
def byte_level(byte_level_file, tmp_path_factory) -> Tokenizer:
    (byte_level_file.parent / "config.json").write_text(json.dumps({"eos_token_id": 0}))
    return load(byte_level_file.parent, tmp_path_factory.mktemp("out"))


def test_byte_level_like_tokenizers(byte_level, byte_level_file):
    reference = tokenizers.Tokenizer.from_file(str(byte_level_file))
    alphabet = [reference.token_to_id(char) for char in pre_tokenizers.ByteLevel.alphabet()]
    added = list(reference.get_added_tokens_decoder())
    one = st.sampled_from(alphabet) | st.sampled_from(added) | st.integers(0, reference.get_vocab_size() - 1)

    @settings(max_examples=500)
    @given(text=st.text() | texts("<|im_start|>", "<|im_end|>", "<tool call>"), ids=st.lists(one, max_size=12))
    def check(text: str, ids: list[int]):
        assert byte_level.encode(text) == reference.encode(text).ids
        assert byte_level.encode_prompt(text, [], continued=True) == reference.encode(text).ids
        assert "".join(streamed(byte_level, ids)) == reference.decode(ids, skip_special_tokens=True)

    check()


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
def exported(checkpoint, tmp_path) -> tuple[Path, dict]:
    return tmp_path / "out" / "tokenizer.json", export_and_load(checkpoint, tmp_path / "out")[0]


def test_manifest_key_missing_or_wrong(exported):
    file, section = exported
    for key in section.keys() - {"file"}:
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


@pytest.mark.parametrize(
    ("values", "message"),
    [({"surfaces": {"x": ""}}, "'surfaces' has 'x'"), ({"family": "wordpiece"}, "'wordpiece' is unknown")],
)
def test_manifest_with_a_value_that_is_unknown(exported, values, message):
    file, section = exported
    with pytest.raises(UserError, match=message):
        Tokenizer(file, {**section, **values})


def test_unreadable_file(exported, tmp_path):
    _, section = exported
    (tmp_path / "broken.json").write_text("{")
    for file in (tmp_path / "broken.json", tmp_path / "missing.json"):
        with pytest.raises(UserError, match=file.name):
            Tokenizer(file, section)


@given(text=texts(*SPECIAL_TOKENS), rows=st.integers(3, 520))
def test_a_token_without_an_embedding_is_named(exported_with_added_tokens, text, rows):
    """Whatever the number of rows: the same IDs where all are below, else an error that names one that is not."""
    file, section = exported_with_added_tokens
    free, bounded = Tokenizer(file, section), Tokenizer(file, section, rows)
    ids = free.encode(text)
    assert bounded.without_embedding() == [
        i for i in range(rows, 600) if tokenizers.Tokenizer.from_file(str(file)).id_to_token(i) is not None
    ]
    if max(ids) < rows:
        assert bounded.encode(text) == ids
        return
    with pytest.raises(UserError, match=rf"has ID \d+, the model's embedding has {rows} rows") as error:
        bounded.encode(text)
    token_id = int(re.search(r"has ID (\d+)", str(error.value))[1])
    assert token_id in ids
    assert repr(free._tokenizer.id_to_token(token_id)) in str(error.value)


@pytest.fixture(scope="module")
def exported_with_added_tokens(tmp_path_factory, model) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("added")
    checkpoint = sentencepiece_checkpoint(folder / "checkpoint", model)
    add_tokens(checkpoint, sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size())
    return folder / "out" / "tokenizer.json", export_and_load(checkpoint, folder / "out")[0]


def test_a_bos_token_without_an_embedding_is_no_tokenizer(exported):
    file, section = exported
    with pytest.raises(UserError, match="has ID 1, the model's embedding has 1 rows, and it opens every prompt"):
        Tokenizer(file, section, 1)


def test_a_panic_of_the_tokenizer_is_the_prompt_s_error(exported, monkeypatch):
    class Panic(BaseException):
        pass

    class Panicking:
        def encode_batch(self, texts, add_special_tokens):
            raise Panic("index out of bounds")

    tokenizer = Tokenizer(*exported)
    monkeypatch.setattr(tokenizer, "_tokenizer", Panicking())
    with pytest.raises(UserError, match="cannot be tokenized: index out of bounds"):
        tokenizer.encode("hello")
