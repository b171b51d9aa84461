"""A float32 graph -> the same graph with Q/DQ nodes on what convolutions and products take.

Weights are symmetric for each output channel, activations symmetric for each tensor, by the range that the calibration
images give them (ONNX Runtime's calibrators and quantiser). Results, and with them residual sums, LayerNorm and GELU,
stay in higher precision, so that the Q/DQ pairs are where TensorRT wants them: on what goes into a convolution or
product alone.
"""

import logging
import tempfile
from collections.abc import Collection, Iterable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.calibrate import TensorsData, create_calibrator, save_tensors_data

from runtime.errors import UserError

METHODS = {
    "minmax": CalibrationMethod.MinMax,
    "entropy": CalibrationMethod.Entropy,
    "percentile": CalibrationMethod.Percentile,
}
PRECISIONS = ("int8", "fp8")
QUANTISED = ("Conv", "MatMul")
LARGEST_FP8 = 448.0  # of E4M3
LARGEST_INT8 = 127.0


class _One(CalibrationDataReader):
    """One image for ONNX Runtime's calibrator."""

    def __init__(self, pixels: np.ndarray):
        self._feeds = [{"pixel_values": pixels}]

    def get_next(self) -> dict[str, np.ndarray] | None:
        return self._feeds.pop() if self._feeds else None


def calibrate(source: Path, images: Iterable[np.ndarray], method: str) -> tuple[TensorsData, list[str]]:
    """(the range of each tensor that convolutions and products take, warnings that name a tensor).

    source: a float32 graph. images: float32 [1, 3, H, W] each. method: a key of `METHODS`.
    Raises UserError for a tensor that is not finite, naming it.
    """
    with tempfile.TemporaryDirectory() as folder:
        calibrator = create_calibrator(
            source,
            list(QUANTISED),
            str(Path(folder, "augmented.onnx")),
            METHODS[method],
            use_external_data_format=_is_large(source),
            extra_options={"symmetric": True},
        )
        for pixels in images:  # one at a time: histograms are merged, not the tensors that they are of
            calibrator.collect_data(_One(pixels))
        ranges = calibrator.compute_data()
    warnings = []
    for name, data in ranges.items():
        low, high = (np.max(np.abs(value)) for value in data.range_value)
        if not np.isfinite([low, high]).all():
            raise UserError(f"{name} is not finite on the calibration images; the checkpoint is broken")
        if max(low, high) == 0:
            warnings.append(f"{name} is zero on every calibration image; its scale means nothing")
    return ranges, warnings


def quantise(source: Path, target: Path, ranges: TensorsData, precision: str, spared: Collection[str] = ()) -> None:
    """Write the Q/DQ graph of the float32 graph `source` to `target` (weights of a large one to `target`.data).

    spared: names of convolutions and products that are left as they are.
    """
    logging.getLogger().setLevel(logging.ERROR)  # ONNX Runtime's quantiser advises at every call
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder, "ranges.json")  # how quantize_static takes ranges that are known
        save_tensors_data(ranges, cache)
        quantize_static(
            str(source),
            str(target),
            None,
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(QUANTISED),
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=[*spared, *(_depthwise(source) if precision == "fp8" else [])],
            use_external_data_format=_is_large(source),
            calibrate_method=ranges.calibration_method,
            calibration_cache_path=cache,
            extra_options={
                "ActivationSymmetric": True,
                "WeightSymmetric": True,
                "MatMulConstBOnly": True,
                "OpTypesToExcludeOutputQuantization": list(QUANTISED),
                "QDQOpTypePerChannelSupportToAxis": {"MatMul": 1},
                "QuantizeBias": False,
            },
        )
    model = onnx.load(str(target))
    _spare_the_others(model.graph)
    if precision == "fp8":
        _to_fp8(model, onnx.load(str(source)))
    _save(model, target, _is_large(source))


def _is_large(source: Path) -> bool:
    return source.with_name(f"{source.name}.data").is_file()


def _spare_the_others(graph: onnx.GraphProto) -> None:
    """Let what has no quantised weights read the value before it was rounded, in place.

    ONNX Runtime's quantiser gives every reader of a tensor the rounded one, and so would round the residual stream.
    """
    makers = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        weights = makers.get(node.input[1]) if node.op_type in QUANTISED else None
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
    size = -1
    while len(graph.node) != size:
        size, used = len(graph.node), outputs | {name for node in graph.node for name in node.input}
        for i in reversed(range(size)):
            if used.isdisjoint(graph.node[i].output):
                del graph.node[i]
    for i in reversed(range(len(graph.initializer))):
        if graph.initializer[i].name not in used:
            del graph.initializer[i]


def _depthwise(source: Path) -> list[str]:
    """Names of the depthwise convolutions; TensorRT has none in FP8 and would dequantise their weights at each run."""
    graph = onnx.load(str(source), load_external_data=False).graph
    grouped = lambda node: any(a.name == "group" and a.i > 1 for a in node.attribute)  # noqa: E731
    return [node.name for node in graph.node if node.op_type == "Conv" and grouped(node)]


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
    zero = numpy_helper.from_array(np.zeros((), ml_dtypes.float8_e4m3fn), "fp8/zero")
    for node in graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        weights, scale = values.get(node.input[0]), values[node.input[1]]
        if scale.name not in done:
            done.add(scale.name)
            wider = numpy_helper.to_array(scale) * np.float32(LARGEST_INT8 / LARGEST_FP8)
            scale.CopyFrom(numpy_helper.from_array(wider.astype(np.float32), scale.name))
        if weights is not None:
            original = numpy_helper.to_array(originals[weights.name.removesuffix("_quantized")])
            axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
            scales = numpy_helper.to_array(scale)
            shape = [-1 if i == axis % original.ndim else 1 for i in range(original.ndim)]
            scaled = original / (scales.reshape(shape) if scales.ndim else scales)
            weights.CopyFrom(numpy_helper.from_array(scaled.astype(ml_dtypes.float8_e4m3fn), weights.name))
        if scale_is_vector := bool(values[node.input[1]].dims):
            name = f"{node.input[1]}/zero"
            if name not in values:
                zeros = np.zeros(tuple(values[node.input[1]].dims), ml_dtypes.float8_e4m3fn)
                values[name] = numpy_helper.from_array(zeros, name)
                graph.initializer.append(values[name])
        node.input[2] = name if scale_is_vector else zero.name
    graph.initializer.append(zero)
    _drop_unused(graph)
    del graph.value_info[:]
