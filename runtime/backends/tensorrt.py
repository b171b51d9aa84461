"""TensorRT engines run on a GPU, TensorRT and TensorRT for RTX alike: only the imported module differs.

Inputs and outputs are the chain's own arrays, so image embeds are written where the decoder reads them. What an image
of one size costs in kernel launches is captured once as a CUDA graph and replayed.
"""

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np

from runtime.backends.base import SequenceBatch
from runtime.backends.graph_sequence import GraphSequence
from runtime.bundle.engines import FLAVOURS, Engine
from runtime.device.cuda import Cuda, CudaGraph
from runtime.device.memory import Array, CudaArray
from runtime.errors import UserError
from runtime.generate.kv_cache import KVCache, allocate
from runtime.graph_io import (
    IMAGE_EMBEDS,
    INPUT_IDS,
    LOGITS,
    NEXT_TOKEN,
    PAST,
    PIXEL_VALUES,
    PRESENT,
    WRITE_INDICES,
    cache_name,
)
from runtime.image.preprocess import visual_tokens

logger = logging.getLogger("convllava.backends")

DTYPES = {"HALF": np.float16, "FLOAT": np.float32, "INT64": np.int64, "INT32": np.int32}
MAX_GRAPHS = 16  # sizes that are kept captured, each with its buffers


class EngineRunner:
    """An engine in GPU memory, with one execution context for each of its optimisation profiles.

    Raises UserError where TensorRT refuses the file.
    """

    def __init__(self, engine: Engine, device: Cuda):
        trt = importlib.import_module(FLAVOURS[engine.report["flavour"]])
        self._device = device
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        if engine.report["version_compatible"]:
            self._runtime.engine_host_code_allowed = True  # such engines carry their own runtime
        self._engine = self._runtime.deserialize_cuda_engine(engine.file.read_bytes())
        if self._engine is None:
            raise UserError(f"{engine.file}: {trt.__name__} {trt.__version__} cannot read it, see what it said above")
        self.file = engine.file
        self._contexts: list[Any] = []
        for profile in range(len(engine.report["profiles"])):
            context = self._engine.create_execution_context()
            if context is None or not context.set_optimization_profile_async(profile, device.stream):
                raise UserError(f"{engine.file}: no execution context, most likely too little GPU memory")
            self._contexts.append(context)
        device.synchronize()

    def run(self, tensors: dict[str, CudaArray], inputs: set[str], profile: int = 0, stream: int | None = None) -> None:
        """Put one execution into a stream, None: the device's. tensors: every input and output by name; inputs: those
        that are.

        Raises UserError where a shape is outside the profile, or the execution fails.
        """
        context = self._contexts[profile]
        for name, array in tensors.items():
            if name in inputs and not context.set_input_shape(name, array.shape):
                raise UserError(f"{self.file}: {name} of shape {array.shape} is outside the engine's profile {profile}")
            if not context.set_tensor_address(name, array.pointer):
                raise UserError(f"{self.file}: has no tensor {name!r}")
        if not context.execute_async_v3(self._device.stream if stream is None else stream):
            raise UserError(f"{self.file}: the execution failed, see what TensorRT said above")


def _captured(device: Cuda, work: Callable[[int], None], what: Path) -> CudaGraph | None:
    """A CUDA graph of `work(stream)`; None, with a warning, where it cannot be captured."""
    device.synchronize()
    try:
        return device.capture(work)
    except UserError as error:
        logger.warning("%s: runs without a CUDA graph: %s", what, error)
        return None


@dataclass
class _Captured:
    """Buffers of one image size and the CUDA graph over them; graph None: it could not be captured. used: an image may
    still be on its way out of `staging`."""

    staging: np.ndarray  # pinned, [1, 3, H, W]
    pixels: CudaArray
    embeds: CudaArray  # [1, T, D]
    graph: CudaGraph | None = None
    used: bool = False


class EngineEncoder:
    """An encoder engine, see `runtime.backends.base.Encoder`. stride: pixels of one side per visual token."""

    batches = True

    def __init__(self, engine: Engine, stride: int, device: Cuda):
        self.device = device
        self._runner = EngineRunner(engine, device)
        (pixels,), (embeds,) = engine.report["inputs"], engine.report["outputs"]
        self._pixels_dtype, self._embeds_dtype = DTYPES[pixels["dtype"]], DTYPES[embeds["dtype"]]
        self._hidden, self._stride = embeds["shape"][2], stride
        self._smallest, _, self._largest = engine.report["profiles"][0][PIXEL_VALUES]
        self._captured: dict[tuple[int, ...], _Captured] = {}

    def __call__(self, images: list[np.ndarray]) -> CudaArray:
        """images: pixel values [3, H, W] float32 -> image embeds [sum of T, D] in the engine's dtype, on the GPU.

        Raises UserError for an image outside the sizes that the engine was built for.
        """
        for image in images:
            self._check_size(image)
        total = sum(visual_tokens(*image.shape[1:], stride=self._stride) for image in images)
        embeds, begin = self.device.zeros((total, self._hidden), self._embeds_dtype), 0
        for image in images:
            end = begin + visual_tokens(*image.shape[1:], stride=self._stride)
            captured = self._captured.get(image.shape) or self._capture(image.shape, end - begin)
            if captured.used:
                self.device.synchronize()
            captured.used = True
            np.copyto(captured.staging[0], image, casting="same_kind")
            self.device.upload(captured.pixels, captured.staging)
            if captured.graph is not None:
                self.device.replay(captured.graph)
            else:
                self._execute(captured)
            self.device.copy(embeds[begin:end], captured.embeds)
            begin = end
        return embeds

    def _check_size(self, image: np.ndarray) -> None:
        for side, least, most in zip(image.shape[1:], self._smallest[2:], self._largest[2:], strict=True):
            if not least <= side <= most:
                raise UserError(
                    f"{self._runner.file}: built for sides of {least} to {most} pixels, the image has "
                    f"{image.shape[2]}x{image.shape[1]}; python -m export.engine --min-res, --max-res"
                )

    def _capture(self, shape: tuple[int, ...], tokens: int) -> _Captured:
        batched = (1, *shape)
        captured = _Captured(
            self.device.pinned(batched, self._pixels_dtype),
            self.device.zeros(batched, self._pixels_dtype),
            self.device.zeros((1, tokens, self._hidden), self._embeds_dtype),
        )
        self._execute(captured)  # TensorRT prepares itself for a shape at its first execution, which cannot be captured
        captured.graph = _captured(self.device, partial(self._execute, captured), self._runner.file)
        if len(self._captured) == MAX_GRAPHS:
            del self._captured[next(iter(self._captured))]
        self._captured[shape] = captured
        return captured

    def _execute(self, captured: _Captured, stream: int | None = None) -> None:
        tensors = {PIXEL_VALUES: captured.pixels, IMAGE_EMBEDS: captured.embeds}
        self._runner.run(tensors, {PIXEL_VALUES}, stream=stream)


