"""Which library runs each component of a bundle, on what, and why. Decided here, once, while a model is loaded."""

import importlib.util
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version

from runtime import kernels
from runtime.backends.base import Decoder, Encoder
from runtime.backends.memory_plan import DTYPES, KV_PRECISIONS, Costs, Plan, mebibytes, plan
from runtime.backends.openvino import OPENVINO_PRECISIONS, OpenVinoEncoder
from runtime.backends.ort_decoder import OnnxDecoder
from runtime.backends.ort_encoder import OnnxEncoder
from runtime.backends.ort_session import PROVIDERS, open_device
from runtime.bundle.engines import FLAVOURS, Engine, choose_engine
from runtime.bundle.manifest import Bundle, DecoderPart
from runtime.device.cpuinfo import int8_sums_saturate, is_x86, lower_priority
from runtime.device.cuda import Cuda, present_gpu
from runtime.device.host_memory import available_bytes
from runtime.errors import UserError

logger = logging.getLogger("convllava.backends")

KERNELS = {"kernels": 8, "kernels24": 24}  # `runtime.kernels`, and to how many bits activations are quantized
ENCODERS = ("auto", "onnx", "kernels", "openvino", "tensorrt")
MAX_THREADS = 512
DECODERS = ("auto", "onnx", *KERNELS, "tensorrt")
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8")


@dataclass(frozen=True)
class Backends:
    """What the user asks for.

    encoder: `onnx` (ONNX Runtime), `kernels` (with `runtime.kernels`, in INT8), `openvino`, `tensorrt`, or `auto`: a
    TensorRT engine where one fits the GPU, else ONNX Runtime (`onnx`). decoder: `onnx` (ONNX Runtime's own operators),
    `kernels` (with `runtime.kernels`), `auto`: the latter for decoders of 4 and 8 bits on x86 processors, where they
    can be had; `kernels24` (with activations in 24 bits in place of 8: the ids of float32 products); or `tensorrt`.
    provider: of ONNX Runtime, a key of `PROVIDERS`.
    encoder_precision: which of the bundle's encoders or engines, or bf16 for OpenVINO's way of computing; None: the
    bundle's own (a float32 bundle's engines are fp16). threads: of one operator on the CPU; None: one a physical core.
    kv_precision: of the decoder's KV cache on ONNX Runtime's CPU provider, fp32, fp16, int8 (with the attention of
    `runtime.kernels`), or auto: fp32 unless a sequence does not fit the memory, else fp16. context: positions of a
    sequence, at most the model's; None: the model's.
    encoder_nice: what is added to the niceness of the encoder's threads on the CPU, where a decoder runs beside it.
    Raises UserError for an unknown name or another number of threads than 1 to MAX_THREADS.
    """

    encoder: str = "auto"
    decoder: str = "auto"
    provider: str = "cpu"
    encoder_precision: str | None = None
    threads: int | None = None
    encoder_nice: int = 0
    kv_precision: str = "auto"
    context: int | None = None

    def __post_init__(self):
        for name, known in (
            ("encoder", ENCODERS),
            ("decoder", DECODERS),
            ("provider", tuple(PROVIDERS)),
            ("kv_precision", KV_PRECISIONS),
        ):
            if getattr(self, name) not in known:
                raise UserError(f"unknown {name} {getattr(self, name)!r}, expected one of {', '.join(known)}")
        if self.encoder_precision not in (None, *PRECISIONS):
            raise UserError(f"unknown precision {self.encoder_precision!r}, expected one of {', '.join(PRECISIONS)}")
        if self.encoder_precision == "bf16" and self.encoder != "openvino":
            raise UserError("precision bf16 is OpenVINO's: --encoder openvino")
        if self.encoder == "kernels" and self.encoder_precision not in (None, "int8"):
            raise UserError(f"precision {self.encoder_precision} is not the kernels', which compute in int8")
        if self.encoder_precision == "fp32" and self.encoder == "tensorrt":
            raise UserError("precision fp32 is no engine's, which compute in fp16, int8 or fp8: --encoder onnx")
        if self.threads is not None and not 1 <= self.threads <= MAX_THREADS:
            raise UserError(f"threads is {self.threads}, expected 1 to {MAX_THREADS}")
        if self.context is not None and self.context < 1:
            raise UserError(f"context is {self.context}, expected 1 or more")


