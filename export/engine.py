"""ONNX -> TensorRT engine with a report of what is in it; TensorRT for RTX builds without a GPU.

    python -m export.engine --bundle DIR [--part encoder|decoder] [--precision fp16|int8|fp8]
                            [--flavour rtx|tensorrt] [--target sm89,sm120|current] [--capability]

Networks are strongly typed: the precision of a layer is that of the ONNX graph, never a builder's choice. For fp16 the
bundle's graph is converted, nodes that overflow excepted (`export.half`); int8 and fp8 need a Q/DQ graph in the bundle.
Engine and report go to <part>/engines/<flavour>-<target>-<precision>.engine and .engine.json.
"""

import argparse
import importlib
import re
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx

from export import trtexec
from export.cli import run
from export.half import Kept, cast_embeds, nodes_to_keep, to_half
from export.validate import describe_run, validate
from runtime.bundle import Bundle, file_sha256, open_bundle
from runtime.device import present_gpu
from runtime.engines import FLAVOURS, FORMAT, engine_folder, engine_name, read_report, report_file, write_report
from runtime.errors import UserError

PRECISIONS = ("fp16", "int8", "fp8")
SMALLEST_FP8 = 89
CURRENT = "current"
RANGE_SIDE = 512  # pixels of the images whose ranges decide what stays in FP32
PREFILL_OPT = 640  # a 1536x1536 image and a question


@dataclass(frozen=True)
class Options:
    """What to build. part: encoder or decoder. flavour: a key of `FLAVOURS`. target: a compute capability, `sm89`.

    min_res, opt_res, max_res: pixels of a side, each side on its own, so that oblong images fit.
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


@dataclass(frozen=True)
class Source:
    """The ONNX file that an engine comes from.

    sha256: of the file and of its weights beside it, by the names that the report gives them; name: the file's.
    folder: where the engine goes. embeds_dtype: numpy name of what image embeds pass from encoder to decoder in,
    whatever the engines compute in; None: as the graph has them.
    """

    file: Path
    name: str
    sha256: dict[str, str]
    folder: Path
    embeds_dtype: str | None = None


def source_of(bundle: Bundle, options: Options) -> Source:
    """The bundle's graph for `options`. Raises UserError as `source_graph`."""
    name = source_graph(bundle, options)
    names = [file for file in (name, f"{name}.data") if file in bundle.files]
    return Source(
        bundle.path(name),
        name,
        {file: bundle.sha256(file) for file in names},
        engine_folder(bundle.folder, options.part),
        bundle.decoder.kv_dtype,
    )


def source_of_file(file: Path, options: Options) -> Source:
    """An ONNX file of no bundle; the engine goes to `engines/` beside it. Raises UserError where it cannot be one."""
    if not file.is_file():
        raise UserError(f"--onnx {file}: no such file")
    names = [path for path in (file, file.with_name(f"{file.name}.data")) if path.is_file()]
    hashes = {path.name: file_sha256(path) for path in names}
    return Source(file, file.name, hashes, file.parent / "engines")


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
    try:
        kept = nodes_to_keep(model, _range_feeds(model, part, np.random.default_rng(0)))
    except ValueError as error:
        raise UserError(f"the {part} cannot be built: {error}; its checkpoint is broken") from error
    return to_half(model, kept), kept


def _range_feeds(model: onnx.ModelProto, part: str, random: np.random.Generator) -> list[dict[str, np.ndarray]]:
    """Noise, a gradient and black: normalised pixels of all frequencies; for a decoder, a prompt of random tokens."""
    if part == "encoder":
        shape = (1, 3, RANGE_SIDE, RANGE_SIDE)
        ramp = np.broadcast_to(np.linspace(-1.8, 2.2, RANGE_SIDE, dtype=np.float32), shape)
        images = [random.standard_normal(shape, dtype=np.float32), np.ascontiguousarray(ramp), np.full_like(ramp, -1.8)]
        return [{"pixel_values": image} for image in images]
    shapes = {value.name: [d.dim_value for d in value.type.tensor_type.shape.dim] for value in model.graph.input}
    vocab = next(v for v in model.graph.output if v.name == "logits").type.tensor_type.shape.dim[2].dim_value
    length, feed = min(64, shapes["past_key_values.0.key"][2]), {}
    for name, shape in shapes.items():
        if name.startswith("past_key_values"):
            feed[name] = np.zeros((1, *shape[1:]), np.float32)
        elif name == "image_embeds":
            feed[name] = random.standard_normal((1, shape[1]), dtype=np.float32)
        elif name == "input_ids":
            feed[name] = random.integers(0, vocab, (1, length))
        else:
            feed[name] = np.zeros(1, np.int64)  # write_indices: the cache is empty
    return [feed]


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
        _set_timing_cache(config, options)
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


