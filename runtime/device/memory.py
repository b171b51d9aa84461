"""Arrays in the CPU's memory or a GPU's, handled alike."""

import math
import mmap
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np


class Device(Protocol):
    """Memory that parts of the chain hand arrays to one another in."""

    name: str  # as ONNX Runtime calls it

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> "Array":
        """A new array of zeros."""
        ...

    def reserve(self, shape: tuple[int, ...], dtype: Any) -> "Array":
        """Zeros whose memory may be taken only once it is written to."""
        ...

    def take(self, values: Any, dtype: Any) -> "Array":
        """`values`, an array of any device, here and in `dtype`; copied only where it must be."""
        ...

    def copy(self, target: Any, source: Any) -> None:
        """Write `source` into `target`, both arrays of this device and of the same shape and dtype."""
        ...


class Cpu:
    """The host's memory."""

    name = "cpu"

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        return np.zeros(shape, dtype)

    def reserve(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Zeros that take memory only where they are written to, 4 KiB at a time: numpy asks Linux for pages of 2 MiB,
        of which each row of a KV cache would hold one from its first position on."""
        dtype = np.dtype(dtype)
        memory = mmap.mmap(-1, max(math.prod(shape) * dtype.itemsize, 1))
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            memory.madvise(mmap.MADV_NOHUGEPAGE)
        return np.frombuffer(memory, dtype, math.prod(shape)).reshape(shape)

    def take(self, values: Any, dtype: Any) -> np.ndarray:
        """`values`, an array of any device, here and in `dtype`; copied only where it must be."""
        return np.ascontiguousarray(to_numpy(values), dtype)

    def copy(self, target: np.ndarray, source: np.ndarray) -> None:
        target[...] = source


@dataclass(frozen=True)
class CudaArray:
    """Contiguous GPU memory. memory: keeps it allocated."""

    device: Any  # the `runtime.device.cuda.Cuda` it lies on
    pointer: int
    shape: tuple[int, ...]
    dtype: np.dtype
    memory: Any = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def reshape(self, shape: tuple[int, ...]) -> "CudaArray":
        """The same memory in another shape of as many elements."""
        if math.prod(shape) != math.prod(self.shape):
            raise ValueError(f"{self.shape} cannot be seen as {shape}")
        return replace(self, shape=tuple(shape))

    def __getitem__(self, rows: slice) -> "CudaArray":
        """Rows start:stop of the first axis, the same memory."""
        start, stop, step = rows.indices(self.shape[0])
        if step != 1:
            raise ValueError(f"rows are taken one after the other, not by {step}")
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        return replace(self, pointer=self.pointer + start * row_bytes, shape=(max(stop - start, 0), *self.shape[1:]))


Array = np.ndarray | CudaArray


def to_numpy(array: Array) -> np.ndarray:
    """The array on the host: itself, or a copy from the GPU."""
    return array.device.download(array) if isinstance(array, CudaArray) else np.asarray(array)


def concatenate(arrays: list[Array]) -> Array:
    """One or more arrays of one device along the first axis; a single one is not copied."""
    first = arrays[0]
    if len(arrays) == 1:
        return first
    if not isinstance(first, CudaArray):
        return np.concatenate([to_numpy(array) for array in arrays])
    device = first.device
    whole = device.zeros((sum(len(array) for array in arrays), *first.shape[1:]), first.dtype)
    begin = 0
    for array in arrays:
        device.copy(whole[begin : begin + len(array)], device.take(array, first.dtype))
        begin += len(array)
    return whole


def copied(array: Array) -> Array:
    """The same in memory of its own."""
    if not isinstance(array, CudaArray):
        return array.copy()
    copy = array.device.zeros(array.shape, array.dtype)
    array.device.copy(copy, array)
    return copy


def pointer(array: Array) -> int:
    """Address of the first element."""
    return array.pointer if isinstance(array, CudaArray) else array.ctypes.data
