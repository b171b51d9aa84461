"""Image embeddings that a client has computed itself: one tensor in safetensors or numpy's .npy, nothing that executes.

vLLM, whose content part this is, takes what `torch.save` writes, which is a pickle: it is refused here.
"""

import base64
import binascii
import io
import json
import math
from typing import Any, cast

import numpy as np

from runtime.errors import UserError

NPY_MAGIC, ZIP_MAGIC = b"\x93NUMPY", b"PK\x03\x04"
MAX_HEADER_BYTES = 10_000
FIELDS = ("dtype", "shape", "data_offsets")  # of a tensor in safetensors
BF16 = "BF16"  # which numpy has not: the upper half of a float32
DTYPES = {"F16": np.dtype("<f2"), "F32": np.dtype("<f4"), BF16: np.dtype("<u2")}


def embeds_bytes(text: str, most: int) -> bytes:
    """What base64 holds. Raises UserError for what is no base64, or larger than `most`."""
    if len(text) > 4 * (most + 3) / 3:
        raise UserError(f"embeddings are larger than {most} bytes")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"embeddings are not base64: {error}") from error


def read_embeds(content: bytes, hidden_size: int) -> np.ndarray:
    """The embeddings of one image.

    Args:
        content: a file in safetensors or .npy with one tensor [T, D] in float16, bfloat16 (safetensors) or float32.
        hidden_size: the model's, D.

    Returns:
        [T, D] float32.

    Raises:
        UserError: it is in another format, or its tensor of another shape or type, or not finite.
    """
    if content.startswith(ZIP_MAGIC):
        raise UserError("embeddings by torch.save are a pickle, which is not read: send safetensors or .npy")
    tensor = _npy(content) if content.startswith(NPY_MAGIC) else _safetensors(content)
    if tensor.ndim != 2 or tensor.shape[1] != hidden_size or not len(tensor):
        raise UserError(f"embeddings have the shape {[*tensor.shape]}, expected [tokens, {hidden_size}]")
    if not np.isfinite(tensor).all():
        raise UserError("embeddings hold NaN or Inf")
    return np.ascontiguousarray(tensor, np.float32)


def _npy(content: bytes) -> np.ndarray:
    file = io.BytesIO(content)
    try:
        tensor = np.lib.format.read_array(file, allow_pickle=False, max_header_size=MAX_HEADER_BYTES)
    except Exception as error:  # whatever a damaged header leads numpy's reader to
        raise UserError(f"embeddings: no whole .npy file: {' '.join(str(error).split())[:200]}") from error
    if tensor.dtype.newbyteorder("<") not in (DTYPES["F16"], DTYPES["F32"]):
        raise UserError(f"embeddings are {tensor.dtype}, expected float16 or float32")
    return tensor


def _safetensors(content: bytes) -> np.ndarray:
    """https://huggingface.co/docs/safetensors: length of the header, header in JSON, tensors."""
    length = int.from_bytes(content[:8], "little")
    if not 0 < length <= min(MAX_HEADER_BYTES, len(content) - 8):
        raise UserError("embeddings are in no known format, expected safetensors or .npy")
    try:
        header: Any = json.loads(content[8 : 8 + length])
        (described,) = [value for name, value in header.items() if name != "__metadata__"]
        dtype, shape, offsets = cast(tuple[Any, Any, Any], tuple(described[key] for key in FIELDS))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError("embeddings: a safetensors file with one tensor is expected") from error
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UserError(f"embeddings are {str(dtype)[:40]}, expected F16, BF16 or F32")
    data = content[8 + length :]
    is_whole = offsets == [0, len(data)]
    if not is_whole or not _is_shape(shape) or math.prod(shape) * DTYPES[dtype].itemsize != len(data):
        raise UserError("embeddings: the safetensors file is damaged: shape and bytes do not fit")
    values = np.frombuffer(data, DTYPES[dtype])
    if dtype == BF16:
        values = (values.astype("<u4") << 16).view("<f4")
    return values.reshape(shape)


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, list) and all(type(size) is int and size >= 0 for size in cast(list[Any], shape))
