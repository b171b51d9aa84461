"""Checkpoints that were made to harm, or are damaged: a single-line error, nothing executed, no exception of others."""

import json
import pickle
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec

from export.bundle import image_rule, prompt_template
from export.cli import choose_resolution
from export.tokenizer.convert import export_tokenizer
from runtime.errors import UserError
from tests.support.checkpoints import QUERY, Parts, edit_json, refusal, write_bin, write_json, write_safetensors
from tests.support.commands import assert_one_line_error, run_main
from train.data.tokenizer import load_tokenizer
from train.model import Checkpoint, check_finite, load_model


def read_all(folder: Path) -> None:
    """What an export reads."""
    checkpoint = Checkpoint.open(folder)
    image_rule(checkpoint, choose_resolution(None, checkpoint))
    prompt_template(checkpoint, None)
    check_finite(checkpoint.vision_tensors(), checkpoint.projector_tensors(), checkpoint.language_tensors())
    load_model(checkpoint)


def header(content: object, size: int | None = None, data: int = 0) -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + bytes(data)


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\1\0",
        header({}, 1 << 62),
        header({}, (1 << 64) - 1),
        header({}, 200_000_000),
        header({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}, data=12),
        header({"a": entry("F32", [2], 8, 0)}, data=8),
        header({"a": entry("Q4", [2], 0, 8)}, data=8),
        header({"a": entry("F3\n2", [2], 0, 8)}, data=8),
        header({"a": entry("F32", [2], 0, 8)}, data=4),
        header({"a": entry("F32", [3], 0, 8)}, data=8),
        header({"a": entry("F32", [1 << 40, 1 << 40], 0, 8)}, data=8),
        header({"a": entry("F32", [-2], 0, 8)}, data=8),
        header({"a": entry("F32", [1 << 63, 0], 0, 0)}),
        header([1]),
        header(b"\xff{{"),
        header(b"[" * 100_000),
    ],
)
def test_safetensors_with_a_header_that_cannot_be(content: bytes, folder: Path, tmp_path: Path):
    file = folder / "model.safetensors"
    file.write_bytes(content)
    message = refusal(lambda: read_all(folder))
    assert message.startswith(f"{file}: cannot be read as safetensors: ") and "\n" not in message
    done = run_main("export.bundle", "--checkpoint", folder, "--out", tmp_path / "out")
    assert_one_line_error(done, file)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a\0b", ".", "..", "", "sub/x.safetensors"])
@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_an_index_names_files_beside_it_alone(name: str, index: str, folder: Path):
    """Though the file is there and whole."""
    (folder / "sub").mkdir()
    shutil.copy(folder / "model.safetensors", folder / "sub" / "x.safetensors")
    (folder / "model.safetensors").rename(folder.parent / "x.safetensors")
    write_json(folder / index, {"weight_map": {QUERY: name}})
    message = refusal(lambda: read_all(folder))
    assert message == f"{folder / index}: {QUERY} lies in {name!r}, expected the name of a file beside the index"


@pytest.mark.parametrize("content", [b"[" * 200_000, b'{"weight_map": ' + b"1" * 5000 + b"}"])
def test_json_that_python_gives_up_on(content: bytes, folder: Path):
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_bytes(content)
    assert refusal(lambda: read_all(folder)).startswith(f"{index}: cannot be read as JSON: ")


