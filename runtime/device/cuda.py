"""Where the parts of the chain keep what they hand to one another: the CPU's memory, or a GPU's.

An array of `Cpu` is a numpy array, one of `Cuda` a `CudaArray`; both have shape, dtype and rows to slice. On a GPU all
work goes into one stream, so what one part writes the next may read without waiting, and nothing passes through the
host unless `to_numpy` asks for it. The CUDA side uses NVIDIA's cuda-bindings; no PyTorch.
"""

import ctypes
import importlib
import math
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

from runtime.device.memory import CudaArray, to_numpy
from runtime.errors import UserError


class Cuda:
    """GPU 0 and the stream that everything goes into. Raises UserError where there is no GPU, or no cuda-bindings."""

    name = "cuda"

    def __init__(self):
        self._cudart = _cudart()
        self._handle = self._call("cudaStreamCreate")
        self.stream = int(self._handle)

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> CudaArray:
        dtype = np.dtype(dtype)
        size = max(math.prod(shape) * dtype.itemsize, 1)
        pointer = int(self._call("cudaMallocAsync", size, self._handle))
        self._call("cudaMemsetAsync", pointer, 0, size, self._handle)
        memory = _Memory()
        weakref.finalize(memory, self._cudart.cudaFreeAsync, pointer, self._handle)
        return CudaArray(self, pointer, tuple(shape), dtype, memory)

    reserve = zeros

    def take(self, values: Any, dtype: Any) -> CudaArray:
        """`values`, an array of any device, here and in `dtype`; by way of the host where it is not so already."""
        if isinstance(values, CudaArray) and values.dtype == dtype:
            return values
        host = np.ascontiguousarray(to_numpy(values), dtype)
        array = self.zeros(host.shape, host.dtype)
        self._copy(array.pointer, host.ctypes.data, host.nbytes, "cudaMemcpyHostToDevice")
        self.synchronize()  # `host` may go before an asynchronous copy has read it
        return array

    def copy(self, target: CudaArray, source: CudaArray) -> None:
        self._copy(target.pointer, source.pointer, target.nbytes, "cudaMemcpyDeviceToDevice")

    def pinned(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """A host array that the GPU reads while the host goes on; the caller keeps it until then."""
        size = max(math.prod(shape) * np.dtype(dtype).itemsize, 1)
        pointer = int(self._call("cudaHostAlloc", size, 0))
        memory: Any = (ctypes.c_byte * size).from_address(pointer)
        weakref.finalize(memory, self._cudart.cudaFreeHost, pointer)
        return np.frombuffer(memory, dtype, math.prod(shape)).reshape(shape)

    def upload(self, target: CudaArray, pinned: np.ndarray) -> None:
        """Begin to copy; does not wait."""
        self._copy(target.pointer, pinned.ctypes.data, pinned.nbytes, "cudaMemcpyHostToDevice")

    def download(self, array: CudaArray) -> np.ndarray:
        """A copy on the host, once all work before it is done."""
        host = np.empty(array.shape, array.dtype)
        self._copy(host.ctypes.data, array.pointer, array.nbytes, "cudaMemcpyDeviceToHost")
        self.synchronize()
        return host

    def fill(self, array: CudaArray, byte: int) -> None:
        """Set every byte of an array."""
        self._call("cudaMemsetAsync", array.pointer, byte, array.nbytes, self._handle)

    def begin_download(self, pinned: np.ndarray, array: CudaArray) -> "CudaEvent":
        """Begin to copy; `pinned` may be read after `wait` for what this returns, and other work goes on meanwhile."""
        self._copy(pinned.ctypes.data, array.pointer, array.nbytes, "cudaMemcpyDeviceToHost")
        event = CudaEvent(self._call("cudaEventCreateWithFlags", self._cudart.cudaEventDisableTiming))
        weakref.finalize(event, self._cudart.cudaEventDestroy, event.handle)
        self._call("cudaEventRecord", event.handle, self._handle)
        return event

    def wait(self, event: "CudaEvent") -> None:
        """Until all work before the event is done."""
        self._call("cudaEventSynchronize", event.handle)

    def synchronize(self) -> None:
        self._call("cudaStreamSynchronize", self._handle)

    def capture(self, work: Callable[[int], None]) -> "CudaGraph":
        """What `work(stream)` puts into that stream, recorded rather than run; `replay` runs it. The stream is another
        than `self.stream`, into which other threads may be putting work."""
        mode = self._cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        stream = self._call("cudaStreamCreate")
        try:
            self._call("cudaStreamBeginCapture", stream, mode)
            try:
                work(int(stream))
            finally:
                graph = self._call("cudaStreamEndCapture", stream)
        finally:
            self._call("cudaStreamDestroy", stream)
        handle = self._call("cudaGraphInstantiate", graph, 0)
        self._call("cudaGraphDestroy", graph)
        recorded = CudaGraph(handle)
        weakref.finalize(recorded, self._cudart.cudaGraphExecDestroy, handle)
        return recorded

    def replay(self, graph: "CudaGraph") -> None:
        self._call("cudaGraphLaunch", graph.handle, self._handle)

    def _copy(self, target: int, source: int, size: int, kind: str) -> None:
        if size:
            kind = getattr(self._cudart.cudaMemcpyKind, kind)
            self._call("cudaMemcpyAsync", target, source, size, kind, self._handle)

    def _call(self, function: str, *arguments: Any) -> Any:
        status, *values = getattr(self._cudart, function)(*arguments)
        if int(status):
            raise UserError(f"{function}: {status.name}")
        return values[0] if values else None


class CudaGraph:
    """Recorded work; destroyed with the object."""

    def __init__(self, handle: Any):
        self.handle = handle


class CudaEvent:
    """A place in the stream; destroyed with the object."""

    def __init__(self, handle: Any):
        self.handle = handle


class _Memory:
    """What arrays of one allocation hold on to."""


def present_gpu() -> str:
    """Compute capability of GPU 0, as "sm89". Raises UserError where there is none, saying why."""
    cudart = _cudart()
    status, count = cudart.cudaGetDeviceCount()
    if int(status) or not count:
        raise UserError(f"no NVIDIA GPU here ({status.name})")
    attribute = cudart.cudaDeviceAttr
    _, major = cudart.cudaDeviceGetAttribute(attribute.cudaDevAttrComputeCapabilityMajor, 0)
    _, minor = cudart.cudaDeviceGetAttribute(attribute.cudaDevAttrComputeCapabilityMinor, 0)
    return f"sm{major}{minor}"


def _cudart() -> Any:
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ImportError:
        raise UserError("no NVIDIA GPU can be used here: Python module cuda.bindings is not installed") from None
