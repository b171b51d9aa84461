"""Trained weights of the demo model: packed and put back on the base, here on the small checkpoint."""

import torch

from train.model import Checkpoint, load_model, save_checkpoint
from train.model.demo import pack, unpack


def test_packed_and_unpacked_it_is_the_trained_model_in_float16(conformance, tmp_path):
    base = conformance / "checkpoint"
    model = load_model(base)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.image_encoder.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
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
