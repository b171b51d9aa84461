"""ONNX -> serialised TensorRT engine, and what the network and the builder's log say is in it.

One code path for TensorRT and TensorRT for RTX: only the imported module differs. Networks are strongly typed: the
precision of a layer is that of the ONNX graph, never a builder's choice.
"""

import importlib
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from runtime.bundle.engines import FLAVOURS
from runtime.errors import UserError

PRECISIONS = ("fp16", "int8", "fp8")
SMALLEST_FP8 = 89
CURRENT = "current"
PREFILL_OPT = 640  # a 1536x1536 image and a question


@dataclass(frozen=True)
class Options:
    """What to build. part: encoder or decoder. flavour: a key of `FLAVOURS`. target: a compute capability, `sm89`.

    min_res, opt_res, max_res: pixels of a side, each side on its own, so that oblong images fit. max_batch: images at
    once. refit: whether weights can be replaced later. version_compatible: whether later versions of TensorRT, of the
    same major one, can run it.
    timing_cache: file that is read, if there, and written. workspace_mib: scratch memory; None: all there is.
    """

    part: str = "encoder"
    precision: str = "fp16"
    flavour: str = "rtx"
    target: str = "sm89"
    min_res: int = 768
    opt_res: int = 1536
    max_res: int = 1536
    max_batch: int = 1
    timing_cache: Path | None = None
    workspace_mib: int | None = None
    refit: bool = False
    version_compatible: bool = False

    def __post_init__(self):
        if self.part not in ("encoder", "decoder"):
            raise UserError(f"unknown --part {self.part!r}, expected encoder or decoder")
        if self.precision not in PRECISIONS:
            raise UserError(f"unknown --precision {self.precision!r}, expected one of {', '.join(PRECISIONS)}")
        if self.flavour not in FLAVOURS:
            raise UserError(f"unknown --flavour {self.flavour!r}, expected one of {', '.join(FLAVOURS)}")
        if not re.fullmatch(r"sm\d+", self.target):
            raise UserError(f"unknown --target {self.target!r}, expected sm80, sm86, sm89, sm120 or {CURRENT}")
        if self.precision == "fp8" and int(self.target[2:]) < SMALLEST_FP8:
            raise UserError(f"--precision fp8 needs sm{SMALLEST_FP8} or newer, not {self.target}")
        if not 0 < self.min_res <= self.opt_res <= self.max_res:
            raise UserError(
                f"--min-res {self.min_res}, --opt-res {self.opt_res}, --max-res {self.max_res}: expected to rise"
            )
        if self.max_batch < 1:
            raise UserError(f"--max-batch is {self.max_batch}, expected 1 or more")
        if self.timing_cache is not None and not self.timing_cache.absolute().parent.is_dir():
            raise UserError(f"--timing-cache {self.timing_cache}: its folder does not exist")
        if self.workspace_mib is not None and self.workspace_mib < 1:
            raise UserError(f"--workspace-mib is {self.workspace_mib}, expected 1 or more")


def import_flavour(flavour: str) -> ModuleType:
    """`tensorrt` or `tensorrt_rtx`. Raises UserError with what installs it."""
    try:
        return importlib.import_module(FLAVOURS[flavour])
    except ImportError as error:
        raise UserError(
            f"--flavour {flavour}: Python module {FLAVOURS[flavour]} cannot be imported ({error}); "
            f"pip install '.[{flavour}]'"
        ) from error


def profiles(network: Any, options: Options) -> list[dict[str, tuple]]:
    """Per optimisation profile, input name -> (min, opt, max) shape.

    A decoder has two: prefill, and decoding, where every shape is fixed and kernels for a single query are chosen.
    """
    inputs = {network.get_input(i).name: tuple(network.get_input(i).shape) for i in range(network.num_inputs)}
    if options.part == "encoder":
        channels = inputs["pixel_values"][1]
        sizes = ((1, options.min_res), (1, options.opt_res), (options.max_batch, options.max_res))
        return [{"pixel_values": tuple((batch, channels, side, side) for batch, side in sizes)}]
    context = inputs["past_key_values.0.key"][2]
    usual = min(PREFILL_OPT, context)
    prefill, decode = ((1, 0), (usual, usual), (context, context)), ((1, 0),) * 3
    return [{name: tuple(_decoder_shape(name, shape, *size) for size in sizes) for name, shape in inputs.items()}
            for sizes in (prefill, decode)]  # fmt: skip


def _decoder_shape(name: str, shape: tuple, new: int, images: int) -> tuple:
    """The shape of a decoder's input for `new` positions with `images` image embeds; the KV cache has a fixed one."""
    if name == "image_embeds":
        return (images, shape[1])
    return (1, new) if name == "input_ids" else (1, *shape[1:])