class EngineDecoder:
    """A decoder engine, whose KV cache has one capacity."""

    def __init__(self, engine: Engine, device: Cuda):
        self.device = device
        self.runner = EngineRunner(engine, device)
        inputs, outputs = ({t["name"]: t for t in engine.report[side]} for side in ("inputs", "outputs"))
        cache, embeds, logits = inputs[cache_name(PAST, 0, "key")], inputs[IMAGE_EMBEDS], outputs[LOGITS]
        self._layers = sum(name.startswith(PAST) for name in inputs) // 2
        self._cache_shape, self._cache_dtype = (1, *cache["shape"][1:]), DTYPES[cache["dtype"]]
        self.embeds_dtype = np.dtype(DTYPES[embeds["dtype"]])
        self.no_images = device.zeros((0, embeds["shape"][1]), self.embeds_dtype)
        self.logits_shape, self.logits_dtype = (1, 1, logits["shape"][2]), DTYPES[logits["dtype"]]

    @property
    def capacity(self) -> int:
        """Positions of the longest sequence: those that the engine's KV cache was built for."""
        return self._cache_shape[2]

    def start_batch(self, count: int, batch_invariant: bool) -> SequenceBatch:
        """Raises UserError: an engine's KV cache holds one sequence."""
        raise UserError("several answers are to be decoded at once, an engine holds one sequence: --decoder auto")

    def start(self, capacity: int) -> "EngineSequence":
        """A new sequence with room for `capacity` positions. Raises UserError where the engine was built for fewer."""
        if capacity > self.capacity:
            raise UserError(f"{self.runner.file}: built for {self.capacity} positions, {capacity} are wanted")
        layers = allocate(self._layers, self._cache_shape, self._cache_dtype, self.device)
        return EngineSequence(self, KVCache(layers))


class EngineSequence(GraphSequence):
    """One sequence on a TensorRT engine. A single step has the same addresses and shapes each time, so it is captured
    as a CUDA graph and replayed."""

    PREFILL, DECODE = 0, 1  # the engine's optimisation profiles

    def __init__(self, decoder: EngineDecoder, cache: KVCache):
        device = decoder.device
        logits = device.zeros(decoder.logits_shape, decoder.logits_dtype)
        argmax = device.zeros((1, 1, 1), np.int64)
        super().__init__(cache, logits, argmax)
        self._decoder = decoder
        self._staging = device.pinned((2,), np.int64)  # one new id and the length of the cache, [1] each
        self._numbers = device.zeros((2,), np.int64)
        # TensorRT writes the new positions in place: past and present are the same memory
        caches = cast(dict[str, CudaArray], cache.tensors(PAST) | cache.tensors(PRESENT))
        self._tensors = {**caches, LOGITS: logits, NEXT_TOKEN: argmax, WRITE_INDICES: self._numbers[1:2]}
        self._graph, self._stepped = None, False

    def _run(self, token_ids: list[int], image_embeddings: Array | None) -> None:
        total = self.cache.room_for(len(token_ids))
        device = self._decoder.device
        self._staging[:] = token_ids[0], self.cache.length
        device.upload(self._numbers, self._staging)
        if len(token_ids) == 1 and image_embeddings is None:
            self._step()
        else:
            embeds = self._decoder.no_images
            if image_embeddings is not None:
                embeds = device.take(image_embeddings, self._decoder.embeds_dtype)
            self._execute(device.take(np.array([token_ids]), np.int64), embeds, self.PREFILL)
        self.cache.length = total

    def _step(self) -> None:
        if self._graph is not None:
            self._decoder.device.replay(self._graph)
            return
        step = partial(self._execute, self._numbers[:1].reshape((1, 1)), self._decoder.no_images, self.DECODE)
        step()
        if not self._stepped:
            self._stepped = True
            self._graph = _captured(self._decoder.device, step, self._decoder.runner.file)

    def _execute(self, input_ids: CudaArray, embeds: CudaArray, profile: int, stream: int | None = None) -> None:
        inputs = {INPUT_IDS: input_ids, IMAGE_EMBEDS: embeds}
        caches = self.cache.tensors(PAST)
        self._decoder.runner.run(self._tensors | inputs, {*inputs, *caches, WRITE_INDICES}, profile, stream)