def _set_timing_cache(config: Any, options: Options) -> None:
    file = options.timing_cache
    if options.flavour == "rtx":
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


def engine_graph(source: Source, options: Options) -> tuple[onnx.ModelProto, list[Kept]]:
    """(the graph that the engine is built from, the nodes that stay in FP32).

    Raises UserError where a quantised engine is asked of a graph without Q/DQ nodes, or a graph is no ONNX.
    """
    try:
        model = onnx.load(str(source.file))
    except Exception as error:  # protobuf's
        raise UserError(f"{source.file}: cannot be read as ONNX: {error}") from error
    names = {value.name for value in (*model.graph.input, *model.graph.output)}
    if "image_embeds" not in names or (options.part == "encoder") != ("pixel_values" in names):
        raise UserError(f"{source.file}: no {options.part} of this project, it has {', '.join(sorted(names)[:6])}")
    quantised = any(node.op_type == "DequantizeLinear" for node in model.graph.node)
    if quantised != (options.precision != "fp16"):
        found = "has Q/DQ nodes" if quantised else "has no Q/DQ nodes"
        raise UserError(f"{source.file} {found}, so it is no source of a {options.precision} engine")
    model, kept = half_graph(model, options.part)
    if options.part == "decoder":
        _one_sequence(model.graph)
    if source.embeds_dtype:
        cast_embeds(model, source.embeds_dtype)
    return model, kept


