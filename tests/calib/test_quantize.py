"""Q/DQ encoders: what they are made of, how far they are from float32, and what cannot be quantised."""

import json
import shutil

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, numpy_helper
from PIL import Image

import runtime
from calib.images import find_images, open_images, pixel_values
from calib.qdq import METHODS, calibrate, quantise
from calib.quantize import Options, quantise_bundle
from export.encoder import export_encoder
from runtime.backends import Backends
from runtime.bundle import file_sha256, open_bundle
from runtime.errors import UserError
from tests.conftest import run_module
from tests.export.test_encoder import tiny
from tests.runtime.test_infer import assert_one_line_error


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """20 pictures of several shapes: patches of colour and lines, and noise."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for i in range(20):
        height, width = random.integers(80, 400, 2)
        pixels = np.kron(random.integers(0, 256, (5, 5, 3)), np.ones((height // 5, width // 5, 1)))
        pixels[:: 7 + i] = 0
        pixels = np.clip(pixels + random.normal(0, 5 * (i % 3), pixels.shape), 0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:02}.png")
    return folder


@pytest.fixture(scope="module")
def int8(conformance_bundle, pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp("bundles") / "int8"
    run_module(
        "calib.quantize", "--bundle", conformance_bundle, "--data", pictures, "--precision", "int8", "--out", out
    ).check_returncode()
    return out


def held_out(rule) -> list[np.ndarray]:
    random = np.random.default_rng(5)
    images = [Image.fromarray(np.kron(random.integers(0, 256, (6, 4, 3)), np.ones((50, 50, 1))).astype(np.uint8))]
    return list(pixel_values(images * 2, rule))


def sqnr(found: np.ndarray, expected: np.ndarray) -> float:
    """Signal to quantisation noise, dB."""
    noise = found.astype(np.float64) - expected
    return 10 * np.log10((expected.astype(np.float64) ** 2).sum() / (noise**2).sum())


def values_of(graph) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_convolutions_and_products_take_quantised_inputs_and_nothing_else_does(
    conformance_bundle, pictures, tmp_path, precision
):
    bundle = open_bundle(conformance_bundle)
    source, target = bundle.path("encoder/fp32.onnx"), tmp_path / "q.onnx"
    images = open_images(find_images(pictures, 16))
    ranges, warnings = calibrate(source, pixel_values(images, bundle.image), "minmax")
    assert warnings == []
    quantise(source, target, ranges, precision)
    original, graph = onnx.load(source).graph, onnx.load(target).graph
    weights, values = values_of(original), values_of(graph)
    makers = {name: node for node in graph.node for name in node.output}
    of_kind = {"int8": np.int8, "fp8": ml_dtypes.float8_e4m3fn}[precision]
    largest = {"int8": 127, "fp8": 448}[precision]
    depthwise = {node.name for node in original.node if any(a.name == "group" and a.i > 1 for a in node.attribute)}
    quantised = 0
    for node in graph.node:
        sources = [makers.get(name) for name in node.input]
        if node.op_type in ("Conv", "MatMul") and not (precision == "fp8" and node.name in depthwise):
            activation, weight = sources[:2]
            assert activation.op_type == weight.op_type == "DequantizeLinear"
            assert makers[activation.input[0]].op_type == "QuantizeLinear"
            scale, zero = (values[name] for name in activation.input[1:3])
            assert scale.ndim == 0, "one scale a tensor"
            assert not np.asarray(zero, np.float32).any(), "symmetric"
            assert zero.dtype == of_kind
            rounded, scales, zeros = (values[name] for name in weight.input)
            assert rounded.dtype == of_kind
            assert not np.asarray(zeros, np.float32).any()
            axis = next(a.i for a in weight.attribute if a.name == "axis") % rounded.ndim
            assert axis == (0 if node.op_type == "Conv" else 1), "one scale an output channel"
            plain = weights[weight.input[0].removesuffix("_quantized")].astype(np.float64)
            others = tuple(i for i in range(plain.ndim) if i != axis)
            np.testing.assert_allclose(scales, np.abs(plain).max(others) / largest, rtol=1e-5)
            shape = [-1 if i == axis else 1 for i in range(plain.ndim)]
            restored = rounded.astype(np.float64) * scales.reshape(shape).astype(np.float64)
            step = scales.reshape(shape) * (0.51 if precision == "int8" else 17)
            assert (np.abs(restored - plain) <= step).all()
            quantised += 1
        elif node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            assert not any(source is not None and source.op_type == "DequantizeLinear" for source in sources)
    expected = sum(node.op_type in ("Conv", "MatMul") for node in original.node)
    assert quantised == expected - (len(depthwise) if precision == "fp8" else 0)


def test_scales_are_the_largest_magnitudes_of_the_images(conformance_bundle, pictures, tmp_path):
    """Of the first convolution's input: the pixel values themselves."""
    bundle = open_bundle(conformance_bundle)
    images = open_images(find_images(pictures, 16))
    feeds = list(pixel_values(images, bundle.image))
    source = bundle.path("encoder/fp32.onnx")
    quantise(source, tmp_path / "q.onnx", calibrate(source, feeds, "minmax")[0], "int8")
    graph = onnx.load(tmp_path / "q.onnx").graph
    (first,) = (n for n in graph.node if n.op_type == "QuantizeLinear" and n.input[0] == "pixel_values")
    expected = max(np.abs(feed).max() for feed in feeds) / 127
    assert values_of(graph)[first.input[1]] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_stays_near_float32(conformance_bundle, pictures, tmp_path, method):
    bundle = open_bundle(conformance_bundle)
    source, images = bundle.path("encoder/fp32.onnx"), open_images(find_images(pictures, 16))
    ranges, _ = calibrate(source, pixel_values(images, bundle.image), method)
    quantise(source, tmp_path / "int8.onnx", ranges, "int8")
    (pixels, _) = held_out(bundle.image)
    (found,), (expected,) = (
        onnxruntime.InferenceSession(file).run(None, {"pixel_values": pixels})
        for file in (tmp_path / "int8.onnx", source)
    )
    assert 15 < sqnr(found, expected) < 60


