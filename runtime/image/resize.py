"""The two passes of Pillow's bicubic `Image.resize`, and the lookup that normalizes: in C++ where the kernels were
built and the processor has AVX2, else by Pillow and numpy. Both give the same bits."""

import ctypes
from functools import cache

import numpy as np
from PIL import Image

from runtime.device.cpuinfo import processor_flags
from runtime.kernels import library

_SIGNATURES = {  # of include/image.h
    "convllava_resize_rows": (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64),
    "convllava_resize_columns": (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64),
    "convllava_normalize": (ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p),
}


@cache
def _kernels() -> ctypes.CDLL | None:
    if "avx2" not in processor_flags() or (found := library()) is None:
        return None
    try:
        kernels = ctypes.CDLL(str(found))
        for name, types in _SIGNATURES.items():
            getattr(kernels, name).argtypes = types
    except (OSError, AttributeError):  # it cannot be loaded, or was built before it had these
        return None
    return kernels


def resize_rows(pixels: np.ndarray, out: np.ndarray) -> None:
    """Write rows of pixels, uint8 [H, W, 3], resized to the width of `out`, uint8 [H, W', 3], C-contiguous.

    Raises:
        MemoryError: there is none left for the filter.
    """
    if pixels.shape == out.shape:
        out[:] = pixels
    elif (kernels := _kernels()) is None:
        out[:] = _by_pillow(pixels, out.shape[1], out.shape[0])
    else:
        pixels = np.ascontiguousarray(pixels)
        if kernels.convllava_resize_rows(pixels.ctypes.data, *pixels.shape[:2], out.ctypes.data, out.shape[1]):
            raise MemoryError


def resize_columns(pixels: np.ndarray, height: int) -> np.ndarray:
    """Columns of pixels, uint8 [H, W, 3], resized to columns of `height` pixels: uint8 [height, W, 3].

    Raises:
        MemoryError: there is none left for the result or the filter.
    """
    if pixels.shape[0] == height:
        return pixels
    if (kernels := _kernels()) is None:
        return _by_pillow(pixels, pixels.shape[1], height)
    pixels, out = np.ascontiguousarray(pixels), np.empty((height, *pixels.shape[1:]), np.uint8)
    if kernels.convllava_resize_columns(pixels.ctypes.data, len(pixels), pixels[0].size, out.ctypes.data, height):
        raise MemoryError
    return out


def look_up(pixels: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """levels, float32 [3, 256], of each channel of pixels, uint8 [H, W, 3]: float32 [3, H, W]."""
    if (kernels := _kernels()) is None:
        return np.stack([levels[channel][pixels[..., channel]] for channel in range(3)])
    pixels, levels = np.ascontiguousarray(pixels), np.ascontiguousarray(levels, np.float32)
    out = np.empty((3, *pixels.shape[:2]), np.float32)
    kernels.convllava_normalize(pixels.ctypes.data, pixels.size // 3, levels.ctypes.data, out.ctypes.data)
    return out


def _by_pillow(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))
