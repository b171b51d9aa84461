"""The demo model's shipped weights: packed from a checkpoint and put back on the base, here on the small checkpoint."""

import json

import pytest
import torch

from train.model import Checkpoint, demo, load_model, save_checkpoint


@pytest.fixture
def base(conformance, tmp_path, monkeypatch):
    """The conformance checkpoint stands in for SmolLM2 and the untrained encoder."""
    monkeypatch.setattr(demo, "untrained_checkpoint", lambda _: conformance / "checkpoint")
    monkeypatch.setattr(demo, "WEIGHTS", tmp_path / "weights.safetensors")
    return conformance / "checkpoint"


@pytest.fixture
def trained(base, tmp_path):
    """The base with another encoder and projector, and a change of rank 2 in one of the decoder's layers."""
    model = load_model(base)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.image_encoder.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        weight = model.decoder.model.layers[1].mlp.up_proj.weight
        weight += 0.1 * torch.randn(len(weight), 2) @ torch.randn(2, weight.shape[1])
    save_checkpoint(model, Checkpoint.open(base), tmp_path / "trained", torch.float32)
    return tmp_path / "trained"


def test_packed_and_put_back_it_is_the_trained_model_in_float16(base, trained, tmp_path):
    assert demo.pack(trained, tmp_path, demo.WEIGHTS) < 1e-3
    found, wanted, before = (
        load_model(folder).state_dict() for folder in (demo.demo_checkpoint(tmp_path), trained, base)
    )
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=2e-3)
    changed = {name for name in before if name.startswith("decoder.") and not torch.equal(found[name], before[name])}
    assert changed == {"decoder.model.layers.1.mlp.up_proj.weight"}


def test_the_checkpoint_is_made_once_and_again_from_other_weights(base, trained, tmp_path):
    demo.pack(trained, tmp_path, demo.WEIGHTS)
    folder = demo.demo_checkpoint(tmp_path)
    first = (folder / "config.json").stat().st_mtime_ns
    assert demo.demo_checkpoint(tmp_path) == folder
    assert (folder / "config.json").stat().st_mtime_ns == first
    digest = json.loads((folder / "config.json").read_text())[demo.MARK]
    demo.pack(base, tmp_path, demo.WEIGHTS)
    again = load_model(demo.demo_checkpoint(tmp_path)).state_dict()
    assert json.loads((folder / "config.json").read_text())[demo.MARK] != digest
    for name, value in load_model(base).state_dict().items():
        torch.testing.assert_close(again[name], value, rtol=1e-3, atol=1e-3)
