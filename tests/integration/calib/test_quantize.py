"""Q/DQ encoders: what they are made of, how far they are from float32, and what cannot be quantised."""

import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper
from PIL import Image

import runtime
from calib.activations import METHODS, Activations, activations_of
from calib.encoder import EncoderOptions, quantize_encoder_bundle, ranges_file
from calib.images import Page, calibration_pixels, find_pages
from calib.qdq import is_depthwise, measure_means, quantize
from export.encoder import export_encoder
from runtime.backends import select as backends
from runtime.backends.ort_session import open_session
from runtime.backends.select import Backends
from runtime.bundle.manifest import open_bundle
from runtime.bundle.verify import file_sha256
from runtime.device.cpuinfo import int8_sums_saturate
from runtime.errors import UserError
from tests.integration.export.test_encoder import tiny
from tests.support.bundles import exported
from tests.support.commands import assert_one_line_error, run_main


@pytest.fixture(scope="module")
def int8(conformance_bundle, pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp("bundles") / "int8"
    run_main(
        "calib.quantize", "--bundle", conformance_bundle, "--data", pictures, "--precision", "int8", "--out", out
    ).check_returncode()
    return out


def held_out(rule, folder) -> list[np.ndarray]:
    """One other picture at two sizes."""
    pixels = np.kron(np.random.default_rng(5).integers(0, 256, (6, 4, 3)), np.ones((50, 50, 1))).astype(np.uint8)
    for name in "ab":
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return [feed for _, feed in calibration_pixels([Page(folder / "a.png"), Page(folder / "b.png")], rule)]


def feeds_of(bundle, pictures, count=16) -> list[tuple[str, np.ndarray]]:
    return list(calibration_pixels(find_pages(pictures)[:count], bundle.image))


def ranges_of(source, feeds, method="minmax") -> dict[str, float]:
    activations = Activations(source)
    activations.collect(feeds)
    return activations.ranges(method)[0]


def depthwise(graph) -> list[str]:
    return [node.name for node in graph.node if is_depthwise(node)]


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
    original = onnx.load(source).graph
    ranges = ranges_of(source, feeds_of(bundle, pictures))
    assert list(ranges) == activations_of(original)
    spared = depthwise(original) if precision == "fp8" else []
    assert depthwise(original)
    quantize(source, target, ranges, precision, spared)
    graph = onnx.load(target).graph
    weights, values = values_of(original), values_of(graph)
    makers = {name: node for node in graph.node for name in node.output}
    of_kind = {"int8": np.int8, "fp8": ml_dtypes.float8_e4m3fn}[precision]
    largest = {"int8": 127, "fp8": 448}[precision]
    quantised = 0
    for node in graph.node:
        sources = [makers.get(name) for name in node.input]
        if node.op_type in ("Conv", "MatMul") and node.name not in spared:
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
    assert quantised == expected - len(spared)


def test_scales_are_the_largest_magnitudes_of_the_images(conformance_bundle, pictures, tmp_path):
    """Of the first convolution's input: the pixel values themselves."""
    bundle = open_bundle(conformance_bundle)
    feeds = feeds_of(bundle, pictures)
    source = bundle.path("encoder/fp32.onnx")
    quantize(source, tmp_path / "q.onnx", ranges_of(source, feeds), "int8")
    graph = onnx.load(tmp_path / "q.onnx").graph
    (first,) = (n for n in graph.node if n.op_type == "QuantizeLinear" and n.input[0] == "pixel_values")
    expected = max(np.abs(feed).max() for _, feed in feeds) / 127
    assert values_of(graph)[first.input[1]] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_stays_near_float32(conformance_bundle, pictures, tmp_path, method):
    bundle = open_bundle(conformance_bundle)
    source = bundle.path("encoder/fp32.onnx")
    quantize(source, tmp_path / "int8.onnx", ranges_of(source, feeds_of(bundle, pictures), method), "int8")
    pixels, _ = held_out(bundle.image, tmp_path)
    (found,), (expected,) = (
        open_session(file, None).run(None, {"pixel_values": pixels}) for file in (tmp_path / "int8.onnx", source)
    )
    assert 25 < sqnr(found, expected) < 40, "ranges three times too large give 21.8 dB at most, too small 6"


def conv_and_product(tmp_path):
    """pixel_values -> a convolution with bias -> its pixels times a matrix, plus a bias that the convolution shares."""
    random = np.random.default_rng(3)
    kernel = (random.standard_normal((8, 3, 1, 1)) * 0.3).astype(np.float32)
    matrix = random.standard_normal((8, 8)).astype(np.float32)
    matrix[:, 0] = 0.9  # with errors that do not cancel
    bias = random.standard_normal(8).astype(np.float32)
    nodes = [
        onnx.helper.make_node("Conv", ["pixel_values", "kernel", "bias"], ["maps"], name="conv"),
        onnx.helper.make_node("Transpose", ["maps"], ["rows"], perm=[0, 2, 3, 1]),
        onnx.helper.make_node("MatMul", ["rows", "matrix"], ["product"], name="product"),
        onnx.helper.make_node("Add", ["product", "bias"], ["out"], name="add"),
    ]
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [onnx.helper.make_tensor_value_info("pixel_values", 1, [1, 3, "h", "w"])],
        [onnx.helper.make_tensor_value_info("out", 1, [1, "h", "w", 8])],
        [numpy_helper.from_array(v, n) for n, v in (("kernel", kernel), ("matrix", matrix), ("bias", bias))],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9)
    onnx.save(model, tmp_path / "plain.onnx")
    return tmp_path / "plain.onnx"


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_biases_take_up_the_mean_error(tmp_path, precision):
    """Ranges are far too wide here, so that rounding errs by much; the mean of what each layer gives stays."""
    source = conv_and_product(tmp_path)
    random = np.random.default_rng(0)
    feeds = [(f"{i}", random.uniform(0.2, 1, (1, 3, 16, 16)).astype(np.float32)) for i in range(3)]
    ranges = {name: most * (40 if precision == "int8" else 1) for name, most in ranges_of(source, feeds).items()}
    means = measure_means(source, ranges, precision, feeds)
    session = onnxruntime.InferenceSession(source)
    outputs = {}
    for name, corrected in (("plain", None), ("corrected", means)):
        quantize(source, tmp_path / f"{name}-q.onnx", ranges, precision, means=corrected)
        outputs[name] = open_session(tmp_path / f"{name}-q.onnx", None)
    errors = {}
    for name, quantised in outputs.items():
        images = [{"pixel_values": pixels} for _, pixels in feeds]
        differences = [quantised.run(None, image)[0] - session.run(None, image)[0] for image in images]
        errors[name] = np.mean(differences, axis=(0, 1, 2, 3))
    assert np.abs(errors["corrected"]).max() < 0.3 * np.abs(errors["plain"]).max()
    # the means themselves, against numpy in float64
    pixels = np.concatenate([x for _, x in feeds]).astype(np.float64)
    np.testing.assert_allclose(means["pixel_values"].plain, pixels.mean((0, 2, 3)), rtol=1e-5)
    if precision == "int8":
        step = ranges["pixel_values"] / 127
        np.testing.assert_allclose(
            means["pixel_values"].rounded, (np.rint(pixels / step) * step).mean((0, 2, 3)), rtol=1e-4
        )
    graph = onnx.load(tmp_path / "corrected-q.onnx").graph
    values = values_of(graph)
    conv, add = (next(node for node in graph.node if node.name == name) for name in ("conv", "add"))
    assert conv.input[2] != add.input[1], "the two layers shared a bias and have one each now"
    assert not np.allclose(values[conv.input[2]], values[add.input[1]])