@dataclass(frozen=True)
class Resolved:
    """What runs a component.

    Attributes:
        runtime: onnxruntime, onnxruntime with kernels or kernels24, openvino or tensorrt.
        provider: where it computes.
        precision: of the graph or engine.
        file: inside the bundle.
        reason: why `auto` did not take what would be faster, or "".
        kv_precision: of a decoder's KV cache.
    """

    runtime: str
    provider: str
    precision: str
    file: str
    reason: str = ""
    kv_precision: str = ""

    def __str__(self) -> str:
        return f"{self.runtime} {self.provider} {self.precision}"

    def to_dict(self) -> dict[str, str]:
        """For `infer.py --json`, which calls the reason `note`."""
        values = {"runtime": self.runtime, "provider": self.provider, "precision": self.precision, "file": self.file}
        others = {"kv_precision": self.kv_precision, "note": self.reason}
        return values | {name: value for name, value in others.items() if value}


@dataclass(frozen=True)
class Components:
    """Encoder and decoder of a bundle, loaded, and what runs them."""

    encoder: Encoder
    encoder_backend: Resolved
    decoder: Decoder
    decoder_backend: Resolved


class _Devices:
    """The memory of ONNX Runtime's provider, and the GPU's for engines: the same where both are on the GPU, so that
    everything goes into one stream."""

    def __init__(self, provider: str):
        self.of_provider = open_device(provider)

    @cached_property
    def gpu(self) -> Cuda:
        return self.of_provider if isinstance(self.of_provider, Cuda) else Cuda()


def open_components(bundle: Bundle, wanted: Backends) -> Components:
    """Load both components. Raises UserError where one cannot be had as wanted."""
    devices = _Devices(wanted.provider)
    if wanted.encoder_nice and wanted.provider == "cpu":
        with ThreadPoolExecutor(1, initializer=lower_priority, initargs=(wanted.encoder_nice,)) as thread:
            opened = thread.submit(_open_encoder, bundle, wanted, devices)  # its own threads inherit the priority
        encoder, encoder_backend = opened.result()
    else:
        encoder, encoder_backend = _open_encoder(bundle, wanted, devices)
    decoder, decoder_backend = _open_decoder(bundle, wanted, devices)
    for name, backend in (("encoder", encoder_backend), ("decoder", decoder_backend)):
        logger.info("%s on %s%s", name, backend, f": {backend.reason}" if backend.reason else "")
    return Components(encoder, encoder_backend, decoder, decoder_backend)


def open_decoder(bundle: Bundle, wanted: Backends | None = None) -> Decoder:
    """The decoder alone. Raises UserError where it cannot be had as wanted."""
    wanted = wanted or Backends()
    return _open_decoder(bundle, wanted, _Devices(wanted.provider))[0]


def plan_batch(
    bundle: Bundle,
    wanted: Backends,
    slots: int | None = None,
    cache_bytes: int | None = None,
    resolution: int = 0,
) -> tuple[Backends, Plan]:
    """What sequences that are decoded together and the image cache may take, so that all fits this machine's memory.

    Args:
        bundle: that is to be loaded.
        wanted: what the user asks for.
        slots, cache_bytes: as `plan`.
        resolution: as `Costs.of`.

    Returns:
        (`wanted` with the context and KV precision that fit, the plan).

    Raises:
        UserError: the bundle has no graph for the KV precision that is asked for.
    """
    costs = Costs.of(bundle, resolution)
    if wanted.provider != "cpu":
        return wanted, plan(costs, None, slots, wanted.context, next(iter(costs.positions)), cache_bytes)
    if wanted.kv_precision not in ("auto", *costs.positions):
        raise _no_graph_with_cache(bundle, wanted.kv_precision, costs)
    chosen = plan(costs, available_bytes(), slots, wanted.context, wanted.kv_precision, cache_bytes)
    return replace(wanted, context=chosen.context, kv_precision=chosen.kv_precision), chosen


