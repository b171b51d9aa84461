"""Checkpoints that ours wrote, read by ours and by transformers."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import ConvNextModel, LlamaForCausalLM

from tests.support.checkpoints import (
    GQA,
    HIDDEN,
    TIED,
    WIDTHS,
    Parts,
    State,
    assert_bit_equal,
    edit_json,
    elsewhere,
    rewrite,
    stored,
    write_bin,
    write_json,
    write_old_bin,
    write_safetensors,
    write_sharded_bin,
    write_sharded_safetensors,
)
from train.errors import CheckpointError
from train.model import Checkpoint, build_projector, load_embedding, load_model, save_checkpoint, save_image_encoder
from train.model.checkpoint.tensors import save_tensors


def stored_as(dtype: str) -> Callable[[State, Path], None]:
    def cast(key: str, value: Tensor) -> Tensor:
        if dtype == "mixed":
            return value.to((torch.float32, torch.float16, torch.bfloat16)[len(key) % 3])
        return value.to(getattr(torch, dtype))

    return lambda state, folder: write_safetensors({key: cast(key, value) for key, value in state.items()}, folder)


@pytest.mark.parametrize("tied", [{}, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "mixed"])
def test_load_save_load_is_bit_equal(dtype: str, tied: dict, tmp_path: Path):
    parts = Parts(**tied)
    first = parts.write(tmp_path / "first", stored_as(dtype))
    save_checkpoint(load_model(first), Checkpoint.open(first), tmp_path / "second")
    for place in ("", "vision_tower"):
        assert_bit_equal(stored(tmp_path / "second" / place), stored(first / place))
    assert_bit_equal(dict(load_model(tmp_path / "second").state_dict()), dict(load_model(first).state_dict()))


@pytest.mark.parametrize("write", [write_bin, write_old_bin, write_sharded_bin, write_sharded_safetensors])
def test_every_file_format_is_saved_as_one_file(write: Callable, parts: Parts, tmp_path: Path):
    first = parts.write(tmp_path / "first", write)
    save_checkpoint(load_model(first), Checkpoint.open(first), tmp_path / "second")
    assert_bit_equal(stored(tmp_path / "second"), parts.main_state())
    assert_bit_equal(stored(tmp_path / "second" / "vision_tower"), parts.tower_state())


def test_saving_half_precision_from_half_precision_memory(parts: Parts, tmp_path: Path):
    """Weights that were never converted may still be mapped from the file they came from."""
    for name, write in (("bin", write_bin), ("safetensors", write_safetensors)):
        first = parts.write(tmp_path / name, lambda state, to, write=write: write(half(state), to))
        model = load_model(first, torch.float16)
        save_checkpoint(model, Checkpoint.open(first), tmp_path / f"{name}-saved")
        assert_bit_equal(stored(tmp_path / f"{name}-saved"), half(parts.main_state()))


def half(state: State) -> State:
    return {key: value.half() for key, value in state.items()}


def test_saved_checkpoint_can_change_its_dtype(folder: Path, parts: Parts, tmp_path: Path):
    save_checkpoint(load_model(folder), Checkpoint.open(folder), tmp_path / "saved", torch.bfloat16)
    expected = {key: value.to(torch.bfloat16) for key, value in parts.main_state().items()}
    assert_bit_equal(stored(tmp_path / "saved"), expected)
    assert {value.dtype for value in stored(tmp_path / "saved" / "vision_tower").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_saved_checkpoint_keeps_its_other_files(folder: Path, tmp_path: Path):
    (folder / "tokenizer.model").write_bytes(b"\x0a\x00sentencepiece")
    # transformers refuses to save such a generation_config itself; it must be no obstacle
    write_json(folder / "generation_config.json", {"do_sample": False, "temperature": 0.9, "eos_token_id": 2})
    edit_json(folder / "config.json", image_aspect_ratio="pad", unknown_key=[1, {"a": None}])
    elsewhere(folder, tmp_path / "encoder", str(tmp_path / "encoder"))
    save_checkpoint(load_model(folder), Checkpoint.open(folder), tmp_path / "saved")
    for name in ("tokenizer.model", "generation_config.json"):
        assert (tmp_path / "saved" / name).read_bytes() == (folder / name).read_bytes()
    saved, first = Checkpoint.open(tmp_path / "saved"), Checkpoint.open(folder)
    assert saved.vision_folder == tmp_path / "saved" / "vision_tower"
    assert saved.config == first.config | {"mm_vision_tower": "vision_tower"}
    assert (saved.vision_config, saved.preprocessor) == (first.vision_config, first.preprocessor)


def test_saved_weights_are_what_transformers_reads(tmp_path: Path):
    parts = Parts(**GQA)
    folder = parts.write(tmp_path / "checkpoint")
    save_checkpoint(load_model(folder), Checkpoint.open(folder), tmp_path / "saved")
    tower, report = ConvNextModel.from_pretrained(tmp_path / "saved" / "vision_tower", output_loading_info=True)
    assert set(report["missing_keys"]) == {"layernorm.weight", "layernorm.bias"}  # the pooler's, which has no use
    assert not report["unexpected_keys"]
    state = {key: value for key, value in tower.state_dict().items() if not key.startswith("layernorm.")}
    assert_bit_equal(state, parts.tower_state())
    state = stored(tmp_path / "saved")
    decoder = LlamaForCausalLM(parts.decoder.config)
    decoder.model.mm_projector = build_projector("mlp2x_gelu", WIDTHS[-1], HIDDEN)
    decoder.load_state_dict(state)


def test_saving_replaces_nothing(folder: Path):
    model, checkpoint = load_model(folder), Checkpoint.open(folder)
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match=re.escape(str(folder))):
        save_checkpoint(model, checkpoint, folder)
    assert (folder / "model.safetensors").read_bytes() == before


def test_saved_folder_appears_whole_or_not_at_all(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, checkpoint = load_model(folder), Checkpoint.open(folder)
    target = tmp_path / "saved"

    def full_disk(state: State, file: Path) -> None:
        if file.parent.name == "vision_tower":
            raise OSError("No space left on device")
        save_tensors(state, file)

    with monkeypatch.context() as patch:
        patch.setattr("train.model.checkpoint.save.save_tensors", full_disk)
        with pytest.raises(OSError, match="No space left"):
            save_checkpoint(model, checkpoint, target)
    assert not target.exists()
    save_checkpoint(model, checkpoint, target)  # what the first attempt left is no obstacle
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "saved"]
    assert_bit_equal(dict(load_model(target).state_dict()), dict(model.state_dict()))


def test_a_part_of_the_image_encoder_takes_the_place_of_another(folder: Path, tmp_path: Path):
    like = Checkpoint.open(folder)
    before = load_model(like).state_dict()
    name = "encoder.stages.4.blocks.1.mlp.fc1.weight"
    save_image_encoder({name: before[f"image_encoder.{name}"] + 1}, like, tmp_path / "saved")
    after = load_model(tmp_path / "saved").state_dict()
    assert {key for key in before if not torch.equal(before[key], after[key])} == {f"image_encoder.{name}"}
    assert torch.equal(after[f"image_encoder.{name}"], before[f"image_encoder.{name}"] + 1)
    with pytest.raises(KeyError, match=r"encoder\.stages\.9"):
        save_image_encoder({"encoder.stages.9": torch.zeros(1)}, like, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_the_embedding_is_read_alone(folder: Path, parts: Parts):
    assert torch.equal(load_embedding(Checkpoint.open(folder)), parts.decoder.get_input_embeddings().weight)
    rewrite(folder, lambda state: state.pop("model.embed_tokens.weight"))
    with pytest.raises(CheckpointError, match=r"missing key model\.embed_tokens\.weight"):
        load_embedding(Checkpoint.open(folder))
