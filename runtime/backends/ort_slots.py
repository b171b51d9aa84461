"""Several sequences decoded together: one run of the graph takes a token of each."""

from collections.abc import Iterator

import numpy as np

from runtime.backends.ort_decoder import Decoder, OnnxSequence
from runtime.backends.ort_session import bind_input, bind_output, run_options
from runtime.device.memory import to_numpy
from runtime.generate.kv_cache import KVCache, allocate
from runtime.graph_io import NEXT_TOKEN


class Slots:
    """Room for `count` sequences of at most `capacity` positions each, in one KV cache.

    Each slot is a sequence of its own, which is prefilled, rewound and stepped alone as any other. `step` advances the
    first so many of them at once, whatever their lengths are; `swap` closes the gap where one among them has ended.

    least: rows that a step computes, the last of them for nothing where fewer take part. On CPUs ONNX Runtime
    multiplies weights of 4 and 8 bits by one kernel for a single row and by another for several, whose sums differ in
    the last bits: with 2 what a sequence gets does not depend on how many others there are.
    """

    def __init__(self, decoder: Decoder, count: int, capacity: int, least: int = 1):
        device, part = decoder.device, decoder.part
        self._decoder, self._least = decoder, least
        rows = max(count, least)
        self._layers = allocate(
            part.layers, (rows, part.kv_heads, capacity, part.head_dim), part.kv_dtype, decoder.device
        )
        self._slots = [OnnxSequence(decoder, self._rows(i, i + 1)) for i in range(count)]
        self._logits = device.zeros((rows, 1, part.vocab_size), part.kv_dtype)
        self._likeliest = device.zeros((rows, 1, 1), np.int64)
        self._bindings = {}  # by how many slots take part
        self._options = run_options(device)

    def __len__(self) -> int:
        return len(self._slots)

    def __getitem__(self, index: int) -> OnnxSequence:
        return self._slots[index]

    def __iter__(self) -> Iterator[OnnxSequence]:
        return iter(self._slots)

    def step(self, tokens: list[int]) -> list[int | None]:
        """Feed token i to slot i; returns the likeliest next token of each, None where its logit is no number (which is
        seen on the CPU alone).

        A slot that takes no part loses its last position if it is full, since a row of nothing may be computed there.
        Raises ValueError where there are more tokens than slots, or one of them is full; nothing is fed then.
        """
        count = len(tokens)
        if not 0 < count <= len(self):
            raise ValueError(f"{count} tokens for {len(self)} slots")
        taking = self._slots[:count]
        totals = [slot.cache.room_for(1) for slot in taking]
        device, decoder = self._decoder.device, self._decoder
        rows = max(count, self._least)
        binding = self._bindings.get(rows) or self._bind(rows)
        lengths = np.array(totals + [self._spare(row) for row in range(count, rows)])
        mask = np.arange(lengths.max()) < lengths[:, None]  # a row's sum is its length; the width is the longest
        ids = np.array(tokens + [0] * (rows - count))[:, None]
        ids, mask = device.take(ids, np.int64), device.take(mask, np.int64)
        bind_input(binding, "input_ids", ids, device)
        bind_input(binding, "attention_mask", mask, device)
        decoder.session.run_with_iobinding(binding, self._options)
        for slot, total in zip(taking, totals, strict=True):
            slot.cache.length = total
        if decoder.tells_likeliest:
            likeliest = to_numpy(self._likeliest[:count]).ravel()
        else:
            likeliest = self.logits(count).argmax(axis=1)
        if not isinstance(self._logits, np.ndarray):
            return likeliest.tolist()
        known = np.isfinite(self._logits[np.arange(count), 0, likeliest])
        return [token if number else None for token, number in zip(likeliest.tolist(), known, strict=True)]

    def _spare(self, row: int) -> int:
        """The length of a row whose last position is free to be written to."""
        if row >= len(self):
            return 1
        cache = self[row].cache
        cache.rewind(min(cache.length, cache.capacity - 1))
        return cache.length + 1

    def logits(self, count: int) -> np.ndarray:
        """[count, V] float32 of the first `count` slots in the last `step`; valid until the next."""
        return to_numpy(self._logits[:count])[:, 0].astype(np.float32, copy=False)

    def copy(self, source: int, target: int, length: int | None = None) -> None:
        """Slot `target` becomes the first `length` positions of slot `source`; None: all there are."""
        length = self[source].cache.length if length is None else length
        for array in (array for pair in self._layers for array in pair):
            if isinstance(array, np.ndarray):
                array[target, :, :length] = array[source, :, :length]
            else:
                self._decoder.device.copy(array[target : target + 1], array[source : source + 1])
        self[target].cache.length = length

    def swap(self, one: int, other: int) -> None:
        """Each of the two slots becomes what the other was."""
        if one == other:
            return
        lengths = [self[one].cache.length, self[other].cache.length]
        most = max(lengths)
        for array in (array for pair in self._layers for array in pair):
            if isinstance(array, np.ndarray):
                array[[one, other], :, :most] = array[[other, one], :, :most]
            else:
                device, first, second = self._decoder.device, array[one : one + 1], array[other : other + 1]
                held = device.zeros(first.shape, first.dtype)
                for target, source in ((held, first), (first, second), (second, held)):
                    device.copy(target, source)
        self[one].cache.length, self[other].cache.length = reversed(lengths)

    def _rows(self, begin: int, end: int) -> KVCache:
        return KVCache([(key[begin:end], value[begin:end]) for key, value in self._layers])

    def _bind(self, count: int):
        decoder, device, cache = self._decoder, self._decoder.device, self._rows(0, count)
        binding = self._bindings[count] = decoder.session.io_binding()
        for name, array in (cache.tensors("past_key_values") | {"image_embeds": decoder.no_images}).items():
            bind_input(binding, name, array, device)
        outputs = cache.tensors("present") | {"logits": self._logits[:count]}
        if decoder.tells_likeliest:
            outputs[NEXT_TOKEN] = self._likeliest[:count]
        for name, array in outputs.items():
            bind_output(binding, name, array, device)
        return binding
