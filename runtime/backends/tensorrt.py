"""TensorRT engines run on a GPU, TensorRT and TensorRT for RTX alike: only the imported module differs.

Inputs and outputs are the chain's own arrays, so image embeds are written where the decoder reads them. What an image
of one size costs in kernel launches is recorded once as a CUDA graph and replayed.
"""

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from runtime.backends.base import Sequence
from runtime.bundle.engines import FLAVOURS, Engine
from runtime.device.cuda import Cuda, CudaGraph
from runtime.device.memory import Array, CudaArray
from runtime.errors import UserError
from runtime.generate.kv_cache import KVCache, allocate
from runtime.graph_io import NEXT_TOKEN
from runtime.image.preprocess import tokens_of

DTYPES = {"HALF": np.float16, "FLOAT": np.float32, "INT64": np.int64, "INT32": np.int32}
MOST_GRAPHS = 16  # sizes that are kept recorded, each with its buffers


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
        self._contexts = []
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


def _recorded(device: Cuda, work: Callable[[int], None], what: Path) -> CudaGraph | None:
    """A CUDA graph of `work(stream)`; None, with a warning, where it cannot be recorded."""
    device.synchronize()
    try:
        return device.capture(work)
    except UserError as error:
        warnings.warn(f"{what}: runs without a CUDA graph: {error}", stacklevel=3)
        return None


@dataclass
class _Recorded:
    """Buffers of one image size and the CUDA graph over them; graph None: it could not be recorded. used: an image may
    still be on its way out of `staging`."""

    staging: np.ndarray  # pinned, [1, 3, H, W]
    pixels: CudaArray
    embeds: CudaArray  # [1, T, D]
    graph: CudaGraph | None = None
    used: bool = False


class EngineEncoder:
    """An encoder engine. stride: pixels of one side to a visual token."""

    def __init__(self, engine: Engine, stride: int, device: Cuda):
        self.device = device
        self._runner = EngineRunner(engine, device)
        (pixels,), (embeds,) = engine.report["inputs"], engine.report["outputs"]
        self._pixels_dtype, self._embeds_dtype = DTYPES[pixels["dtype"]], DTYPES[embeds["dtype"]]
        self._hidden, self._stride = embeds["shape"][2], stride
        self._smallest, _, self._largest = engine.report["profiles"][0]["pixel_values"]
        self._recorded: dict[tuple[int, ...], _Recorded] = {}

    def __call__(self, images: list[np.ndarray]) -> CudaArray:
        """images: pixel values [3, H, W] float32 -> image embeds [sum of T, D] in the engine's dtype, on the GPU.

        Raises UserError for an image outside the sizes that the engine was built for.
        """
        for image in images:
            self._check_size(image)
        total = sum(tokens_of(image, self._stride) for image in images)
        embeds, begin = self.device.zeros((total, self._hidden), self._embeds_dtype), 0
        for image in images:
            end = begin + tokens_of(image, self._stride)
            recorded = self._recorded.get(image.shape) or self._record(image.shape, end - begin)
            if recorded.used:
                self.device.synchronize()
            recorded.used = True
            np.copyto(recorded.staging[0], image, casting="same_kind")
            self.device.upload(recorded.pixels, recorded.staging)
            if recorded.graph is not None:
                self.device.replay(recorded.graph)
            else:
                self._execute(recorded)
            self.device.copy(embeds[begin:end], recorded.embeds)
            begin = end
        return embeds

    def _check_size(self, image: np.ndarray) -> None:
        for side, least, most in zip(image.shape[1:], self._smallest[2:], self._largest[2:], strict=True):
            if not least <= side <= most:
                raise UserError(
                    f"{self._runner.file}: built for sides of {least} to {most} pixels, the image has "
                    f"{image.shape[2]}x{image.shape[1]}; python -m export.engine --min-res, --max-res"
                )

    def _record(self, shape: tuple[int, ...], tokens: int) -> _Recorded:
        batched = (1, *shape)
        recorded = _Recorded(
            self.device.pinned(batched, self._pixels_dtype),
            self.device.zeros(batched, self._pixels_dtype),
            self.device.zeros((1, tokens, self._hidden), self._embeds_dtype),
        )
        self._execute(recorded)  # TensorRT prepares itself for a shape at its first execution, which cannot be recorded
        recorded.graph = _recorded(self.device, partial(self._execute, recorded), self._runner.file)
        if len(self._recorded) == MOST_GRAPHS:
            del self._recorded[next(iter(self._recorded))]
        self._recorded[shape] = recorded
        return recorded

    def _execute(self, recorded: _Recorded, stream: int | None = None) -> None:
        tensors = {"pixel_values": recorded.pixels, "image_embeds": recorded.embeds}
        self._runner.run(tensors, {"pixel_values"}, stream=stream)


