"""What becomes of a checkpoint's tokenizer files: ids against SentencePiece, the manifest's section, refusals."""

from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from export.tokenizer import convert_sentencepiece
from export.tokenizer.convert import export_tokenizer
from tests.support.tiny_tokenizers import (
    FRAGMENTS,
    MODELS,
    change,
    entry,
    export_and_load,
    sentencepiece_checkpoint,
    texts,
    train_byte_level,
    train_sentencepiece,
)
from train.errors import TokenizerError


@pytest.fixture(scope="module")
def trained() -> dict[str, bytes]:
    return {name: train_sentencepiece(**options) for name, options in MODELS.items()}


@pytest.fixture
def checkpoint(trained, tmp_path) -> Path:
    """A Llama-like one with a SentencePiece model and little else."""
    return sentencepiece_checkpoint(tmp_path / "checkpoint", trained["bpe"])


def size_of(checkpoint: Path) -> int:
    return sentencepiece.SentencePieceProcessor(model_file=str(checkpoint / "tokenizer.model")).get_piece_size()


# SentencePiece models


def test_conformance_checkpoint(conformance, tmp_path):
    section, tokenizer = export_and_load(conformance / "checkpoint", tmp_path / "tokenizer")
    assert section == {
        "file": "tokenizer/tokenizer.json",
        "family": "sentencepiece",
        "bos_token_id": 1,
        "eos_token_ids": [2],
        "special_ids": [0, 1, 2],
        "prefix": "▁",
        "strip_first_piece": True,
        "strip_start": "none",
        "surfaces": {},
    }
    assert [file.name for file in (tmp_path / "tokenizer").iterdir()] == ["tokenizer.json"]
    assert tokenizer.bos_token_id == 1
    assert tokenizer.eos_token_ids == {2}


@pytest.mark.parametrize("model", MODELS)
def test_legacy_like_sentencepiece(trained, tmp_path, model):
    checkpoint = sentencepiece_checkpoint(tmp_path / "checkpoint", trained[model], legacy=True)
    _, tokenizer = export_and_load(checkpoint, tmp_path / "out")
    processor = sentencepiece.SentencePieceProcessor(model_proto=trained[model])

    @settings(max_examples=100)
    @given(text=texts(), ids=st.lists(st.integers(3, processor.get_piece_size() - 1), max_size=12))
    def check(text: str, ids: list[int]):
        encoded = processor.encode(text)
        assert tokenizer.encode(text, bos=False) == encoded
        if text:
            assert tokenizer.encode(f"</s>{text}<s>", bos=False) == [2, *encoded, 1]
        # LlamaTokenizer strips a space though there is no prefix, and cuts a run of them that comes first
        run_first = bool(ids) and processor.id_to_piece(ids[0]).startswith("▁▁")
        if model != "bpe, no prefix" and not run_first:
            assert tokenizer.decode(ids) == processor.decode(ids)

    check()


@pytest.mark.parametrize("model", MODELS)
def test_ids_with_the_originals_own_prefix(trained, tmp_path, model):
    checkpoint = sentencepiece_checkpoint(tmp_path / "checkpoint", trained[model])
    _, tokenizer = export_and_load(checkpoint, tmp_path / "out")
    altered = sentencepiece_model_pb2.ModelProto.FromString(trained[model])
    altered.normalizer_spec.add_dummy_prefix = False
    processor = sentencepiece.SentencePieceProcessor(model_proto=altered.SerializeToString())
    unknown = processor.encode("<unk>")

    @settings(max_examples=100)
    @given(texts().filter(bool))
    def check(text: str):
        expected = processor.encode("<unk>▁" + text.replace("▁", " "))[len(unknown) :]
        assert tokenizer.encode(text, bos=False) == expected

    check()
    for text in ("a", "A chat", "\n", "你好"):
        assert tokenizer.encode(f"</s>{text}<s>", bos=False) == [2, *processor.encode(text), 1], text


