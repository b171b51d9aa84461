"""The portable decoder graph on ONNX Runtime's CPU provider."""

from pathlib import Path

import numpy as np

from runtime.backends.graph_sequence import GraphSequence
from runtime.backends.ort_session import bind_input, bind_output, float_dtype, open_session
from runtime.device.memory import Array, Cpu
from runtime.generate.kv_cache import KVCache, allocate
from runtime.graph_io import IMAGE_EMBEDS, INPUT_IDS, LOGITS, NEXT_TOKEN, PAST, PRESENT, WRITE_INDICES, cache_name


class PortableSequence(GraphSequence):
    """The portable graph on ONNX Runtime's CPU provider, its `past` and `present` bound to the same memory."""

    def __init__(self, file: Path):
        self._session = open_session(file, None)
        shapes = {value.name: value.shape for value in (*self._session.get_inputs(), *self._session.get_outputs())}
        self._dtype, self._device = np.dtype(float_dtype(self._session, IMAGE_EMBEDS)), Cpu()
        layers = sum(name.startswith(PAST) for name in shapes) // 2
        shape = (1, *shapes[cache_name(PAST, 0, "key")][1:])
        cache = KVCache(allocate(layers, shape, self._dtype, self._device))
        logits = self._device.zeros((1, 1, shapes[LOGITS][2]), self._dtype)
        argmax = self._device.zeros((1, 1, 1), np.int64)
        super().__init__(cache, logits, argmax)
        self._no_images = np.empty((0, shapes[IMAGE_EMBEDS][1]), self._dtype)
        self._binding = self._session.io_binding()
        for name, array in cache.tensors(PAST).items():
            bind_input(self._binding, name, array, self._device)
        for name, array in (cache.tensors(PRESENT) | {LOGITS: logits, NEXT_TOKEN: argmax}).items():
            bind_output(self._binding, name, array, self._device)

    def restart(self) -> "PortableSequence":
        """Forget everything; returns itself."""
        self.rewind(0)
        return self

    def _run(self, token_ids: list[int], image_embeddings: Array | None) -> None:
        total = self.cache.room_for(len(token_ids))
        inputs = {
            INPUT_IDS: np.array([token_ids], np.int64),
            WRITE_INDICES: np.array([self.cache.length], np.int64),
            IMAGE_EMBEDS: self._no_images
            if image_embeddings is None
            else self._device.take(image_embeddings, self._dtype),
        }
        for name, array in inputs.items():
            bind_input(self._binding, name, array, self._device)
        self._session.run_with_iobinding(self._binding)
        self.cache.length = total
