"""Attention of training on a CPU in bfloat16, as products that oneDNN is fast at."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

BLOCK = 256  # queries that go through the products together


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` in bfloat16, for masks that leave every query some key.

    query: [B, H, N, D]. key, value: [B, K, S, D]. Returns [B, H, N, D], bfloat16. Blocks of queries come one after the
    other; where it is causal, keys behind a block are left out. Raises ValueError for dropout.
    """
    if dropout_p:
        raise ValueError(f"dropout is not supported, found {dropout_p}")
    batch, heads, length, width = query.shape
    shared = key.shape[1]
    scale = width**-0.5 if scale is None else scale
    # The heads of a key behind one another, [B, K, H / K, N, D]
    queries = (query * scale).bfloat16().reshape(batch, shared, heads // shared, length, width)
    keys, values = key.bfloat16().transpose(2, 3), value.bfloat16()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros(attn_mask.shape).masked_fill_(~attn_mask, -torch.inf)
    blocks = []
    for begin in range(0, length, BLOCK):
        end = min(begin + BLOCK, length)
        seen = end if is_causal else keys.shape[3]
        block = queries[:, :, :, begin:end].flatten(2, 3)
        scores = (block @ keys[..., :seen]).unflatten(2, (-1, end - begin))  # [B, K, H / K, n, S']
        if is_causal:
            scores[..., begin:] += torch.full((end - begin, end - begin), -torch.inf, dtype=scores.dtype).triu_(1)
        if attn_mask is not None:
            scores += attn_mask[..., begin:end, :].unsqueeze(2)
        blocks.append((scores.softmax(-1).flatten(2, 3) @ values[:, :, :seen]).unflatten(2, (-1, end - begin)))
    return torch.cat(blocks, 3).flatten(1, 2)


@contextmanager
def quick_attention(device: torch.device) -> Iterator[None]:
    """Under a CPU's autocast to bfloat16, SDPA is `attend`: at 832 positions of 9 heads of 64, forward and backward,
    45 % of the time of PyTorch's fused kernel."""
    if device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        yield
        return
    with _Quick():
        yield


class _Quick(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not F.scaled_dot_product_attention or (kwargs or {}).get("dropout_p"):
            return function(*args, **(kwargs or {}))
        with torch.autocast("cpu", enabled=False):
            return attend(*args, **(kwargs or {}))
