"""TensorRT engines of a bundle: where they lie, what their reports say, which one fits.

    <part>/engines/<flavour>-<target>-<precision>.engine   and the same name + .json, its report

An engine is believed only as far as its report and hashes go, before TensorRT is asked: it runs on one GPU
architecture, one TensorRT version, and stands for one ONNX file of its bundle.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from runtime.bundle import Bundle, file_sha256
from runtime.errors import UserError

FORMAT = 1
FLAVOURS = {"tensorrt": "tensorrt", "rtx": "tensorrt_rtx"}  # flavour -> Python module


@dataclass(frozen=True)
class Engine:
    """An engine file and its report, the JSON as written by `export.engine`."""

    file: Path
    report: dict

    def __str__(self) -> str:
        return f"{self.file.name} (version {self.report['version']})"


def engine_file(folder: Path, part: str, flavour: str, target: str, precision: str) -> Path:
    """Where the engine of a bundle lies."""
    return folder / part / "engines" / f"{flavour}-{target}-{precision}.engine"


def find_engines(bundle: Bundle, part: str) -> list[Engine]:
    """The engines of `part` that have a report, by name. Raises UserError for a report that cannot be read."""
    found = []
    for file in sorted((bundle.folder / part / "engines").glob("*.engine")):
        report = file.with_name(file.name + ".json")
        if report.is_file():
            found.append(Engine(file, _read_report(report)))
    return found


def choose_engine(bundle: Bundle, part: str, precision: str, target: str, versions: dict[str, str]) -> Engine:
    """The engine of `part` for the GPU `target` (as "sm89"), verified.

    versions: flavour -> installed version, of the flavours that can run here.
    Raises UserError where none fits, with what there is and the command that builds one, and where the one that would
    fit is truncated, altered, of another TensorRT version or of another ONNX file than the bundle's.
    """
    engines = find_engines(bundle, part)
    wanted = [e for e in engines if e.report["precision"] == precision and e.report["flavour"] in versions]
    wanted = [e for e in wanted if e.report["target"] == target]
    if not wanted:
        flavour = next(iter(versions), "rtx")
        there = ", ".join(map(str, engines)) or "none"
        raise UserError(
            f"{bundle.folder}: no {precision} {part} engine for this GPU ({target}); there: {there}; build one: "
            f"python -m export.engine --bundle {bundle.folder} --part {part} --precision {precision} "
            f"--flavour {flavour} --target {target if flavour == 'rtx' else 'current'}"
        )
    same_version = [e for e in wanted if e.report["version"] == versions[e.report["flavour"]]]
    if not same_version:
        engine = wanted[0]
        raise UserError(
            f"{engine.file}: built by {engine.report['flavour']} {engine.report['version']}, installed is "
            f"{versions[engine.report['flavour']]}; build it again with python -m export.engine"
        )
    verify_engine(bundle, same_version[0])
    return same_version[0]


def verify_engine(bundle: Bundle, engine: Engine) -> None:
    """Raises UserError unless the file is the one its report describes, made from the ONNX file that the bundle has."""
    report, size = engine.report, engine.file.stat().st_size
    if size != report["engine"]["size"]:
        raise UserError(
            f"{engine.file}: truncated or altered, {size} bytes where its report says {report['engine']['size']}; "
            "build it again with python -m export.engine"
        )
    if file_sha256(engine.file) != report["engine"]["sha256"]:
        raise UserError(f"{engine.file}: altered, its sha256 is not its report's; build it again")
    source = report["onnx"]
    if any(bundle.sha256(file) != sha256 for file, sha256 in source["sha256"].items()):
        raise UserError(
            f"{engine.file}: built from another {source['file']} than this bundle's; build it again with "
            "python -m export.engine"
        )


def _read_report(file: Path) -> dict:
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as JSON: {error}") from error
    needed = {"format", "flavour", "version", "target", "precision", "onnx", "engine"}
    if not isinstance(report, dict) or needed - report.keys() or report["format"] != FORMAT:
        raise UserError(f"{file}: no engine report of format {FORMAT}; build the engine again")
    return report
