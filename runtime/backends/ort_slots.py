"""Several sequences decoded together: one run of the graph takes a token of each."""

import numpy as np
from onnxruntime import IOBinding

from runtime.backends.ort_sequence import DecoderGraph, OnnxSequence
from runtime.backends.ort_session import bind_input, bind_output, run_options
from runtime.device.memory import to_numpy
from runtime.generate.kv_cache import KVCache, allocate
from runtime.graph_io import ATTENTION_MASK, IMAGE_EMBEDS, INPUT_IDS, LOGITS, NEXT_TOKEN, PAST, PRESENT


class Slots:
    """Room for several sequences in one KV cache, see `runtime.backends.base.SequenceBatch`.

    Each slot is a sequence of its own, which is prefilled, rewound and stepped alone as any other. `step` advances the
    first so many of them at once, whatever their lengths are; `swap` closes the gap where one among them has ended.
    """

    def __init__(self, graph: DecoderGraph, count: int, capacity: int, min_rows: int = 1):
        """
        Args:
            graph: runs them.
            count: number of slots.
            capacity: positions of each.
            min_rows: decode batches are padded to this many rows, so that results do not depend on the batch size where
                the graph is not batch-invariant.
        """
        device, part = graph.device, graph.part
        self._graph, self._min_rows = graph, min_rows
        rows = max(count, min_rows)
        self._layers = allocate(part.layers, (rows, part.kv_heads, capacity, part.kv_width), part.kv_dtype, device)
        self._slots = [OnnxSequence(graph, self._rows(i, i + 1)) for i in range(count)]
        self._logits = device.zeros((rows, 1, part.vocab_size), graph.logits_dtype)
        self._argmax = device.zeros((rows, 1, 1), np.int64)
        self._bindings: dict[int, IOBinding] = {}  # by how many rows take part
        self._options = run_options(device)

    def __len__(self) -> int:
        return len(self._slots)

    def __getitem__(self, slot: int) -> OnnxSequence:
        return self._slots[slot]

    def step(self, tokens: list[int]) -> list[int | None]:
        """Feed token i to slot i; returns the argmax of each, None where its logit is NaN or Inf (CPU alone).

        A slot that takes no part loses its last position if it is full, since a padding row may be computed there.
        Raises ValueError where there are more tokens than slots, or one of them is full; nothing is fed then.
        """
        count = len(tokens)
        if not 0 < count <= len(self):
            raise ValueError(f"{count} tokens for {len(self)} slots")
        totals = [slot.cache.room_for(1) for slot in self._slots[:count]]
        device, graph = self._graph.device, self._graph
        rows = max(count, self._min_rows)
        binding = self._bindings.get(rows) or self._bind(rows)
        lengths = np.array(totals + [self._padding_length(row) for row in range(count, rows)])
        mask = np.arange(int(lengths.max())) < lengths[:, None]  # a row's sum is its length; the width is the longest
        ids = np.array(tokens + [0] * (rows - count))[:, None]
        # Bound by address: they must live until the run has ended
        bound = {INPUT_IDS: device.take(ids, np.int64), ATTENTION_MASK: device.take(mask, np.int64)}
        for name, array in bound.items():
            bind_input(binding, name, array, device)
        graph.session.run_with_iobinding(binding, self._options)
        for slot, total in zip(self._slots, totals, strict=False):
            slot.cache.length = total
        if graph.has_argmax:
            chosen: list[int] = to_numpy(self._argmax[:count]).ravel().tolist()
        else:
            chosen = self.logits(count).argmax(axis=1).tolist()
        if not isinstance(self._logits, np.ndarray):
            return list(chosen)
        finite = np.isfinite(self._logits[np.arange(count), 0, chosen])
        return [token if good else None for token, good in zip(chosen, finite, strict=True)]

    def _padding_length(self, row: int) -> int:
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
        length = self[source].length if length is None else length
        for array in (array for pair in self._layers for array in pair):
            if isinstance(array, np.ndarray):
                array[target, :, :length] = array[source, :, :length]
            else:
                self._graph.device.copy(array[target : target + 1], array[source : source + 1])
        self[target].cache.length = length

    def swap(self, one: int, other: int) -> None:
        """Each of the two slots becomes what the other was."""
        if one == other:
            return
        lengths = [self[one].length, self[other].length]
        longest = max(lengths)
        for array in (array for pair in self._layers for array in pair):
            if isinstance(array, np.ndarray):
                array[[one, other], :, :longest] = array[[other, one], :, :longest]
            else:
                device, first, second = self._graph.device, array[one : one + 1], array[other : other + 1]
                held = device.zeros(first.shape, first.dtype)
                for target, source in ((held, first), (first, second), (second, held)):
                    device.copy(target, source)
        self[one].cache.length, self[other].cache.length = reversed(lengths)

    def _rows(self, begin: int, end: int) -> KVCache:
        return KVCache([(key[begin:end], value[begin:end]) for key, value in self._layers])

    def _bind(self, count: int) -> IOBinding:
        graph, device, cache = self._graph, self._graph.device, self._rows(0, count)
        binding = self._bindings[count] = graph.session.io_binding()
        for name, array in (cache.tensors(PAST) | {IMAGE_EMBEDS: graph.no_images}).items():
            bind_input(binding, name, array, device)
        outputs = cache.tensors(PRESENT) | {LOGITS: self._logits[:count]}
        if graph.has_argmax:
            outputs[NEXT_TOKEN] = self._argmax[:count]
        for name, array in outputs.items():
            bind_output(binding, name, array, device)
        return binding