def test_prefix_space_goes_where_a_special_token_comes_first(checkpoint, tmp_path):
    _, tokenizer = export_and_load(checkpoint, tmp_path / "out")
    space = tokenizer.encode("▁ ", bos=False)[0]
    assert tokenizer.encode("</s>", bos=False) == [2]
    assert tokenizer.encode(" </s>", bos=False) == [space, space, 2]
    assert tokenizer.encode("</s> ", bos=False) == [2, space]


def test_unknown_character_is_no_special_token(trained, tmp_path):
    checkpoint = sentencepiece_checkpoint(tmp_path / "checkpoint", trained["bpe, normalised"])
    _, tokenizer = export_and_load(checkpoint, tmp_path / "out")
    space = sentencepiece.SentencePieceProcessor(model_proto=trained["bpe, normalised"]).piece_to_id("▁")
    assert tokenizer.encode("☃", bos=False) == [space, 0]
    assert tokenizer.encode("<unk>", bos=False) == [0]


def test_difference_from_sentencepiece_is_refused(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(convert_sentencepiece, "_normalizers", lambda spec, legacy: [normalizers.Strip()])
    with pytest.raises(TokenizerError, match=r"differs from SentencePiece on '.*': \[.*\], expected \[.*\]"):
        export_tokenizer(checkpoint, tmp_path / "out")


# Added tokens


def test_tokens_beyond_the_vocabulary_keep_their_ids(checkpoint, tmp_path):
    size = size_of(checkpoint)
    added = {"0": entry("<unk>"), "1": entry("<s>"), "2": entry("</s>"), str(size + 3): entry("<pad>")}
    added[str(size)] = entry("<tool>", special=False)
    change(checkpoint / "tokenizer_config.json", added_tokens_decoder=added, pad_token="<pad>")
    section, tokenizer = export_and_load(checkpoint, tmp_path / "out")
    assert section["special_ids"] == [0, 1, 2, size + 3]
    ids = tokenizer.encode("a<pad>a <tool>a")
    assert [i for i in ids if i >= size] == [size + 3, size]
    assert tokenizer.decode(ids) == "aa  <tool> a"


def test_older_checkpoints_files_are_read(checkpoint, tmp_path):
    size = size_of(checkpoint)
    change(checkpoint / "added_tokens.json", **{"[PAD]": size, "<plain>": size + 1})
    change(checkpoint / "special_tokens_map.json", pad_token="[PAD]", additional_special_tokens=["<more>"])
    section, tokenizer = export_and_load(checkpoint, tmp_path / "out")
    assert section["special_ids"] == [0, 1, 2, size, size + 2]
    assert tokenizer.encode("[PAD]<plain><more>", bos=False) == [size, size + 1, size + 2]


@pytest.mark.parametrize("there", [False, True])
def test_image_tokens_are_added_unless_they_are_there(checkpoint, tmp_path, there):
    size, names = size_of(checkpoint), ["<im_start>", "<im_end>"]
    if there:
        added = {"1": entry("<s>"), "2": entry("</s>"), str(size): entry(names[0]), str(size + 1): entry(names[1])}
        change(checkpoint / "tokenizer_config.json", added_tokens_decoder=added, additional_special_tokens=names)
    else:
        names.insert(0, "<im_patch>")
    change(checkpoint / "config.json", mm_use_im_start_end=True, mm_use_im_patch_token=not there)
    section, tokenizer = export_and_load(checkpoint, tmp_path / "out")
    ids = list(range(size, size + len(names)))
    assert section["special_ids"] == [0, 1, 2, *ids]
    assert tokenizer.encode("".join(names), bos=False) == ids
    assert tokenizer.encode_prompt("<im_start><image><im_end>\n", [1])[:4] == [1, ids[-2], -1, ids[-1]]


def test_control_piece_has_no_text(trained, tmp_path):
    checkpoint = sentencepiece_checkpoint(tmp_path / "checkpoint", trained["bpe, symbols"])
    section, tokenizer = export_and_load(checkpoint, tmp_path / "out")
    control = sentencepiece.SentencePieceProcessor(model_proto=trained["bpe, symbols"]).piece_to_id("<ctl>")
    assert section["surfaces"] == {str(control): ""}
    assert tokenizer.decode([*tokenizer.encode("a", bos=False), control]) == "a"


# The manifest's section


@pytest.mark.parametrize(
    ("legacy", "add_prefix_space", "expected"),
    [
        (None, True, (None, True, "one")),
        (True, True, (None, True, "one")),
        (False, True, ("▁", True, "none")),
        (False, False, ("", False, "none")),
        (False, None, ("", False, "none")),
    ],
)
def test_prefix_settings(checkpoint, tmp_path, legacy, add_prefix_space, expected):
    change(checkpoint / "tokenizer_config.json", legacy=legacy, add_prefix_space=add_prefix_space)
    section = export_tokenizer(checkpoint, tmp_path / "out")
    assert (section["prefix"], section["strip_first_piece"], section["strip_start"]) == expected


def test_no_bos_where_the_original_adds_none(checkpoint, tmp_path):
    change(checkpoint / "tokenizer_config.json", add_bos_token=False)
    section, tokenizer = export_and_load(checkpoint, tmp_path / "out")
    assert section["bos_token_id"] is None
    assert 1 not in tokenizer.encode_prompt("a<image>b", [1])


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({"eos_token_id": 2}, {}, [2]),
        ({"eos_token_id": 2}, {"eos_token_id": [5, 2, 5]}, [5, 2]),
        ({"eos_token_id": None}, {}, [2]),
        ({"eos_token_id": [7]}, {"eos_token_id": None}, [7]),
        ({"eos_token_id": 0}, {"bos_token_id": 1}, [0]),
    ],
)
def test_eos_of_the_model(checkpoint, tmp_path, config, generation, expected):
    change(checkpoint / "config.json", **config)
    change(checkpoint / "generation_config.json", **generation)
    assert export_tokenizer(checkpoint, tmp_path / "out")["eos_token_ids"] == expected


