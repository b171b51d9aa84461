"""Bundle -> bundle whose encoder has explicit Q/DQ nodes, for ONNX Runtime, OpenVINO and TensorRT alike.

    python -m calib.quantize --bundle DIR --data FOLDER|dataset.json --precision int8|fp8 --out DIR
                             [--method minmax|entropy|percentile] [--samples N]

Convolutions and products with weights are quantised: weights symmetric for each output channel, activations symmetric
for each tensor, by the range that the calibration images give them (ONNX Runtime's calibrators and quantiser). Their
results, and with them residual sums, LayerNorm and GELU, stay in higher precision, which is where TensorRT wants
the Q/DQ pairs: on what goes into a convolution or product alone. The float32 graph stays in the bundle beside it.
"""

import argparse
import json
import logging
import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.calibrate import TensorsData, create_calibrator, save_tensors_data
from tqdm import tqdm

from calib.images import find_images, open_images, pixel_values
from runtime.bundle import MANIFEST, Bundle, open_bundle, write_bundle
from runtime.errors import UserError

METHODS = {
    "minmax": CalibrationMethod.MinMax,
    "entropy": CalibrationMethod.Entropy,
    "percentile": CalibrationMethod.Percentile,
}
SOURCE = "encoder/fp32.onnx"
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


def quantise(source: Path, target: Path, ranges: TensorsData, precision: str) -> None:
    """Write the Q/DQ graph of the float32 graph `source` to `target` (weights of a large one to `target`.data)."""
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
            nodes_to_exclude=_depthwise(source) if precision == "fp8" else [],
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
    """Let what is neither convolution nor product read the value before it was rounded, in place.

    ONNX Runtime's quantiser gives every reader of a tensor the rounded one, and so would round the residual stream.
    """
    makers = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        if node.op_type in (*QUANTISED, "QuantizeLinear", "DequantizeLinear"):
            continue
        for index, name in enumerate(node.input):
            maker = makers.get(name)
            if maker is not None and maker.op_type == "DequantizeLinear" and maker.input[0] in makers:
                node.input[index] = makers[maker.input[0]].input[0]


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
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    del graph.value_info[:]


def quantise_bundle(
    bundle: Bundle, out: Path, data: Path, precision: str, samples: int, method: str = "minmax"
) -> list[str]:
    """Write a bundle like `bundle`, with a quantised encoder beside the float32 one. Returns warnings.

    INT8 becomes the encoder that the runtime takes by itself; FP8 is for TensorRT alone, and float32 stays the one.
    Raises UserError where the bundle has no float32 encoder, and as `find_images`, `open_images` and `calibrate`.
    """
    if SOURCE not in bundle.files:
        raise UserError(f"{bundle.folder} has no {SOURCE} to quantise; export it with --precision fp32")
    images = open_images(find_images(data, samples))
    manifest = json.loads((bundle.folder / MANIFEST).read_text(encoding="utf-8"))
    sections = {name: manifest[name] for name in ("image", "prompt", "tokenizer", "encoder", "decoder")}
    feeds = tqdm(pixel_values(images, bundle.image), "calibrating", len(images), unit="image", disable=None)
    ranges, warnings = calibrate(bundle.path(SOURCE), feeds, method)

    def fill(folder: Path) -> dict[str, Any]:
        for name in bundle.files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle.path(name), folder / name)  # not linked: onnx refuses linked weights
        quantise(bundle.path(SOURCE), folder / "encoder" / f"{precision}.onnx", ranges, precision)
        if precision == "int8":
            sections["encoder"] |= {"file": f"encoder/{precision}.onnx", "precision": precision}
        return sections

    write_bundle(out, fill, bundle.name, manifest["producers"])
    return warnings


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m calib.quantize", description=__doc__.split("\n")[0])
    parser.add_argument("--bundle", help="folder made by export.bundle; default: the demo model's")
    parser.add_argument("--data", type=Path, required=True, help="folder of images, or a dataset in LLaVA's JSON")
    parser.add_argument("--precision", default="int8", help="int8 (default), or fp8 for TensorRT")
    parser.add_argument("--method", default="minmax", help="of ranges: minmax (default), entropy or percentile")
    parser.add_argument("--samples", type=int, default=64, metavar="N", help="images taken of the data; default: 64")
    parser.add_argument("--out", type=Path, required=True, help="the new bundle's folder")
    args = parser.parse_args()
    if args.precision not in PRECISIONS:
        raise UserError(f"unknown --precision {args.precision!r}, expected {' or '.join(PRECISIONS)}")
    if args.method not in METHODS:
        raise UserError(f"unknown --method {args.method!r}, expected one of {', '.join(METHODS)}")
    if args.samples < 1:
        raise UserError(f"--samples is {args.samples}, expected 1 or more")
    bundle = open_bundle(args.bundle)
    for warning in quantise_bundle(bundle, args.out, args.data, args.precision, args.samples, args.method):
        print(f"warning: {warning}", file=sys.stderr)
    size = (args.out / "encoder" / f"{args.precision}.onnx").stat().st_size
    note = "" if args.precision == "int8" else "; for engines, ONNX Runtime goes on with float32"
    print(f"{args.out}: encoder {args.precision}, {size / 1e6:.1f} MB{note}")
    return 0


def run() -> None:
    """Exit with main's status; with 2 and one line for what the user can put right."""
    try:
        sys.exit(main())
    except (UserError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    run()
