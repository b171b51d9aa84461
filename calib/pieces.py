"""A graph cut into pieces that run one after the other: what it computes on the way to its outputs can be looked at in
the memory of one piece. Weights are mapped from where they lie."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from export.graphs.load import read_weights, weights_file
from runtime.errors import UserError

SMALL = 1024  # bytes of a tensor that is held in a piece's own graph


@dataclass(frozen=True)
class Piece:
    """Nodes of a graph that follow one another.

    Args:
        inputs: what they take of earlier pieces and of the graph's inputs.
        outputs: what they give to later pieces or to the caller.
        names: those of the outputs and of the graph's inputs that the caller asked for.
    """

    nodes: list[onnx.NodeProto]
    inputs: list[str]
    outputs: list[str]
    names: list[str]


class Pieces:
    """The pieces of a graph, `pieces`, in order.

    Args:
        source: an ONNX file; its weights may lie beside it.
        names: tensors to give, inputs of the graph among them.
        cut_after: the operator behind each of whose nodes the graph is cut.
        float32: compute a float16 graph in float32; it takes and gives float32 then.
    """

    def __init__(self, source: Path, names: Collection[str], cut_after: str, float32: bool = False):
        self._source, self._float32 = source, float32
        self._model = onnx.load(str(source), load_external_data=False)
        graph = self._model.graph
        self._weights = {tensor.name: tensor for tensor in graph.initializer}
        runs: list[list[onnx.NodeProto]] = [[]]
        for node in graph.node:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self._weights[node.output[0]] = tensor = onnx.TensorProto()
                tensor.CopyFrom(node.attribute[0].t)
                tensor.name = node.output[0]
                continue
            runs[-1].append(node)
            if node.op_type == cut_after:
                runs.append([])
        self._sessions: dict[int, onnxruntime.InferenceSession] = {}
        self.pieces = self._linked([run for run in runs if run], set(names))

    def _linked(self, runs: list[list[onnx.NodeProto]], names: set[str]) -> list[Piece]:
        """Without nodes that nothing asked for depends on."""
        graph_inputs = {value.name for value in self._model.graph.input} - self._weights.keys()
        wanted = set(names)  # by the caller and later pieces
        pieces: list[Piece] = []
        for run in reversed(runs):
            nodes, used = [], set(wanted)
            for node in reversed(run):
                if used.intersection(node.output):
                    nodes.insert(0, node)
                    used.update(node.input)
            made = [name for node in nodes for name in node.output if name]
            taken = dict.fromkeys(name for node in nodes for name in node.input if name and name not in self._weights)
            inputs = [name for name in taken if name not in made]
            outputs = [name for name in made if name in wanted]
            if nodes:
                pieces.append(Piece(nodes, inputs, outputs, [name for name in outputs if name in names]))
            wanted |= set(inputs) - graph_inputs
        first = pieces.pop()
        given = sorted(names & graph_inputs)
        return [Piece(first.nodes, first.inputs, first.outputs, [*given, *first.names]), *reversed(pieces)]

    def __call__(self, feed: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        """The tensors asked for, piece by piece. Sessions stay open. feed: the graph's inputs."""
        live = dict(feed)
        for i, piece in enumerate(self.pieces):
            session = self._sessions.get(i)
            if session is None:
                self._sessions[i] = session = self.open(piece, live)
            found = self.run(session, piece, live)
            yield {name: found[name] if name in found else feed[name] for name in piece.names}
            live |= found
            later = {name for other in self.pieces[i + 1 :] for name in other.inputs}
            live = {name: value for name, value in live.items() if name in later}
            del found

    @staticmethod
    def run(
        session: onnxruntime.InferenceSession, piece: Piece, values: dict[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """The piece's outputs. values: its inputs among others."""
        found = session.run(piece.outputs, {name: values[name] for name in piece.inputs})
        return dict(zip(piece.outputs, map(np.asarray, found), strict=True))

    def open(self, piece: Piece, values: dict[str, np.ndarray]) -> onnxruntime.InferenceSession:
        """A session of the piece. values: its inputs among others, which tell of what type these are."""
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.enable_cpu_mem_arena = False  # each piece would keep the most that it ever took
        options.add_session_config_entry("session.x64quantprecision", "1")
        graph = onnx.GraphProto(name="piece")
        graph.node.extend(piece.nodes)
        for name in piece.inputs:
            kind = helper.np_dtype_to_tensor_dtype(values[name].dtype)
            graph.input.append(helper.make_tensor_value_info(name, kind, None))
        graph.output.extend(onnx.ValueInfoProto(name=name) for name in piece.outputs)
        mapped: dict[str, onnxruntime.OrtValue] = {}
        for name in dict.fromkeys(name for node in piece.nodes for name in node.input if name in self._weights):
            array = self._values(self._weights[name])
            if array.nbytes < SMALL:
                graph.initializer.append(numpy_helper.from_array(array, name))
            else:
                graph.initializer.append(_outside(name, array))
                mapped[name] = onnxruntime.OrtValue.ortvalue_from_numpy(array)
        if self._float32:
            for node in graph.node:
                _widen_node(node)
        options.add_external_initializers(list(mapped), list(mapped.values()))
        model = helper.make_model(graph, opset_imports=self._model.opset_import, ir_version=self._model.ir_version)
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def _values(self, tensor: onnx.TensorProto) -> np.ndarray:
        array = mapped_values(tensor, self._source)
        return array.astype(np.float32) if self._float32 and array.dtype == np.float16 else array


def mapped_values(tensor: onnx.TensorProto, source: Path) -> np.ndarray:
    """The values of an initializer of the graph at `source`, mapped from the file beside it where they lie there.

    Raises UserError as `export.graphs.load.read_weights`.
    """
    entries = {entry.key: entry.value for entry in tensor.external_data}
    if tensor.data_location != TensorProto.EXTERNAL or not tensor.dims:
        values = onnx.TensorProto()
        values.CopyFrom(tensor)
        read_weights(values, source)
        return numpy_helper.to_array(values)
    file = weights_file(tensor, source)
    kind, shape = helper.tensor_dtype_to_np_dtype(tensor.data_type), tuple(tensor.dims)
    try:
        return np.memmap(file, kind, "r", int(entries.get("offset", 0)), shape)
    except (OSError, ValueError) as error:
        raise UserError(f"{source}: weights of {tensor.name!r} cannot be read from {file}: {error}") from error


def _outside(name: str, values: np.ndarray) -> onnx.TensorProto:
    """A tensor whose values the session is given apart."""
    tensor = onnx.TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(values.dtype), dims=values.shape)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "memory"), ("offset", "0"), ("length", str(values.nbytes))):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    return tensor


def widen(model: onnx.ModelProto) -> None:
    """A float16 graph in float32, in place, but for the values that lie beside it."""
    graph = model.graph
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT16:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT16 and tensor.data_location == TensorProto.EXTERNAL:
            tensor.data_type = TensorProto.FLOAT
        elif tensor.data_type == TensorProto.FLOAT16:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    for node in graph.node:
        _widen_node(node)
    del graph.value_info[:]


def _widen_node(node: onnx.NodeProto) -> None:
    """Casts to float16 and constants in it."""
    for attribute in node.attribute:
        if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT16:
            attribute.i = TensorProto.FLOAT
        if attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type == TensorProto.FLOAT16:
            attribute.t.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(attribute.t).astype(np.float32)))
