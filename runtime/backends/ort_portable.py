"""The portable decoder graph on ONNX Runtime's CPU provider."""

from pathlib import Path

import numpy as np

from runtime.backends.base import Sequence
from runtime.backends.ort_session import bind_input, bind_output, input_dtype, open_session
from runtime.device.memory import Cpu
from runtime.generate.kv_cache import KVCache, allocate
from runtime.graph_io import NEXT_TOKEN


class PortableSequence(Sequence):
    """The portable graph on ONNX Runtime's CPU provider, its `past` and `present` bound to the same memory."""

    def __init__(self, file: Path):
        self._session = open_session(file, None)
        shapes = {value.name: value.shape for value in (*self._session.get_inputs(), *self._session.get_outputs())}
        self._dtype, self._device = np.dtype(input_dtype(self._session, "image_embeds")), Cpu()
        layers = sum(name.startswith("past_key_values") for name in shapes) // 2
        shape = (1, *shapes["past_key_values.0.key"][1:])
        cache = KVCache(allocate(layers, shape, self._dtype, self._device))
        logits = self._device.zeros((1, 1, shapes["logits"][2]), self._dtype)
        super().__init__(cache, logits, self._device.zeros((1, 1, 1), np.int64))
        self._no_images = np.empty((0, shapes["image_embeds"][1]), self._dtype)
        self._binding = self._session.io_binding()
        for name, array in cache.tensors("past_key_values").items():
            bind_input(self._binding, name, array, self._device)
        for name, array in (cache.tensors("present") | {"logits": logits, NEXT_TOKEN: self._likeliest}).items():
            bind_output(self._binding, name, array, self._device)

    def restart(self) -> "PortableSequence":
        """Forget everything; returns itself."""
        self.rewind(0)
        return self

    def _run(self, ids: list[int], image_embeds: np.ndarray | None) -> None:
        total = self.cache.room_for(len(ids))
        inputs = {
            "input_ids": np.array([ids], np.int64),
            "write_indices": np.array([self.cache.length], np.int64),
            "image_embeds": self._no_images if image_embeds is None else self._device.take(image_embeds, self._dtype),
        }
        for name, array in inputs.items():
            bind_input(self._binding, name, array, self._device)
        self._session.run_with_iobinding(self._binding)
        self.cache.length = total
