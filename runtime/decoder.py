"""Tokens and image embeds -> logits: the bundle's decoder graph on ONNX Runtime, with its KV cache.

One graph serves prefill and decode. An id of 0 or more is a token; an id of -1 - k stands for row k of
`image_embeds`, so that several images, or part of one, need nothing else.
"""

from pathlib import Path

import numpy as np

from runtime.bundle import DecoderPart
from runtime.device import Array, Cpu, Device, to_numpy
from runtime.session import bind_input, bind_output, input_dtype, open_session, run_options

NEXT_TOKEN = "next_token"  # the graph's output [1, 1, 1] int64: the likeliest


class KVCache:
    """Keys and values of one sequence: [1, kv_heads, capacity, head_dim] for each layer, in the graph's dtype.

    The graph's `past` and `present` are bound to the same memory, so attention writes the new positions in place and
    nothing is copied from step to step. On the CPU the memory is asked for once and touched by the system page by page,
    so an unused tail costs address space alone.
    """

    def __init__(self, part: DecoderPart, capacity: int, device: Device):
        shape = (1, part.kv_heads, capacity, part.head_dim)
        self.capacity = capacity
        self.length = 0  # positions filled
        self.layers = [tuple(device.zeros(shape, part.kv_dtype) for _ in "kv") for _ in range(part.layers)]

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` positions. Raises ValueError if there are not so many."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot go back to {length} positions, the KV cache holds {self.length}")
        self.length = length

    def room_for(self, count: int) -> int:
        """The length with `count` positions more. Raises ValueError if they do not fit."""
        total = self.length + count
        if total > self.capacity:
            raise ValueError(f"{total} positions do not fit a KV cache of {self.capacity}")
        return total


class Decoder:
    """The fused graph on ONNX Runtime. provider, device: see `runtime.session`."""

    def __init__(
        self,
        file: Path,
        part: DecoderPart,
        threads: int | None = None,
        provider: str = "cpu",
        device: Device | None = None,
    ):
        self.part = part
        self.device = device or Cpu()
        self.session = open_session(file, threads, provider, self.device)
        self.embeds_dtype = np.dtype(input_dtype(self.session, "image_embeds"))
        hidden = next(value.shape[1] for value in self.session.get_inputs() if value.name == "image_embeds")
        self.no_images = self.device.zeros((0, hidden), self.embeds_dtype)

    def start(self, capacity: int) -> "Sequence":
        """A new sequence with room for `capacity` positions."""
        return Sequence(self, KVCache(self.part, capacity, self.device))


class Sequence:
    """One sequence being decoded."""

    def __init__(self, decoder: Decoder, cache: KVCache):
        self.cache = cache
        self._decoder = decoder
        device, part = decoder.device, decoder.part
        self._mask = device.take(np.ones((cache.capacity,)), np.int64)
        self._logits = device.zeros((1, 1, part.vocab_size), part.kv_dtype)
        self._binding = decoder.session.io_binding()
        self._options = run_options(device)
        for layer, pair in enumerate(cache.layers):
            for name, array in zip(("key", "value"), pair, strict=True):
                bind_input(self._binding, f"past_key_values.{layer}.{name}", array, device)
                bind_output(self._binding, f"present.{layer}.{name}", array, device)
        bind_output(self._binding, "logits", self._logits, device)
        self._likeliest = None
        if any(value.name == NEXT_TOKEN for value in decoder.session.get_outputs()):
            self._likeliest = device.zeros((1, 1, 1), np.int64)
            bind_output(self._binding, NEXT_TOKEN, self._likeliest, device)

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` positions. Raises ValueError if there are not so many."""
        self.cache.rewind(length)

    def forward(self, ids: list[int], image_embeds: Array | None = None) -> np.ndarray:
        """Take `ids` [S] after what the cache holds.

        image_embeds: [N, D], the rows that ids below 0 name.
        Returns logits [V] float32 of the last position; valid until the next call.
        Raises ValueError if S more positions do not fit.
        """
        self._run(ids, image_embeds)
        return to_numpy(self._logits)[0, 0].astype(np.float32, copy=False)

    def forward_greedy(self, ids: list[int], image_embeds: Array | None = None) -> int:
        """As `forward`, but returns the likeliest next token, all that leaves the device."""
        self._run(ids, image_embeds)
        if self._likeliest is None:  # a bundle written before the graphs had this output
            return int(to_numpy(self._logits)[0, 0].argmax())
        return int(to_numpy(self._likeliest)[0, 0, 0])

    def _run(self, ids: list[int], image_embeds: Array | None) -> None:
        total = self.cache.room_for(len(ids))
        decoder, device = self._decoder, self._decoder.device
        input_ids = device.take(np.array([ids]), np.int64)
        embeds = decoder.no_images if image_embeds is None else device.take(image_embeds, decoder.embeds_dtype)
        bind_input(self._binding, "input_ids", input_ids, device)
        bind_input(self._binding, "attention_mask", self._mask[:total].reshape((1, total)), device)
        bind_input(self._binding, "image_embeds", embeds, device)
        decoder.session.run_with_iobinding(self._binding, self._options)
        self.cache.length = total