@pytest.mark.parametrize("eos", [50256, -1, "</s>"])
def test_eos_outside_the_vocabulary_is_refused(checkpoint, tmp_path, eos):
    change(checkpoint / "config.json", eos_token_id=eos)
    with pytest.raises(TokenizerError, match=f"eos_token_id {eos!r}"):
        export_tokenizer(checkpoint, tmp_path / "out")


def test_eos_of_the_tokenizer(checkpoint, tmp_path):
    """The end of a ChatML turn beside the model's; its own where the model has none."""
    size, file = size_of(checkpoint), checkpoint / "tokenizer_config.json"
    change(file, additional_special_tokens=["<|im_end|>"])
    assert export_tokenizer(checkpoint, tmp_path / "out")["eos_token_ids"] == [2, size]
    change(checkpoint / "config.json", eos_token_id=None)
    change(file, additional_special_tokens=[], eos_token="<end>", added_tokens_decoder={"1": entry("<s>")})
    assert export_tokenizer(checkpoint, tmp_path / "other")["eos_token_ids"] == [size]


# tokenizer.json


@pytest.fixture
def byte_level_checkpoint(tmp_path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    train_byte_level().save(str(folder / "tokenizer.json"))
    change(folder / "config.json", eos_token_id=0)
    return folder


def put_in_front(file: Path, before: str, after: str = "") -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(file))
    names = [name for name in (before, after) if name]
    special = [(name, tokenizer.token_to_id(name)) for name in names]
    single = f"{before} $A {after}".strip()
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    tokenizer.save(str(file))


def test_byte_level_file_is_taken_over_as_it_is(byte_level_checkpoint, tmp_path):
    (byte_level_checkpoint / "tokenizer.model").write_bytes(b"GGUF, or anything else")
    section, _ = export_and_load(byte_level_checkpoint, tmp_path / "tokenizer")
    assert section == {
        "file": "tokenizer/tokenizer.json",
        "family": "byte_level",
        "bos_token_id": None,
        "eos_token_ids": [0, 2],
        "special_ids": [0, 1, 2],
    }
    written = (tmp_path / "tokenizer" / "tokenizer.json").read_bytes()
    assert written == (byte_level_checkpoint / "tokenizer.json").read_bytes()


