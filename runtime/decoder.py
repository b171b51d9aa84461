"""Tokens and image embeds -> logits: the bundle's decoder graph on ONNX Runtime, with its KV cache.

One graph serves prefill and decode. An id of 0 or more is a token; an id of -1 - k stands for row k of
`image_embeds`, so that several images, or part of one, need nothing else.
"""

from pathlib import Path

import numpy as np
import onnxruntime

from runtime.bundle import DecoderPart
from runtime.session import input_dtype, open_session


class KVCache:
    """Keys and values of one sequence: [1, kv_heads, capacity, head_dim] for each layer, in the graph's dtype.

    The graph's `past` and `present` are bound to the same memory, so attention writes the new positions in place and
    nothing is copied from step to step. The memory is asked for once and touched by the system page by page, so an
    unused tail costs address space alone.
    """

    def __init__(self, part: DecoderPart, capacity: int):
        shape = (1, part.kv_heads, capacity, part.head_dim)
        self.capacity = capacity
        self.length = 0  # positions filled
        self.layers = [(np.zeros(shape, part.kv_dtype), np.zeros(shape, part.kv_dtype)) for _ in range(part.layers)]


class Decoder:
    def __init__(self, file: Path, part: DecoderPart, threads: int | None = None):
        self.part = part
        self.session = open_session(file, threads)
        hidden = next(value.shape[1] for value in self.session.get_inputs() if value.name == "image_embeds")
        self.no_images = np.empty((0, hidden), input_dtype(self.session, "image_embeds"))

    def start(self, capacity: int) -> "Sequence":
        """A new sequence with room for `capacity` positions."""
        return Sequence(self, KVCache(self.part, capacity))


class Sequence:
    """One sequence being decoded."""

    def __init__(self, decoder: Decoder, cache: KVCache):
        self.cache = cache
        self._decoder = decoder
        self._mask = np.ones((1, cache.capacity), np.int64)
        self._logits = np.empty((1, 1, decoder.part.vocab_size), decoder.part.kv_dtype)
        self._binding = decoder.session.io_binding()
        for layer, pair in enumerate(cache.layers):
            for name, array in zip(("key", "value"), pair, strict=True):
                value = onnxruntime.OrtValue.ortvalue_from_numpy(array)  # on the CPU: the array's own memory
                self._binding.bind_ortvalue_input(f"past_key_values.{layer}.{name}", value)
                self._binding.bind_ortvalue_output(f"present.{layer}.{name}", value)
        logits = self._logits
        self._binding.bind_output("logits", "cpu", 0, logits.dtype, logits.shape, logits.ctypes.data)

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` positions. Raises ValueError if there are not so many."""
        if not 0 <= length <= self.cache.length:
            raise ValueError(f"cannot go back to {length} positions, the KV cache holds {self.cache.length}")
        self.cache.length = length

    def forward(self, ids: list[int], image_embeds: np.ndarray | None = None) -> np.ndarray:
        """Take `ids` [S] after what the cache holds.

        image_embeds: [N, D], the rows that ids below 0 name.
        Returns logits [V] float32 of the last position; valid until the next call.
        Raises ValueError if S more positions do not fit.
        """
        total = self.cache.length + len(ids)
        if total > self.cache.capacity:
            raise ValueError(f"{total} positions do not fit a KV cache of {self.cache.capacity}")
        none = self._decoder.no_images
        input_ids = np.array([ids], np.int64)
        embeds = none if image_embeds is None else np.ascontiguousarray(image_embeds, none.dtype)
        self._binding.bind_cpu_input("input_ids", input_ids)
        self._binding.bind_cpu_input("attention_mask", self._mask[:, :total])
        self._binding.bind_cpu_input("image_embeds", embeds)
        self._decoder.session.run_with_iobinding(self._binding)
        self.cache.length = total
        return self._logits[0, 0].astype(np.float32, copy=False)
