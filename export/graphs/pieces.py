"""A graph in pieces that run one after the other, each with its own weights alone."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import helper

FOLDER = "session.model_external_initializers_file_folder_path"  # of ONNX Runtime: where weights beside a graph lie


def cut(model: onnx.ModelProto, borders: Sequence[str]) -> list[onnx.ModelProto]:
    """The graph cut after each of `borders`.

    Args:
        model: weights that lie beside it need not be loaded.
        borders: values in the order in which they are computed, the graph's only output last. Each piece takes the
            value before it, the first one the graph's inputs.

    Raises:
        ValueError: nodes that are not in the borders' order, or that read across one.
    """
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    types = {value.name: value for value in (*graph.input, *graph.output)}
    element = graph.output[0].type.tensor_type.elem_type
    pieces, start, given = [], 0, list(graph.input)
    makers = {name: i for i, node in enumerate(graph.node) for name in node.output}
    for border in borders:
        end = makers[border] + 1
        nodes = graph.node[start:end]
        known = weights.keys() | {value.name for value in given} | {name for node in nodes for name in node.output}
        used = dict.fromkeys(name for node in nodes for name in node.input if name)
        if not nodes or not used.keys() <= known:
            raise ValueError(f"the graph cannot be cut at {border!r}")
        output = types.get(border) or helper.make_tensor_value_info(border, element, None)
        taken = [weights[name] for name in used if name in weights]
        piece = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
        piece.graph.CopyFrom(helper.make_graph(nodes, border, given, [output], taken))
        pieces.append(piece)
        start, given = end, [output]
    return pieces


def open_piece(piece: onnx.ModelProto, folder: Path, libraries: Sequence[str] = ()) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session of a graph whose weights lie in files of `folder`.

    Args:
        libraries: shared libraries of the operators that it needs.
    """
    options = onnxruntime.SessionOptions()
    options.enable_cpu_mem_arena = False  # a piece runs a few times: nothing is worth keeping for the next one
    options.add_session_config_entry(FOLDER, str(folder))
    for library in libraries:
        options.register_custom_ops_library(library)
    return onnxruntime.InferenceSession(piece.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run_piece(session: onnxruntime.InferenceSession, value: np.ndarray) -> np.ndarray:
    """The output of a graph with one input and one output."""
    return np.asarray(session.run(None, {session.get_inputs()[0].name: value})[0])
