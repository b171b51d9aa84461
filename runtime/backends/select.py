"""Which library runs each part of a bundle, on what, and why. Decided here, once, before anything is loaded."""

import importlib.util
import warnings
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from runtime import kernels
from runtime.backends.openvino import OPENVINO_PRECISIONS, OpenVinoEncoder
from runtime.backends.ort_decoder import Decoder
from runtime.backends.ort_encoder import OnnxEncoder
from runtime.backends.ort_session import (
    PROVIDERS,
    open_device,
)
from runtime.bundle.engines import FLAVOURS, choose_engine
from runtime.bundle.manifest import Bundle, DecoderPart
from runtime.device.cpuinfo import int8_sums_saturate, is_x86
from runtime.device.cuda import Cuda, present_gpu
from runtime.device.memory import Device
from runtime.errors import UserError

KERNELS = {"kernels": 8, "kernels24": 24}  # `runtime.kernels`, and to how many bits activations are rounded


def open_decoder(
    bundle: Bundle,
    threads: int | None = None,
    provider: str = "cpu",
    device: Device | None = None,
    products: str = "auto",
) -> Decoder:
    """The bundle's fused graph, with products by `runtime.kernels` or with the graph for prompts, where that is faster.

    products: `onnx`, `kernels`, `kernels24` (activations in 24 bits) or `auto`: the kernels where they are known to be
    faster (`kernels_are_faster`) and can be had. Raises UserError where they are asked for and cannot be had.
    """
    part = bundle.decoder
    slow_bytes = provider == "cpu" and int8_sums_saturate()
    if products == "auto":
        ours = kernels_are_faster(part, provider) and kernels_missing(bundle) is None
        products = "kernels" if ours else "onnx"
    if provider == "cuda" and products == "onnx":
        return _on_cuda(bundle, device)
    if products == "onnx":
        prefill = bundle.path(part.prefill_file) if part.prefill_file and slow_bytes else None
        return Decoder(bundle.path(part.file), part, threads, provider, device, prefill)
    if (reason := kernels_missing(bundle)) or provider != "cpu":
        raise UserError(f"--decoder {products}: {reason or 'they are for --provider cpu'}")
    file, bits = bundle.path(part.kernels_file), KERNELS[products]
    return Decoder(file, part, threads, provider, device, operators=kernels.library(), activation_bits=bits)


def _on_cuda(bundle: Bundle, device: Device) -> Decoder:
    """With steps recorded as a CUDA graph, where ONNX Runtime can."""
    from runtime.backends.ort_cuda_graph import ResidentDecoder

    file, part = bundle.path(bundle.decoder.file), bundle.decoder
    try:
        return ResidentDecoder(file, part, device, part.sampler_file and bundle.path(part.sampler_file))
    except UserError as error:
        better = "" if part.kv_dtype == "float16" else "; for a GPU there are --decoder-precision fp16 and w4a16"
        warnings.warn(f"decoding runs without a CUDA graph: {error}{better}", stacklevel=3)
    # Once the error is gone, and with it what holds the weights
    return Decoder(file, part, provider="cuda", device=device)


def kernels_are_faster(part: DecoderPart, provider: str) -> bool:
    """Whether products by `runtime.kernels` are known to be faster: on x86 processors, with VNNI and without."""
    return provider == "cpu" and part.precision in ("int4", "int8") and is_x86()


def kernels_missing(bundle: Bundle) -> str | None:
    """Why the decoder of a bundle cannot have products by `runtime.kernels`; None if it can."""
    if bundle.decoder.kernels_file is None:
        return f"{bundle.folder} has no graph for them, which decoders of 4 and 8 bits have if they are exported anew"
    return kernels.unavailable()


ENCODERS = ("auto", "onnx", "openvino", "tensorrt")
MAX_THREADS = 512
DECODERS = ("auto", "onnx", *KERNELS, "tensorrt")
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8")


