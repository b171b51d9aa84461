"""The projectors against their formulas, under the released checkpoints' parameter names."""

import math

import pytest
import torch

from train.model import build_projector


@torch.inference_mode()
def test_linear_is_one_matrix_and_a_bias():
    projector = build_projector("linear", 6, 10)
    assert set(projector.state_dict()) == {"weight", "bias"}
    features = torch.randn(2, 5, 6)
    torch.testing.assert_close(projector(features), features @ projector.weight.T + projector.bias)


@torch.inference_mode()
@pytest.mark.parametrize("layers", [1, 2, 3, 12])
def test_mlp_is_linears_with_the_exact_gelu_between(layers: int):
    torch.manual_seed(0)
    projector = build_projector(f"mlp{layers}x_gelu", 6, 10)
    weights = projector.state_dict()
    assert set(weights) == {f"{2 * i}.{kind}" for i in range(layers) for kind in ("weight", "bias")}
    assert weights["0.weight"].shape == (10, 6)
    features = torch.randn(2, 5, 6)
    expected = features
    for i in range(layers):
        if i:
            expected = 0.5 * expected * (1 + torch.erf(expected / math.sqrt(2)))
        expected = expected @ weights[f"{2 * i}.weight"].T + weights[f"{2 * i}.bias"]
    torch.testing.assert_close(projector(features), expected)


def test_identity_changes_nothing():
    features = torch.randn(2, 5, 6)
    projector = build_projector("identity", 6, 6)
    assert not projector.state_dict()
    torch.testing.assert_close(projector(features), features, rtol=0, atol=0)
    with pytest.raises(ValueError, match="'identity' cannot turn 6 features into 10"):
        build_projector("identity", 6, 10)


@pytest.mark.parametrize("kind", ["mlp0x_gelu", "mlpx_gelu", "mlp2x_gelu_", "mlp2x_relu", "resampler", ""])
def test_unknown_kinds_are_refused(kind: str):
    with pytest.raises(ValueError, match=f"unknown projector {kind!r}, expected linear, mlpNx_gelu or identity"):
        build_projector(kind, 6, 10)
