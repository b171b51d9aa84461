"""What released checkpoints have in place of what the layout says."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from tests.support.checkpoints import (
    QUERY,
    TOWER,
    Parts,
    assert_same_logits,
    edit_json,
    elsewhere,
    refusal,
    rewrite,
    write_bin,
    write_safetensors,
    write_sharded_bin,
    write_sharded_safetensors,
)
from tests.support.commands import run_main
from train.model import Checkpoint, load_image_encoder, load_language_state, save_image_encoder

BOTH = [write_safetensors, write_bin, write_sharded_bin, write_sharded_safetensors]


@pytest.fixture(autouse=True)
def warnings_of_checkpoints(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.WARNING, "convllava")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_shards_with_an_index_keep_their_bits(dtype: torch.dtype, parts: Parts, tmp_path: Path):
    parameters = [item for part in (parts.decoder, parts.tower, parts.projector) for item in part.parameters()]
    for parameter in parameters:
        parameter.data = parameter.data.to(dtype)
    folder = parts.write(tmp_path / "checkpoint", write_sharded_bin)
    state = load_language_state(Checkpoint.open(folder))
    assert torch.equal(state[QUERY], parts.decoder.state_dict()[QUERY])
    assert {tensor.dtype for tensor in state.values()} == {dtype}
    for parameter in parameters:
        parameter.data = parameter.data.float()
    assert_same_logits(folder, parts)


@pytest.mark.parametrize("tower", ["/home/author/convnext", "./author/convnext"])
def test_an_encoder_on_another_machine_is_asked_for(tower: str, folder: Path, tmp_path: Path):
    elsewhere(folder, tmp_path / "moved", tower)
    message = refusal(lambda: Checkpoint.open(folder))
    assert message.startswith(f"{folder / 'config.json'}: mm_vision_tower: {tower}: no such folder")
    assert f"put the encoder into {folder / 'vision_tower'}" in message


@pytest.mark.parametrize(
    ("resolution", "image_size", "side"), [(768, 256, 768), (128, 256, 128), (None, 320, 320), (..., ..., 256)]
)
def test_a_missing_preprocessor_has_the_releases_settings(resolution, image_size, side, folder: Path, caplog):
    file = folder / "vision_tower" / "preprocessor_config.json"
    file.unlink()
    edit_json(folder / "config.json", mm_vision_resolution=resolution)
    edit_json(folder / "vision_tower" / "config.json", image_size=image_size)
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.resolution == side
    assert checkpoint.pixel_statistics == (tuple(OPENAI_CLIP_MEAN), tuple(OPENAI_CLIP_STD))
    (message,) = caplog.messages
    assert message.startswith(f"{file} is missing: taking the release's settings, a side of {side} pixels")
    assert "bicubic" in message


def test_a_missing_preprocessor_is_saved_with_the_model(folder: Path, tmp_path: Path, caplog):
    (folder / "vision_tower" / "preprocessor_config.json").unlink()
    checkpoint = Checkpoint.open(folder)
    save_image_encoder({}, checkpoint, tmp_path / "saved")
    caplog.clear()
    assert Checkpoint.open(tmp_path / "saved").preprocessor == checkpoint.preprocessor
    assert not caplog.messages


@pytest.mark.parametrize("write", BOTH)
def test_encoder_weights_in_two_places_are_told(write: Callable, parts: Parts, tmp_path: Path, caplog):
    """The encoder's own folder counts, as in the original."""

    def write_both(state: dict[str, torch.Tensor], folder: Path) -> None:
        other = {TOWER + key: value + 1 for key, value in parts.tower_state().items()}
        write(state if folder.name == "vision_tower" else state | other, folder)

    folder = parts.write(tmp_path / "checkpoint", write_both)
    checkpoint = Checkpoint.open(folder)
    for _ in range(2):
        load_image_encoder(checkpoint)
    (message,) = caplog.messages
    used, unused = message.removeprefix("encoder weights are stored twice: those of ").split(" are used, those of ")
    assert Path(used).parent == folder / "vision_tower"
    assert Path(unused.split(" ")[0]).parent == folder
    assert_same_logits(folder, parts)


def test_encoder_weights_in_one_place_need_no_word(folder: Path, parts: Parts, caplog):
    load_image_encoder(Checkpoint.open(folder))
    (folder / "vision_tower" / "model.safetensors").unlink()
    rewrite(folder, lambda state: state.update({TOWER + key: value for key, value in parts.tower_state().items()}))
    load_image_encoder(Checkpoint.open(folder))
    assert not caplog.messages


def test_a_tied_head_that_differs_is_refused_by_both_names(tmp_path: Path):
    folder = Parts().write(tmp_path / "checkpoint")
    edit_json(folder / "config.json", tie_word_embeddings=True)
    message = refusal(lambda: load_language_state(Checkpoint.open(folder)))
    assert "lm_head.weight differs from model.embed_tokens.weight" in message
    assert "tie_word_embeddings" in message


def test_the_command_says_a_missing_preprocessor_in_one_line(conformance: Path, tmp_path: Path):
    folder = Path(shutil.copytree(conformance / "checkpoint", tmp_path / "checkpoint"))
    (folder / "vision_tower" / "preprocessor_config.json").unlink()
    done = run_main("export.encoder", "--checkpoint", folder, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "preprocessor_config.json" in line]
    assert "is missing: taking the release's settings" in line
