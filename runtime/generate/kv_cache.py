"""The KV cache of one sequence."""

from typing import Any

from runtime.device.memory import Array, Device
from runtime.graph_io import KINDS, cache_name

Layers = list[tuple[Array, Array]]  # keys and values of each layer, [rows, kv_heads, capacity, head_dim]


def allocate(layers: int, shape: tuple[int, int, int, int], dtype: Any, device: Device) -> Layers:
    """Zeros for so many layers, keys and values of `shape` each. On the CPU pages that are never written take no
    memory, so an unused tail costs address space alone."""
    return [(device.reserve(shape, dtype), device.reserve(shape, dtype)) for _ in range(layers)]


class KVCache:
    """Keys and values of one sequence, [1, kv_heads, capacity, head_dim] in each layer.

    A graph's `past` and `present` are bound to the same memory, so attention writes the new positions in place and
    nothing is copied from step to step.
    """

    def __init__(self, layers: Layers):
        self.layers = layers
        self.capacity = layers[0][0].shape[2]
        self.length = 0  # positions filled

    def tensors(self, side: str) -> dict[str, Array]:
        """The arrays by the names that graphs give them. side: `graph_io.PAST` or `graph_io.PRESENT`."""
        pairs = enumerate(self.layers)
        return {cache_name(side, i, kind): array for i, pair in pairs for kind, array in zip(KINDS, pair, strict=True)}

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` positions. Raises ValueError if there are fewer."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot rewind to {length} positions, the KV cache holds {self.length}")
        self.length = length

    def room_for(self, count: int) -> int:
        """The length with `count` positions more. Raises ValueError if they do not fit."""
        total = self.length + count
        if total > self.capacity:
            raise ValueError(f"{total} positions do not fit a KV cache of {self.capacity}")
        return total
