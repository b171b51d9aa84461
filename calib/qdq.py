"""A float32 graph -> the same graph with Q/DQ nodes on what convolutions and matmuls take.

Weights are symmetric for each output channel, activations symmetric for each tensor, by the ranges that the calibration
images give them (`calib.activations`). Results, and with them residual sums, LayerNorm and GELU, stay in higher
precision, so that the Q/DQ pairs are where TensorRT wants them: on the inputs of convolutions and matmuls alone. Biases
take up the mean error of what was rounded. Weights are read and written one at a time.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper

from calib.activations import CUT_AFTER, INPUT, KINDS, LARGEST, QUANTIZED
from calib.pieces import Pieces, mapped_values
from export.graphs.store import store


@dataclass(frozen=True)
class Mean:
    """Of a tensor's channels over calibration images, float64 [C]: as it is, and rounded."""

    plain: np.ndarray
    rounded: np.ndarray


@dataclass(frozen=True)
class Calibrated:
    """A float32 graph and what its Q/DQ graph is made with: see `quantize`."""

    source: Path
    precision: str
    ranges: dict[str, float]
    means: dict[str, Mean] | None = None

    def write(self, target: Path, excluded: Collection[str] = ()) -> None:
        """The Q/DQ graph, but for the convolutions and products named in `excluded`."""
        quantize(self.source, target, self.ranges, self.precision, excluded, self.means)


def quantize(
    source: Path,
    target: Path,
    ranges: dict[str, float],
    precision: str,
    excluded: Collection[str] = (),
    means: dict[str, Mean] | None = None,
) -> None:
    """Write the Q/DQ graph of the float32 graph `source` to `target` (weights of a large one to `target`.data).

    Args:
        ranges: the largest magnitude of each input of a convolution or matmul.
        excluded: names of convolutions and matmuls to keep in higher precision.
        means: of the same tensors, to correct biases by; None keeps the biases.
    """
    for file in target.parent.glob(f"{target.name}*"):
        file.unlink()
    model = onnx.load(str(source), load_external_data=False)
    if source.with_name(f"{source.name}.data").is_file():
        with open(f"{target}.data", "wb") as data:
            _rewrite(model.graph, source, _Rounding(precision, ranges, set(excluded), means), data)
    else:
        _rewrite(model.graph, source, _Rounding(precision, ranges, set(excluded), means), None)
    del model.graph.value_info[:]
    onnx.save(model, str(target))


@dataclass(frozen=True)
class _Rounding:
    """The arguments of `quantize`."""

    precision: str
    ranges: dict[str, float]
    excluded: set[str]
    means: dict[str, Mean] | None

    @property
    def kind(self) -> np.dtype:
        return KINDS[self.precision]

    def scales(self, largest: np.ndarray) -> np.ndarray:
        """float32, of magnitudes; 1 for zero."""
        scales = (largest.astype(np.float64) / LARGEST["int8"]).astype(np.float32)
        scales = np.where(scales < np.finfo(np.float32).tiny, np.float32(1), scales)
        return scales if self.precision == "int8" else scales * np.float32(LARGEST["int8"] / LARGEST[self.precision])

    def codes(self, weights: np.ndarray, scales: np.ndarray) -> np.ndarray:
        """scales: shaped to divide by."""
        scaled = weights / scales
        return (np.rint(scaled) if self.precision == "int8" else scaled).astype(self.kind)


def _rewrite(graph: onnx.GraphProto, source: Path, rounding: _Rounding, data: BinaryIO | None) -> None:
    """Put Q/DQ nodes into a graph, in place. data: where large tensors go; None keeps them in the graph."""
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    readers = {name: node for node in graph.node for name in node.input}
    nodes: list[onnx.NodeProto] = []
    stored: list[onnx.TensorProto] = []
    paired: set[str] = set()

    def keep(name: str, values: np.ndarray) -> str:
        stored.append(numpy_helper.from_array(np.asarray(values), name) if data is None else store(name, values, data))
        return name

    def dequantized(name: str, scales: np.ndarray, codes: np.ndarray | None = None, **axis: int) -> None:
        """A Q/DQ pair on the tensor `name`, or a DQ of `codes` in its place."""
        by = [keep(f"{name}_scale", scales), keep(f"{name}_zero_point", np.zeros(scales.shape, rounding.kind))]
        pair = [f"{name}_QuantizeLinear", f"{name}_DequantizeLinear"]
        if codes is None:
            rounded = f"{pair[0]}_Output"
            nodes.append(helper.make_node("QuantizeLinear", [name, *by], [rounded], pair[0]))
        else:
            rounded = keep(f"{name}_quantized", codes)
        nodes.append(helper.make_node("DequantizeLinear", [rounded, *by], [f"{pair[1]}_Output"], pair[1], **axis))

    for node in graph.node:
        if node.op_type in QUANTIZED and node.input[1] in tensors and node.name not in rounding.excluded:
            taken, matrix = node.input[:2]
            weights = mapped_values(tensors[matrix], source)
            axis = 0 if node.op_type == "Conv" else 1
            scales = rounding.scales(np.abs(weights).max(tuple(i for i in range(weights.ndim) if i != axis)))
            along = scales.reshape([-1 if i == axis else 1 for i in range(weights.ndim)])
            codes = rounding.codes(weights, along)
            if rounding.means is not None:
                mean, restored = rounding.means[taken], codes.astype(np.float64) * along
                lost = _mean_result(node, weights, mean.plain) - _mean_result(node, restored, mean.rounded)
                for adds, place in _bias_of(node, readers, tensors):
                    bias = mapped_values(tensors[adds.input[place]], source)
                    # its own: another layer may share the one it had
                    adds.input[place] = keep(f"{node.name}/bias", (bias + lost).astype(np.float32))
            if taken not in paired:
                paired.add(taken)
                dequantized(taken, rounding.scales(np.array(rounding.ranges[taken], np.float32)))
            node.input[0] = f"{taken}_DequantizeLinear_Output"
            if matrix not in paired:
                paired.add(matrix)
                dequantized(matrix, scales, codes, axis=axis)
            node.input[1] = f"{matrix}_DequantizeLinear_Output"
        nodes.append(node)
    used = {name for node in nodes for name in node.input}
    for name, tensor in tensors.items():
        if name in used:
            keep(name, mapped_values(tensor, source))
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(stored)


