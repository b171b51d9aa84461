"""ONNX Runtime sessions, opened and bound one way, on any provider."""

import importlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from runtime import kernels, telemetry
from runtime.device.cuda import Cuda
from runtime.device.memory import Array, Cpu, Device, pointer
from runtime.errors import UserError

if telemetry.is_off("ORT_DISABLE_TELEMETRY"):
    onnxruntime.disable_telemetry_events()  # for a program that had imported it before us, and so without the variable

# --provider -> ONNX Runtime's name, and what installs it
PROVIDERS = {
    "cpu": ("CPUExecutionProvider", ".[cpu]"),
    "cuda": ("CUDAExecutionProvider", ".[gpu]"),
    "tensorrt": ("TensorrtExecutionProvider", ".[gpu] and datacenter TensorRT"),
    "nv_tensorrt_rtx": ("NvTensorRTRTXExecutionProvider", ".[cpu,rtx-provider]"),
}


def open_device(provider: str) -> Device:
    """The memory that a provider computes in. Raises UserError for an unknown provider and where there is no GPU."""
    if provider not in PROVIDERS:
        raise UserError(f"unknown provider {provider!r}, expected one of {', '.join(PROVIDERS)}")
    if provider == "cpu":
        return Cpu()
    _require_provider(provider)
    return Cuda()


def open_session(
    file: Path,
    threads: int | None,
    provider: str = "cpu",
    device: Device | None = None,
    operators: Path | None = None,
    activation_bits: int = 8,
    cuda_graph: bool = False,
    channels_last: bool = False,
    mapped: bool = False,
    lean: bool = False,
) -> onnxruntime.InferenceSession:
    """A session whose arrays lie on `device` and whose work goes into its stream.

    threads: of one operator on the CPU; None lets ONNX Runtime take one a physical core. operators: a library of some
    that ONNX Runtime lacks. activation_bits: to which those of `runtime.kernels` round activations, 8 or 24. Of
    `--provider cuda` alone: cuda_graph: let `run_options` name runs that are recorded; channels_last: convolve images
    as [B, H, W, C]. mapped: read weights in a file beside the graph where the system maps them, which processes
    share, in place of a repacked copy: matmuls of many rows take up to a tenth longer in float32, a fifth in INT8.
    lean: hold large activations on the CPU in as little memory as can be, and see `run_options`.
    Raises UserError where ONNX Runtime cannot open the graph, or not with this provider: it never falls back to
    another one by itself.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 3
    # INT8 sums that cannot saturate, where `int8_sums_saturate`; elsewhere it changes nothing
    options.add_session_config_entry("session.x64quantprecision", "1")
    skipped: list[str] = []
    if mapped:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if lean:
        options.add_session_config_entry("session.use_env_allocators", "1")
        options.enable_mem_pattern = False  # it would take a block for all activations beside those of the run before
        skipped.append("BiasGeluFusion")  # which holds a third array of an MLP's inner width
        _register_arena()
    name = PROVIDERS[provider][0]
    stream = device.stream if isinstance(device, Cuda) else None
    try:
        if operators is not None:
            options.add_session_config_entry(kernels.ACTIVATION_BITS, str(activation_bits))
            options.register_custom_ops_library(str(operators))
        if provider == "nv_tensorrt_rtx":
            own_stream = {"has_user_compute_stream": "1", "user_compute_stream": str(stream)}
            options.add_provider_for_devices(_rtx_devices(), own_stream)
            session = onnxruntime.InferenceSession(str(file), options)
        else:
            session = onnxruntime.InferenceSession(
                str(file),
                options,
                providers=_providers(provider, stream, cuda_graph, channels_last),
                disabled_optimizers=skipped,
            )
    except UserError:
        raise
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        raise UserError(f"{file}: ONNX Runtime {onnxruntime.__version__} cannot open it: {error}") from error
    if name not in session.get_providers():  # ONNX Runtime drops one that fails to load, and only logs it
        raise UserError(f"--provider {provider}: ONNX Runtime could not load {name}, see what it said above")
    return session


@cache
def _register_arena() -> None:
    """Memory of lean sessions: pieces as large as asked for, not the next power of two."""
    kind = onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR
    memory = onnxruntime.OrtMemoryInfo("Cpu", kind, 0, onnxruntime.OrtMemType.DEFAULT)
    as_requested = {"arena_extend_strategy": 1}
    onnxruntime.create_and_register_allocator(memory, onnxruntime.OrtArenaCfg(as_requested))


def _providers(provider: str, stream: int | None, cuda_graph: bool, channels_last: bool) -> list[Any]:
    """The provider, and those that take what it leaves."""
    if provider == "cpu":
        return ["CPUExecutionProvider"]
    own_stream = {"user_compute_stream": str(stream)}
    # TF32 would round float32 graphs to 10 bits unasked
    switches = {"use_tf32": False, "enable_cuda_graph": cuda_graph, "prefer_nhwc": channels_last}
    cuda = own_stream | {name: str(int(on)) for name, on in switches.items()}
    providers = [("CUDAExecutionProvider", cuda), "CPUExecutionProvider"]
    return [("TensorrtExecutionProvider", own_stream), *providers] if provider == "tensorrt" else providers


def _require_provider(provider: str) -> None:
    name, package = PROVIDERS[provider]
    if provider == "nv_tensorrt_rtx":
        if not _rtx_devices():
            raise UserError(f"--provider {provider}: TensorRT for RTX finds no GPU that it can use")
        return
    if hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()  # CUDA's and cuDNN's libraries of NVIDIA's Python packages
    if name not in onnxruntime.get_available_providers():
        there = ", ".join(onnxruntime.get_available_providers())
        raise UserError(
            f"--provider {provider}: the installed ONNX Runtime {onnxruntime.__version__} has {there} alone; "
            f"pip install '{package}' in an environment without another flavour"
        )


def _rtx_devices() -> list[Any]:
    """ONNX Runtime's devices of the plugin provider for TensorRT for RTX, which is registered on the first call."""
    name, package = PROVIDERS["nv_tensorrt_rtx"]
    try:
        plugin = importlib.import_module("onnxruntime_ep_nv_tensorrt_rtx")
    except ImportError as error:
        raise UserError(f"--provider nv_tensorrt_rtx: {error}; pip install '{package}'") from error
    if not _rtx_registered:
        try:
            onnxruntime.register_execution_provider_library(name, plugin.get_library_path())
        except Exception as error:
            raise UserError(f"--provider nv_tensorrt_rtx: its library cannot be loaded: {error}") from error
        _rtx_registered.append(name)
    return [device for device in onnxruntime.get_ep_devices() if device.ep_name == name]


