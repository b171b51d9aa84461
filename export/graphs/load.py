"""Reads ONNX files whose weights lie beside them, whatever kind of file these are.

onnx's own reader refuses weights that are a symbolic link or have several hard links, which is what a bundle in the
Hub's cache or one that was copied with `cp -al` has. Here a link is followed; what is refused is a name that leaves the
graph's folder.
"""

from pathlib import Path, PurePosixPath

import numpy as np
import onnx
from onnx import numpy_helper

from export.graphs.store import Read
from runtime.errors import UserError


def load_graph(file: Path) -> onnx.ModelProto:
    """The graph at `file` with all its weights in memory.

    Raises UserError where it cannot be read as ONNX; as `read_weights`.
    """
    try:
        model = onnx.load(str(file), load_external_data=False)
    except Exception as error:  # protobuf's
        raise UserError(f"{file}: cannot be read as ONNX: {error}") from error
    for tensor in model.graph.initializer:
        read_weights(tensor, file)
    return model


def open_graph(file: Path) -> tuple[onnx.ModelProto, Read]:
    """(the graph at `file` without the weights that lie beside it, a reader of one initializer's values by its name).

    The reader raises UserError as `read_weights`.
    """
    model = onnx.load(str(file), load_external_data=False)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}

    def read(name: str) -> np.ndarray:
        tensor = onnx.TensorProto()
        tensor.CopyFrom(tensors[name])  # so that the graph does not keep what is read
        read_weights(tensor, file)
        return numpy_helper.to_array(tensor)

    return model, read


def read_weights(tensor: onnx.TensorProto, file: Path) -> None:
    """Put a tensor's values into it where they lie in a file beside its graph.

    Args:
        tensor: of the graph at `file`.

    Raises:
        UserError: the values lie outside the graph's folder, in a file that is missing, or beyond its end.
    """
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return
    entries = {entry.key: entry.value for entry in tensor.external_data}
    data = weights_file(tensor, file)
    try:
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", -1))
        with data.open("rb") as stream:
            stream.seek(offset)
            content = stream.read(length)
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: weights of {tensor.name!r} cannot be read from {data}: {error}") from error
    if length >= 0 and len(content) != length:
        raise UserError(f"{data}: truncated, {tensor.name!r} of {file} needs {length} bytes from byte {offset} on")
    tensor.raw_data = content
    tensor.ClearField("external_data")
    tensor.data_location = onnx.TensorProto.DEFAULT


def weights_file(tensor: onnx.TensorProto, file: Path) -> Path:
    """Where the values of an external tensor of the graph at `file` lie. Raises UserError outside its folder."""
    name = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
    if not name or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise UserError(f"{file}: weights of {tensor.name!r} lie in {name!r}, outside the graph's folder")
    return file.parent / name