def measure_means(
    source: Path, ranges: dict[str, float], precision: str, images: Iterable[tuple[str, np.ndarray]]
) -> dict[str, Mean]:
    """The means of the tensors in `ranges` over `images`, each of which counts alike: (name, float32 [1, 3, H, W])."""
    graph = onnx.load(str(source), load_external_data=False).graph
    maps = {node.input[0] for node in graph.node if node.op_type == "Conv"}  # [1, C, H, W]; products take [1, ..., C]
    scales = {name: np.array(largest / LARGEST[precision] or 1, np.float32) for name, largest in ranges.items()}
    sessions = {is_map: _averaging(is_map, precision) for is_map in (True, False)}
    pieces = Pieces(source, list(ranges), CUT_AFTER)
    found: dict[str, list] = {name: [] for name in ranges}
    for _, pixels in images:
        for values in pieces({INPUT: pixels}):
            for name, value in values.items():
                found[name].append(sessions[name in maps].run(None, {"x": value, "scale": scales[name]}))
    return {name: Mean(*np.asarray(pairs, np.float64).mean(0)) for name, pairs in found.items()}


def _averaging(is_map: bool, precision: str) -> onnxruntime.InferenceSession:
    """x, scale -> the means of its channels as it is and rounded. is_map: [1, C, H, W], else [1, ..., C]."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["codes"]),
        helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["rounded"]),
    ]
    for value, mean in (("x", "plain_mean"), ("rounded", "rounded_mean")):
        if not is_map:
            nodes.append(helper.make_node("Flatten", [value], [f"{value}/rows"], axis=-1))
        rows = value if is_map else f"{value}/rows"
        nodes.append(helper.make_node("ReduceMean", [rows, "axes"], [mean], keepdims=0))
    graph = helper.make_graph(
        nodes,
        "means",
        [helper.make_tensor_value_info("x", 1, None), helper.make_tensor_value_info("scale", 1, [])],
        [onnx.ValueInfoProto(name=name) for name in ("plain_mean", "rounded_mean")],
        [
            numpy_helper.from_array(np.zeros((), KINDS[precision]), "zero"),
            numpy_helper.from_array(np.array([0, 2, 3] if is_map else [0]), "axes"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.enable_cpu_mem_arena = False  # the largest tensors would stay
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _bias_of(
    node: onnx.NodeProto, readers: dict[str, onnx.NodeProto], tensors: dict[str, onnx.TensorProto]
) -> list[tuple[onnx.NodeProto, int]]:
    """The node that adds a bias to what a convolution or matmul gives, and at which input; none where there is none.

    The bias takes up what rounding takes from the mean of the result (the bias correction of arXiv 1906.04721, with
    what the activations lose as well). What a convolution pads with counts as if it were the mean too, so that a wide
    kernel on a small map is corrected by a little too much.
    """
    adds = node if node.op_type == "Conv" else readers.get(node.output[0], node)
    if adds.op_type not in ("Conv", "Add"):
        return []
    return [(adds, i) for i, name in enumerate(adds.input) if name in tensors and len(tensors[name].dims) == 1][:1]


def _mean_result(node: onnx.NodeProto, weights: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """[output channels], of a product with weights [C, D] or a convolution with [D, C or 1, h, w]."""
    weights = weights.astype(np.float64)
    if node.op_type == "MatMul":
        return mean @ weights
    kernel = weights.sum(axis=(2, 3))
    return kernel[:, 0] * mean if is_depthwise(node) else kernel @ mean


def is_depthwise(node: onnx.NodeProto) -> bool:
    """TensorRT has none in FP8 and would dequantise their weights at each run; in INT8 they are slower on a CPU than in
    float32."""
    return node.op_type == "Conv" and any(a.name == "group" and a.i > 1 for a in node.attribute)
