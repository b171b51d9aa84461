"""Attention in bfloat16 by blocks of queries, against PyTorch's in float64."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

from train import attention
from train.attention import attend, quick_attention


def inputs(length: int, heads: int = 4, shared: int = 4, width: int = 16) -> list[torch.Tensor]:
    torch.manual_seed(length)
    return [torch.randn(2, count, length, width, requires_grad=True) for count in (heads, shared, shared)]


def assert_equals_exact(tensors: list[torch.Tensor], found: torch.Tensor, **options) -> None:
    """Value and gradients, against float64's, within what bfloat16 rounds."""
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    wanted = F.scaled_dot_product_attention(*exact, **options)
    weights = torch.randn_like(wanted)
    (found.double() * weights).sum().backward()
    (wanted * weights).sum().backward()
    assert found.shape == wanted.shape and (found - wanted).norm() < 0.01 * wanted.norm()
    for tensor, reference in zip(tensors, exact, strict=True):
        assert (tensor.grad - reference.grad).norm() <= 0.02 * reference.grad.norm() + 1e-6


@pytest.mark.parametrize("shared", [4, 2, 1])
@pytest.mark.parametrize("length", [1, 7, 8, 20])
def test_causal_attention_is_attention(monkeypatch: pytest.MonkeyPatch, length: int, shared: int):
    monkeypatch.setattr(attention, "BLOCK", 8)
    tensors, options = inputs(length, shared=shared), {"is_causal": True, "enable_gqa": shared != 4}
    assert_equals_exact(tensors, attend(*tensors, **options), **options)


def test_attention_with_a_mask_and_a_scale(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention, "BLOCK", 8)
    mask = torch.rand(2, 1, 20, 20, generator=torch.Generator().manual_seed(0)) < 0.5
    mask |= torch.eye(20, dtype=torch.bool)  # a query without any key has no softmax
    for options in ({"attn_mask": mask, "scale": 0.5}, {"attn_mask": mask.double().log().clamp(min=-5)}):
        tensors = inputs(20)
        assert_equals_exact(tensors, attend(*tensors, **options), **options)


def test_it_is_pytorchs_attention_within_autocast_alone():
    tensors = inputs(90)
    plain = F.scaled_dot_product_attention(*tensors, is_causal=True)
    with quick_attention(tensors[0].device):
        assert torch.equal(F.scaled_dot_product_attention(*tensors, is_causal=True), plain)
        with torch.autocast("cpu", torch.bfloat16), quick_attention(tensors[0].device):
            found = F.scaled_dot_product_attention(*tensors, is_causal=True)
    assert found.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(found, attend(*tensors, is_causal=True))
    assert_equals_exact(tensors, found, is_causal=True)


def test_dropout_is_refused_and_left_to_pytorch():
    with pytest.raises(ValueError, match="dropout is not supported"):
        attend(*inputs(4), dropout_p=0.1)
    dropped = []
    with torch.autocast("cpu", torch.bfloat16):
        for wrapped in (nullcontext(), quick_attention(torch.device("cpu"))):
            torch.manual_seed(0)
            with wrapped:
                dropped.append(F.scaled_dot_product_attention(*inputs(90), dropout_p=0.5))
    assert torch.equal(*dropped)