def _open_encoder(bundle: Bundle, wanted: Backends, devices: _Devices) -> tuple[Encoder, Resolved]:
    if wanted.encoder == "openvino":
        return _openvino_encoder(bundle, wanted)
    if wanted.encoder == "kernels":
        return _kernels_encoder(bundle, wanted)
    if wanted.encoder == "tensorrt":
        return _engine_encoder(bundle, wanted, devices)
    reason = ""
    if wanted.encoder == "auto":
        try:
            present_gpu()  # the reason that matters where there is none
            return _engine_encoder(bundle, wanted, devices)
        except UserError as error:
            reason = f"not on TensorRT, {error}"
    file, precision = _graph(bundle, wanted.encoder_precision)
    device, stride = devices.of_provider, bundle.encoder.stride
    encoder = OnnxEncoder(bundle.path(file), stride, wanted.threads, wanted.provider, device)
    return encoder, Resolved("onnxruntime", wanted.provider, precision, file, reason)


def _open_decoder(bundle: Bundle, wanted: Backends, devices: _Devices) -> tuple[Decoder, Resolved]:
    choice, reason = wanted.decoder, ""
    if choice == "tensorrt":
        from runtime.backends.tensorrt import EngineDecoder

        engine = _engine(bundle, "decoder", "fp16")
        return EngineDecoder(engine, devices.gpu), _resolved_engine(bundle, engine)
    part, note = _with_kv_cache(bundle, wanted)
    kv_precision = {dtype: name for name, dtype in DTYPES.items()}[part.kv_dtype]
    if kv_precision == "int8" and (missing := kernels.unavailable()):
        raise UserError(f"--kv-precision int8: its attention is one of this project's kernels; {missing}")
    if choice == "auto":
        choice = "onnx"
        if wanted.provider == "cpu" and part.precision in ("int4", "int8") and is_x86():  # where kernels are faster
            missing = kernels_missing(bundle, part)
            choice, reason = ("onnx", f"without this project's kernels, {missing}") if missing else ("kernels", "")
    provider, device = wanted.provider, devices.of_provider
    if choice in KERNELS:
        if missing := kernels_missing(bundle, part) or (provider != "cpu" and "they are for --provider cpu"):
            raise UserError(f"--decoder {choice}: {missing}")
        assert part.kernels_file is not None
        file = part.kernels_file
        operators, bits = kernels.library(), KERNELS[choice]
        decoder = OnnxDecoder(
            bundle.path(file), part, wanted.threads, provider, device, operators=operators, activation_bits=bits
        )
        return decoder, Resolved(f"onnxruntime with {choice}", provider, part.precision, file, note, kv_precision)
    if isinstance(device, Cuda) and provider == "cuda":
        decoder, reason = _cuda_decoder(bundle, device)
    else:
        dequantized = part.prefill_file if provider == "cpu" and int8_sums_saturate() else None
        prefill = bundle.path(dequantized) if dequantized else None
        decoder = OnnxDecoder(bundle.path(part.file), part, wanted.threads, provider, device, prefill)
    reason = "; ".join(filter(None, (reason, note)))
    return decoder, Resolved("onnxruntime", provider, part.precision, part.file, reason, kv_precision)


def _with_kv_cache(bundle: Bundle, wanted: Backends) -> tuple[DecoderPart, str]:
    """(the decoder with the KV cache that is wanted, why it is not in float32 or "")."""
    asked, note = wanted.kv_precision, ""
    costs = Costs.of(bundle)
    if wanted.provider != "cpu":
        if asked != "auto" and DTYPES[asked] != bundle.decoder.kv_dtype:
            raise UserError(f"--kv-precision {asked} is for --provider cpu")
        asked = next(name for name in DTYPES if DTYPES[name] == bundle.decoder.kv_dtype)
    elif asked == "auto":
        chosen = plan(costs, available_bytes(), slots=1, context=wanted.context)
        asked = chosen.kv_precision
        if asked != next(iter(costs.positions)):
            size = mebibytes(chosen.context * costs.positions["fp32"])
            note = f"KV cache in {asked}, a sequence takes {size} in fp32"
    part = bundle.decoder_with_cache(DTYPES[asked])
    if part is None:
        raise _no_graph_with_cache(bundle, asked, costs)
    if wanted.context is not None:
        part = replace(part, context_length=min(wanted.context, part.context_length))
    return part, note


def _no_graph_with_cache(bundle: Bundle, asked: str, costs: Costs) -> UserError:
    there = " or ".join(costs.positions)
    return UserError(f"--kv-precision {asked}: {bundle.folder} has graphs for {there} alone; export it again")


