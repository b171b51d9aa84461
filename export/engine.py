"""ONNX -> TensorRT engine with a report of what is in it; TensorRT for RTX builds without a GPU.

    python -m export.engine --bundle DIR [--part encoder|decoder] [--precision fp16|int8|fp8]
                            [--flavour rtx|tensorrt] [--target sm89,sm120|current] [--capability]

Networks are strongly typed: the precision of a layer is that of the ONNX graph, never a builder's choice. For fp16 the
bundle's graph is converted, nodes that overflow excepted (`export.half`); int8 and fp8 need a Q/DQ graph in the bundle.
Engine and report go to <part>/engines/<flavour>-<target>-<precision>.engine and .engine.json.
"""

import argparse
import importlib
import json
import os
import re
import shlex
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx

from export.cli import run
from export.half import Kept, nodes_to_keep, to_half
from runtime.bundle import Bundle, file_sha256, open_bundle
from runtime.engines import FLAVOURS, FORMAT, engine_file
from runtime.errors import UserError

PRECISIONS = ("fp16", "int8", "fp8")
SMALLEST_FP8 = 89
CURRENT = "current"
RANGE_SIDE = 512  # pixels of the images whose ranges decide what stays in FP32
PREFILL_OPT = 640  # a 1536x1536 image and a question


@dataclass(frozen=True)
class Options:
    """What to build. part: encoder or decoder. flavour: a key of `FLAVOURS`. target: `sm89`, ... or `current`.

    min_res, opt_res, max_res: pixels of a side, each side on its own, so that oblong images fit.
    timing_cache: file that is read, if there, and written. workspace_mib: scratch memory; None: all there is.
    """

    part: str = "encoder"
    precision: str = "fp16"
    flavour: str = "rtx"
    target: str = CURRENT
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
        if self.flavour == "tensorrt" and self.target != CURRENT:
            raise UserError(
                f"--target {self.target}: datacenter TensorRT builds for the GPU that is present, --target current; "
                "--flavour rtx builds for others"
            )
        if self.target != CURRENT and not re.fullmatch(r"sm\d+", self.target):
            raise UserError(f"unknown --target {self.target!r}, expected sm80, sm86, sm89, sm120 or current")
        if self.precision == "fp8" and self.target != CURRENT and int(self.target[2:]) < SMALLEST_FP8:
            raise UserError(f"--precision fp8 needs sm{SMALLEST_FP8} or newer, not {self.target}")
        if not 0 < self.min_res <= self.opt_res <= self.max_res:
            raise UserError(
                f"--min-res {self.min_res}, --opt-res {self.opt_res}, --max-res {self.max_res}: expected to rise"
            )
        if self.max_batch < 1:
            raise UserError(f"--max-batch is {self.max_batch}, expected 1 or more")
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


def source_graph(bundle: Bundle, options: Options) -> str:
    """The ONNX file inside the bundle that an engine of `options` comes from.

    Raises UserError where the bundle has none.
    """
    if options.part == "decoder":
        if options.precision != "fp16":
            raise UserError(f"--part decoder builds fp16 engines, not {options.precision}")
        if bundle.decoder.portable_file is None:
            raise UserError(
                f"{bundle.folder} has no decoder of standard operators, and TensorRT cannot parse the fused one; "
                "export it with python -m export.bundle --portable-decoder"
            )
        return bundle.decoder.portable_file
    if options.precision == "fp16":
        return bundle.encoder_file("fp32") or bundle.encoder.file
    file = bundle.encoder_file(options.precision)
    if file is None:
        raise UserError(
            f"{bundle.folder} has no quantised encoder: encoder/{options.precision}.onnx, a Q/DQ graph, is not among "
            "its files"
        )
    return file


def half_graph(model: onnx.ModelProto, part: str) -> tuple[onnx.ModelProto, list[Kept]]:
    """(the graph in FP16, the nodes that stay in FP32). A graph that takes FP16 already is returned as it is."""
    floats = [v for v in model.graph.input if v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT]
    if not floats:
        return model, []
    random = np.random.default_rng(0)
    kept = nodes_to_keep(model, _range_feeds(model, part, random))
    return to_half(model, kept), kept


