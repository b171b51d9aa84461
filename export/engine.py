"""ONNX -> TensorRT engine with a report of what is in it; TensorRT for RTX builds without a GPU.

    python -m export.engine --bundle DIR [--part encoder|decoder] [--precision fp16|int8|fp8]
                            [--flavour rtx|tensorrt] [--target sm89,sm120|current] [--validate] [--capability]
    python -m export.engine --onnx FILE ...

For fp16 the bundle's graph is converted, nodes that overflow excepted (`export.graphs.mixed_precision`); int8 and
fp8 need a Q/DQ graph in the bundle, which `calib.quantize` makes.
The engine (`export.tensorrt.build`) and its report go to
<part>/engines/<flavour>-<target>-<precision>.engine and .engine.json.
"""

import argparse
import shutil
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import onnx

from export.bundle_writer import partial_folder
from export.tensorrt import trtexec
from export.tensorrt.build import CURRENT, Options, build, capability, import_flavour
from export.tensorrt.source import Source, engine_graph, fp32_by_standard, source_of, source_of_file
from export.tensorrt.validate import describe_run, validate
from runtime.bundle.engines import FLAVOURS, FORMAT, engine_name, read_report, report_file, write_report
from runtime.bundle.manifest import Bundle, open_bundle
from runtime.bundle.verify import file_sha256
from runtime.command import run
from runtime.device.cuda import present_gpu
from runtime.errors import UserError

SIDES = ("min_res", "opt_res", "max_res", "max_batch")  # of images


def build_engine(source: Source, options: Options) -> Path:
    """Build one engine and its report; returns the engine's file. What was there of the same name is replaced.

    Raises UserError as `engine_graph` and `build`.
    """
    model, kept = engine_graph(source, options)
    out = source.folder / engine_name(options.flavour, options.target, options.precision)
    with partial_folder(source.file.parent) as scratch:
        graph = scratch / "graph.onnx"
        onnx.save(model, str(graph), save_as_external_data=True, location="graph.onnx.data")
        inside = [name for name in fp32_by_standard(model) if name not in {keep.node for keep in kept}]
        del model
        serialised, about = build(graph, options)
        partial = scratch / "engine"
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


def main(argv: list[str] | None = None) -> int:
    args = _arguments().parse_args(argv)
    names = ("part", "precision", "flavour", "timing_cache", "workspace_mib", "refit", "version_compatible")
    if args.flavour in FLAVOURS:
        import_flavour(args.flavour)
    if args.onnx and args.bundle:
        raise UserError("--onnx or --bundle, not both")
    if args.capability and args.validate:
        raise UserError("--capability builds no engine that --validate could run")
    given = {name: value for name in SIDES if (value := getattr(args, name)) is not None}
    if args.part == "decoder" and given:
        option = f"--{next(iter(given)).replace('_', '-')}"
        raise UserError(f"{option} is for --part encoder: a decoder's engine has one sequence and no images")
    common = {name: getattr(args, name) for name in names}
    wanted = [Options(target=target, **common) for target in _targets(args)]
    bundle = None if args.onnx else open_bundle(args.bundle)
    sides = _sides(given, bundle.image.resolution if bundle else Options.opt_res)
    wanted = [replace(options, **given | sides) for options in wanted]
    for options in wanted:
        source = source_of(bundle, options) if bundle else source_of_file(args.onnx)
        if args.capability:
            return _print_capability(source, options)
        if bundle:
            _check_sides(bundle, options)
        engine = build_engine(source, options)
        if args.validate:
            validate(engine, source.file)
        print(describe(engine, read_report(engine)), flush=True)
    return 0


def _sides(given: dict[str, int], resolution: int) -> dict[str, int]:
    """The sides, around the resolution where they are not given."""
    least, most = given.get("min_res", 1), given.get("max_res", max(resolution, Options.max_res))
    usual = given.get("opt_res", min(max(resolution, least), most))
    return {"min_res": given.get("min_res", min(usual, Options.min_res)), "opt_res": usual, "max_res": max(usual, most)}


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
    parser = argparse.ArgumentParser(
        prog="python -m export.engine", description="Build TensorRT engines from a bundle or an ONNX file."
    )
    parser.add_argument("--bundle", help="folder made by export.bundle; default: the demo model's")
    parser.add_argument("--onnx", type=Path, metavar="FILE", help="a graph of no bundle instead")
    parser.add_argument("--part", default="encoder", help="encoder (default) or decoder")
    parser.add_argument("--precision", default="fp16", help="fp16 (default), int8 or fp8")
    parser.add_argument("--flavour", default="rtx", help="rtx (default): TensorRT for RTX; tensorrt: datacenter")
    parser.add_argument("--target", default=CURRENT, help="sm80,sm86,sm89,sm120: an engine for each; or current")
    sides = f"default: {Options.min_res}, or the side to tune for, if that is less"
    parser.add_argument("--min-res", type=int, metavar="N", help=f"shortest side, pixels; {sides}")
    parser.add_argument("--opt-res", type=int, metavar="N", help="side to tune for, pixels; default: the bundle's")
    sides = f"default: {Options.max_res}, or the side to tune for, if that is more"
    parser.add_argument("--max-res", type=int, metavar="N", help=f"longest side, pixels; {sides}")
    parser.add_argument("--max-batch", type=int, metavar="N", help="images at once; default: 1")
    parser.add_argument("--timing-cache", type=Path, metavar="FILE", help="read and written, for faster builds")
    parser.add_argument("--workspace-mib", type=int, metavar="N", help="scratch memory; default: all there is")
    parser.add_argument("--refit", action="store_true", help="weights can be replaced later")
    parser.add_argument("--version-compatible", action="store_true", help="for later versions of TensorRT too")
    parser.add_argument("--validate", action="store_true", help="run it with trtexec, or else polygraphy on a GPU")
    parser.add_argument("--capability", action="store_true", help="only say which nodes the parser would refuse")
    return parser


def _check_sides(bundle: Bundle, options: Options) -> None:
    """Raises UserError for sides that are no multiples of the stride; says so where the engine cannot take images of
    the bundle's own size."""
    side = bundle.image.resolution
    if options.part == "encoder" and not options.min_res <= side <= options.max_res:
        print(
            f"warning: an engine for sides of {options.min_res} to {options.max_res} takes no images of {side}, the "
            "bundle's resolution: --res has to say another each time",
            file=sys.stderr,
        )
    for name in ("min_res", "opt_res", "max_res"):
        if options.part == "encoder" and (side := getattr(options, name)) % bundle.encoder.stride:
            raise UserError(f"--{name.replace('_', '-')} {side} is not a multiple of {bundle.encoder.stride}")


if __name__ == "__main__":
    run(main)