@dataclass(frozen=True)
class Backends:
    """What the user asks for.

    encoder: `onnx` (ONNX Runtime), `openvino`, `tensorrt`, or `auto`: a TensorRT engine where one fits the GPU, else
    ONNX Runtime. decoder: `onnx` (ONNX Runtime's own operators), `kernels` (with `runtime.kernels`), `auto`: the
    latter for decoders of 4 and 8 bits on x86 processors, where they can be had; `kernels24` (with activations in 24
    bits in place of 8: the ids of float32 products); or `tensorrt`.
    provider: of ONNX Runtime, a key of `PROVIDERS`.
    encoder_precision: which of the bundle's encoders or engines, or bf16 for OpenVINO's way of computing; None: the
    bundle's own (a float32 bundle's engines are fp16). threads: of one operator on the CPU; None: one a physical core.
    Raises UserError for an unknown name or another number of threads than 1 to MAX_THREADS.
    """

    encoder: str = "auto"
    decoder: str = "auto"
    provider: str = "cpu"
    encoder_precision: str | None = None
    threads: int | None = None

    def __post_init__(self):
        for name, known in (("encoder", ENCODERS), ("decoder", DECODERS), ("provider", tuple(PROVIDERS))):
            if getattr(self, name) not in known:
                raise UserError(f"unknown {name} {getattr(self, name)!r}, expected one of {', '.join(known)}")
        if self.encoder_precision not in (None, *PRECISIONS):
            raise UserError(f"unknown precision {self.encoder_precision!r}, expected one of {', '.join(PRECISIONS)}")
        if self.encoder_precision == "bf16" and self.encoder != "openvino":
            raise UserError("precision bf16 is OpenVINO's: --encoder openvino")
        if self.encoder_precision == "fp32" and self.encoder == "tensorrt":
            raise UserError("precision fp32 is no engine's, which compute in fp16, int8 or fp8: --encoder onnx")
        if self.threads is not None and not 1 <= self.threads <= MAX_THREADS:
            raise UserError(f"threads is {self.threads}, expected 1 to {MAX_THREADS}")


@dataclass(frozen=True)
class Chosen:
    """What runs a part. runtime: onnxruntime, onnxruntime with kernels or kernels24, openvino or tensorrt; provider:
    where it computes; file: inside the bundle; note: why `auto` did not take what would be faster."""

    runtime: str
    provider: str
    precision: str
    file: str
    note: str = ""

    def __str__(self) -> str:
        return f"{self.runtime} {self.provider} {self.precision}"

    def to_dict(self) -> dict[str, str]:
        return {key: value for key, value in asdict(self).items() if value}


@dataclass(frozen=True)
class Parts:
    """Encoder and decoder of a bundle, loaded."""

    encoder: Any
    encoder_chosen: Chosen
    decoder: Any
    decoder_chosen: Chosen


class _Devices:
    """The memory of ONNX Runtime's provider, and the GPU's for engines: the same where both are on the GPU, so that
    everything goes into one stream."""

    def __init__(self, provider: str):
        self.of_provider = open_device(provider)

    @cached_property
    def gpu(self) -> Cuda:
        return self.of_provider if isinstance(self.of_provider, Cuda) else Cuda()


def open_parts(bundle: Bundle, wanted: Backends) -> Parts:
    """Load both parts. Raises UserError where one cannot be had as wanted."""
    devices = _Devices(wanted.provider)
    return Parts(*_open_encoder(bundle, wanted, devices), *_open_decoder(bundle, wanted, devices))


def _open_encoder(bundle: Bundle, wanted: Backends, devices: _Devices) -> tuple[Any, Chosen]:
    if wanted.encoder == "openvino":
        return _openvino_encoder(bundle, wanted)
    if wanted.encoder == "tensorrt":
        return _engine_encoder(bundle, wanted, devices)
    note = ""
    if wanted.encoder == "auto":
        try:
            present_gpu()  # the reason that matters where there is none
            return _engine_encoder(bundle, wanted, devices)
        except UserError as error:
            note = str(error)
    file, precision = _graph(bundle, wanted.encoder_precision)
    device, stride = devices.of_provider, bundle.encoder.stride
    encoder = OnnxEncoder(bundle.path(file), stride, wanted.threads, wanted.provider, device)
    return encoder, Chosen("onnxruntime", wanted.provider, precision, file, note)


