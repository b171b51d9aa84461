"""A float32 graph -> the same graph with Q/DQ nodes on what convolutions and products take.

Weights are symmetric for each output channel, activations symmetric for each tensor, by the ranges that the calibration
images give them (`calib.activations`); ONNX Runtime's quantiser places the nodes. Results, and with them residual sums,
LayerNorm and GELU, stay in higher precision, so that the Q/DQ pairs are where TensorRT wants them: on what goes into a
convolution or product alone. Biases take up the mean error of what was rounded.
"""

import contextlib
import logging
import tempfile
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.calibrate import TensorData, TensorsData, save_tensors_data

from calib.activations import INPUT, KINDS, LARGEST, QUANTIZED
from export.graphs.load import load_graph
from runtime.backends.ort_session import open_session


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
    with tempfile.TemporaryDirectory() as folder, _only_errors_logged():
        cache = Path(folder, "ranges.json")  # how quantize_static takes ranges that are known
        data: dict[str, TensorData | tuple] = {
            name: TensorData(lowest=np.float32(-largest), highest=np.float32(largest))
            for name, largest in ranges.items()
        }
        save_tensors_data(TensorsData(CalibrationMethod.MinMax, data), cache)
        quantize_static(
            load_graph(source),  # of a path it writes a second file beside it
            str(target),
            None,
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(QUANTIZED),
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=list(excluded),
            use_external_data_format=_is_large(source),
            calibrate_method=CalibrationMethod.MinMax,
            calibration_cache_path=cache,
            extra_options={
                "ActivationSymmetric": True,
                "WeightSymmetric": True,
                "MatMulConstBOnly": True,
                "OpTypesToExcludeOutputQuantization": list(QUANTIZED),
                "QDQOpTypePerChannelSupportToAxis": {"MatMul": 1},
                "QuantizeBias": False,
            },
        )
    model, original = onnx.load(str(target)), load_graph(source)
    _restore_other_readers(model.graph)
    if precision == "fp8":
        _to_fp8(model, original)
    if means is not None:
        _correct_biases(model.graph, original.graph, means)
    _save(model, target, _is_large(source))


