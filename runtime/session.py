"""ONNX Runtime sessions, opened one way."""

from pathlib import Path

import numpy as np
import onnxruntime

from runtime.errors import UserError


def open_session(file: Path, threads: int | None) -> onnxruntime.InferenceSession:
    """A session on the CPU. threads: of one operator; None lets ONNX Runtime take one a physical core.

    Raises UserError where ONNX Runtime cannot open the graph.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        raise UserError(f"{file}: ONNX Runtime {onnxruntime.__version__} cannot open it: {error}") from error


def input_dtype(session: onnxruntime.InferenceSession, name: str) -> type[np.floating]:
    """numpy's type of a graph's floating-point input."""
    types = {value.name: value.type for value in session.get_inputs()}
    return {"tensor(float)": np.float32, "tensor(float16)": np.float16}[types[name]]
