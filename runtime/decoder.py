"""Tokens and image embeds -> logits: the bundle's decoder graph on ONNX Runtime, with its KV cache.

One graph serves prefill and decode. An id of 0 or more is a token; an id of -1 - k stands for row k of
`image_embeds`, so that several images, or part of one, need nothing else.
"""

import warnings
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
from onnxruntime import InferenceSession, IOBinding

from runtime import kernels
from runtime.bundle import Bundle, DecoderPart
from runtime.device import Array, Cpu, Device, int8_sums_saturate, is_x86, to_numpy
from runtime.errors import NoNumbersError, UserError
from runtime.sampling import Sampling, next_token
from runtime.session import bind_input, bind_output, input_dtype, open_session, run_options

KINDS = ("key", "value")
NEXT_TOKEN = "next_token"  # the graph's output [1, 1, 1] int64: the likeliest
# ids, from which on float32 products repay unpacking the weights where a processor has no instruction for bytes (AVX2,
# two cores: 0.6 s either way in 4 bits, 1.0 against 0.75 s in 8)
LEAST_PREFILL = 128
KERNELS = {"kernels": 8, "kernels24": 24}  # `runtime.kernels`, and to how many bits activations are rounded


Layers = list[tuple[Array, Array]]  # keys and values of each layer, [rows, kv_heads, capacity, head_dim]


def allocate(layers: int, shape: tuple[int, int, int, int], dtype: Any, device: Device) -> Layers:
    """Zeros. On the CPU the memory is asked for once and touched by the system page by page, so an unused tail costs
    address space alone."""
    return [(device.reserve(shape, dtype), device.reserve(shape, dtype)) for _ in range(layers)]


class KVCache:
    """Keys and values of one sequence, [1, kv_heads, capacity, head_dim] in each layer.

    The graph's `past` and `present` are bound to the same memory, so attention writes the new positions in place and
    nothing is copied from step to step.
    """

    def __init__(self, layers: Layers):
        self.layers = layers
        self.capacity = layers[0][0].shape[2]
        self.length = 0  # positions filled

    def tensors(self, name: str) -> dict[str, Array]:
        """The arrays by the names that graphs give them. name: `past_key_values` or `present`."""
        pairs = enumerate(self.layers)
        return {f"{name}.{i}.{kind}": array for i, pair in pairs for kind, array in zip(KINDS, pair, strict=True)}

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
    """The fused graph on ONNX Runtime. provider, device, operators, activation_bits: see `runtime.session`. prefill: a
    graph that is equal but for what it costs, for LEAST_PREFILL ids and more. cuda_graph: runs may be recorded.

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


def open_decoder(
    bundle: Bundle,
    threads: int | None = None,
    provider: str = "cpu",
    device: Device | None = None,
    products: str = "auto",
) -> Decoder:
    """The bundle's fused graph, with products by `runtime.kernels` or with the graph for prompts, where that is faster.

    products: `onnx`, `kernels`, `kernels24` (activations in 24 bits) or `auto`: the kernels where they are known to be
    faster (`kernels_are_faster`) and can be had. Raises UserError where they are asked for and cannot be had.
    """
    part = bundle.decoder
    slow_bytes = provider == "cpu" and int8_sums_saturate()
    if products == "auto":
        ours = kernels_are_faster(part, provider) and kernels_missing(bundle) is None
        products = "kernels" if ours else "onnx"
    if provider == "cuda" and products == "onnx":
        return _on_cuda(bundle, device)
    if products == "onnx":
        prefill = bundle.path(part.prefill_file) if part.prefill_file and slow_bytes else None
        return Decoder(bundle.path(part.file), part, threads, provider, device, prefill)
    if (reason := kernels_missing(bundle)) or provider != "cpu":
        raise UserError(f"--decoder {products}: {reason or 'they are for --provider cpu'}")
    file, bits = bundle.path(part.kernels_file), KERNELS[products]
    return Decoder(file, part, threads, provider, device, operators=kernels.library(), activation_bits=bits)


def _on_cuda(bundle: Bundle, device: Device) -> Decoder:
    """With steps recorded as a CUDA graph, where ONNX Runtime can."""
    from runtime.resident import ResidentDecoder

    file, part = bundle.path(bundle.decoder.file), bundle.decoder
    try:
        return ResidentDecoder(file, part, device, part.sampler_file and bundle.path(part.sampler_file))
    except UserError as error:
        better = "" if part.kv_dtype == "float16" else "; for a GPU there are --decoder-precision fp16 and w4a16"
        warnings.warn(f"decoding runs without a CUDA graph: {error}{better}", stacklevel=3)
    # Once the error is gone, and with it what holds the weights
    return Decoder(file, part, provider="cuda", device=device)


def kernels_are_faster(part: DecoderPart, provider: str) -> bool:
    """Whether products by `runtime.kernels` are known to be faster: on x86 processors, with VNNI and without."""
    return provider == "cpu" and part.precision in ("int4", "int8") and is_x86()


def kernels_missing(bundle: Bundle) -> str | None:
    """Why the decoder of a bundle cannot have products by `runtime.kernels`; None if it can."""
    if bundle.decoder.kernels_file is None:
        return f"{bundle.folder} has no graph for them, which decoders of 4 and 8 bits have if they are exported anew"
    return kernels.unavailable()


class Sequence(ABC):
    """One sequence being decoded. logits: [1, 1, V]; likeliest: [1, 1, 1] int64, or None where the graph does not say;
    both are written by each run."""

    def __init__(self, cache: KVCache, logits: Array, likeliest: Array | None):
        self.cache = cache
        self._logits, self._likeliest = logits, likeliest

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
        """As `forward`, but returns the likeliest next token, all that leaves the device.

        Raises NoNumbersError where that one's logit is none, which is seen on the CPU alone.
        """
        self._run(ids, image_embeds)
        if self._likeliest is None:
            token = int(to_numpy(self._logits)[0, 0].argmax())
        else:
            token = int(to_numpy(self._likeliest)[0, 0, 0])
        if isinstance(self._logits, np.ndarray) and not np.isfinite(self._logits[0, 0, token]):
            raise NoNumbersError
        return token

    def forward_sampled(
        self, ids: list[int], image_embeds: Array | None, sampling: Sampling, random: np.random.Generator
    ) -> int:
        """As `forward`, but returns a token drawn by `sampling`, a plain one, with the next number of `random`."""
        return next_token(self.forward(ids, image_embeds), [], sampling, random)

    @abstractmethod
    def _run(self, ids: list[int], image_embeds: Array | None) -> None:
        """Write logits and likeliest of the last of `ids`, and the KV cache. Raises ValueError as `forward`."""


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