_rtx_registered: list[str] = []  # a library may be registered once a process
NOT_RECORDED = -1  # as ONNX Runtime numbers CUDA graphs


def run_options(device: Device, graph: int = NOT_RECORDED, shrink: bool = False) -> onnxruntime.RunOptions:
    """On a GPU the call returns before the work is done; whoever reads the result waits.

    graph: under which number the first run is recorded; runs with this number replay it. They have to have the same
    addresses and shapes. shrink: give the memory of activations on the CPU back to the system after the run.
    """
    options = onnxruntime.RunOptions()
    if shrink:
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    if isinstance(device, Cuda):
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        options.add_run_config_entry("gpu_graph_id", str(graph))
    return options


def bind_input(binding: onnxruntime.IOBinding, name: str, array: Array, device: Device) -> None:
    binding.bind_input(name, device.name, 0, array.dtype.type, array.shape, pointer(array))


def bind_output(binding: onnxruntime.IOBinding, name: str, array: Array, device: Device) -> None:
    binding.bind_output(name, device.name, 0, array.dtype.type, array.shape, pointer(array))


FLOATS = ("tensor(float)", "tensor(float16)")
INT64 = ("tensor(int64)",)
Contract = Mapping[str, tuple[tuple[str, ...], tuple[int | None, ...]]]  # name -> types, and dimensions (None: any)


def check_graph(session: onnxruntime.InferenceSession, file: Path, inputs: Contract, outputs: Contract) -> None:
    """Compare a graph with what `runtime.graph_io` and its bundle's manifest say of it.

    Raises:
        UserError: an input or output is missing or of another type or shape, or the graph wants another input.
    """
    for side, values, expected in (("input", session.get_inputs(), inputs), ("output", session.get_outputs(), outputs)):
        found = {value.name: value for value in values}
        for name, (types, shape) in expected.items():
            if name not in found:
                raise UserError(f"{file}: no {side} {name!r}; it is not the graph that the manifest describes")
            value, dims = found[name], list(found[name].shape)
            pairs = zip(shape, dims, strict=False)
            fits = len(dims) == len(shape) and all(a is None or not isinstance(b, int) or a == b for a, b in pairs)
            if value.type not in types or not fits:
                raise UserError(
                    f"{file}: {side} {name!r} is {value.type} {dims}, expected {' or '.join(types)} {list(shape)}; "
                    "it is not the graph that the manifest describes"
                )
        if side == "input" and (others := sorted(found.keys() - expected.keys())):
            raise UserError(f"{file}: unknown input {others[0]!r}; it is not the graph that the manifest describes")


def float_dtype(session: onnxruntime.InferenceSession, name: str) -> type[np.floating]:
    """numpy's type of a graph's floating-point input or output."""
    types = {value.name: value.type for value in (*session.get_inputs(), *session.get_outputs())}
    return {"tensor(float)": np.float32, "tensor(float16)": np.float16}[types[name]]