def test_byte_level_file_gets_the_image_tokens(byte_level_checkpoint, tmp_path):
    size = train_byte_level().get_vocab_size()
    change(byte_level_checkpoint / "config.json", mm_use_im_patch_token=False, mm_use_im_start_end=True)
    section, tokenizer = export_and_load(byte_level_checkpoint, tmp_path / "out")
    assert section["special_ids"] == [0, 1, 2, size, size + 1]
    assert tokenizer.encode_prompt("<im_start><image><im_end>", [1]) == [size, -1, size + 1]


@pytest.mark.parametrize(
    ("in_front", "config", "expected"),
    [
        ("<|endoftext|>", {}, 0),
        ("<|endoftext|>", {"add_bos_token": False}, None),
        ("", {"add_bos_token": True, "bos_token": "<|endoftext|>"}, 0),
        ("", {"add_bos_token": True, "bos_token": {"content": "<|endoftext|>"}}, 0),
        ("", {"bos_token": "<|endoftext|>"}, None),
        ("<|im_start|>", {"add_bos_token": True, "bos_token": "<|im_start|>"}, None),
        ("<|im_start|>", {}, None),
    ],
)
def test_bos_of_a_byte_level_file(byte_level_checkpoint, tmp_path, in_front, config, expected):
    if in_front:
        put_in_front(byte_level_checkpoint / "tokenizer.json", in_front)
    change(byte_level_checkpoint / "tokenizer_config.json", **config)
    assert export_tokenizer(byte_level_checkpoint, tmp_path / "out")["bos_token_id"] == expected


def test_file_that_ends_the_text_is_refused(byte_level_checkpoint, tmp_path):
    put_in_front(byte_level_checkpoint / "tokenizer.json", "<|endoftext|>", "<|im_end|>")
    with pytest.raises(TokenizerError, match="more than one BOS"):
        export_tokenizer(byte_level_checkpoint, tmp_path / "out")


def test_byte_level_decoding_the_runtime_does_not_know_is_refused(byte_level_checkpoint, tmp_path):
    file = byte_level_checkpoint / "tokenizer.json"
    tokenizer = tokenizers.Tokenizer.from_file(str(file))
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip("a", 1, 0)])
    tokenizer.save(str(file))
    with pytest.raises(TokenizerError, match=r"ids \[.*\] decode to"):
        export_tokenizer(byte_level_checkpoint, tmp_path / "out")