class EngineDecoder:
    """A decoder engine, whose KV cache has one capacity."""

    def __init__(self, engine: Engine, device: Cuda):
        self.device = device
        self.runner = EngineRunner(engine, device)
        inputs, outputs = ({t["name"]: t for t in engine.report[side]} for side in ("inputs", "outputs"))
        cache, embeds, logits = inputs["past_key_values.0.key"], inputs["image_embeds"], outputs["logits"]
        self._layers = sum(name.startswith("past_key_values") for name in inputs) // 2
        self._cache_shape, self._cache_dtype = (1, *cache["shape"][1:]), DTYPES[cache["dtype"]]
        self.embeds_dtype = np.dtype(DTYPES[embeds["dtype"]])
        self.no_images = device.zeros((0, embeds["shape"][1]), self.embeds_dtype)
        self.logits_shape, self.logits_dtype = (1, 1, logits["shape"][2]), DTYPES[logits["dtype"]]

    @property
    def capacity(self) -> int:
        """Positions of the longest sequence: those that the engine's KV cache was built for."""
        return self._cache_shape[2]

    def start(self, capacity: int) -> "EngineSequence":
        """A new sequence with room for `capacity` positions. Raises UserError where the engine was built for fewer."""
        if capacity > self.capacity:
            raise UserError(f"{self.runner.file}: built for {self.capacity} positions, {capacity} are wanted")
        layers = allocate(self._layers, self._cache_shape, self._cache_dtype, self.device)
        return EngineSequence(self, KVCache(layers))


class EngineSequence(Sequence):
    """One sequence on a TensorRT engine. A single step has the same addresses and shapes each time, so it is recorded
    as a CUDA graph and replayed."""

    PREFILL, DECODE = 0, 1  # the engine's optimisation profiles

    def __init__(self, decoder: EngineDecoder, cache: KVCache):
        device = decoder.device
        logits = device.zeros(decoder.logits_shape, decoder.logits_dtype)
        super().__init__(cache, logits, device.zeros((1, 1, 1), np.int64))
        self._decoder = decoder
        self._staging = device.pinned((2,), np.int64)  # one new id and the length of the cache, [1] each
        self._numbers = device.zeros((2,), np.int64)
        # TensorRT writes the new positions in place: past and present are the same memory
        caches = cache.tensors("past_key_values") | cache.tensors("present")
        self._tensors = {**caches, "logits": logits, NEXT_TOKEN: self._likeliest, "write_indices": self._numbers[1:2]}
        self._graph, self._stepped = None, False

    def _run(self, ids: list[int], image_embeds: Array | None) -> None:
        total = self.cache.room_for(len(ids))
        device = self._decoder.device
        self._staging[:] = ids[0], self.cache.length
        device.upload(self._numbers, self._staging)
        if len(ids) == 1 and image_embeds is None:
            self._step()
        else:
            embeds = self._decoder.no_images
            if image_embeds is not None:
                embeds = device.take(image_embeds, self._decoder.embeds_dtype)
            self._execute(device.take(np.array([ids]), np.int64), embeds, self.PREFILL)
        self.cache.length = total

    def _step(self) -> None:
        if self._graph is not None:
            self._decoder.device.replay(self._graph)
            return
        step = partial(self._execute, self._numbers[:1].reshape((1, 1)), self._decoder.no_images, self.DECODE)
        step()
        if not self._stepped:
            self._stepped = True
            self._graph = _recorded(self._decoder.device, step, self._decoder.runner.file)

    def _execute(self, input_ids: CudaArray, embeds: CudaArray, profile: int, stream: int | None = None) -> None:
        inputs = {"input_ids": input_ids, "image_embeds": embeds}
        caches = self.cache.tensors("past_key_values")
        self._decoder.runner.run(self._tensors | inputs, {*inputs, *caches, "write_indices"}, profile, stream)