def _open_decoder(bundle: Bundle, wanted: Backends, devices: _Devices) -> tuple[Any, Chosen]:
    part = bundle.decoder
    if wanted.decoder == "tensorrt":
        from runtime.backends.tensorrt import EngineDecoder

        engine = _engine(bundle, "decoder", "fp16")
        return EngineDecoder(engine, devices.gpu), _chosen_engine(bundle, engine)
    decoder = open_decoder(bundle, wanted.threads, wanted.provider, devices.of_provider, wanted.decoder)
    if decoder.kernels:
        name = next(name for name, bits in KERNELS.items() if bits == decoder.activation_bits)
        return decoder, Chosen(f"onnxruntime with {name}", wanted.provider, part.precision, part.kernels_file)
    would_help = wanted.decoder == "auto" and kernels_are_faster(part, wanted.provider)
    note = kernels_missing(bundle) if would_help else None
    return decoder, Chosen("onnxruntime", wanted.provider, part.precision, part.file, note or "")


def _graph(bundle: Bundle, precision: str | None) -> tuple[str, str]:
    """(an encoder graph of the bundle, its precision)."""
    if precision in (None, bundle.encoder.precision):
        return bundle.encoder.file, bundle.encoder.precision
    file = bundle.encoder_file(precision)
    if file is None:
        there = ", ".join(name for name in PRECISIONS if bundle.encoder_file(name))
        raise UserError(f"{bundle.folder} has no {precision} encoder, only {there}")
    return file, precision


def _openvino_encoder(bundle: Bundle, wanted: Backends) -> tuple[Any, Chosen]:
    asked = wanted.encoder_precision
    file, precision = _graph(bundle, None if asked == "bf16" else asked)
    if precision == "int8" and int8_sums_saturate():
        raise UserError(
            f"--encoder openvino: {file} is INT8, this processor has no VNNI, and without it OpenVINO's INT8 sums are "
            "wrong; --encoder onnx computes them right, --encoder-precision fp32 takes the float32 graph"
        )
    if asked == "bf16":
        precision = asked
    if precision not in OPENVINO_PRECISIONS:
        raise UserError(f"OpenVINO's CPU plugin does not compute in {precision}")
    encoder = OpenVinoEncoder(bundle.path(file), wanted.threads, precision)
    return encoder, Chosen("openvino", "cpu", precision, file)


def _engine_encoder(bundle: Bundle, wanted: Backends, devices: _Devices) -> tuple[Any, Chosen]:
    from runtime.backends.tensorrt import EngineEncoder

    engine = _engine(bundle, "encoder", wanted.encoder_precision or engine_precision(bundle))
    return EngineEncoder(engine, bundle.encoder.stride, devices.gpu), _chosen_engine(bundle, engine)


def engine_precision(bundle: Bundle) -> str:
    """Of the engine that stands for the bundle's own encoder: quantised as that is, else fp16."""
    return bundle.encoder.precision if bundle.encoder.precision in ("int8", "fp8") else "fp16"


def _engine(bundle: Bundle, part: str, precision: str) -> Any:
    """The engine of the bundle that fits the GPU that is here, verified."""
    return choose_engine(bundle, part, precision, present_gpu, installed_flavours())


def installed_flavours() -> dict[str, str]:
    """flavour -> version of the TensorRT packages that can be imported here."""
    found = {}
    for flavour, module in FLAVOURS.items():
        if importlib.util.find_spec(module) is None:
            continue
        for package in (module, f"{module}_cu13", f"{module}_cu12"):
            try:
                found[flavour] = version(package)
                break
            except PackageNotFoundError:
                continue
    return found


def _chosen_engine(bundle: Bundle, engine: Any) -> Chosen:
    report = engine.report
    return Chosen(
        "tensorrt", f"{report['flavour']} {report['version']}", report["precision"],
        str(engine.file.relative_to(bundle.folder)),
    )  # fmt: skip