def _cuda_decoder(bundle: Bundle, device: Cuda) -> tuple[OnnxDecoder, str]:
    """(decoder, reason): with decode steps captured as a CUDA graph, where ONNX Runtime can."""
    from runtime.backends.ort_cuda_graph import CudaGraphDecoder

    file, part = bundle.path(bundle.decoder.file), bundle.decoder
    try:
        return CudaGraphDecoder(file, part, device, bundle.path(part.sampler_file) if part.sampler_file else None), ""
    except UserError as error:
        better = "" if part.kv_dtype == "float16" else "; for a GPU there are --decoder-precision fp16 and w4a16"
        reason = f"without a CUDA graph, {error}{better}"
    # Once the error is gone, and with it what holds the weights
    return OnnxDecoder(file, part, provider="cuda", device=device), reason


def kernels_missing(bundle: Bundle, part: DecoderPart | None = None) -> str | None:
    """Why the decoder of a bundle, or `part` of it, cannot run on `runtime.kernels`; None if it can."""
    kernels_file = bundle.decoder.kernels_file  # beside which lie the scales that all such graphs share
    if kernels_file is None or (part or bundle.decoder).kernels_file is None:
        return f"{bundle.folder} has no graph for them, which decoders of 4 and 8 bits have if they are exported anew"
    file = bundle.path(kernels_file)
    if not file.with_name(f"{file.name}.data").is_file():
        return f"{file} is of an earlier version, whose weights were packed when it was opened; export the bundle anew"
    return kernels.unavailable()


def _graph(bundle: Bundle, precision: str | None) -> tuple[str, str]:
    """(an encoder graph of the bundle, its precision)."""
    if precision in (None, bundle.encoder.precision):
        return bundle.encoder.file, bundle.encoder.precision
    file = bundle.encoder_file(precision)
    if file is None:
        there = ", ".join(name for name in PRECISIONS if bundle.encoder_file(name))
        raise UserError(f"{bundle.folder} has no {precision} encoder, only {there}")
    return file, precision


def _openvino_encoder(bundle: Bundle, wanted: Backends) -> tuple[Encoder, Resolved]:
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
    return encoder, Resolved("openvino", "cpu", precision, file)


def _kernels_encoder(bundle: Bundle, wanted: Backends) -> tuple[Encoder, Resolved]:
    file, missing = bundle.encoder.kernels_file, kernels.unavailable()
    if wanted.provider != "cpu":
        missing = "they are for --provider cpu"
    if file is None:
        missing = f"{bundle.folder} has no encoder for them, which a float32 one has if it is exported anew"
    if file is None or missing:
        raise UserError(f"--encoder kernels: {missing}")
    encoder = OnnxEncoder(bundle.path(file), bundle.encoder.stride, wanted.threads, operators=kernels.library())
    return encoder, Resolved("onnxruntime with kernels", "cpu", "int8", file)


def _engine_encoder(bundle: Bundle, wanted: Backends, devices: _Devices) -> tuple[Encoder, Resolved]:
    from runtime.backends.tensorrt import EngineEncoder

    engine = _engine(bundle, "encoder", wanted.encoder_precision or engine_precision(bundle))
    return EngineEncoder(engine, bundle.encoder.stride, devices.gpu), _resolved_engine(bundle, engine)


def engine_precision(bundle: Bundle) -> str:
    """Of the engine that stands for the bundle's own encoder: quantised as that is, else fp16."""
    return bundle.encoder.precision if bundle.encoder.precision in ("int8", "fp8") else "fp16"


def _engine(bundle: Bundle, part: str, precision: str) -> Engine:
    """The engine of the bundle that fits the GPU that is here, verified."""
    return choose_engine(bundle, part, precision, present_gpu, installed_flavours())


def installed_flavours() -> dict[str, str]:
    """flavour -> version of the TensorRT packages that can be imported here."""
    found: dict[str, str] = {}
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


def _resolved_engine(bundle: Bundle, engine: Engine) -> Resolved:
    report = engine.report
    return Resolved(
        "tensorrt", f"{report['flavour']} {report['version']}", report["precision"],
        str(engine.file.relative_to(bundle.folder)),
    )  # fmt: skip
