"""An encoder by this project's operators: against PyTorch in float64, and in bundles."""

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from export.encoder import export_encoder
from export.graphs.encoder_kernels import LANES, PANEL, int8_matrix, write_encoder_kernels
from export.graphs.variants import DOMAIN
from runtime import kernels
from runtime.backends.ort_session import open_session
from runtime.backends.select import Backends, open_components
from runtime.bundle.manifest import open_bundle
from runtime.errors import UserError
from tests.support.bundles import exported
from train.model import ConvNeXtEncoder, EncoderConfig, ImageEncoder, build_projector

needs_kernels = pytest.mark.usefixtures("built")
INSTRUCTIONS = {"reference": set(), "avx2": {"avx2"}, "avx_vnni": {"avx_vnni"}, "avx512_vnni": {"avx512_vnni"}}


def image_encoder(
    widths=(16, 32, 48, 64, 96), depths=(1, 1, 2, 1, 1), projector="mlp2x_gelu", hidden=64, seed=0, **options
) -> ImageEncoder:
    """With random weights, so that every layer changes its input by about as much as it holds."""
    torch.manual_seed(seed)
    config = EncoderConfig(depths, widths, **{"layer_scale": 0.5} | options)
    model = ImageEncoder(ConvNeXtEncoder(config), build_projector(projector, widths[-1], hidden)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            elif not name.endswith("gamma"):
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def write(model: ImageEncoder, folder: Path) -> Path:
    export_encoder(model, folder / "fp32.onnx", "fp32")
    assert write_encoder_kernels(folder / "fp32.onnx", folder / "kernels.onnx")
    return folder / "kernels.onnx"


def run(file: Path, pixels: np.ndarray, threads: int = 2, library: Path | None = None) -> np.ndarray:
    session = open_session(file, threads, operators=library or kernels.library())
    return session.run(None, {"pixel_values": pixels})[0]


def pixels_of(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def sqnr(found: np.ndarray, expected: np.ndarray) -> float:
    """dB"""
    return float(10 * np.log10(np.square(expected).sum() / np.square(found - expected).sum()))


@pytest.fixture(scope="module")
def graph(tmp_path_factory) -> Path:
    return write(image_encoder(), tmp_path_factory.mktemp("encoder"))


@needs_kernels
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.integers(1, 5), min_size=4, max_size=5),
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    st.sampled_from(["linear", "mlp2x_gelu", "identity"]),
    st.integers(0, 99),
)
def test_it_computes_what_pytorch_does_in_float64(tmp_path_factory, widths, sizes, projector, seed):
    channels = tuple(LANES * width for width in widths)
    hidden = channels[-1] if projector == "identity" else 40  # no multiple of 16: that matmul stays in float32
    model = image_encoder(channels, (1,) * len(channels), projector, hidden, seed)
    file = write(model, tmp_path_factory.mktemp("encoder"))
    batch, stride = sizes[0], model.encoder.config.stride
    pixels = pixels_of(batch, 3, sizes[1] * stride, sizes[2] * stride, seed=seed)
    with torch.no_grad():
        expected = model.double()(torch.from_numpy(pixels).double()).numpy()
    found = run(file, pixels)
    assert found.shape == expected.shape
    assert sqnr(found, expected) > 24  # rows of 16 channels have the least to average over


@needs_kernels
def test_all_its_layers_are_the_projects_operators(graph):
    kinds = [node.op_type for node in onnx.load(graph, load_external_data=False).graph.node]
    assert kinds[0] == "ConvNextStem" and kinds.count("ConvNextBlock") == 6 and kinds.count("ConvNextDownsample") == 4
    assert kinds[-3:] == ["Reshape", "Int8Linear", "Int8Linear"] and len(kinds) == 14


@needs_kernels
@pytest.mark.parametrize("options", [{"layer_scale": 0.0}, {"skip_last_block": True}, {"norm_eps": 0.1}])
def test_encoders_of_other_options(tmp_path, options):
    model = image_encoder(depths=(1, 1, 1, 1, 2), **options)
    pixels = pixels_of(1, 3, 128, 192)
    with torch.no_grad():
        expected = model.double()(torch.from_numpy(pixels).double()).numpy()
    model.float()
    assert sqnr(run(write(model, tmp_path), pixels), expected) > 27


@needs_kernels
def test_an_image_is_the_same_in_a_batch_and_on_any_number_of_threads(graph):
    pixels = pixels_of(3, 3, 192, 320)
    found = run(graph, pixels)
    for threads in (1, 2, 3):
        alone = [run(graph, pixels[i : i + 1], threads)[0] for i in range(3)]
        np.testing.assert_array_equal(found, alone)


@needs_kernels
@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_instruction_sets_give_the_same_bits(graph, tmp_path, monkeypatch, name):
    if missing := INSTRUCTIONS[name] - kernels.processor_flags():
        pytest.skip(f"the processor has no {', '.join(sorted(missing))}")
    copy = tmp_path / f"{name}.so"  # it chooses once
    shutil.copy(kernels.library(), copy)
    pixels = pixels_of(1, 3, 64, 128)
    expected = run(graph, pixels)
    monkeypatch.setenv("CONVLLAVA_KERNELS", name)
    np.testing.assert_array_equal(run(graph, pixels, library=copy), expected)


@needs_kernels
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_makes_its_image_nan_and_no_other(graph, value):
    pixels = pixels_of(2, 3, 64, 64)
    expected = run(graph, pixels)
    pixels[1, 1, 30, 31] = value
    found = run(graph, pixels)
    assert np.isnan(found[1]).all()
    np.testing.assert_array_equal(found[0], expected[0])


