"""The bundle's decoder graph on ONNX Runtime, and one sequence that it runs.

One graph serves prefill and decode: several images, or part of one, need nothing else (`runtime.graph_io`).
"""

from pathlib import Path

import numpy as np
from onnxruntime import InferenceSession, IOBinding

from runtime import kernels
from runtime.backends.graph_sequence import GraphSequence
from runtime.backends.ort_session import (
    FLOATS,
    INT64,
    Contract,
    bind_input,
    bind_output,
    check_graph,
    float_dtype,
    open_session,
    run_options,
)
from runtime.bundle.manifest import DecoderPart
from runtime.device.memory import Array, Cpu, Device
from runtime.generate.kv_cache import KVCache
from runtime.graph_io import (
    ATTENTION_MASK,
    IMAGE_EMBEDS,
    INPUT_IDS,
    KINDS,
    LOGITS,
    NEXT_TOKEN,
    PAST,
    PRESENT,
    cache_name,
)

# Shortest prompt (tokens) for which dequantizing to float32 matmuls beats INT8 dot products on processors without VNNI
# (AVX2, two cores: 0.6 s either way in 4 bits, 0.75 against 1.0 s in 8)
MIN_DEQUANTIZED_PREFILL = 128


class DecoderGraph:
    """A fused graph in ONNX Runtime.

    Attributes:
        part: what the manifest says of it.
        device: where its arrays lie.
        kernels: whether its matmuls are `runtime.kernels`.
        batch_invariant: whether a row's results do not depend on how many rows are computed with it, to the bit. On
            CPUs ONNX Runtime multiplies weights of 4 and 8 bits by one kernel for a single row and another for several.
    """

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
        """
        Args:
            file: the graph.
            part: what the manifest says of it.
            threads, provider, device, operators, activation_bits, cuda_graph: see `open_session`.
            prefill: the same graph with float32 matmuls, for prompts of `MIN_DEQUANTIZED_PREFILL` tokens and more.

        Raises:
            UserError: as `open_session`.
        """
        self.part = part
        self.device: Device = device or Cpu()
        self.kernels, self.activation_bits = operators is not None, activation_bits
        self.batch_invariant = self.kernels or part.precision not in ("int4", "int8", "w4a16")
        attention = kernels.library() if part.kv_dtype == "int8" else None
        self.session = open_session(
            file, threads, provider, self.device, operators or attention, activation_bits, cuda_graph
        )
        self.prefill_session = open_session(prefill, threads, provider, self.device, attention) if prefill else None
        check_graph(self.session, file, *_contract(part))
        if prefill and self.prefill_session:
            check_graph(self.prefill_session, prefill, *_contract(part))
        self.embeds_dtype = np.dtype(float_dtype(self.session, IMAGE_EMBEDS))
        hidden = next(value.shape[1] for value in self.session.get_inputs() if value.name == IMAGE_EMBEDS)
        self.no_images = self.device.zeros((0, hidden), self.embeds_dtype)
        self.logits_dtype = np.dtype(float_dtype(self.session, LOGITS))
        self.has_argmax = any(value.name == NEXT_TOKEN for value in self.session.get_outputs())

    @property
    def capacity(self) -> int:
        """Positions of the longest sequence."""
        return self.part.context_length


def _contract(part: DecoderPart) -> tuple[Contract, Contract]:
    """Inputs and outputs of a fused graph of `part`."""
    types = {"float32": "tensor(float)", "float16": "tensor(float16)", "int8": "tensor(int8)"}
    cache = ((types[part.kv_dtype],), (None, part.kv_heads, None, part.kv_width))
    past, present = (
        {cache_name(side, layer, kind): cache for layer in range(part.layers) for kind in KINDS}
        for side in (PAST, PRESENT)
    )
    rows = (None, None)
    inputs: Contract = {INPUT_IDS: (INT64, rows), IMAGE_EMBEDS: (FLOATS, rows), ATTENTION_MASK: (INT64, rows), **past}
    outputs: Contract = {LOGITS: (FLOATS, (None, 1, part.vocab_size)), **present}
    return inputs, outputs


class OnnxSequence(GraphSequence):
    """One sequence on ONNX Runtime."""

    def __init__(self, graph: DecoderGraph, cache: KVCache, logits: Array | None = None, argmax: Array | None = None):
        """
        Args:
            graph: runs it.
            cache: its keys and values.
            logits, argmax: where to write them, see `GraphSequence`; None: arrays of its own.
        """
        device, part = graph.device, graph.part
        if logits is None:
            logits = device.zeros((1, 1, part.vocab_size), graph.logits_dtype)
        if argmax is None and graph.has_argmax:
            argmax = device.zeros((1, 1, 1), np.int64)
        super().__init__(cache, logits, argmax)
        self._graph = graph
        self._mask = device.take(np.ones((cache.capacity,)), np.int64)
        self._options = run_options(device)
        self._step = self._bind(graph.session)
        self._prefill = self._bind(graph.prefill_session) if graph.prefill_session else None

    def _bind(self, session: InferenceSession) -> tuple[InferenceSession, IOBinding]:
        """A session with what stays the same from call to call bound to it."""
        binding, device, cache = session.io_binding(), self._graph.device, self.cache
        for name, array in cache.tensors(PAST).items():
            bind_input(binding, name, array, device)
        outputs = {**cache.tensors(PRESENT), LOGITS: self._logits}
        if self._argmax is not None:
            outputs[NEXT_TOKEN] = self._argmax
        for name, array in outputs.items():
            bind_output(binding, name, array, device)
        return session, binding

    def _run(self, token_ids: list[int], image_embeddings: Array | None) -> None:
        total = self.cache.room_for(len(token_ids))
        graph, device = self._graph, self._graph.device
        long = len(token_ids) >= MIN_DEQUANTIZED_PREFILL
        session, binding = self._prefill if self._prefill and long else self._step
        input_ids = device.take(np.array([token_ids]), np.int64)
        embeds = graph.no_images if image_embeddings is None else device.take(image_embeddings, graph.embeds_dtype)
        bind_input(binding, INPUT_IDS, input_ids, device)
        bind_input(binding, ATTENTION_MASK, self._mask[:total].reshape((1, total)), device)
        bind_input(binding, IMAGE_EMBEDS, embeds, device)
        session.run_with_iobinding(binding, self._options)
        self.cache.length = total