def _range_feeds(model: onnx.ModelProto, part: str, random: np.random.Generator) -> list[dict[str, np.ndarray]]:
    """Noise, a gradient and black: normalised pixels of all frequencies; for a decoder, a prompt of random tokens."""
    if part == "encoder":
        shape = (1, 3, RANGE_SIDE, RANGE_SIDE)
        ramp = np.broadcast_to(np.linspace(-1.8, 2.2, RANGE_SIDE, dtype=np.float32), shape)
        images = [random.standard_normal(shape, dtype=np.float32), np.ascontiguousarray(ramp), np.full_like(ramp, -1.8)]
        return [{"pixel_values": image} for image in images]
    cache = next(v for v in model.graph.input if v.name == "past_key_values.0.key").type.tensor_type.shape
    length, feed = min(64, cache.dim[2].dim_value), {}
    vocabulary = next(v for v in model.graph.output if v.name == "logits").type.tensor_type.shape.dim[2].dim_value
    for value in model.graph.input:
        dims = [d.dim_value for d in value.type.tensor_type.shape.dim]
        if value.name.startswith("past_key_values"):
            feed[value.name] = np.zeros((1, *dims[1:]), np.float32)
        elif value.name == "image_embeds":
            feed[value.name] = random.standard_normal((1, dims[1]), dtype=np.float32)
        elif value.name == "input_ids":
            feed[value.name] = random.integers(3, min(1000, vocabulary), (1, length))
        else:
            feed[value.name] = np.zeros(1, np.int64)  # write_indices: the cache is empty
    return [feed]


def profiles(network: Any, options: Options, context: int) -> list[dict[str, tuple]]:
    """Per optimisation profile, input name -> (min, opt, max) shape. context: the decoder's longest sequence.

    A decoder has two: prefill, and decoding, where every shape is fixed and kernels for a single query are chosen.
    """
    inputs = {network.get_input(i).name: tuple(network.get_input(i).shape) for i in range(network.num_inputs)}
    if options.part == "encoder":
        channels = inputs["pixel_values"][1]
        sizes = ((1, options.min_res), (1, options.opt_res), (options.max_batch, options.max_res))
        return [{"pixel_values": tuple((batch, channels, side, side) for batch, side in sizes)}]
    usual = min(PREFILL_OPT, context)
    prefill, decode = ((1, 0), (usual, usual), (context, context)), ((1, 0),) * 3
    return [{name: tuple(_decoder_shape(name, shape, *size) for size in sizes) for name, shape in inputs.items()}
            for sizes in (prefill, decode)]  # fmt: skip


def _decoder_shape(name: str, shape: tuple, new: int, images: int) -> tuple:
    """The shape of a decoder's input for `new` positions with `images` image embeds; the KV cache has a fixed one."""
    if name == "image_embeds":
        return (images, shape[1])
    return (1, new) if name == "input_ids" else (1, *shape[1:])


def build(file: Path, options: Options, context: int = 0) -> tuple[bytes, dict]:
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
    if options.target != CURRENT:
        capability = getattr(trt.ComputeCapability, options.target.upper(), None)
        if capability is None:
            known = ", ".join(name.lower() for name in trt.ComputeCapability.__members__ if name.startswith("SM"))
            raise UserError(f"--target {options.target}: {trt.__name__} {trt.__version__} builds for {known}")
        config.num_compute_capabilities = 1
        config.set_compute_capability(capability, 0)
    shapes = profiles(network, options, context)
    for profile_shapes in shapes:
        profile = builder.create_optimization_profile()
        for name, (smallest, usual, largest) in profile_shapes.items():
            profile.set_shape(name, smallest, usual, largest)
        if config.add_optimization_profile(profile) < 0:
            raise UserError(f"{file}: the profile {profile_shapes} does not fit the graph")
    _set_timing_cache(config, options.timing_cache)
    serialised = builder.build_serialized_network(network, config)
    if serialised is None:
        raise UserError(f"{file}: the builder failed: {' / '.join(log.errors) or 'it gave no reason'}")
    if options.timing_cache:
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
        raise UserError(f"{file}: {trt.__name__} {trt.__version__} cannot parse it: {' / '.join(errors)}")
    return builder, network


def _parser_error(error: Any) -> str:
    return f"node {error.node_name() or error.node()} ({error.node_operator()}): {error.desc()}"


def _set_timing_cache(config: Any, file: Path | None) -> None:
    if file:
        content = file.read_bytes() if file.is_file() else b""
        if not config.set_timing_cache(config.create_timing_cache(content), ignore_mismatch=False):
            raise UserError(f"--timing-cache {file}: made by another version or for another GPU; remove it")


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


def trtexec_command(flavour: str, engine: Path, shapes: list[dict[str, tuple]]) -> str:
    """What measures the engine on its target, at the shapes it is tuned for."""
    usual = ",".join(f"{name}:{'x'.join(map(str, sizes[1]))}" for name, sizes in shapes[0].items())
    tool = "tensorrt_rtx" if flavour == "rtx" else "trtexec"
    return shlex.join([tool, f"--loadEngine={engine}", f"--shapes={usual}"])