def test_images_come_at_several_sizes_and_ratios(conformance_bundle, pictures):
    shapes = [pixels.shape for _, pixels in feeds_of(open_bundle(conformance_bundle), pictures, 20)]
    assert {(1, 3, 256, 256), (1, 3, 192, 192), (1, 3, 128, 128)} <= set(shapes)
    assert any(height != width for *_, height, width in shapes)


def test_the_bundle_answers_and_keeps_the_rest(conformance_bundle, int8, pictures, tmp_path, monkeypatch):
    before, after = open_bundle(conformance_bundle), open_bundle(int8)
    assert (after.encoder.file, after.encoder.precision) == ("encoder/int8.onnx", "int8")
    names = {path.name for path in (conformance_bundle / "encoder").iterdir()}
    assert names == {"fp32.onnx", "kernels.onnx", "kernels.onnx.data"}, "nothing is left there"
    assert [path.name for path in int8.parent.iterdir()] == ["int8"], "ranges are kept no longer than they are needed"
    assert set(after.files) == {*before.files, "encoder/int8.onnx", "calib/encoder-int8.json", "calib/encoder-int8.md"}
    for name in before.files:
        assert file_sha256(after.path(name)) == file_sha256(before.path(name))
    expected = runtime.load(conformance_bundle, backends=Backends(encoder="onnx"))
    images = [pixels[0] for pixels in held_out(before.image, tmp_path)]
    for encoder in ("onnx",) if int8_sums_saturate() else ("onnx", "openvino"):
        model = runtime.load(int8, backends=Backends(encoder=encoder))
        assert model.encoder_backend.precision == "int8"
        assert 25 < sqnr(model.encoder(images), expected.encoder(images)) < 40
    *_, last = model.generate([pictures / "00.png"], "What?", runtime.Options(max_new_tokens=3))
    assert len(last.result.token_ids) == 3
    monkeypatch.setattr(backends, "int8_sums_saturate", lambda: True)
    with pytest.raises(UserError, match=r"no VNNI.*--encoder onnx"):
        runtime.load(int8, backends=Backends(encoder="openvino"))
    plain = runtime.load(int8, backends=Backends(encoder="onnx", encoder_precision="fp32"))
    np.testing.assert_array_equal(plain.encoder(images), expected.encoder(images))


