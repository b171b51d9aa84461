"""Which library runs each part: OpenVINO, engines on a simulated GPU, falling back, and what cannot be had."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import onnx
import openvino
import pytest
from PIL import Image

import runtime
from export.graphs.mixed_precision import to_half
from export.tensorrt.build import Options
from export.tensorrt.source import engine_graph, source_of
from export.tensorrt.validate import validate
from runtime.backends.ort_encoder import OnnxEncoder
from runtime.backends.select import Backends
from runtime.bundle.engines import FORMAT, engine_folder, engine_name, read_report, write_report
from runtime.bundle.manifest import open_bundle
from runtime.bundle.verify import file_sha256
from runtime.device.memory import Cpu
from runtime.errors import UserError
from tests.integration.runtime.test_infer import answer, infer
from tests.support import simulated_gpu
from tests.support.bundles import exported
from tests.support.commands import assert_one_line_error


@pytest.fixture
def picture(tmp_path):
    file = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 300, 3), np.uint8)).save(file)
    return file


@pytest.fixture
def bundle(conformance_bundle, tmp_path):
    return shutil.copytree(conformance_bundle, tmp_path / "bundle")


@pytest.fixture(scope="module")
def reference(conformance_bundle):
    return runtime.load(conformance_bundle, backends=Backends(encoder="onnx"))


@pytest.fixture(scope="module")
def portable():
    """A bundle with the decoder of standard operators too."""
    return exported("--res", 256, "--portable-decoder")


def put_decoder_engine(folder) -> None:
    """The portable decoder in FP16, as its engine is made, standing in for one."""
    bundle = open_bundle(folder)
    options = Options(part="decoder", target="sm89")
    source = source_of(bundle, options)
    model, _ = engine_graph(source, options)
    dtypes = {1: "FLOAT", 7: "INT64", 10: "HALF"}

    def tensors(values):
        return [
            {
                "name": value.name,
                "dtype": dtypes[value.type.tensor_type.elem_type],
                "shape": [dim.dim_value or -1 for dim in value.type.tensor_type.shape.dim],
            }
            for value in values
        ]

    file = source.folder / engine_name("rtx", "sm89", "fp16")
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(simulated_gpu.as_engine(model))
    report = {
        "format": FORMAT, "flavour": "rtx", "version": "1.0", "version_compatible": False, "target": "sm89",
        "part": "decoder", "precision": "fp16", "profiles": [{}, {}],
        "engine": {"size": file.stat().st_size, "sha256": file_sha256(file)},
        "onnx": {"file": source.name, "sha256": source.sha256},
        "inputs": tensors(model.graph.input), "outputs": tensors(model.graph.output),
    }  # fmt: skip
    write_report(file, report)


def put_engine(folder, target: str = "sm89", **changes) -> None:
    """The encoder in FP16, standing in for an engine of sides from 128 to 512."""
    bundle = open_bundle(folder)
    model = to_half(onnx.load(str(bundle.path("encoder/fp32.onnx"))), [])
    file = engine_folder(folder, "encoder") / engine_name("rtx", target, "fp16")
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(simulated_gpu.as_engine(model))
    sizes = [[1, 3, side, side] for side in (128, 256, 512)]
    report = {
        "format": FORMAT, "flavour": "rtx", "version": "1.0", "version_compatible": False, "target": target,
        "precision": "fp16", "profiles": [{"pixel_values": sizes}],
        "engine": {"size": file.stat().st_size, "sha256": file_sha256(file)},
        "onnx": {"file": "encoder/fp32.onnx", "sha256": {"encoder/fp32.onnx": bundle.sha256("encoder/fp32.onnx")}},
        "inputs": [{"name": "pixel_values", "dtype": "HALF", "shape": [-1, 3, -1, -1]}],
        "outputs": [{"name": "image_embeds", "dtype": "HALF", "shape": [-1, -1, bundle.encoder.hidden_size]}],
    }  # fmt: skip
    write_report(file, report | changes)


def embeds_of(model, images) -> np.ndarray:
    trace = runtime.Trace()
    list(model.generate(images, "What?", runtime.Options(max_new_tokens=1), trace))
    return trace.image_embeds


def relative_error(found, expected) -> float:
    return np.linalg.norm(found.astype(np.float64) - expected) / np.linalg.norm(expected)


def has_bf16() -> bool:
    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def test_openvino_computes_in_float32_unless_bf16_is_asked_for(conformance_bundle, reference, picture):
    expected = embeds_of(reference, [picture])
    error = {}
    for precision in (None, *(("bf16",) if has_bf16() else ())):
        model = runtime.load(
            conformance_bundle, backends=Backends(encoder="openvino", encoder_precision=precision, threads=1)
        )
        assert model.encoder_backend.runtime == "openvino"
        assert model.encoder_backend.precision == (precision or "fp32")
        error[precision] = relative_error(embeds_of(model, [picture]), expected)
    assert error[None] < 1e-5
    assert not has_bf16() or 1e-4 < error["bf16"] < 3e-2


def test_bf16_is_refused_where_the_processor_has_none(conformance_bundle, monkeypatch):
    class Older(openvino.Core):
        def compile_model(self, file, device, hints):
            return super().compile_model(file, device, hints | {"INFERENCE_PRECISION_HINT": "f32"})

    monkeypatch.setattr(openvino, "Core", Older)
    with pytest.raises(UserError, match="precision bf16: this processor has none"):
        runtime.load(conformance_bundle, backends=Backends(encoder="openvino", encoder_precision="bf16"))


def test_openvino_takes_images_of_several_sizes(conformance_bundle, reference):
    random = np.random.default_rng(1)
    images = [random.standard_normal((3, height, 192), dtype=np.float32) for height in (128, 320, 128)]
    model = runtime.load(conformance_bundle, backends=Backends(encoder="openvino"))
    found, expected = model.encoder(images), reference.encoder(images)
    assert found.shape == expected.shape == ((2 + 5 + 2) * 3, expected.shape[1])
    assert relative_error(found, expected) < 1e-5


def test_an_engine_answers_as_onnx_runtime_does(bundle, reference, picture, monkeypatch):
    simulated_gpu.install(monkeypatch)
    put_engine(bundle)
    model = runtime.load(bundle)
    assert model.encoder_backend.runtime == "tensorrt"
    assert model.encoder_backend.file == "encoder/engines/rtx-sm89-fp16.engine"
    assert 1e-6 < relative_error(embeds_of(model, [picture]), embeds_of(reference, [picture])) < 5e-3


def test_embeds_on_a_gpu_are_kept_and_joined_there(bundle, reference, monkeypatch):
    random = np.random.default_rng(2)
    pictures = [Image.fromarray(random.integers(0, 256, (90, 130, 3), np.uint8)) for _ in range(2)]
    cudart = simulated_gpu.install(monkeypatch)
    put_engine(bundle)
    model = runtime.load(bundle, backends=Backends(encoder="tensorrt"))

    def ids(model, images) -> list[int]:
        *_, last = model.generate(images, "What?", runtime.Options(max_new_tokens=5))
        return last.result.token_ids

    apart = [ids(model, [picture]) for picture in pictures]
    replays, uploaded = cudart.replays, cudart.copied[1]
    assert ids(model, pictures) == ids(reference, pictures)
    assert cudart.replays == replays
    assert cudart.copied[1] == uploaded, "no pixels went to the GPU"
    assert [ids(model, [picture]) for picture in pictures] == apart == [ids(reference, [p]) for p in pictures]


def test_each_size_is_recorded_once_and_replayed(bundle, reference, monkeypatch):
    cudart = simulated_gpu.install(monkeypatch)
    put_engine(bundle)
    encoder = runtime.load(bundle, backends=Backends(encoder="tensorrt")).encoder
    random = np.random.default_rng(2)
    sizes = [(128, 128), (256, 128), (128, 128), (128, 128)]
    images = [random.standard_normal((3, *size), dtype=np.float32) for size in sizes]
    for _ in range(2):
        cudart.replays = 0
        embeds = encoder(images)
        assert cudart.replays == len(images)
        found = embeds.device.download(embeds)
        assert relative_error(found, reference.encoder(images)) < 5e-3
    assert cudart.copied[1] == 2 * sum(image.size * 2 for image in images), "each image goes up once, in FP16"


def test_runs_without_a_cuda_graph_where_none_can_be_recorded(bundle, reference, monkeypatch, caplog):
    cudart = simulated_gpu.install(monkeypatch)
    cudart.capture_fails = True
    put_engine(bundle)
    encoder = runtime.load(bundle, backends=Backends(encoder="tensorrt")).encoder
    image = np.random.default_rng(2).standard_normal((3, 128, 192), dtype=np.float32)
    embeds = encoder([image])
    assert "without a CUDA graph" in caplog.text
    assert relative_error(embeds.device.download(embeds), reference.encoder([image])) < 5e-3


def test_memory_is_given_back(bundle, monkeypatch):
    cudart = simulated_gpu.install(monkeypatch)
    put_engine(bundle)
    encoder = runtime.load(bundle, backends=Backends(encoder="tensorrt")).encoder
    random = np.random.default_rng(2)
    encoder([random.standard_normal((3, 128, 128), dtype=np.float32)])
    held = len(cudart.memory)
    for rows in range(2, 60):  # more sizes than are kept
        encoder([random.standard_normal((3, 64 * (rows % 7 + 2), 64 * (rows % 5 + 2)), dtype=np.float32)])
    assert len(cudart.memory) <= held + 15 * 3
    sizes = len({(rows % 7, rows % 5) for rows in range(2, 60)} | {(0, 0)})
    assert cudart.destroyed >= sizes - 16


def test_an_image_outside_the_engine_is_refused(bundle, monkeypatch):
    simulated_gpu.install(monkeypatch)
    put_engine(bundle)
    encoder = runtime.load(bundle, backends=Backends(encoder="tensorrt")).encoder
    with pytest.raises(UserError, match="sides of 128 to 512 pixels, the image has 576x256"):
        encoder([np.zeros((3, 256, 576), np.float32)])


def test_an_engine_that_tensorrt_cannot_read_is_one_line(bundle, monkeypatch):
    simulated_gpu.install(monkeypatch)
    put_engine(bundle)
    file = bundle / "encoder/engines/rtx-sm89-fp16.engine"
    file.write_bytes(b"no engine")
    report = json.loads((bundle / "encoder/engines/rtx-sm89-fp16.engine.json").read_text())
    write_report(file, report | {"engine": {"size": 9, "sha256": file_sha256(file)}})
    with pytest.raises(UserError, match="cannot read it"):
        runtime.load(bundle, backends=Backends(encoder="tensorrt"))


def test_decoder_reads_gpu_memory(conformance_bundle, reference, monkeypatch):
    """ONNX Runtime's CUDA provider is not here; its bindings to addresses are tried on the CPU's."""
    cudart = simulated_gpu.install(monkeypatch)
    simulated_gpu.install_provider(monkeypatch)
    model = runtime.load(conformance_bundle, backends=Backends(encoder="onnx", provider="cuda"))
    images = [np.random.default_rng(3).standard_normal((3, 128, side), dtype=np.float32) for side in (128, 256)]
    embeds = model.encoder(images)
    assert embeds.device.download(embeds).tolist() == reference.encoder(images).tolist()
    ids = [1, *range(-1, -13, -1), 20, 30]
    expected = reference.decoder.start(64)
    sequence = model.decoder.start(64)
    assert sequence.forward_greedy(ids, embeds) == expected.forward_greedy(ids, reference.encoder(images))
    assert cudart.copied[1], "what is on the host goes to the GPU"


def test_both_parts_as_engines(portable, tmp_path, reference, picture, monkeypatch):
    cudart = simulated_gpu.install(monkeypatch)
    folder = shutil.copytree(portable, tmp_path / "bundle")
    put_engine(folder)
    put_decoder_engine(folder)
    model = runtime.load(folder, backends=Backends(encoder="tensorrt", decoder="tensorrt"))
    assert model.encoder.device is model.decoder.device, "one stream from end to end"
    image = np.random.default_rng(3).standard_normal((3, 128, 256), dtype=np.float32)
    ids = [1, *range(-1, -9, -1), 20, 30]
    down = cudart.copied[2]
    embeds = model.encoder([image])
    assert cudart.copied[2] == down, "image embeds stay on the GPU"
    found, expected = model.decoder.start(64), reference.decoder.start(64)
    rows = [(found.forward(ids, embeds), expected.forward(ids, reference.encoder([image])).copy())]
    for token in (5, 6, 7, 8):
        rows.append((found.forward([token]), expected.forward([token]).copy()))
    assert cudart.replays == 1 + 3, "the image, and every single step but the first"
    found.rewind(9)
    expected.rewind(9)
    rows.append((found.forward([40, 50]), expected.forward([40, 50]).copy()))
    rows.append((found.forward([60]), expected.forward([60]).copy()))
    for one, other in rows:
        assert 1e-7 < relative_error(one, other) < 1e-2
    found.rewind(9)
    likeliest = found.forward_greedy([60])
    found.rewind(9)
    assert likeliest == found.forward([60]).argmax()
    *_, last = model.generate([picture], "What?", runtime.Options(max_new_tokens=4))
    assert len(last.result.token_ids) == 4


def test_a_longer_sequence_than_the_engine_holds(portable, tmp_path, monkeypatch):
    simulated_gpu.install(monkeypatch)
    folder = shutil.copytree(portable, tmp_path / "bundle")
    put_decoder_engine(folder)
    model = runtime.load(folder, backends=Backends(encoder="onnx", decoder="tensorrt"))
    with pytest.raises(UserError, match="built for 4096 positions, 5000 are wanted"):
        model.decoder.start(5000)


def test_a_decoder_engine_is_validated_by_the_runtime(portable, tmp_path, monkeypatch):
    simulated_gpu.install(monkeypatch)
    folder = shutil.copytree(portable, tmp_path / "bundle")
    put_decoder_engine(folder)
    engine = engine_folder(folder, "decoder") / engine_name("rtx", "sm89", "fp16")
    validation = validate(engine, open_bundle(folder).path("decoder/portable.onnx"))
    assert validation["tool"] == "runtime"
    assert [run["profile"] for run in validation["runs"]] == [0, *[1] * 8]
    assert all(1e-7 < run["error"] < 1e-2 for run in validation["runs"])
    assert read_report(engine)["executed"] is True


@pytest.mark.parametrize("gpu", [{"devices": 0}, {"capability": (12, 0)}])
def test_auto_falls_back_and_says_why(bundle, picture, monkeypatch, gpu):
    simulated_gpu.install(monkeypatch, **gpu)
    put_engine(bundle)
    model = runtime.load(bundle)
    assert model.encoder_backend.runtime == "onnxruntime"
    for said in ["no NVIDIA GPU"] if "devices" in gpu else ["rtx-sm89-fp16.engine", "the GPU: sm120", "export.engine"]:
        assert said in model.encoder_backend.reason


def test_the_command_line_says_what_ran(conformance_bundle, picture):
    found = answer(conformance_bundle, "--image", picture, "--prompt", "What?", "--max-new-tokens", 2)
    assert found["encoder"]["runtime"] == found["decoder"]["runtime"] == "onnxruntime"
    assert "NVIDIA GPU" in found["encoder"]["note"]
    arguments = ("--image", picture, "--prompt", "What?", "--max-new-tokens", 2)
    done = infer(conformance_bundle, *arguments)
    assert "not on TensorRT, no NVIDIA GPU" in done.stdout
    assert "onnxruntime cpu fp32" in done.stdout
    asked = infer(conformance_bundle, *arguments, "--encoder", "onnx")
    assert asked.stderr == ""
    precision = "bf16" if has_bf16() else "fp32"
    found = answer(conformance_bundle, *arguments, "--encoder", "openvino", "--encoder-precision", precision)
    assert (found["encoder"]["runtime"], found["encoder"]["precision"]) == ("openvino", precision)


@pytest.mark.parametrize(
    ("arguments", "mentions"),
    [
        (["--encoder", "torch"], ["torch", "auto, onnx, kernels, openvino, tensorrt"]),
        (["--decoder", "openvino"], ["openvino", "auto, onnx, kernels, kernels24, tensorrt"]),
        (["--provider", "rocm"], ["rocm", "cpu, cuda, tensorrt, nv_tensorrt_rtx"]),
        (["--provider", "cuda"], ["cuda", "CPUExecutionProvider", ".[gpu]"]),
        (["--provider", "nv_tensorrt_rtx"], ["onnxruntime_ep_nv_tensorrt_rtx", "pip install"]),
        (["--encoder-precision", "int3"], ["int3", "int8"]),
        (["--encoder", "onnx", "--encoder-precision", "int8"], ["no int8 encoder", "fp32"]),
        (["--encoder", "onnx", "--encoder-precision", "bf16"], ["--encoder openvino"]),
        (["--encoder", "tensorrt", "--encoder-precision", "fp32"], ["fp32 is no engine's", "fp16, int8 or fp8"]),
        (["--encoder", "tensorrt"], ["no fp16 encoder engine", "there: none", "NVIDIA GPU", "-m export.engine"]),
    ],
)
def test_what_cannot_be_had_is_one_line(conformance_bundle, arguments, mentions):
    assert_one_line_error(infer(conformance_bundle, "--prompt", "What?", *arguments), *mentions)


def test_images_of_one_size_are_a_batch_where_the_device_is_no_cpu(reference, conformance_bundle):
    class Elsewhere:
        """Memory of the host that does not call itself so."""

        name, zeros, take = "cpu", Cpu.zeros, Cpu.take

    file = conformance_bundle / "encoder" / "fp32.onnx"
    encoder, batches = OnnxEncoder(file, reference.bundle.encoder.stride, device=Elsewhere()), []
    session = encoder._session
    encoder._session = SimpleNamespace(
        io_binding=session.io_binding,
        run_with_iobinding=lambda binding, options: batches.append(session.run_with_iobinding(binding, options)),
    )
    random = np.random.default_rng(0)
    sizes = [(128, 128), (128, 128), (192, 128), (128, 128)]
    images = [random.standard_normal((3, *size), dtype=np.float32) for size in sizes]
    np.testing.assert_allclose(encoder(images), reference.encoder(images), rtol=1e-4, atol=1e-5)
    assert len(batches) == 3


def test_what_the_cuda_provider_is_told():
    from runtime.backends.ort_session import _providers

    for cuda_graph, channels_last in ((True, False), (False, True)):
        (name, options), last = _providers("cuda", 77, cuda_graph, channels_last)
        assert (name, last) == ("CUDAExecutionProvider", "CPUExecutionProvider")
        assert options["user_compute_stream"] == "77" and options["use_tf32"] == "0"
        assert options["enable_cuda_graph"] == str(int(cuda_graph))
        assert options["prefer_nhwc"] == str(int(channels_last))