def build_into_bundle(bundle: Bundle, options: Options) -> Path:
    """Build one engine and its report; returns the engine's file. What was there of the same name is replaced."""
    source = source_graph(bundle, options)
    sources = [name for name in (source, f"{source}.data") if name in bundle.files]
    out = engine_file(bundle.folder, options.part, options.flavour, options.target, options.precision)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".partial-") as scratch:
        model, kept = half_graph(onnx.load(str(bundle.path(source))), options.part)
        graph = Path(scratch, "graph.onnx")
        onnx.save(model, str(graph), save_as_external_data=True, location="graph.onnx.data")
        del model
        serialised, about = build(graph, options, bundle.decoder.context_length)
        partial = Path(scratch, "engine")
        partial.write_bytes(serialised)
        report = {
            "format": FORMAT,
            "flavour": options.flavour,
            "version": about.pop("version"),
            "target": options.target,
            "part": options.part,
            "precision": options.precision,
            "engine": {"size": len(serialised), "sha256": file_sha256(partial)},
            "onnx": {"file": source, "sha256": {name: bundle.sha256(name) for name in sources}},
            "kept_in_fp32": [asdict(keep) for keep in kept],
            "executed": False,
            "trtexec": trtexec_command(options.flavour, out, about["profiles"]),
            **about,
        }
        report_file = out.with_name(out.name + ".json")
        report_file.unlink(missing_ok=True)  # an engine without a report is nobody's: a kill leaves that at worst
        shutil.move(partial, out)
        partial.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        os.replace(partial.with_suffix(".json"), report_file)
    return out


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m export.engine", description=__doc__.split("\n")[0])
    parser.add_argument("--bundle", help="folder made by export.bundle; default: the demo model's")
    parser.add_argument("--part", default="encoder", help="encoder (default) or decoder")
    parser.add_argument("--precision", default="fp16", help="fp16 (default), int8 or fp8")
    parser.add_argument("--flavour", default="rtx", help="rtx (default): TensorRT for RTX; tensorrt: datacenter")
    parser.add_argument("--target", default=CURRENT, help="sm80,sm86,sm89,sm120: an engine for each; or current")
    parser.add_argument("--min-res", type=int, default=768, metavar="N", help="shortest side, pixels")
    parser.add_argument("--opt-res", type=int, default=1536, metavar="N", help="side to tune for, pixels")
    parser.add_argument("--max-res", type=int, default=1536, metavar="N", help="longest side, pixels")
    parser.add_argument("--max-batch", type=int, default=1, metavar="N")
    parser.add_argument("--timing-cache", type=Path, metavar="FILE", help="read and written, for faster builds")
    parser.add_argument("--workspace-mib", type=int, metavar="N", help="scratch memory; default: all there is")
    parser.add_argument("--refit", action="store_true", help="weights can be replaced later")
    parser.add_argument("--version-compatible", action="store_true", help="for later versions of TensorRT too")
    parser.add_argument("--capability", action="store_true", help="only say which nodes the parser would refuse")
    args = parser.parse_args()
    names = ("part", "precision", "flavour", "min_res", "opt_res", "max_res", "max_batch", "timing_cache")
    common = {name: getattr(args, name) for name in (*names, "workspace_mib", "refit", "version_compatible")}
    wanted = [Options(target=target, **common) for target in args.target.split(",")]
    import_flavour(args.flavour)
    bundle = open_bundle(args.bundle)
    if args.capability:
        file = bundle.path(source_graph(bundle, wanted[0]))
        refused = capability(file, args.flavour)
        print("\n".join(refused) if refused else f"{file}: the parser takes every node")
        return 1 if refused else 0
    for options in wanted:
        _check_sides(bundle, options)
        engine = build_into_bundle(bundle, options)
        report = json.loads(engine.with_name(engine.name + ".json").read_text(encoding="utf-8"))
        print(
            f"{engine}: {report['engine']['size'] / 1e6:.1f} MB, {len(report['network_layers'])} layers "
            f"({len(report['engine_layers'])} after fusion), {len(report['kept_in_fp32'])} kept in FP32, built in "
            f"{report['build_seconds']} s, not executed\non the target: {report['trtexec']}",
            flush=True,
        )
    return 0


def _check_sides(bundle: Bundle, options: Options) -> None:
    for name in ("min_res", "opt_res", "max_res"):
        if options.part == "encoder" and (side := getattr(options, name)) % bundle.encoder.stride:
            raise UserError(f"--{name.replace('_', '-')} {side} is not a multiple of {bundle.encoder.stride}")


if __name__ == "__main__":
    run(main)
