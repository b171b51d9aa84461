"""TensorRT engines, built for real without a GPU, and what their reports say is in them. None is executed here."""

import hashlib
import json
import multiprocessing
import re
import sys

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

from export import engine as engine_command
from export.encoder import export_encoder
from export.engine import build_engine, main, source_of, source_of_file
from export.tensorrt.build import Options
from runtime.bundle.engines import choose_engine, read_report
from runtime.bundle.manifest import open_bundle
from runtime.errors import UserError
from tests.integration.export.test_encoder import tiny
from tests.support.commands import assert_one_line_error, run_module
from train.model import ConvNeXtEncoder, EncoderConfig, ImageEncoder, build_projector

trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed: pip install '.[rtx]'")
# Layers that move or name data and compute nothing
MOVES = {"CAST", "SHUFFLE", "CONSTANT", "IDENTITY", "SHAPE", "SLICE", "CONCATENATION", "SQUEEZE", "UNSQUEEZE", "GATHER"}


@pytest.fixture(scope="module")
def demo_bundle(tmp_path_factory):
    """The demo model's, with both decoders."""
    out = tmp_path_factory.mktemp("bundles") / "demo"
    run_module("export.bundle", "--portable-decoder", "--out", out).check_returncode()
    return out


@pytest.fixture(scope="module", params=["int8", "fp8"])
def quantised(request, demo_bundle, tmp_path_factory):
    """(precision, the demo model's bundle with an encoder quantised on drawn documents)."""
    folder = tmp_path_factory.mktemp("quantised")
    pages = ("--out", folder / "pages", "--pages", 16, "--preset", "small-512")
    run_module("train.synth", *pages).check_returncode()
    arguments = ["--bundle", demo_bundle, "--data", folder / "pages", "--precision", request.param, "--questions", 4]
    if request.param == "int8":  # TensorRT has depthwise convolutions in INT8
        arguments.append("--depthwise")
    run_module("calib.quantize", *arguments, "--out", folder / "bundle").check_returncode()
    return request.param, folder / "bundle"


@pytest.fixture
def graph(tmp_path):
    file = tmp_path / "fp32.onnx"
    export_encoder(tiny(), file, "fp32")
    return file


