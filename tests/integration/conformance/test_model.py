"""The PyTorch model against what the original implementation computed from the same checkpoint."""

from pathlib import Path

import numpy as np
import pytest
import torch

from train.model import Checkpoint, ConvLLaVA, load_image_encoder, load_model, save_checkpoint

CASES = [0, 1, 2]
EOS = {2}


@pytest.fixture(scope="module", params=["as released", "saved again"])
def model(request: pytest.FixtureRequest, conformance: Path, tmp_path_factory: pytest.TempPathFactory) -> ConvLLaVA:
    source = conformance / "checkpoint"
    if request.param == "saved again":
        saved = tmp_path_factory.mktemp("saved") / "checkpoint"
        save_checkpoint(load_model(source), Checkpoint.open(source), saved)
        source = saved
    return load_model(source)


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, conformance: Path) -> dict[str, torch.Tensor]:
    with np.load(conformance / f"case{request.param}.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays}


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """1e-4 relative: norm of the difference over norm of the reference."""
    assert found.shape == expected.shape
    assert (found - expected).norm() <= 1e-4 * expected.norm()


def test_every_case_is_here(conformance: Path, reference: dict):
    assert sorted(path.name for path in conformance.glob("case*.npz")) == [f"case{i}.npz" for i in CASES]
    assert len(reference["cases"]) == len(CASES)


@torch.inference_mode()
def test_encoder_features(model: ConvLLaVA, case: dict):
    assert_close(model.image_encoder.encoder(case["pixel_values"][None])[0], case["encoder_features"])


@torch.inference_mode()
def test_image_embeds(model: ConvLLaVA, case: dict):
    assert_close(model.image_encoder(case["pixel_values"][None])[0], case["image_embeds"])


@torch.inference_mode()
def test_last_logits(model: ConvLLaVA, case: dict):
    (logits,) = model(case["input_ids"], [case["pixel_values"]])
    assert_close(logits[-1], case["last_logits"])


def test_generated_ids(model: ConvLLaVA, case: dict, reference: dict):
    ids = model.generate(case["input_ids"], [case["pixel_values"]], reference["max_new_tokens"], EOS)
    assert ids == case["generated_ids"].tolist()


def test_train_loss(model: ConvLLaVA, case: dict):
    _, loss = model(case["train_input_ids"], [case["pixel_values"]], case["train_labels"])
    assert_close(loss, case["train_loss"])
    loss.backward()  # the loss is for training: it must reach the first parameter
    stem = model.image_encoder.encoder.stem[0].weight
    assert stem.grad.abs().sum() > 0
    model.zero_grad()


def test_load_save_load_is_bit_equal(conformance: Path, tmp_path: Path):
    source = conformance / "checkpoint"
    save_checkpoint(load_model(source), Checkpoint.open(source), tmp_path / "saved")
    first, second = load_model(source).state_dict(), load_model(tmp_path / "saved").state_dict()
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value.view(torch.uint8), second[key].view(torch.uint8)), key
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        assert (tmp_path / "saved" / name).read_bytes() == (source / name).read_bytes()
    assert Checkpoint.open(tmp_path / "saved").config == Checkpoint.open(source).config


def test_image_encoder_alone_is_the_models(model: ConvLLaVA, conformance: Path):
    alone = load_image_encoder(Checkpoint.open(conformance / "checkpoint")).state_dict()
    whole = model.image_encoder.state_dict()
    assert alone.keys() == whole.keys()
    assert all(torch.equal(alone[key], whole[key]) for key in alone)


def test_images_and_placeholders_must_match(model: ConvLLaVA, conformance: Path):
    ids = torch.tensor([1, -200, 5])
    with pytest.raises(ValueError, match="1 image placeholders in input_ids, but 2 images"):
        model(ids, [torch.zeros(3, 64, 64)] * 2)
