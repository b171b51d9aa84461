"""TensorRT engines run on a GPU, TensorRT and TensorRT for RTX alike: only the imported module differs.

Inputs and outputs are the chain's own arrays, so image embeds are written where the decoder reads them. What an image
of one size costs in kernel launches is recorded once as a CUDA graph and replayed.
"""

import importlib
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtime.device import Cuda, CudaArray
from runtime.encoder import tokens_of
from runtime.engines import FLAVOURS, Engine
from runtime.errors import UserError

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

    def run(self, tensors: dict[str, CudaArray], inputs: set[str], profile: int = 0) -> None:
        """Put one execution into the device's stream. tensors: every input and output by name; inputs: those that are.

        Raises UserError where a shape is outside the profile, or the execution fails.
        """
        context = self._contexts[profile]
        for name, array in tensors.items():
            if name in inputs and not context.set_input_shape(name, array.shape):
                raise UserError(f"{self.file}: {name} of shape {array.shape} is outside the engine's profile {profile}")
            if not context.set_tensor_address(name, array.pointer):
                raise UserError(f"{self.file}: has no tensor {name!r}")
        if not context.execute_async_v3(self._device.stream):
            raise UserError(f"{self.file}: the execution failed, see what TensorRT said above")


@dataclass
class _Recorded:
    """Buffers of one image size and the CUDA graph over them; graph None: it could not be recorded."""

    staging: np.ndarray  # pinned, [1, 3, H, W]
    pixels: CudaArray
    embeds: CudaArray  # [1, T, D]
    graph: Any = None


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
        embeds, begin, used = self.device.zeros((total, self._hidden), self._embeds_dtype), 0, set()
        for image in images:
            end = begin + tokens_of(image, self._stride)
            if image.shape in used:
                self.device.synchronize()  # the image before may still be on its way out of the same staging memory
            used.add(image.shape)
            recorded = self._recorded.get(image.shape) or self._record(image.shape, end - begin)
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
        self.device.synchronize()
        try:
            recorded.graph = self.device.capture(lambda: self._execute(recorded))
        except UserError as error:
            warnings.warn(f"{self._runner.file}: runs without a CUDA graph: {error}", stacklevel=2)
        if len(self._recorded) == MOST_GRAPHS:
            del self._recorded[next(iter(self._recorded))]
        self._recorded[shape] = recorded
        return recorded

    def _execute(self, recorded: _Recorded) -> None:
        self._runner.run({"pixel_values": recorded.pixels, "image_embeds": recorded.embeds}, {"pixel_values"})