def _one_sequence(graph: onnx.GraphProto) -> None:
    """Fix a decoder's batch at 1, all that the runtime asks of it: what has a fixed shape costs the builder nothing."""
    for value in (*graph.input, *graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in ("batch", "batch_size"):
                dim.dim_value = 1


def fp32_by_standard(model: onnx.ModelProto) -> list[str]:
    """Nodes with FP16 inputs that ONNX lets compute in FP32 inside (`stash_type`), whatever surrounds them."""
    return [
        node.name
        for node in model.graph.node
        if node.op_type in ("LayerNormalization", "RMSNormalization")
        and all(a.i == onnx.TensorProto.FLOAT for a in node.attribute if a.name == "stash_type")
    ]


def build_engine(source: Source, options: Options) -> Path:
    """Build one engine and its report; returns the engine's file. What was there of the same name is replaced.

    Raises UserError as `engine_graph` and `build`.
    """
    model, kept = engine_graph(source, options)
    out = source.folder / engine_name(options.flavour, options.target, options.precision)
    with tempfile.TemporaryDirectory(dir=source.file.parent, prefix=".partial-") as scratch:
        graph = Path(scratch, "graph.onnx")
        onnx.save(model, str(graph), save_as_external_data=True, location="graph.onnx.data")
        inside = [name for name in fp32_by_standard(model) if name not in {keep.node for keep in kept}]
        del model
        serialised, about = build(graph, options)
        partial = Path(scratch, "engine")
        partial.write_bytes(serialised)
        report = {
            "format": FORMAT,
            "flavour": options.flavour,
            "version": about.pop("version"),
            "version_compatible": options.version_compatible,
            "target": options.target,
            "part": options.part,
            "precision": options.precision,
            "engine": {"size": len(serialised), "sha256": file_sha256(partial)},
            "onnx": {"file": source.name, "sha256": source.sha256},
            "kept_in_fp32": [asdict(keep) for keep in kept],
            "fp32_by_standard": inside,
            "executed": False,
            "validation": None,
            "trtexec": trtexec.command_line(options.flavour, out, about["inputs"], about["profiles"]),
            **about,
        }
        out.parent.mkdir(exist_ok=True)
        report_file(out).unlink(missing_ok=True)  # an engine without a report is nobody's
        shutil.move(partial, out)
    write_report(out, report)
    return out


def main() -> int:
    args = _arguments().parse_args()
    names = ("part", "precision", "flavour", "min_res", "opt_res", "max_res", "max_batch", "timing_cache")
    names = (*names, "workspace_mib", "refit", "version_compatible")
    if args.flavour in FLAVOURS:
        import_flavour(args.flavour)
    wanted = [Options(target=target, **{name: getattr(args, name) for name in names}) for target in _targets(args)]
    if args.onnx and args.bundle:
        raise UserError("--onnx or --bundle, not both")
    bundle = None if args.onnx else open_bundle(args.bundle)
    for options in wanted:
        source = source_of(bundle, options) if bundle else source_of_file(args.onnx, options)
        if args.capability:
            return _print_capability(source, options)
        if bundle:
            _check_sides(bundle, options)
        engine = build_engine(source, options)
        if args.validate:
            validate(engine, source.file)
        print(describe(engine, read_report(engine)), flush=True)
    return 0


def _targets(args: argparse.Namespace) -> list[str]:
    """Compute capabilities that --target names, `current` resolved.

    Raises UserError for datacenter TensorRT and another GPU than the present one, and where no GPU is present.
    """
    targets = args.target.split(",")
    if args.capability and targets == [CURRENT]:
        return [Options.target]  # a parser takes the same nodes for every GPU
    if args.flavour == "tensorrt" and targets != [CURRENT]:
        raise UserError(
            f"--target {args.target}: datacenter TensorRT builds for the GPU that is present, --target {CURRENT}; "
            "--flavour rtx builds for others"
        )
    if CURRENT not in targets:
        return targets
    try:
        current = present_gpu()
    except UserError as error:
        other = "" if args.flavour == "tensorrt" else "; name what to build for: --target sm89"
        raise UserError(f"--target {CURRENT}: {error}{other}") from error
    return [current if target == CURRENT else target for target in targets]


def _print_capability(source: Source, options: Options) -> int:
    model, _ = engine_graph(source, options)
    with tempfile.TemporaryDirectory() as scratch:
        graph = Path(scratch, "graph.onnx")
        onnx.save(model, str(graph), save_as_external_data=True, location="graph.onnx.data")
        refused = capability(graph, options.flavour)
    print("\n".join(refused) if refused else f"{source.file}: the parser takes every node")
    return 1 if refused else 0


def describe(engine: Path, report: dict) -> str:
    """Lines for people: what was built, whether it ran, what runs it on the target."""
    validation = report["validation"]
    ran = f"validated with {validation['tool']}" if validation else "not executed"
    lines = [
        f"{engine}: {report['engine']['size'] / 1e6:.1f} MB, {len(report['network_layers'])} layers "
        f"({len(report['engine_layers'])} after fusion), {len(report['kept_in_fp32'])} kept in FP32, built in "
        f"{report['build_seconds']} s, {ran}",
        f"on {report['target']}: {report['trtexec']}",
    ]
    for run_ in validation["runs"] if validation else ():
        lines.append(f"  {describe_run(run_)}")
    return "\n".join(lines)


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m export.engine", description=__doc__.split("\n")[0])
    parser.add_argument("--bundle", help="folder made by export.bundle; default: the demo model's")
    parser.add_argument("--onnx", type=Path, metavar="FILE", help="a graph of no bundle instead")
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
    parser.add_argument("--validate", action="store_true", help="run it with trtexec, or else polygraphy on a GPU")
    parser.add_argument("--capability", action="store_true", help="only say which nodes the parser would refuse")
    return parser


def _check_sides(bundle: Bundle, options: Options) -> None:
    for name in ("min_res", "opt_res", "max_res"):
        if options.part == "encoder" and (side := getattr(options, name)) % bundle.encoder.stride:
            raise UserError(f"--{name.replace('_', '-')} {side} is not a multiple of {bundle.encoder.stride}")


if __name__ == "__main__":
    run(main)
