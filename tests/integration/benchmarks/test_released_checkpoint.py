"""The generator of random checkpoints, at a size of kilobytes."""

import dataclasses
import zlib
from pathlib import Path

import pytest
import torch

from benchmarks.released import __main__ as command
from benchmarks.released import checkpoint as released
from benchmarks.released.checkpoint import Shape, llama_config, main_shapes, split, tower_shapes, write_checkpoint
from train.errors import CheckpointError
from train.model import Checkpoint, EncoderConfig, load_model

TINY = Shape(
    layers=2,
    kv_heads=2,
    hidden=64,
    heads=4,
    intermediate=96,
    vocabulary=600,
    encoder=EncoderConfig((1, 1, 2, 1, 1), (8, 16, 24, 32, 48), layer_scale=0.5),
    resolution=128,
    shard_bytes=100_000,
)


@pytest.fixture(autouse=True)
def small_table(monkeypatch):
    monkeypatch.setattr(released, "TABLE", 65_537)


@pytest.mark.parametrize("as_bin", [False, True])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_the_model_loads_and_stays_finite_in_float16(tmp_path, as_bin, kv_heads):
    folder = tmp_path / "checkpoint"
    write_checkpoint(folder, dataclasses.replace(TINY, kv_heads=kv_heads), as_bin)
    assert len(list(folder.glob("*.bin" if as_bin else "*.safetensors"))) > 2
    assert not [file for file in folder.rglob("*") if "mapped" in file.name]
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.resolution == 128
    model = load_model(folder, torch.float16)
    assert model.decoder.config.num_key_value_heads == kv_heads
    layers = [layer.mlp.up_proj.weight for layer in model.decoder.model.layers]
    assert not torch.equal(*layers)
    with torch.inference_mode():
        (logits,) = model.float()(torch.tensor([1, 5, -200, 9]), [torch.randn(3, 128, 128)])
    assert logits.isfinite().all()
    assert logits.std() > 0.01


def test_both_formats_hold_the_same_bits(tmp_path):
    write_checkpoint(tmp_path / "safetensors", TINY)
    write_checkpoint(tmp_path / "bin", TINY, as_bin=True)
    one, other = (load_model(tmp_path / name, torch.float16).state_dict() for name in ("safetensors", "bin"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_the_same_shape_gives_the_same_bytes(tmp_path):
    write_checkpoint(tmp_path / "one", TINY)
    write_checkpoint(tmp_path / "two", TINY)
    files = [file.relative_to(tmp_path / "one") for file in (tmp_path / "one").rglob("*") if file.is_file()]
    assert len(files) > 8
    assert all((tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes() for file in files)


def test_an_existing_folder_stays_as_it_is(tmp_path):
    with pytest.raises(CheckpointError, match="exists"):
        write_checkpoint(tmp_path, TINY)


def test_shards_keep_the_order_and_the_limit():
    assert split({"a": 3, "b": 3, "c": 9, "d": 1, "e": 7}, 8) == [["a", "b"], ["c"], ["d", "e"]]


def test_the_full_size_is_that_of_the_release(monkeypatch):
    """13.5 GB in float16 (Vicuna-7B has 6,738,415,616 parameters), every tensor at an offset of its own."""
    monkeypatch.undo()
    shape = Shape()
    sizes = main_shapes(llama_config(shape), shape.encoder)
    language = sum(torch.Size(size).numel() for key, size in sizes.items() if "mm_projector" not in key)
    assert language == 6_738_415_616
    keys = [*sizes, *tower_shapes(shape.encoder)]
    assert len({zlib.crc32(key.encode()) % released.TABLE for key in keys}) == len(keys)


def test_the_command_passes_its_options(monkeypatch, capsys):
    given = []
    monkeypatch.setattr(command, "write_checkpoint", lambda *arguments: given.append(arguments))
    assert command.main(["checkpoint", "--layers", "4", "--kv-heads", "8", "--bin", "--out", "here"]) == 0
    assert given == [(Path("here"), Shape(layers=4, kv_heads=8), True)]
    assert capsys.readouterr().out == "here\n"


def test_layers_add_little_to_what_they_are_given(tmp_path):
    """Else rounding errors of 4 bits grow from layer to layer, until after 32 of them nothing of the logits is left."""
    folder = tmp_path / "checkpoint"
    write_checkpoint(folder, TINY)
    state = load_model(folder, torch.float32).decoder.state_dict()
    assert 0.9 < state["model.embed_tokens.weight"].std() < 1.1
    for name, deviation in (("self_attn.o_proj", 0.0025), ("mlp.down_proj", 0.0025), ("mlp.up_proj", 0.02)):
        assert 0.9 < state[f"model.layers.1.{name}.weight"].std() / deviation < 1.1