def test_images_come_at_several_sizes_and_ratios(conformance_bundle, pictures):
    rule = open_bundle(conformance_bundle).image
    shapes = [pixels.shape for pixels in pixel_values(open_images(find_images(pictures, 20)), rule)]
    assert {(1, 3, 256, 256), (1, 3, 192, 192), (1, 3, 128, 128)} <= set(shapes)
    assert any(height != width for *_, height, width in shapes)


def test_the_bundle_answers_and_keeps_the_rest(conformance_bundle, int8, pictures):
    before, after = open_bundle(conformance_bundle), open_bundle(int8)
    assert (after.encoder.file, after.encoder.precision) == ("encoder/int8.onnx", "int8")
    assert set(after.files) == {*before.files, "encoder/int8.onnx", "calib/report.json", "calib/report.md"}
    for name in before.files:
        assert file_sha256(after.path(name)) == file_sha256(before.path(name))
    expected = runtime.load(conformance_bundle, backends=Backends(encoder="onnx"))
    images = [pixels[0] for pixels in held_out(before.image)]
    for encoder in ("onnx", "openvino"):
        model = runtime.load(int8, backends=Backends(encoder=encoder))
        assert model.encoder_chosen.precision == "int8"
        assert 20 < sqnr(model.encoder(images), expected.encoder(images)) < 60
    *_, last = model.generate([pictures / "00.png"], "What?", runtime.Options(max_new_tokens=3))
    assert len(last.result.token_ids) == 3
    plain = runtime.load(int8, backends=Backends(encoder="onnx", encoder_precision="fp32"))
    np.testing.assert_array_equal(plain.encoder(images), expected.encoder(images))


def test_fp8_is_for_engines_and_float32_stays(conformance_bundle, pictures, tmp_path):
    done = run_module(
        "calib.quantize",
        "--bundle",
        conformance_bundle,
        "--data",
        pictures,
        "--precision",
        "fp8",
        "--out",
        tmp_path / "b",
    )
    assert done.returncode == 0, done.stderr
    assert "ONNX Runtime goes on with float32" in done.stdout
    bundle = open_bundle(tmp_path / "b")
    assert (bundle.encoder.file, bundle.encoder_file("fp8")) == ("encoder/fp32.onnx", "encoder/fp8.onnx")


def test_fp8_values_are_near_float32(conformance_bundle, pictures, tmp_path):
    """By ONNX's own evaluator, since ONNX Runtime computes nothing in FP8 on a CPU: a small encoder, a small image."""
    export_encoder(tiny(), tmp_path / "fp32.onnx", "fp32")
    rule = open_bundle(conformance_bundle).image
    ranges, _ = calibrate(tmp_path / "fp32.onnx", pixel_values(open_images(find_images(pictures, 16)), rule), "minmax")
    quantise(tmp_path / "fp32.onnx", tmp_path / "fp8.onnx", ranges, "fp8")
    from onnx.reference import ReferenceEvaluator

    pixels = held_out(rule)[1][:, :, :64, :64]
    (found,) = ReferenceEvaluator(onnx.load(tmp_path / "fp8.onnx")).run(None, {"pixel_values": pixels})
    (expected,) = onnxruntime.InferenceSession(tmp_path / "fp32.onnx").run(None, {"pixel_values": pixels})
    assert 15 < sqnr(found, expected) < 50