@contextlib.contextmanager
def _only_errors_logged() -> Iterator[None]:
    """ONNX Runtime's quantizer gives advice on the root logger at every call."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)


def measure_means(
    source: Path, ranges: dict[str, float], precision: str, images: Iterable[tuple[str, np.ndarray]]
) -> dict[str, Mean]:
    """The means of the tensors in `ranges` over `images`, each of which counts alike: (name, float32 [1, 3, H, W])."""
    model = load_graph(source)
    graph = model.graph
    maps = {node.input[0] for node in graph.node if node.op_type == "Conv"}  # [1, C, H, W]; products take [1, ..., C]
    outputs = []

    def add_node(kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        graph.node.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def add_constant(name: str, value: np.ndarray) -> str:
        graph.initializer.append(numpy_helper.from_array(value, name))
        return name

    zero = add_constant("mean/zero", np.zeros((), KINDS[precision]))
    of_map, of_rows = add_constant("mean/of_map", np.array([0, 2, 3])), add_constant("mean/of_rows", np.array([0]))
    for i, (name, largest) in enumerate(ranges.items()):
        scale = add_constant(f"mean/{i}/scale", np.array(largest / LARGEST[precision] or 1, np.float32))
        rounded = add_node("QuantizeLinear", [name, scale, zero], f"mean/{i}/quantised")
        rounded = add_node("DequantizeLinear", [rounded, scale, zero], f"mean/{i}/dequantised")
        for value, output in ((name, f"mean/{i}/plain"), (rounded, f"mean/{i}/rounded")):
            if name not in maps:
                value = add_node("Flatten", [value], f"{output}/rows", axis=-1)
            outputs.append(add_node("ReduceMean", [value, of_map if name in maps else of_rows], output, keepdims=0))
    del graph.output[:]
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "means.onnx")
        _save(model, file, _is_large(source))
        session = open_session(file, None)
        found = [session.run(outputs, {INPUT: pixels}) for _, pixels in images]
    means = [np.asarray(values, np.float64).mean(0) for values in zip(*found, strict=True)]
    return {name: Mean(*pair) for name, pair in zip(ranges, zip(means[::2], means[1::2], strict=True), strict=True)}


def _correct_biases(graph: onnx.GraphProto, original: onnx.GraphProto, means: dict[str, Mean]) -> None:
    """Add to the bias after each quantised convolution and product what rounding took from the mean of its result, in
    place (the bias correction of arXiv 1906.04721, with what the activations lose as well).

    What a convolution pads with counts as if it were the mean too, so that a wide kernel on a small map is corrected by
    a little too much.
    """
    plain = {tensor.name: tensor for tensor in original.initializer}
    values = {tensor.name: tensor for tensor in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    readers = {name: node for node in graph.node for name in node.input}
    weights_of = {node.name: node.input[1] for node in original.node if node.op_type in QUANTIZED}
    for node in graph.node:
        weights = makers.get(node.input[1]) if node.op_type in QUANTIZED else None
        if weights is None or weights.op_type != "DequantizeLinear":
            continue
        adds = node if node.op_type == "Conv" else readers.get(node.output[0], node)
        if adds.op_type not in ("Conv", "Add"):
            continue
        place = next((i for i, name in enumerate(adds.input) if name in values and len(values[name].dims) == 1), None)
        if place is None:
            continue
        pair = makers[node.input[0]]  # DequantizeLinear of QuantizeLinear
        mean = means[makers[pair.input[0]].input[0]]
        scale, levels = (numpy_helper.to_array(values[weights.input[i]]).astype(np.float64) for i in (1, 0))
        rounded = levels * _along(scale, _axis(weights), levels.ndim)
        exact = numpy_helper.to_array(plain[weights_of[node.name]])
        lost = _mean_result(node, exact, mean.plain) - _mean_result(node, rounded, mean.rounded)
        bias = numpy_helper.to_array(values[adds.input[place]])
        name = f"{node.name}/bias"  # its own: another layer may share the one it had
        graph.initializer.append(numpy_helper.from_array((bias + lost).astype(np.float32), name))
        adds.input[place] = name
    _drop_unused(graph)


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


def _axis(node: onnx.NodeProto) -> int:
    """Of a QuantizeLinear's or DequantizeLinear's scales."""
    return next((a.i for a in node.attribute if a.name == "axis"), 1)


def _along(scale: np.ndarray, axis: int, ndim: int) -> np.ndarray:
    """Scales [C] shaped to multiply an array of `ndim` axes; a scalar as it is."""
    return scale.reshape([-1 if i == axis % ndim else 1 for i in range(ndim)]) if scale.ndim else scale


def _is_large(source: Path) -> bool:
    return source.with_name(f"{source.name}.data").is_file()


def _restore_other_readers(graph: onnx.GraphProto) -> None:
    """Let what has no quantised weights read the value before it was rounded, in place.

    ONNX Runtime's quantiser gives every reader of a tensor the rounded one, and so would round the residual stream.
    """
    makers = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        weights = makers.get(node.input[1]) if node.op_type in QUANTIZED else None
        quantised = weights is not None and weights.op_type == "DequantizeLinear"
        if quantised or node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            continue
        for index, name in enumerate(node.input):
            maker = makers.get(name)
            if maker is not None and maker.op_type == "DequantizeLinear" and maker.input[0] in makers:
                node.input[index] = makers[maker.input[0]].input[0]
    _drop_unused(graph)


def _drop_unused(graph: onnx.GraphProto) -> None:
    """Q/DQ nodes that nothing reads any longer, and initializers of nobody, in place."""
    outputs = {value.name for value in graph.output}
    while True:
        used = outputs | {name for node in graph.node for name in node.input}
        unused = [i for i, node in enumerate(graph.node) if used.isdisjoint(node.output)]
        if not unused:
            break
        for i in reversed(unused):
            del graph.node[i]
    for i in reversed(range(len(graph.initializer))):
        if graph.initializer[i].name not in used:
            del graph.initializer[i]


def _save(model: onnx.ModelProto, target: Path, large: bool) -> None:
    for file in target.parent.glob(f"{target.name}*"):
        file.unlink()
    where = {"save_as_external_data": True, "location": f"{target.name}.data"} if large else {}
    onnx.save(model, str(target), **where)


def _to_fp8(model: onnx.ModelProto, source: onnx.ModelProto) -> None:
    """The INT8 graph's nodes with E4M3 in place of INT8, weights rounded anew from the float32 ones, in place."""
    graph = model.graph
    values = {tensor.name: tensor for tensor in graph.initializer}
    originals = {tensor.name: tensor for tensor in source.graph.initializer}
    done: set[str] = set()
    zero = numpy_helper.from_array(np.zeros((), KINDS["fp8"]), "fp8/zero")
    for node in graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        weights, scale = values.get(node.input[0]), values[node.input[1]]
        if scale.name not in done:
            done.add(scale.name)
            wider = numpy_helper.to_array(scale) * np.float32(LARGEST["int8"] / LARGEST["fp8"])
            scale.CopyFrom(numpy_helper.from_array(wider.astype(np.float32), scale.name))
        if weights is not None:
            original = numpy_helper.to_array(originals[weights.name.removesuffix("_quantized")])
            scaled = original / _along(numpy_helper.to_array(scale), _axis(node), original.ndim)
            weights.CopyFrom(numpy_helper.from_array(scaled.astype(KINDS["fp8"]), weights.name))
        name = f"{scale.name}/zero" if scale.dims else zero.name
        if scale.dims and name not in values:
            values[name] = numpy_helper.from_array(np.zeros(tuple(scale.dims), KINDS["fp8"]), name)
            graph.initializer.append(values[name])
        node.input[2] = name
    graph.initializer.append(zero)
    _drop_unused(graph)
    del graph.value_info[:]