def build(file: Path, options: Options) -> tuple[bytes, dict]:
    """Build an engine from the ONNX `file`, strongly typed.

    Returns (the serialised engine, the report's part about it). Raises UserError where the parser or builder refuses.
    """
    trt = import_flavour(options.flavour)
    log = _make_log(trt)
    begin = time.perf_counter()
    builder, network = _parse(trt, file, log)
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if options.workspace_mib:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib << 20)
    if options.refit:
        config.set_flag(trt.BuilderFlag.REFIT)
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    config.clear_flag(trt.BuilderFlag.TF32)  # it would round float32 to 10 bits unasked
    if options.flavour == "rtx":  # datacenter TensorRT builds for the GPU that is present
        capability = getattr(trt.ComputeCapability, options.target.upper(), None)
        if capability is None:
            known = ", ".join(name.lower() for name in trt.ComputeCapability.__members__ if name.startswith("SM"))
            raise UserError(f"--target {options.target}: {trt.__name__} {trt.__version__} builds for {known}")
        config.num_compute_capabilities = 1
        config.set_compute_capability(capability, 0)
    shapes = profiles(network, options)
    for profile_shapes in shapes:
        profile = builder.create_optimization_profile()
        for name, (smallest, usual, largest) in profile_shapes.items():
            profile.set_shape(name, smallest, usual, largest)
        if config.add_optimization_profile(profile) < 0:
            raise UserError(f"the profile {profile_shapes} does not fit the graph")
    if options.timing_cache:
        _set_timing_cache(config, options.timing_cache, options.flavour)
    serialised = builder.build_serialized_network(network, config)
    if serialised is None:
        raise UserError(f"the builder failed{_hint(options)}: {' / '.join(log.errors) or 'it gave no reason'}")
    if options.timing_cache and options.flavour == "tensorrt":
        options.timing_cache.write_bytes(bytes(config.get_timing_cache().serialize()))
    return bytes(serialised), {
        "version": trt.__version__,
        "build_seconds": round(time.perf_counter() - begin, 2),
        "profiles": shapes,
        "inputs": [_tensor(network.get_input(i)) for i in range(network.num_inputs)],
        "outputs": [_tensor(network.get_output(i)) for i in range(network.num_outputs)],
        "memory": log.memory(),
        "network_layers": [_layer(network.get_layer(i)) for i in range(network.num_layers)],
        "engine_layers": log.engine_layers(),
    }


def capability(file: Path, flavour: str) -> list[str]:
    """What the parser would refuse of an ONNX file, a line for each; empty where it takes all of it."""
    trt = import_flavour(flavour)
    network = _network(trt, builder := trt.Builder(_make_log(trt)))
    parser = trt.OnnxParser(network, builder.logger)
    if parser.supports_model_v2(file.read_bytes(), str(file)):
        return []
    return [_parser_error(parser.get_error(i)) for i in range(parser.num_errors)] or ["refused without a reason"]


def _network(trt: ModuleType, builder: Any) -> Any:
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return builder.create_network(1 << int(typed) if typed is not None else 0)


def _parse(trt: ModuleType, file: Path, log: Any) -> tuple[Any, Any]:
    builder = trt.Builder(log)
    network = _network(trt, builder)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(file)):
        errors = [_parser_error(parser.get_error(i)) for i in range(parser.num_errors)]
        raise UserError(f"{trt.__name__} {trt.__version__} cannot parse the graph: {' / '.join(errors)}")
    return builder, network


def _parser_error(error: Any) -> str:
    return f"node {error.node_name() or error.node()} ({error.node_operator()}): {error.desc()}"


def _set_timing_cache(config: Any, file: Path, flavour: str) -> None:
    if flavour == "rtx":
        print(f"--timing-cache {file}: left alone, TensorRT for RTX times nothing while it builds", file=sys.stderr)
        return
    content = file.read_bytes() if file.is_file() else b""
    if not config.set_timing_cache(config.create_timing_cache(content), ignore_mismatch=False):
        raise UserError(f"--timing-cache {file}: made by another version or for another GPU; remove it")


def _hint(options: Options) -> str:
    """What an option that TensorRT for RTX has, but cannot follow everywhere, asks for."""
    if options.flavour == "rtx" and options.version_compatible:
        return " (--version-compatible takes the lean runtime, which TensorRT for RTX's Python package lacks)"
    if options.flavour == "rtx" and options.refit:
        return " (--refit takes a GPU while building)"
    return ""


def _make_log(trt: ModuleType) -> Any:
    """A logger that keeps what the builder says of the engine it makes."""

    class Log(trt.ILogger):
        def __init__(self):
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self._lines: list[str] = []

        def log(self, severity, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)
            self._lines.append(message)

        def memory(self) -> dict[str, int | None]:
            """Bytes of weights and of activations, as the builder says."""
            found = {}
            for kind in ("Weights", "Activation"):
                match = re.search(rf"Total {kind} Memory: (\d+) bytes", "\n".join(self._lines))
                found[f"{kind.lower()}_bytes"] = int(match[1]) if match else None
            return found

        def engine_layers(self) -> list[dict]:
            """The layers after fusion, from the detailed log: name, type, data types of what goes in and out."""
            lines = (line for text in self._lines for line in text.splitlines() if line.startswith("Name: "))
            return [layer for line in lines if (layer := _engine_layer(line))]

    return Log()


def _engine_layer(line: str) -> dict | None:
    match = re.match(
        r"Name: (.*?), LayerType: (.*?), Inputs: \[(.*)\], Constants: \[(.*)\], Outputs: \[(.*)\], TacticName:", line
    )
    if match is None:
        return None
    name, kind, *sides = match.groups()
    inputs, constants, outputs = (re.findall(r"Datatype: (\w+)", side) for side in sides)
    return {"name": name, "type": kind, "inputs": inputs, "constants": constants, "outputs": outputs}


def _tensor(tensor: Any) -> dict:
    return {"name": tensor.name, "dtype": tensor.dtype.name, "shape": list(tensor.shape)}


def _layer(layer: Any) -> dict:
    inputs = [layer.get_input(i) for i in range(layer.num_inputs)]
    outputs = [layer.get_output(i) for i in range(layer.num_outputs)]
    return {
        "name": layer.name,
        "type": layer.type.name,
        "inputs": [tensor.dtype.name for tensor in inputs if tensor is not None],
        "outputs": [tensor.dtype.name for tensor in outputs],
    }
