"""The exported encoder: open sizes, comparisons block by block, and the command's exit codes."""

import resource

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

from export import encoder as encoder_export
from export.encoder import check_encoder, export_encoder, main, parity_inputs
from export.encoder_graph import OPSET
from export.graphs.store import SMALL
from export.parity import TOLERANCES, ParityError
from tests.support.commands import assert_one_line_error, run_main
from train.model import ConvNeXtEncoder, EncoderConfig, ImageEncoder, build_projector


def tiny(fifth: bool = True, **options) -> ImageEncoder:
    torch.manual_seed(0)
    stages = 5 if fifth else 4
    config = EncoderConfig((1,) * stages, (8, 16, 24, 32, 40)[:stages], layer_scale=0.5, **options)
    return ImageEncoder(ConvNeXtEncoder(config), build_projector("mlp2x_gelu", config.widths[-1], 48)).eval()


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    file = tmp_path_factory.mktemp("graph") / "fp32.onnx"
    export_encoder(tiny(), file, "fp32")
    return file


def pytorch(model: ImageEncoder, pixels: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return model(torch.from_numpy(pixels)).numpy()


def shape_of(value) -> list:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def test_graph_leaves_batch_height_and_width_open(graph):
    model = onnx.load(graph)
    assert [value.name for value in model.graph.input] == ["pixel_values"]
    assert shape_of(model.graph.input[0]) == ["batch", 3, "height", "width"]
    assert [value.name for value in model.graph.output] == ["image_embeds"]
    assert shape_of(model.graph.output[0]) == ["batch", "visual_tokens", 48]
    assert [opset.version for opset in model.opset_import if opset.domain == ""] == [OPSET]
    assert OPSET >= 18


@pytest.mark.parametrize("shape", [(1, 64, 64), (1, 64, 640), (3, 320, 128), (2, 512, 512), (5, 64, 64)])
def test_any_size_and_batch_equal_pytorch(graph, shape):
    batch, height, width = shape
    pixels = np.random.default_rng(1).standard_normal((batch, 3, height, width), dtype=np.float32)
    (found,) = onnxruntime.InferenceSession(graph).run(None, {"pixel_values": pixels})
    expected = pytorch(tiny(), pixels)
    assert found.shape == (batch, (height // 64) * (width // 64), 48)
    assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)


def test_four_stages_have_stride_32(tmp_path):
    export_encoder(tiny(fifth=False), tmp_path / "fp32.onnx", "fp32")
    rows = check_encoder(tmp_path / "fp32.onnx", tiny(fifth=False), parity_inputs(96, 32), "fp32")
    assert all(row.ok for row in rows)
    assert "9 tokens" in rows[1].what


@pytest.mark.parametrize("projector", ["linear", "mlp1x_gelu", "mlp3x_gelu", "identity"])
def test_every_projector(tmp_path, projector):
    model = tiny()
    model.projector = build_projector(projector, 40, 40 if projector == "identity" else 24)
    export_encoder(model, tmp_path / "fp32.onnx", "fp32")
    assert shape_of(onnx.load(tmp_path / "fp32.onnx").graph.output[0])[2] == (40 if projector == "identity" else 24)
    assert all(row.ok for row in check_encoder(tmp_path / "fp32.onnx", model, parity_inputs(128, 64), "fp32"))


@pytest.mark.parametrize("options", [{"skip_last_block": True}, {"layer_scale": 0.0}])
def test_encoders_without_a_block_or_layer_scales(tmp_path, options):
    torch.manual_seed(0)
    config = EncoderConfig((1, 1, 1, 1, 2), (8, 16, 24, 32, 40), **options)
    model = ImageEncoder(ConvNeXtEncoder(config), build_projector("linear", 40, 24)).eval()
    export_encoder(model, tmp_path / "fp32.onnx", "fp32")
    pixels = np.random.default_rng(2).standard_normal((1, 3, 128, 192), dtype=np.float32)
    (found,) = onnxruntime.InferenceSession(tmp_path / "fp32.onnx").run(None, {"pixel_values": pixels})
    expected = pytorch(model, pixels)
    assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)


def test_fp16_is_fp16_through_and_through(tmp_path):
    export_encoder(tiny(), tmp_path / "fp16.onnx", "fp16")
    graph = onnx.load(tmp_path / "fp16.onnx").graph
    assert {tensor.data_type for tensor in graph.initializer} <= {onnx.TensorProto.FLOAT16, onnx.TensorProto.INT64}
    assert graph.input[0].type.tensor_type.elem_type == graph.output[0].type.tensor_type.elem_type == 10
    rows = check_encoder(tmp_path / "fp16.onnx", tiny(), parity_inputs(256, 64), "fp16")
    assert all(1e-6 < row.error <= 5e-3 for row in rows)


def test_weights_are_cast_from_the_type_they_are_stored_in(tmp_path):
    export_encoder(tiny().half(), tmp_path / "half.onnx", "fp32")
    export_encoder(tiny().half().float(), tmp_path / "single.onnx", "fp32")
    assert (tmp_path / "half.onnx").read_bytes() == (tmp_path / "single.onnx").read_bytes()


def test_large_weights_lie_beside_the_graph(tmp_path, monkeypatch):
    monkeypatch.setattr(encoder_export, "INLINE_BYTES", 1000)
    export_encoder(tiny(), tmp_path / "fp32.onnx", "fp32")
    weights = sum(parameter.nbytes for parameter in tiny().parameters() if parameter.nbytes > SMALL)
    assert (tmp_path / "fp32.onnx.data").stat().st_size >= weights
    assert (tmp_path / "fp32.onnx").stat().st_size < weights / 3
    assert all(row.ok for row in check_encoder(tmp_path / "fp32.onnx", tiny(), parity_inputs(128, 64), "fp32"))


def test_graph_holds_no_path_of_the_exporting_machine(graph):
    content = graph.read_bytes()
    assert b"site-packages" not in content
    assert str(encoder_export.BUILD.parent).encode() not in content


def test_parity_sizes_hold_the_resolution_an_oblong_and_a_batch():
    for resolution in (64, 128, 256, 320, 768, 1024, 1536):
        shapes = [pixels.shape for pixels in parity_inputs(resolution, 64)]
        assert len(shapes) >= 3
        assert (1, 3, resolution, resolution) in shapes
        assert any(height != width for _, _, height, width in shapes)
        assert any(batch > 1 for batch, *_ in shapes)
        assert all(side % 64 == 0 and side > 0 for _, _, *sides in shapes for side in sides)


@pytest.mark.parametrize("damage", [lambda weights: weights[::-1], lambda weights: weights * np.nan])
@pytest.mark.parametrize("block", ["encoder.stages.2.blocks.0", "encoder.stages.4.downsample", "projector"])
def test_a_broken_graph_names_its_block(graph, tmp_path, block, damage):
    model = onnx.load(graph)
    tensor = next(t for t in model.graph.initializer if t.name.startswith(f"{block}.") and len(t.dims) > 1)
    tensor.CopyFrom(numpy_helper.from_array(damage(numpy_helper.to_array(tensor)).astype(np.float32), tensor.name))
    onnx.save(model, tmp_path / "fp32.onnx")
    (row,) = check_encoder(tmp_path / "fp32.onnx", tiny(), parity_inputs(128, 64), "fp32")
    assert not row.ok
    assert str(row).startswith(f"first bad block: {block}")
    assert "TOO LARGE" in str(row)


def test_command_prints_the_table_and_writes_the_graph(conformance, tmp_path):
    arguments = ["--checkpoint", conformance / "checkpoint", "--res", 256, "--out", tmp_path]
    done = run_main("export.encoder", *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" ok") >= 3
    assert "256x256 -> 16 visual tokens" in done.stdout
    assert [file.name for file in tmp_path.iterdir()] == ["fp32.onnx"]


def test_without_a_comparison_the_command_says_so(conformance, tmp_path):
    arguments = ["--checkpoint", conformance / "checkpoint", "--out", tmp_path, "--check", "none"]
    done = run_main("export.encoder", *arguments)
    assert done.returncode == 0, done.stderr
    assert "nothing was compared" in done.stdout
    assert " ok" not in done.stdout
    assert [file.name for file in tmp_path.iterdir()] == ["fp32.onnx"]


@pytest.mark.parametrize("inline_bytes", [0, 10**9])
def test_a_full_disk_is_one_line_and_leaves_nothing(conformance, tmp_path, monkeypatch, inline_bytes):
    monkeypatch.setattr(encoder_export, "INLINE_BYTES", inline_bytes)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
    try:
        with pytest.raises(OSError):
            main(["--checkpoint", str(conformance / "checkpoint"), "--out", str(tmp_path)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "mentions"),
    [
        (["--res", "1000"], ["1000", "64", "960", "1024"]),
        (["--res", "-64"], ["-64"]),
        (["--precision", "int3"], ["int3", "fp32", "fp16"]),
        (["--check", "half"], ["half", "full", "none"]),
        (["--checkpoint", "/no/such/folder"], ["/no/such/folder"]),
    ],
)
def test_command_refuses_in_one_line(conformance, tmp_path, arguments, mentions):
    checkpoint = [] if "--checkpoint" in arguments else ["--checkpoint", conformance / "checkpoint"]
    done = run_main("export.encoder", *checkpoint, *arguments, "--out", tmp_path)
    assert_one_line_error(done, *mentions)
    assert list(tmp_path.iterdir()) == []


def test_command_fails_where_the_error_exceeds_its_bound(conformance, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(TOLERANCES, ("encoder", "fp32"), 1e-9)
    with pytest.raises(ParityError, match="nothing was written") as error:
        main(["--checkpoint", str(conformance / "checkpoint"), "--res", "128", "--out", str(tmp_path)])
    assert error.value.exit_code == 1
    assert "TOO LARGE" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
