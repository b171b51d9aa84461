"""A float32 encoder graph with this project's operators (`runtime.kernels`): channels last, matmuls in INT8.

Weights of a matmul get a scale an output channel, activations a scale and a minimum a row while the graph runs: no
data is needed. A layer scale becomes part of the matmul before it. Weights are laid out as the kernels read them
(`encoder.h`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
from onnx import helper

from export.graphs.load import open_graph
from export.graphs.store import Read, store
from export.graphs.variants import DOMAIN

LANES, PANEL = 16, 32  # channels are a multiple of the former; output channels whose weights lie together
ROWS_AT_A_TIME = 16 * PANEL  # of a matrix that is rounded
LARGEST_CODE = 127

STEM = "Conv Transpose LayerNormalization Transpose"
DOWNSAMPLE = "Transpose LayerNormalization Transpose Conv"
BLOCK = "Conv Transpose LayerNormalization MatMul Add Gelu MatMul Add Transpose Add"
SCALED_BLOCK = "Conv Transpose LayerNormalization MatMul Add Gelu MatMul Add Transpose Mul Add"
FEATURES = "Reshape Transpose"
GELU_LINEAR, LINEAR = "MatMul Add Gelu", "MatMul Add"
PATTERNS = (STEM, DOWNSAMPLE, SCALED_BLOCK, BLOCK, FEATURES, GELU_LINEAR, LINEAR, "Gelu", "Identity")
CONVOLUTIONS = {STEM: (4, 4, 0), DOWNSAMPLE: (2, 2, 0), SCALED_BLOCK: (7, 1, 3), BLOCK: (7, 1, 3)}  # side, stride, pad


@dataclass(frozen=True)
class _Layer:
    pattern: str
    nodes: list[onnx.NodeProto]

    def of(self, kind: str) -> list[onnx.NodeProto]:
        return [node for node in self.nodes if node.op_type == kind]


def write_encoder_kernels(source: Path, target: Path) -> bool:
    """Write the graph at `source` with this project's operators to `target`, its weights to `target`.data.

    Returns:
        False, and nothing is written, where it is no float32 graph of `export.encoder_graph` or where the numbers of
        channels are no multiples of LANES.

    Raises:
        UserError: as `open_graph`'s reader.
    """
    model, read = open_graph(source)
    graph = model.graph
    shapes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    layers = list(_layers(graph))
    if not all(layer and _fits(layer, shapes) for layer in layers) or not layers:
        return False
    if graph.input[0].type.tensor_type.elem_type != onnx.TensorProto.FLOAT:
        return False
    with open(f"{target}.data", "wb") as data:
        writer = _Writer(read, shapes, data)
        for layer in layers:
            assert layer is not None
            writer.add(layer)
    made = helper.make_graph(writer.nodes, graph.name, graph.input, graph.output, writer.initializers)
    opsets = [*model.opset_import, helper.make_opsetid(DOMAIN, 1)]
    onnx.save(
        helper.make_model(made, opset_imports=opsets, ir_version=model.ir_version, producer_name=model.producer_name),
        str(target),
    )
    return True


def _layers(graph: onnx.GraphProto) -> Iterator[_Layer | None]:
    """The nodes of one layer after another; None, and no more, where they are of none."""
    nodes, begin, value = list(graph.node), 0, graph.input[0].name
    while begin < len(nodes):
        kinds = [node.op_type for node in nodes[begin : begin + len(SCALED_BLOCK.split())]]
        for pattern in PATTERNS:
            wanted = pattern.split()
            part = nodes[begin : begin + len(wanted)]
            if kinds[: len(wanted)] == wanted and _is_chain(part, value, is_residual=pattern in (BLOCK, SCALED_BLOCK)):
                yield _Layer(pattern, part)
                begin, value = begin + len(part), part[-1].output[0]
                break
        else:
            yield None
            return


def _is_chain(nodes: list[onnx.NodeProto], value: str, is_residual: bool) -> bool:
    if is_residual and nodes[-1].input[1] != value:
        return False
    for node in nodes:
        if node.input[0] != value:
            return False
        value = node.output[0]
    return True


def _fits(layer: _Layer, shapes: dict[str, list[int]]) -> bool:
    for conv in layer.of("Conv"):
        attributes, (side, stride, pad) = _attributes(conv), CONVOLUTIONS[layer.pattern]
        given = [attributes[name] for name in ("kernel_shape", "strides", "pads", "dilations")]
        if given != [[side] * 2, [stride] * 2, [pad] * 4, [1] * 2]:
            return False
        out, columns, *_ = shapes[conv.input[1]]
        channels = {STEM: out if columns == 3 else 0, DOWNSAMPLE: columns}.get(layer.pattern, attributes["group"])
        if not channels or out % LANES or channels % LANES:
            return False
    return layer.pattern in (GELU_LINEAR, LINEAR) or all(
        size % LANES == 0 for node in layer.of("MatMul") for size in shapes[node.input[1]]
    )


class _Writer:
    """Appends the nodes of layers and their weights."""

    def __init__(self, read: Read, shapes: dict[str, list[int]], data: BinaryIO):
        self._read, self._shapes, self._data = read, shapes, data
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def add(self, layer: _Layer) -> None:
        convolutions, norms, products, sums = (
            layer.of(kind) for kind in ("Conv", "LayerNormalization", "MatMul", "Add")
        )
        value = layer.nodes[0].input[0]
        if layer.pattern == FEATURES:
            shape = np.array([0, -1, self._read(layer.nodes[0].input[1])[1]], np.int64)  # 0: as it is
            inputs = [value, self._store(f"{layer.nodes[1].name}.shape", shape)]
            self.nodes.append(helper.make_node("Reshape", inputs, layer.nodes[1].output, layer.nodes[1].name))
        elif layer.pattern == STEM:
            inputs = [self._vertical(convolutions[0]), self._norm(norms[0])]
            self._node("ConvNextStem", layer, value, inputs, epsilon=_attributes(norms[0])["epsilon"])
        elif layer.pattern == DOWNSAMPLE:
            conv = convolutions[0]
            rows = self._read(conv.input[1]).transpose(0, 2, 3, 1)
            matrix = self._matrix(conv.name, rows.reshape(len(rows), -1), self._read(conv.input[2]))
            inputs = [self._norm(norms[0]), *matrix]
            self._node("ConvNextDownsample", layer, value, inputs, epsilon=_attributes(norms[0])["epsilon"])
        elif layer.pattern in (BLOCK, SCALED_BLOCK):
            gain = self._read(layer.of("Mul")[0].input[1]).reshape(-1) if layer.pattern == SCALED_BLOCK else None
            inputs = [self._vertical(convolutions[0]), self._norm(norms[0])]
            inputs += self._linear(products[0], sums[0]) + self._linear(products[1], sums[1], gain)
            self._node("ConvNextBlock", layer, value, inputs, epsilon=_attributes(norms[0])["epsilon"])
        elif layer.pattern in (GELU_LINEAR, LINEAR) and not any(
            size % LANES for size in self._shapes[products[0].input[1]]
        ):
            inputs = self._linear(products[0], sums[0])
            self._node("Int8Linear", layer, value, inputs, gelu=int(layer.pattern == GELU_LINEAR))
        else:  # as it is
            self.nodes.extend(layer.nodes)
            for name in (name for node in [*products, *sums] for name in node.input[1:]):
                self._store(name, self._read(name))

    def _node(self, kind: str, layer: _Layer, value: str, inputs: list[str], **attributes: Any) -> None:
        last = layer.nodes[-1]
        made = helper.make_node(kind, [value, *inputs], last.output, last.name, domain=DOMAIN, **attributes)
        self.nodes.append(made)

    def _linear(self, product: onnx.NodeProto, bias: onnx.NodeProto, gain: np.ndarray | None = None) -> list[str]:
        return self._matrix(product.name, self._read(product.input[1]).T, self._read(bias.input[1]), gain)

    def _matrix(self, name: str, rows: np.ndarray, bias: np.ndarray, gain: np.ndarray | None = None) -> list[str]:
        codes, parameters = int8_matrix(rows, bias, gain)
        return [self._store(f"{name}.codes", codes), self._store(f"{name}.parameters", parameters)]

    def _norm(self, norm: onnx.NodeProto) -> str:
        return self._store(f"{norm.name}.parameters", np.stack([self._read(name) for name in norm.input[1:]]))

    def _vertical(self, conv: onnx.NodeProto) -> str:
        """float32 [channels / LANES, weights of a channel and its bias, LANES]."""
        weights, bias = (self._read(name) for name in conv.input[1:])
        rows = np.concatenate([weights.reshape(len(weights), -1), bias[:, None]], 1)
        return self._store(f"{conv.name}.parameters", rows.reshape(-1, LANES, rows.shape[1]).transpose(0, 2, 1))

    def _store(self, name: str, values: np.ndarray) -> str:
        self.initializers.append(store(name, np.ascontiguousarray(values), self._data))
        return name


def int8_matrix(rows: np.ndarray, bias: np.ndarray, gain: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """A matrix as the kernels read it.

    Args:
        rows: float32 [N, K], both multiples of LANES.
        bias: float32 [N]. gain: float32 [N], which multiplies what the matrix and the bias give, or None.

    Returns:
        (codes int8 [panels, K / 4, PANEL, 4], parameters float32 [N / LANES, 3, LANES]: scales of the codes, their sums
        times the scale, biases).
    """
    count, columns = rows.shape
    codes = np.zeros((-(-count // PANEL), columns // 4, PANEL, 4), np.int8)
    scales, sums = np.zeros((2, count), np.float32)
    for begin in range(0, count, ROWS_AT_A_TIME):
        part = np.ascontiguousarray(rows[begin : begin + ROWS_AT_A_TIME])
        largest = np.abs(part).max(1)
        scale = largest / np.float32(LARGEST_CODE)
        rounded = np.rint(part / np.where(largest > 0, scale, 1)[:, None]).astype(np.int8)
        scales[begin : begin + len(part)] = scale
        sums[begin : begin + len(part)] = scale * rounded.sum(1, dtype=np.int64)
        padded = np.pad(rounded, ((0, -len(part) % PANEL), (0, 0))).reshape(-1, PANEL, columns // 4, 4)
        codes[begin // PANEL :][: len(padded)] = padded.transpose(0, 2, 1, 3)
    parameters = np.stack([scales, sums, bias]) * (1 if gain is None else gain)
    return codes, parameters.astype(np.float32).reshape(3, -1, LANES).transpose(1, 0, 2)


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