def usual_conversion(checkpoint: Path, legacy: bool) -> tokenizers.Tokenizer:
    """A tokenizer.json as it usually comes with Llama: with `legacy` it gives the original's ids, without it drops the
    prefix space of a text that opens with a space."""
    model = sentencepiece_model_pb2.ModelProto.FromString((checkpoint / "tokenizer.model").read_bytes())
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type == piece.NORMAL}
    cuts = [(score, piece[:i], piece[i:]) for piece, score in scores.items() for i in range(1, len(piece))]
    merges = sorted((cut for cut in cuts if cut[1] in scores and cut[2] in scores), key=lambda cut: -cut[0])
    vocabulary = {piece.piece: i for i, piece in enumerate(model.pieces)}
    bpe = models.BPE(vocabulary, [cut[1:] for cut in merges], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(bpe)
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    put = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.post_processor = put
    return tokenizer


@pytest.mark.parametrize("legacy", [True, False])
def test_sentencepiece_file_beside_its_model(trained, tmp_path, legacy):
    checkpoint = sentencepiece_checkpoint(tmp_path / "checkpoint", trained["bpe"], legacy)
    usual_conversion(checkpoint, legacy).save(str(checkpoint / "tokenizer.json"))
    section, tokenizer = export_and_load(checkpoint, tmp_path / "out")
    taken_over = (tmp_path / "out" / "tokenizer.json").read_bytes() == (checkpoint / "tokenizer.json").read_bytes()
    assert taken_over == legacy
    assert section["bos_token_id"] == 1
    (checkpoint / "tokenizer.json").unlink()
    _, converted = export_and_load(checkpoint, tmp_path / "converted")
    for text in FRAGMENTS:
        assert tokenizer.encode(text) == converted.encode(text), text
    ids = list(range(size_of(checkpoint)))
    assert tokenizer.decode(ids) == converted.decode(ids)


@pytest.mark.parametrize("legacy", [True, False])
def test_sentencepiece_file_alone(trained, tmp_path, legacy):
    checkpoint = sentencepiece_checkpoint(tmp_path / "checkpoint", trained["bpe"], legacy)
    reference = usual_conversion(checkpoint, legacy)
    reference.save(str(checkpoint / "tokenizer.json"))
    (checkpoint / "tokenizer.model").unlink()
    section, tokenizer = export_and_load(checkpoint, tmp_path / "tokenizer")
    assert section == {
        "file": "tokenizer/tokenizer.json",
        "family": "sentencepiece",
        "bos_token_id": 1,
        "eos_token_ids": [2],
        "special_ids": [0, 1, 2],
        "prefix": None,
        "strip_first_piece": True,
        "strip_start": "none",
        "surfaces": {},
    }
    for text in FRAGMENTS:
        ids = reference.encode(text).ids
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == reference.decode(ids)


# Refusals


def test_no_tokenizer(tmp_path):
    with pytest.raises(TokenizerError, match=r"expected tokenizer\.json or tokenizer\.model"):
        export_tokenizer(tmp_path, tmp_path / "out")


@pytest.mark.parametrize(
    "name", ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json"]
)
def test_damaged_json(checkpoint, tmp_path, name):
    for content in ("{", "[]"):
        (checkpoint / name).write_text(content)
        with pytest.raises(TokenizerError, match=name):
            export_tokenizer(checkpoint, tmp_path / "out")


def test_damaged_tokenizers(checkpoint, tmp_path):
    (checkpoint / "tokenizer.model").write_bytes(b"GGUF\x03\x00\x00\x00")
    with pytest.raises(TokenizerError, match=r"tokenizer\.model: cannot be read"):
        export_tokenizer(checkpoint, tmp_path / "out")
    (checkpoint / "tokenizer.model").write_bytes(b"")
    with pytest.raises(TokenizerError, match="no pieces"):
        export_tokenizer(checkpoint, tmp_path / "out")
    (checkpoint / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: cannot be read"):
        export_tokenizer(checkpoint, tmp_path / "out")


def test_tokenizer_of_another_kind(byte_level_checkpoint, tmp_path):
    tokenizer = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.save(str(byte_level_checkpoint / "tokenizer.json"))
    with pytest.raises(TokenizerError, match=r"neither byte-level nor SentencePiece.*WordPiece"):
        export_tokenizer(byte_level_checkpoint, tmp_path / "out")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"tokenizer_class": "GemmaTokenizer"}, "GemmaTokenizer, not LlamaTokenizer"),
        ({"add_eos_token": True}, "add_eos_token"),
        ({"added_tokens_decoder": {"9": entry("<t>", single_word=True)}}, "'<t>': single_word"),
    ],
)
def test_settings_that_are_not_supported(checkpoint, tmp_path, config, message):
    change(checkpoint / "tokenizer_config.json", **config)
    with pytest.raises(TokenizerError, match=message):
        export_tokenizer(checkpoint, tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "word", "vocab_size": 40}, "neither BPE nor Unigram"),
        ({"model_type": "bpe", "vocab_size": 250, "treat_whitespace_as_suffix": True}, "spaces at the end of words"),
    ],
)
def test_models_that_are_not_supported(tmp_path, options, message):
    checkpoint = sentencepiece_checkpoint(tmp_path / "checkpoint", train_sentencepiece(**options))
    with pytest.raises(TokenizerError, match=message):
        export_tokenizer(checkpoint, tmp_path / "out")