def build(bundle, *arguments) -> list[dict]:
    """Reports of the engines that the command built, by name."""
    done = run_module("export.engine", "--bundle", bundle, *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("not executed") == len(re.findall(r"^on sm", done.stdout, re.MULTILINE)) > 0
    files = re.findall(r"^(\S+\.engine): ", done.stdout, re.MULTILINE)
    return [json.loads(open(f"{file}.json", encoding="utf-8").read()) for file in files]


def fp32_compute_layers(report: dict) -> list[str]:
    """Layers that compute in FP32 and are not on the report's lists; zero points, which the parser makes, aside."""
    allowed = [kept["node"] for kept in report["kept_in_fp32"]] + report["fp32_by_standard"]
    of_allowed = re.compile("(" + "|".join(map(re.escape, allowed)) + ")([^0-9a-zA-Z].*)?")  # the parser adds suffixes
    found = []
    for layer in report["network_layers"]:
        inputs = layer["inputs"][:2] if layer["type"] in ("QUANTIZE", "DEQUANTIZE") else layer["inputs"]
        if "FLOAT" in inputs and layer["type"] not in MOVES and not of_allowed.fullmatch(layer["name"]):
            found.append(layer["name"])
    return found


def layers(report: dict, kind: str) -> list[dict]:
    return [layer for layer in report["network_layers"] if layer["type"] == kind]


def test_the_demo_encoder_in_fp16(demo_bundle):
    reports = build(demo_bundle, "--target", "sm89,sm120")
    assert [report["target"] for report in reports] == ["sm89", "sm120"]
    for report in reports:
        assert fp32_compute_layers(report) == report["kept_in_fp32"] == []
        assert len(layers(report, "CONVOLUTION")) == 18
        assert len(layers(report, "NORMALIZATION")) == 18
        assert len(layers(report, "MATRIX_MULTIPLY")) == 28
        for kind in ("CONVOLUTION", "MATRIX_MULTIPLY"):
            assert {kind for layer in layers(report, kind) for kind in layer["inputs"]} == {"HALF"}
        assert report["inputs"] == [{"name": "pixel_values", "dtype": "HALF", "shape": [-1, 3, -1, -1]}]
        assert report["outputs"] == [{"name": "image_embeds", "dtype": "FLOAT", "shape": [-1, -1, 576]}]
        assert report["profiles"] == [{"pixel_values": [[1, 3, 768, 768], [1, 3, 1536, 1536], [1, 3, 1536, 1536]]}]
        assert report["executed"] is False
        assert report["validation"] is None
        assert report["version"] == trt.__version__
        bundle = open_bundle(demo_bundle)
        assert report["onnx"] == {
            "file": "encoder/fp32.onnx",
            "sha256": {"encoder/fp32.onnx": hashlib.sha256(bundle.path("encoder/fp32.onnx").read_bytes()).hexdigest()},
        }
        weights = sum(np.prod(t.dims) for t in onnx.load(bundle.path("encoder/fp32.onnx")).graph.initializer)
        assert 0.9 < report["memory"]["weights_bytes"] / (2 * weights) < 1.1
        assert report["memory"]["activation_bytes"] > 1536 * 1536 * 3 * 2
        fused = [layer for layer in report["engine_layers"] if "Half" in layer["inputs"]]
        assert 40 < len(fused) < len(report["network_layers"])
        chosen = choose_engine(bundle, "encoder", "fp16", lambda: report["target"], {"rtx": trt.__version__})  # noqa: B023
        assert chosen.report == report


def test_the_demo_encoder_quantised(quantised):
    precision, bundle = quantised
    graph = onnx.load(open_bundle(bundle).path(f"encoder/{precision}.onnx")).graph
    pairs = sum(node.op_type == "QuantizeLinear" for node in graph.node)
    name = {"int8": "INT8", "fp8": "FP8"}[precision]
    fused_name = {"int8": "Int8", "fp8": "FP8"}[precision]
    for report in build(bundle, "--precision", precision, "--target", "sm89,sm120"):
        assert fp32_compute_layers(report) == []
        quantise, dequantise = layers(report, "QUANTIZE"), layers(report, "DEQUANTIZE")
        assert len(quantise) == pairs
        assert len(dequantise) == 2 * pairs, "of activations and of weights"
        assert {layer["inputs"][0] for layer in quantise} == {"HALF"}
        assert {layer["inputs"][0] for layer in dequantise} == {name}
        # After fusion the convolutions and products themselves take quantised values
        fused = [layer for layer in report["engine_layers"] if fused_name in layer["inputs"][:1]]
        kinds = [layer["type"] for layer in fused if fused_name in layer["constants"]]
        assert kinds.count("gemm") == 28
        assert kinds.count("correlation") == pairs - 28 == (18 if precision == "int8" else 5)
        weights = sum(np.prod(t.dims) for t in graph.initializer if t.data_type in (3, 17))
        assert 1 < report["memory"]["weights_bytes"] / weights < 1.2, "a byte each"
        assert report["inputs"][0]["shape"] == [-1, 3, -1, -1]
        assert report["onnx"]["file"] == f"encoder/{precision}.onnx"


def test_the_demo_decoder_in_fp16(demo_bundle):
    (report,) = build(demo_bundle, "--part", "decoder", "--target", "sm89")
    assert fp32_compute_layers(report) == []
    assert 0 < len(report["kept_in_fp32"]) < 100, "SmolLM2's residual stream leaves FP16's range"
    assert {kept["operator"] for kept in report["kept_in_fp32"]} == {"Add", "RMSNormalization", "MatMul"}
    assert len(layers(report, "KV_CACHE_UPDATE")) == 2 * 30
    assert len(layers(report, "ATTENTION_INPUT")) == 30
    assert {kind for layer in layers(report, "MATRIX_MULTIPLY") for kind in layer["inputs"]} == {"HALF"}
    shapes = {tensor["name"]: tensor["shape"] for tensor in (*report["inputs"], *report["outputs"])}
    assert shapes["input_ids"] == [1, -1]
    assert shapes["image_embeds"] == [-1, 576]
    assert shapes["past_key_values.29.value"] == shapes["present.29.value"] == [1, 3, 8192, 64]
    assert shapes["logits"] == [1, 1, 49152]
    prefill, decode = report["profiles"]
    assert prefill["input_ids"] == [[1, 1], [1, 640], [1, 8192]]
    assert decode["input_ids"] == [[1, 1]] * 3
    assert 0.95 < report["memory"]["weights_bytes"] / (2 * 134_515_008) < 1.1, "each weight once, in FP16"
    (portable,) = (name for name in report["onnx"]["sha256"] if name.endswith(".data"))
    assert portable == "decoder/portable.onnx.data"


LARGE = EncoderConfig.from_variant("large", (6, 3072), layer_scale=0.5)


def export_large(file) -> None:
    """ConvNeXt-L with a fifth stage and a projector to 4096, random weights."""
    torch.manual_seed(0)
    model = ImageEncoder(ConvNeXtEncoder(LARGE), build_projector("mlp2x_gelu", LARGE.widths[-1], 4096)).eval()
    export_encoder(model, file, "fp32")


@pytest.mark.slow
def test_the_released_encoder_in_fp16(tmp_path):
    """1.4 GB in FP16; in processes of their own, whose memory is given back."""
    export = multiprocessing.get_context("spawn").Process(target=export_large, args=(tmp_path / "fp32.onnx",))
    export.start()
    export.join()
    assert export.exitcode == 0
    run_module("export.engine", "--onnx", tmp_path / "fp32.onnx", "--target", "sm89").check_returncode()
    report = read_report(tmp_path / "engines" / "rtx-sm89-fp16.engine")
    graph = onnx.load(tmp_path / "fp32.onnx", load_external_data=False).graph
    weights = sum(np.prod(tensor.dims) for tensor in graph.initializer)
    assert weights > 600e6
    assert fp32_compute_layers(report) == []
    assert len(layers(report, "CONVOLUTION")) == sum(LARGE.depths) + len(LARGE.depths)
    assert report["outputs"][0]["shape"] == [-1, -1, 4096]
    assert 0.95 < report["memory"]["weights_bytes"] / (2 * weights) < 1.1
    assert set(report["onnx"]["sha256"]) == {"fp32.onnx", "fp32.onnx.data"}


def test_a_graph_that_is_fp16_already_is_taken_as_it_is(tmp_path):
    export_encoder(tiny(), tmp_path / "fp16.onnx", "fp16")
    options = Options(target="sm80")
    report = read_report(build_engine(source_of_file(tmp_path / "fp16.onnx"), options))
    assert {tensor["dtype"] for tensor in report["inputs"] + report["outputs"]} == {"HALF"}
    assert {kind for layer in layers(report, "CONVOLUTION") for kind in layer["inputs"]} == {"HALF"}


def test_what_overflows_is_listed_and_computed_in_fp32(tmp_path):
    """A fifth stage whose residual stream is far beyond FP16."""
    model = tiny()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.mul_(8000)
    export_encoder(model, tmp_path / "fp32.onnx", "fp32")
    options = Options(target="sm89")
    report = read_report(build_engine(source_of_file(tmp_path / "fp32.onnx"), options))
    kept = {keep["node"]: keep for keep in report["kept_in_fp32"]}
    assert kept
    assert all(keep["value"] > 65504 / 4 for keep in kept.values())
    computing = {
        layer["name"] for layer in report["network_layers"] if layer["inputs"] and set(layer["inputs"]) == {"FLOAT"}
    }
    assert any(name.startswith(node) for name in computing for node in kept)
    assert fp32_compute_layers(report) == []


def test_options_reach_the_builder(graph, capsys):
    options = Options(
        target="sm86", min_res=128, opt_res=256, max_res=512, max_batch=4, timing_cache=graph.parent / "timing.cache",
        workspace_mib=64,
    )  # fmt: skip
    plain = read_report(build_engine(source_of_file(graph), Options(target="sm86")))
    engine = build_engine(source_of_file(graph), options)
    report = read_report(engine)
    assert report["profiles"] == [{"pixel_values": [[1, 3, 128, 128], [1, 3, 256, 256], [4, 3, 512, 512]]}]
    assert report["memory"]["activation_bytes"] != plain["memory"]["activation_bytes"]
    assert "left alone" in capsys.readouterr().err, "there is no timing cache in TensorRT for RTX"
    assert engine.name == "rtx-sm86-fp16.engine"
    assert engine.parent == graph.parent / "engines"
    assert report["engine"]["size"] == engine.stat().st_size
    assert report["engine"]["sha256"] == hashlib.sha256(engine.read_bytes()).hexdigest()
    assert sorted(file.name for file in engine.parent.iterdir()) == [engine.name, f"{engine.name}.json"]


@pytest.mark.parametrize(
    ("option", "said"), [({"refit": True}, "takes a GPU"), ({"version_compatible": True}, "lean runtime")]
)
def test_what_tensorrt_for_rtx_cannot_do_here_is_said(graph, option, said):
    options = Options(target="sm89", **option)
    with pytest.raises(UserError, match=said):
        build_engine(source_of_file(graph), options)
    assert sorted(file.name for file in graph.parent.iterdir()) == ["fp32.onnx"]


@pytest.mark.parametrize(
    ("resolution", "given", "sides"),
    [
        (1536, {}, (768, 1536, 1536)),
        (320, {}, (320, 320, 1536)),
        (2048, {}, (768, 2048, 2048)),
        (1536, {"max_res": 768}, (768, 768, 768)),
        (320, {"min_res": 512}, (512, 512, 1536)),
        (320, {"opt_res": 1024}, (768, 1024, 1536)),
        (1536, {"min_res": 64, "opt_res": 128, "max_res": 256}, (64, 128, 256)),
    ],
)
def test_sides_are_around_the_bundles_resolution(resolution, given, sides):
    assert tuple(engine_command._sides(given, resolution).values()) == sides


def test_embeds_leave_in_the_decoder_s_type(conformance_bundle):
    options = Options(target="sm89")
    source = source_of(open_bundle(conformance_bundle), options)
    assert source.embeds_dtype == open_bundle(conformance_bundle).decoder.kv_dtype == "float32"


@pytest.mark.parametrize(
    ("arguments", "mentions"),
    [
        (["--target", "sm70"], ["sm70", "sm89"]),
        (["--target", "ada"], ["ada", "sm80"]),
        ([], ["--target current", "no NVIDIA GPU", "--target sm89"]),
        (["--flavour", "tensorrt", "--target", "sm89"], ["tensorrt"]),
        (["--flavour", "onnx", "--target", "sm89"], ["onnx", "tensorrt, rtx"]),
        (["--precision", "fp8", "--target", "sm86"], ["fp8", "sm89 or newer"]),
        (["--precision", "int8", "--target", "sm89"], ["no quantised encoder", "encoder/int8.onnx"]),
        (["--precision", "int4", "--target", "sm89"], ["int4", "fp16, int8, fp8"]),
        (["--part", "projector", "--target", "sm89"], ["projector", "encoder or decoder"]),
        (["--part", "decoder", "--target", "sm89"], ["no decoder of standard operators", "--portable-decoder"]),
        (["--part", "decoder", "--precision", "int8", "--target", "sm89"], ["fp16"]),
        (["--min-res", 1000, "--target", "sm89"], ["--min-res 1000", "multiple of 64"]),
        (["--min-res", 1536, "--max-res", 768, "--target", "sm89"], ["--min-res 1536", "rise"]),
        (["--max-batch", 0, "--target", "sm89"], ["--max-batch"]),
        (["--workspace-mib", 0, "--target", "sm89"], ["--workspace-mib"]),
        (["--onnx", "nowhere.onnx", "--target", "sm89"], ["--onnx or --bundle"]),
        (["--part", "decoder", "--max-batch", 2, "--target", "sm89"], ["--max-batch is for --part encoder"]),
        (["--timing-cache", "nowhere/cache", "--target", "sm89"], ["--timing-cache nowhere/cache", "does not exist"]),
        (["--capability", "--validate"], ["--capability builds no engine"]),
    ],
)
def test_mistakes_are_told(conformance_bundle, monkeypatch, arguments, mentions):
    monkeypatch.setattr(sys, "argv", ["export.engine", "--bundle", str(conformance_bundle), *map(str, arguments)])
    with pytest.raises(UserError) as error:
        main()
    for mention in mentions:
        assert mention in str(error.value)
    assert not (conformance_bundle / "encoder" / "engines").exists()


def test_files_that_are_no_source_are_one_line(graph):
    arguments = ("--target", "sm89", "--onnx")
    text = graph.parent / "text.onnx"
    text.write_text("no model")
    assert_one_line_error(run_module("export.engine", *arguments, text), "cannot be read as ONNX", text)
    assert_one_line_error(run_module("export.engine", *arguments, "nowhere.onnx"), "nowhere.onnx", "no such file")
    assert_one_line_error(run_module("export.engine", *arguments, graph, "--part", "decoder"), "no decoder")
    assert_one_line_error(run_module("export.engine", *arguments, graph, "--precision", "int8"), "no Q/DQ nodes")
    model = onnx.load(graph)
    for dim in model.graph.input[0].type.tensor_type.shape.dim[2:]:
        dim.dim_value = 768
    onnx.save(model, graph)
    assert_one_line_error(run_module("export.engine", *arguments, graph), "of one size, [768, 768]")


def test_a_broken_checkpoint_is_named(graph):
    model = onnx.load(graph)
    weight = next(tensor for tensor in model.graph.initializer if len(tensor.dims) == 4)
    broken = numpy_helper.to_array(weight).copy()
    broken[0, 0, 0, 0] = np.nan
    weight.CopyFrom(numpy_helper.from_array(broken, weight.name))
    onnx.save(model, graph)
    done = run_module("export.engine", "--target", "sm89", "--onnx", graph)
    assert_one_line_error(done, "not finite in FP32", "encoder.stem.0")


def test_capability_names_what_the_parser_refuses(graph):
    """An operator of nobody between the encoder and its output."""
    done = run_module("export.engine", "--capability", "--onnx", graph)
    assert (done.returncode, done.stdout.strip()) == (0, f"{graph}: the parser takes every node")
    model = onnx.load(graph)
    model.graph.node[-1].output[0] = "before"
    model.graph.node.append(helper.make_node("Optional", ["before"], ["d"], name="maybe"))
    model.graph.node.append(helper.make_node("OptionalGetElement", ["d"], ["image_embeds"], name="surely"))
    onnx.save(model, graph)
    done = run_module("export.engine", "--capability", "--target", "sm89", "--onnx", graph)
    assert done.returncode == 1
    assert "Optional" in done.stdout
