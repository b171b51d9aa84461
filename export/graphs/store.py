"""Weights in a file beside their graph, written one at a time."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
from onnx import external_data_helper, helper, numpy_helper
from tqdm import tqdm

ALIGNMENT = 64  # bytes, of a tensor in the file of weights
SMALL = 1024  # bytes of a tensor that stays in the graph's own file
CHUNK = 1 << 20  # bytes that are rearranged at a time: they stay in a processor's cache
LAYER = re.compile(r"\blayers\.(\d+)\.")

Read = Callable[[str], np.ndarray]  # values of the initializer of that name


def write_graph(model: onnx.ModelProto, read: Read, target: Path) -> None:
    """Write a graph to `target` and its weights to `target`.data.

    Args:
        model: changed in place. Of its initializers, name, type and shape are enough.
        read: for those without values; any float type, which is converted to the initializer's.
    """
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    del model.graph.initializer[:]
    with open(f"{target}.data", "wb") as data:
        for name in by_layer(tensors):
            model.graph.initializer.append(store(name, values_of(tensors[name], read), data, tensors[name].data_type))
    onnx.save(model, str(target))


def values_of(tensor: onnx.TensorProto, read: Read) -> np.ndarray:
    """An initializer's own values, else what `read` gives."""
    return numpy_helper.to_array(tensor) if tensor.HasField("raw_data") else read(tensor.name)


def store(name: str, values: np.ndarray, data: BinaryIO, element: int | None = None) -> onnx.TensorProto:
    """A tensor of a graph whose bytes, unless they are few, go to the end of `data`.

    Args:
        element: type of the tensor, of onnx.TensorProto; None takes that of `values`.
    """
    dtype = values.dtype if element is None else helper.tensor_dtype_to_np_dtype(element)
    size = values.size * dtype.itemsize
    if size < SMALL:
        return numpy_helper.from_array(_as(values, dtype), name)
    data.write(b"\0" * (-data.tell() % ALIGNMENT))
    tensor = onnx.TensorProto(name=name, dims=values.shape, data_type=helper.np_dtype_to_tensor_dtype(dtype))
    tensor.raw_data = b"\0"  # without some, it cannot be external
    external_data_helper.set_external_data(tensor, Path(data.name).name, data.tell(), size)
    tensor.ClearField("raw_data")
    rows = max(1, CHUNK * len(values) // size)
    for begin in range(0, len(values), rows):
        data.write(_as(values[begin : begin + rows], dtype).view(np.uint8).data)  # FP8 has no buffer of its own
    return tensor


def _as(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore"):  # infinity, which the comparison with PyTorch finds
        return np.asarray(values, dtype, order="C")


def by_layer(names: Iterable[str], what: str = "decoder") -> Iterator[str]:
    """The names, with a progress bar over the layers that they belong to. what: is drawn before it."""
    names = list(names)
    layers = [int(found[1]) if (found := LAYER.search(name)) else -1 for name in names]
    left = Counter(layer for layer in layers if layer >= 0)
    with tqdm(total=len(left), desc=what, unit="layer", disable=None) as bar:
        for name, layer in zip(names, layers, strict=True):
            yield name
            left[layer] -= 1
            bar.update(layer >= 0 and not left[layer])