class Trap:
    """Writes a file when it is unpickled, by way of builtins alone."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self) -> tuple:
        return eval, (f"open({str(self.file)!r}, 'w').write('sprung')",)


@pytest.mark.parametrize("name", ["model", "tower", "shard"])
def test_a_plain_pickle_is_refused_and_not_run(name: str, folder: Path, tmp_path: Path):
    trap = tmp_path / "sprung"
    if name == "shard":
        (folder / "model.safetensors").unlink()
        file = folder / "part-1.bin"
        write_json(folder / "pytorch_model.bin.index.json", {"weight_map": {QUERY: file.name}})
    else:
        where = folder if name == "model" else folder / "vision_tower"
        (where / "model.safetensors").unlink()
        file = where / "pytorch_model.bin"
    file.write_bytes(pickle.dumps({QUERY: Trap(trap)}))
    done = run_main("export.bundle", "--checkpoint", folder, "--out", tmp_path / "out")
    assert_one_line_error(done, file)
    assert not trap.exists()
    pickle.loads(file.read_bytes())
    assert trap.exists()  # it would have


CONFIG = [
    *(("mm_vision_resolution", value) for value in ("big", [1], True, 320.5)),
    *(("mm_vision_tower", value) for value in (5, ["a"], {"a": 1})),
    *(("mm_projector_type", value) for value in (5, None, ["x"])),
    *(("conversation_template", value) for value in (5, ["x"], None)),
    *(
        (key, value)
        for key in ("hidden_size", "num_attention_heads", "vocab_size")
        for value in ("x", [1], -4, 0, None)
    ),
    *(("mm_vision_select_layer", value) for value in ("x", [1])),
    *(("image_aspect_ratio", value) for value in (["pad"], {})),
    *((key, "x") for key in ("rope_theta", "rope_scaling", "rope_parameters", "rms_norm_eps", "num_hidden_layers")),
    ("conversation_system", 5),
    ("rope_scaling", 5),
    ("hidden_act", 5),
    ("pad_token_id", 1000),
    ("model_type", ["llava_llama"]),
]
VISION = [
    *((key, value) for key in ("depths", "hidden_sizes") for value in (5, None, {}, ["x"] * 5, [0] * 5, [-1] * 5)),
    *((key, value) for key in ("depths", "hidden_sizes") for value in ([1.5] * 5, [True] * 5)),
    *((key, value) for key in ("layer_scale_init_value", "drop_path_rate", "norm_eps") for value in ("x", None, [1])),
    ("num_stages", "5"),
]


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [("config.json", *pair) for pair in CONFIG] + [("vision_tower/config.json", *pair) for pair in VISION],
)
def test_values_of_a_wrong_type_are_the_file_s_fault(name: str, key: str, value: object, folder: Path):
    edit_json(folder / name, **{key: value})
    with pytest.raises(UserError) as error:
        read_all(folder)
    assert "\n" not in str(error.value)


# Random damage


def damaged(content: bytes, seed: int) -> bytes:
    """Some bytes flipped, and every third time the end cut off. Most flips hit the first kilobyte."""
    chance, changed = random.Random(seed), bytearray(content)
    for _ in range(chance.choice([1, 2, 8])):
        changed[chance.randrange(chance.choice([min(len(changed), 1024), len(changed)]))] ^= 1 << chance.randrange(8)
    return bytes(changed[: chance.randrange(len(changed))] if seed % 3 == 0 else changed)


def survive(read: Callable[[], object]) -> None:
    """Reads, or raises an error that names what is wrong in a line."""
    try:
        read()
    except UserError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("write", [write_safetensors, write_bin])
def test_damaged_weights_are_read_or_refused(write: Callable, parts: Parts, tmp_path: Path):
    folder = parts.write(tmp_path / "checkpoint", write)
    (file,) = (file for file in folder.iterdir() if file.suffix in (".safetensors", ".bin"))
    content = file.read_bytes()
    for seed in range(150):
        file.unlink()  # another inode: the one before may be mapped still
        file.write_bytes(damaged(content, seed))
        checkpoint = Checkpoint.open(folder)
        survive(lambda: check_finite(checkpoint.projector_tensors(), checkpoint.language_tensors()))  # noqa: B023


def test_damaged_configurations_are_read_or_refused(folder: Path):
    for name in ("config.json", "vision_tower/config.json", "vision_tower/preprocessor_config.json"):
        content = (folder / name).read_bytes()
        for seed in range(40):
            (folder / name).write_bytes(damaged(content, seed))
            survive(lambda: image_rule(opened := Checkpoint.open(folder), choose_resolution(None, opened)))
        (folder / name).write_bytes(content)


def test_a_damaged_tokenizer_is_read_or_refused(conformance: Path, tmp_path: Path):
    folder = Path(shutil.copytree(conformance / "checkpoint", tmp_path / "checkpoint"))
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        content = (folder / name).read_bytes()
        for seed in range(60):
            (folder / name).write_bytes(damaged(content, seed))
            survive(lambda: load_tokenizer(folder).encode("Plain text, </s> and <0x41>"))
        (folder / name).write_bytes(content)


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"\xff" * 100, b"not a model", bytes(range(256))])
def test_garbage_is_no_sentencepiece_model(content: bytes, conformance: Path, tmp_path: Path):
    folder = Path(shutil.copytree(conformance / "checkpoint", tmp_path / "checkpoint"))
    (folder / "tokenizer.model").write_bytes(content)
    for read in (load_tokenizer, lambda source: export_tokenizer(source, tmp_path / "out")):
        with pytest.raises(UserError, match=r"tokenizer\.model: (cannot be read|not supported)") as error:
            read(folder)
        assert "\n" not in str(error.value)


def not_utf8(model: ModelProto) -> bytes:
    piece = next(piece for piece in model.pieces if piece.type == piece.NORMAL)
    piece.piece = "~~~~"
    return model.SerializeToString().replace(b"~~~~", b"\xff" * 4)


def without_normal_pieces(model: ModelProto) -> bytes:
    kept = [piece for piece in model.pieces if piece.type != piece.NORMAL]
    del model.pieces[:]
    model.pieces.extend(kept)
    return model.SerializeToString()


def without_an_unknown_piece(model: ModelProto) -> bytes:
    """SentencePiece itself lets it pass."""
    next(piece for piece in model.pieces if piece.type == piece.UNKNOWN).type = model.SentencePiece.CONTROL
    return model.SerializeToString()


def with_charsmap(model: ModelProto) -> bytes:
    model.normalizer_spec.precompiled_charsmap = struct.pack("<II", 1 << 10, 0) + bytes(2048)
    return model.SerializeToString()


@pytest.mark.parametrize("damage", [not_utf8, without_normal_pieces, without_an_unknown_piece, with_charsmap])
@pytest.mark.parametrize("kind", [TrainerSpec.BPE, TrainerSpec.UNIGRAM])
def test_a_sentencepiece_model_that_cannot_be_used(damage: Callable, kind: int, conformance: Path, tmp_path: Path):
    folder = Path(shutil.copytree(conformance / "checkpoint", tmp_path / "checkpoint"))
    model = ModelProto.FromString((folder / "tokenizer.model").read_bytes())
    model.trainer_spec.model_type = kind
    (folder / "tokenizer.model").write_bytes(damage(model))
    with pytest.raises(UserError, match=r"tokenizer\.model: (cannot be|not supported)") as error:
        export_tokenizer(folder, tmp_path / "out")
    assert "\n" not in str(error.value)


def test_float8_weights_are_looked_at(folder: Path):
    """A type that torch computes little in."""
    state = {QUERY: torch.ones(32, 32).to(torch.float8_e4m3fn)}
    state[QUERY][0, 0] = float("nan")
    write_safetensors(state, folder)
    message = refusal(lambda: check_finite(Checkpoint.open(folder).language_tensors()))
    assert f"{QUERY} has 1 NaN and 0 infinite of 1024 values" in message