@needs_kernels
def test_images_of_another_size_may_follow(graph):
    session = open_session(graph, 2, operators=kernels.library())
    for height, width in ((64, 64), (192, 64), (64, 128), (64, 64)):
        pixels = pixels_of(1, 3, height, width)
        found = session.run(None, {"pixel_values": pixels})[0]
        np.testing.assert_array_equal(found, run(graph, pixels))


@given(st.integers(1, 5), st.integers(1, 5), st.booleans(), st.integers(0, 99))
def test_a_matrix_is_rounded_by_half_a_step_at_most(rows, columns, has_gain, seed):
    rows, columns = rows * LANES, columns * LANES
    random = np.random.default_rng(seed)
    matrix = random.standard_normal((rows, columns), np.float32) * random.uniform(0, 2, (rows, 1)).astype(np.float32)
    matrix[rows // 2] = 0
    bias, gain = random.standard_normal((2, rows), np.float32)
    codes, parameters = int8_matrix(matrix, bias, gain if has_gain else None)
    scales, sums, biases = parameters.astype(np.float64).transpose(1, 0, 2).reshape(3, -1)
    levels = codes.transpose(0, 2, 1, 3).reshape(-1, columns)
    assert codes.shape == (-(-rows // PANEL), columns // 4, PANEL, 4) and not levels[rows:].any()
    factor = gain if has_gain else np.ones(rows)
    step = np.abs(matrix).max(1) / 127
    assert (np.abs(levels[:rows] * step[:, None] - matrix) <= 0.5001 * step[:, None]).all()
    np.testing.assert_allclose(scales, step * factor, rtol=1e-6)
    np.testing.assert_allclose(sums, scales * levels[:rows].sum(1), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(biases, bias * factor, rtol=1e-6)


@pytest.mark.parametrize(
    "change", [{"widths": (8, 16, 32, 48, 64)}, {"precision": "fp16"}], ids=["8 channels", "float16"]
)
def test_other_graphs_have_none(tmp_path, change):
    precision = change.pop("precision", "fp32")
    export_encoder(image_encoder(**change), tmp_path / "model.onnx", precision)
    assert not write_encoder_kernels(tmp_path / "model.onnx", tmp_path / "kernels.onnx")
    assert not list(tmp_path.glob("kernels.*"))


def test_a_graph_of_other_nodes_has_none(graph, tmp_path):
    model = onnx.load(graph.with_name("fp32.onnx"))
    node = next(node for node in model.graph.node if node.op_type == "Gelu")
    node.op_type = "Erf"
    del node.attribute[:]
    onnx.save(model, tmp_path / "model.onnx")
    assert not write_encoder_kernels(tmp_path / "model.onnx", tmp_path / "kernels.onnx")
    assert not write_encoder_kernels(graph, tmp_path / "kernels.onnx")


@needs_kernels
@pytest.mark.parametrize("change", ["rows", "channels", "constant"])
def test_a_graph_whose_weights_do_not_fit_is_refused(graph, tmp_path, change):
    model = onnx.load(graph)
    node = next(node for node in model.graph.node if node.op_type == "ConvNextBlock")
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    if change == "constant":
        model.graph.initializer.remove(weights[node.input[3]])
        node.input[3] = "codes"
        model.graph.input.append(onnx.helper.make_tensor_value_info("codes", onnx.TensorProto.INT8, None))
    else:
        other = next(node for node in model.graph.node if node.op_type == "ConvNextDownsample")
        given, taken = (node.input[4], other.input[3]) if change == "rows" else (node.input[2], other.input[1])
        node.input[list(node.input).index(given)] = taken if change == "rows" else "norm"
        norm = np.zeros((2, 32), np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(norm, "norm"))
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(UserError, match="expected"):
        open_session(tmp_path / "model.onnx", 1, operators=kernels.library())


@needs_kernels
def test_a_bundles_encoder(conformance_bundle):
    bundle = open_bundle(conformance_bundle)
    assert bundle.encoder.kernels_file == "encoder/kernels.onnx" and bundle.checked["encoder/kernels.onnx"] < 0.1
    ours, plain = (open_components(bundle, Backends(encoder=name)) for name in ("kernels", "onnx"))
    backend = ours.encoder_backend
    assert (backend.runtime, backend.precision, backend.file) == (
        "onnxruntime with kernels", "int8", "encoder/kernels.onnx",
    )  # fmt: skip
    images = [pixels_of(3, 256, 256), pixels_of(3, 128, 320, seed=1)]
    assert sqnr(ours.encoder(images), plain.encoder(images)) > 30
    nodes = onnx.load(bundle.path(backend.file), load_external_data=False).graph.node
    assert {node.domain for node in nodes} == {DOMAIN, ""}


@needs_kernels
def test_a_bundle_without_such_an_encoder_says_so(conformance_bundle, monkeypatch):
    half = open_bundle(exported("--res", 256, "--precision", "fp16"))
    assert half.encoder.kernels_file is None
    with pytest.raises(UserError, match=r"--encoder kernels: .* has no encoder for them"):
        open_components(half, Backends(encoder="kernels"))
    with pytest.raises(UserError, match="fp16 is not the kernels'"):
        Backends(encoder="kernels", encoder_precision="fp16")
    monkeypatch.setattr(kernels, "library", lambda: None)
    with pytest.raises(UserError, match="--encoder kernels: they were not built"):
        open_components(open_bundle(conformance_bundle), Backends(encoder="kernels"))