def test_fp8_is_for_engines_and_float32_stays(conformance_bundle, pictures, tmp_path):
    done = run_main(
        "calib.quantize",
        "--bundle",
        conformance_bundle,
        "--data",
        pictures,
        "--precision",
        "fp8",
        "--out",
        tmp_path / "b",
        "--cache",
        tmp_path / "ranges.npz",
    )
    assert done.returncode == 0, done.stderr
    assert "ONNX Runtime goes on with fp32" in done.stdout
    assert (tmp_path / "ranges.npz").is_file()
    bundle = open_bundle(tmp_path / "b")
    assert (bundle.encoder.file, bundle.encoder_file("fp8")) == ("encoder/fp32.onnx", "encoder/fp8.onnx")


def test_fp8_values_are_near_float32(tiny_encoder, conformance_bundle, pictures, tmp_path):
    """On ONNX Runtime, and by ONNX's own evaluator: a small encoder, a small image."""
    bundle = open_bundle(conformance_bundle)
    feeds = feeds_of(bundle, pictures)
    ranges = ranges_of(tiny_encoder, feeds)
    means = measure_means(tiny_encoder, ranges, "fp8", feeds[:4])
    quantize(tiny_encoder, tmp_path / "fp8.onnx", ranges, "fp8", depthwise(onnx.load(tiny_encoder).graph), means)
    from onnx.reference import ReferenceEvaluator

    pixels = held_out(bundle.image, tmp_path)[1][:, :, :64, :64]
    (found,) = ReferenceEvaluator(onnx.load(tmp_path / "fp8.onnx")).run(None, {"pixel_values": pixels})
    (run,) = onnxruntime.InferenceSession(tmp_path / "fp8.onnx").run(None, {"pixel_values": pixels})
    (expected,) = onnxruntime.InferenceSession(tiny_encoder).run(None, {"pixel_values": pixels})
    assert 15 < sqnr(found, expected) < 50
    assert sqnr(run, expected) == pytest.approx(sqnr(found, expected), abs=1)


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_large_weights_lie_beside_the_graph(pictures, conformance_bundle, tmp_path, monkeypatch, precision):
    monkeypatch.setattr("export.encoder.INLINE_BYTES", 1000)
    export_encoder(tiny(), tmp_path / "fp32.onnx", "fp32")
    onnx.save(onnx.load(tmp_path / "fp32.onnx"), tmp_path / "inline.onnx")
    feeds = feeds_of(open_bundle(conformance_bundle), pictures)
    ranges = ranges_of(tmp_path / "fp32.onnx", feeds)
    means = measure_means(tmp_path / "fp32.onnx", ranges, precision, feeds[:2])
    quantize(tmp_path / "fp32.onnx", tmp_path / "q.onnx", ranges, precision, (), means)
    assert (tmp_path / "q.onnx.data").stat().st_size > 1000
    quantize(tmp_path / "inline.onnx", tmp_path / "whole.onnx", ranges, precision, (), means)
    pixels = {"pixel_values": feeds[2][1]}
    found, expected = (open_session(tmp_path / name, None).run(None, pixels) for name in ("q.onnx", "whole.onnx"))
    np.testing.assert_array_equal(found, expected)


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
        (few / "00.png", "neither a list of records"),
    ):
        with pytest.raises(UserError, match=said):
            quantize_encoder_bundle(bundle, tmp_path / "out", data, EncoderOptions())
    with pytest.raises(UserError, match="is no bundle"):
        quantize_encoder_bundle(bundle, few, pictures, EncoderOptions())
    with pytest.raises(UserError, match="the bundle itself"):
        quantize_encoder_bundle(bundle, bundle.folder, pictures, EncoderOptions())
    arguments = ("--bundle", conformance_bundle, "--data", pictures, "--out", tmp_path / "out")
    assert_one_line_error(run_main("calib.quantize", *arguments, "--precision", "int4"), "int4", "int8 or fp8")
    decoder = (*arguments, "--part", "decoder")
    assert_one_line_error(run_main("calib.quantize", *decoder, "--precision", "fp8"), "fp8", "int4 or int8")
    for budget in ("1", "0"):
        done = run_main("calib.quantize", *decoder, "--budget", budget)
        assert_one_line_error(done, "--budget is for --part encoder")
    assert_one_line_error(run_main("calib.quantize", *decoder, "--samples", "16"), "--samples is for gptq: q4_1")
    for options, said in (
        ({"samples": 15}, "--samples is 15, expected 16"),
        ({"questions": -1}, "--questions"),
        ({"questions": 0, "budget": 1}, "--budget is a loss on questions"),
        ({"method": "guess"}, "mse, minmax, percentile"),
        ({"method": "entropy"}, "entropy was removed: mse loses less"),
        ({"budget": -1}, "--budget"),
        ({"depthwise": True, "precision": "fp8"}, "no depthwise convolution in FP8"),
    ):
        with pytest.raises(UserError, match=said):
            EncoderOptions(**options)
    assert not (tmp_path / "out").exists()


def test_ranges_lie_beside_the_folder_that_out_names(tmp_path, monkeypatch):
    (tmp_path / "new").mkdir()
    monkeypatch.chdir(tmp_path / "new")
    assert (
        ranges_file(Path(), EncoderOptions())
        == ranges_file(tmp_path / "new", EncoderOptions())
        == tmp_path / "new.ranges.npz"
    )


def test_a_bundle_without_a_float32_encoder(pictures, tmp_path):
    fp16 = exported("--res", 256, "--precision", "fp16")
    with pytest.raises(UserError, match=r"no encoder/fp32\.onnx"):
        quantize_encoder_bundle(open_bundle(fp16), tmp_path / "out", pictures, EncoderOptions())
