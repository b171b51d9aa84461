"""Tokens and image embeds -> logits: the bundle's decoder graph on ONNX Runtime, with its KV cache.

One graph serves prefill and decode. An id of 0 or more is a token; an id of -1 - k stands for row k of
`image_embeds`, so that several images, or part of one, need nothing else.
"""

from pathlib import Path

import numpy as np
from onnxruntime import InferenceSession, IOBinding

from runtime.backends.base import Sequence
from runtime.backends.ort_session import bind_input, bind_output, input_dtype, open_session, run_options
from runtime.bundle.manifest import DecoderPart
from runtime.device.memory import Array, Cpu, Device
from runtime.generate.kv_cache import KVCache, allocate
from runtime.graph_io import NEXT_TOKEN

# ids, from which on float32 products repay unpacking the weights where a processor has no instruction for bytes (AVX2,
# two cores: 0.6 s either way in 4 bits, 1.0 against 0.75 s in 8)
LEAST_PREFILL = 128


class Decoder:
    """The fused graph on ONNX Runtime. provider, device, operators, activation_bits: see
    `runtime.backends.ort_session`. prefill: a graph that is equal but for what it costs, for LEAST_PREFILL ids and
    more. cuda_graph: runs may be recorded.

    row_invariant: what a sequence gets does not depend on how many are computed with it, to the bit. On CPUs ONNX
    Runtime multiplies weights of 4 and 8 bits by one kernel for a single row and by another for several."""

    def __init__(
        self,
        file: Path,
        part: DecoderPart,
        threads: int | None = None,
        provider: str = "cpu",
        device: Device | None = None,
        prefill: Path | None = None,
        operators: Path | None = None,
        activation_bits: int = 8,
        cuda_graph: bool = False,
    ):
        self.part = part
        self.device = device or Cpu()
        self.kernels, self.activation_bits = operators is not None, activation_bits
        self.row_invariant = self.kernels or part.precision not in ("int4", "int8", "w4a16")
        self.session = open_session(file, threads, provider, self.device, operators, activation_bits, cuda_graph)
        self.prefill_session = prefill and open_session(prefill, threads, provider, self.device)
        self.embeds_dtype = np.dtype(input_dtype(self.session, "image_embeds"))
        hidden = next(value.shape[1] for value in self.session.get_inputs() if value.name == "image_embeds")
        self.no_images = self.device.zeros((0, hidden), self.embeds_dtype)
        # graphs of bundles from before there was this output leave it to the logits
        self.tells_likeliest = any(value.name == NEXT_TOKEN for value in self.session.get_outputs())

    @property
    def capacity(self) -> int:
        """Positions of the longest sequence."""
        return self.part.context_length

    def start(self, capacity: int) -> "Sequence":
        """A new sequence with room for `capacity` positions."""
        part = self.part
        shape = (1, part.kv_heads, capacity, part.head_dim)
        return OnnxSequence(self, KVCache(allocate(part.layers, shape, part.kv_dtype, self.device)))


class OnnxSequence(Sequence):
    """One sequence on ONNX Runtime. logits, likeliest: where to write them, see `Sequence`; None: arrays of its own."""

    def __init__(self, decoder: Decoder, cache: KVCache, logits: Array | None = None, likeliest: Array | None = None):
        device, part = decoder.device, decoder.part
        if logits is None:
            logits = device.zeros((1, 1, part.vocab_size), part.kv_dtype)
        if likeliest is None and decoder.tells_likeliest:
            likeliest = device.zeros((1, 1, 1), np.int64)
        super().__init__(cache, logits, likeliest)
        self._decoder = decoder
        self._mask = device.take(np.ones((cache.capacity,)), np.int64)
        self._options = run_options(device)
        self._step = self._bind(decoder.session)
        self._prefill = decoder.prefill_session and self._bind(decoder.prefill_session)

    def _bind(self, session: InferenceSession) -> tuple[InferenceSession, IOBinding]:
        """A session with what stays the same from call to call bound to it."""
        binding, device, cache = session.io_binding(), self._decoder.device, self.cache
        for name, array in cache.tensors("past_key_values").items():
            bind_input(binding, name, array, device)
        outputs = {**cache.tensors("present"), "logits": self._logits}
        if self._likeliest is not None:
            outputs[NEXT_TOKEN] = self._likeliest
        for name, array in outputs.items():
            bind_output(binding, name, array, device)
        return session, binding

    def _run(self, ids: list[int], image_embeds: Array | None) -> None:
        total = self.cache.room_for(len(ids))
        decoder, device = self._decoder, self._decoder.device
        session, binding = self._prefill if self._prefill and len(ids) >= LEAST_PREFILL else self._step
        input_ids = device.take(np.array([ids]), np.int64)
        embeds = decoder.no_images if image_embeds is None else device.take(image_embeds, decoder.embeds_dtype)
        bind_input(binding, "input_ids", input_ids, device)
        bind_input(binding, "attention_mask", self._mask[:total].reshape((1, total)), device)
        bind_input(binding, "image_embeds", embeds, device)
        session.run_with_iobinding(binding, self._options)
        self.cache.length = total