def test_large_weights_lie_beside_the_graph(pictures, conformance_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr("export.encoder.INLINE_BYTES", 1000)
    export_encoder(tiny(), tmp_path / "fp32.onnx", "fp32")
    rule = open_bundle(conformance_bundle).image
    ranges, _ = calibrate(tmp_path / "fp32.onnx", pixel_values(open_images(find_images(pictures, 16)), rule), "minmax")
    quantise(tmp_path / "fp32.onnx", tmp_path / "int8.onnx", ranges, "int8")
    assert (tmp_path / "int8.onnx.data").stat().st_size > 1000
    onnxruntime.InferenceSession(tmp_path / "int8.onnx")


def test_a_dataset_names_its_images(pictures, tmp_path):
    records = [{"id": str(i), "image": f"{i:02}.png", "conversations": []} for i in range(17)] + [{"id": "text"}]
    for text in (json.dumps(records), "\n".join(map(json.dumps, records))):
        (pictures / "data.json").write_text(text)
        assert [file.name for file in find_images(pictures / "data.json", 100)] == [f"{i:02}.png" for i in range(17)]
        assert len(find_images(pictures / "data.json", 16)) == 16
    (pictures / "data.json").unlink()


def test_a_picture_that_does_not_open_is_named_and_skipped(pictures, tmp_path, capsys):
    folder = shutil.copytree(pictures, tmp_path / "pictures")
    (folder / "05.png").write_bytes(b"no picture")
    assert len(open_images(find_images(folder, 20))) == 19
    assert "05.png" in capsys.readouterr().err


def test_constant_activations_are_warned_of(pictures, conformance_bundle, tmp_path):
    export_encoder(tiny(), tmp_path / "fp32.onnx", "fp32")
    rule = open_bundle(conformance_bundle).image
    feeds = (np.zeros_like(pixels) for pixels in pixel_values(open_images(find_images(pictures, 16)), rule))
    _, warnings = calibrate(tmp_path / "fp32.onnx", feeds, "minmax")
    assert any("pixel_values is zero" in warning for warning in warnings)


def test_what_is_not_finite_is_named(pictures, conformance_bundle, tmp_path):
    export_encoder(tiny(), tmp_path / "fp32.onnx", "fp32")
    model = onnx.load(tmp_path / "fp32.onnx")
    weight = next(tensor for tensor in model.graph.initializer if tensor.data_type == TensorProto.FLOAT)
    broken = numpy_helper.to_array(weight).copy()
    broken.flat[0] = np.inf
    weight.CopyFrom(numpy_helper.from_array(broken, weight.name))
    onnx.save(model, tmp_path / "fp32.onnx")
    feeds = pixel_values(open_images(find_images(pictures, 16)), open_bundle(conformance_bundle).image)
    with pytest.raises(UserError, match="not finite"):
        calibrate(tmp_path / "fp32.onnx", feeds, "minmax")


def test_mistakes_are_one_line(conformance_bundle, pictures, tmp_path):
    few = tmp_path / "few"
    few.mkdir()
    for i in range(15):
        shutil.copy(pictures / f"{i:02}.png", few)
    broken = tmp_path / "broken"
    broken.mkdir()
    for i in range(16):
        (broken / f"{i}.png").write_bytes(b"no picture")
    bundle = open_bundle(conformance_bundle)
    for data, said in (
        (few, "15 images, at least 16"),
        (broken, "0 of 16 images can be opened"),
        (tmp_path / "nowhere", "no such folder"),
        (few / "00.png", "LLaVA's JSON"),
    ):
        with pytest.raises(UserError, match=said):
            quantise_bundle(bundle, tmp_path / "out", data, Options())
    with pytest.raises(UserError, match="the bundle itself"):
        quantise_bundle(bundle, bundle.folder, pictures, Options())
    arguments = ("--bundle", conformance_bundle, "--data", pictures, "--out", tmp_path / "out")
    assert_one_line_error(run_module("calib.quantize", *arguments, "--precision", "int4"), "int4", "int8 or fp8")
    for options, said in (
        ({"samples": 15}, "--samples is 15, expected 16"),
        ({"method": "guess"}, "minmax, entropy, percentile"),
        ({"budget": -1}, "--budget"),
        ({"budget": 0.5, "precision": "fp8"}, "no FP8"),
    ):
        with pytest.raises(UserError, match=said):
            Options(**options)
    assert not (tmp_path / "out").exists()


def test_a_bundle_without_a_float32_encoder(conformance, pictures, tmp_path):
    arguments = ("--checkpoint", conformance / "checkpoint", "--res", 256, "--precision", "fp16")
    run_module("export.bundle", *arguments, "--out", tmp_path / "fp16").check_returncode()
    with pytest.raises(UserError, match=r"no encoder/fp32\.onnx"):
        quantise_bundle(open_bundle(tmp_path / "fp16"), tmp_path / "out", pictures, Options())
