"""Trained weights of the demo model: packed and put back on the base, here on the small checkpoint."""

import torch

from train.model import Checkpoint, load_model, save_checkpoint
from train.model.demo import pack, unpack


def moved(base):
    """The model with its encoder and projector changed."""
    model = load_model(base)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.image_encoder.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def test_packed_and_unpacked_it_is_the_trained_model_in_float16(conformance, tmp_path):
    base = conformance / "checkpoint"
    model = moved(base)
    with torch.no_grad():
        weight = model.decoder.model.layers[1].mlp.up_proj.weight
        weight += 0.1 * torch.randn(len(weight), 2) @ torch.randn(2, weight.shape[1])
    save_checkpoint(model, Checkpoint.open(base), tmp_path / "trained", torch.float32)

    assert pack(tmp_path / "trained", base, tmp_path / "packed.safetensors") < 1e-3
    unpack(tmp_path / "packed.safetensors", base, tmp_path / "again")
    found, before = load_model(tmp_path / "again").state_dict(), load_model(base).state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=2e-3)
    changed = {name for name in before if name.startswith("decoder.") and not torch.equal(found[name], before[name])}
    assert changed == {"decoder.model.layers.1.mlp.up_proj.weight"}


def test_packed_onto_another_file_it_is_the_model_that_went_on(conformance, tmp_path):
    base = conformance / "checkpoint"
    model = moved(base)
    save_checkpoint(model, Checkpoint.open(base), tmp_path / "first", torch.float32)
    pack(tmp_path / "first", base, tmp_path / "first.safetensors")
    unpack(tmp_path / "first.safetensors", base, tmp_path / "first-again")
    with torch.no_grad():
        model = load_model(tmp_path / "first-again")
        model.image_encoder.projector[0].bias += 0.5
        fifth = model.image_encoder.encoder.stages[4].downsample[1].weight
        fifth += 0.1 * (torch.randn(len(fifth), 2) @ torch.randn(2, fifth[0].numel())).view_as(fifth)
        weight = model.decoder.model.layers[0].self_attn.q_proj.weight
        weight += 0.1 * torch.randn(len(weight), 2) @ torch.randn(2, weight.shape[1])
    save_checkpoint(model, Checkpoint.open(base), tmp_path / "second", torch.float32)

    file = tmp_path / "second.safetensors"
    assert pack(tmp_path / "second", base, file, tmp_path / "first.safetensors") < 1e-3
    assert file.stat().st_size < 0.5 * (tmp_path / "first.safetensors").stat().st_size
    unpack(file, base, tmp_path / "again")
    found, before = (load_model(tmp_path / name).state_dict() for name in ("again", "first-again"))
    for name, value in model.state_dict().items():
        change, error = value - before[name], found[name] - value
        assert error.norm() <= 0.02 * change.norm() + 1e-6 * value.norm(), name
