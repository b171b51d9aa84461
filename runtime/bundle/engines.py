"""TensorRT engines of a bundle: where they lie, what their reports say, which one fits.

    <part>/engines/<flavour>-<target>-<precision>.engine   and the same name + .json, its report

An engine is believed only as far as its report and hashes go, before TensorRT is asked: it runs on one GPU
architecture, one TensorRT version, and stands for one ONNX file of its bundle.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from runtime.bundle.manifest import Bundle
from runtime.bundle.verify import file_sha256
from runtime.errors import UserError

FORMAT = 1
FLAVOURS = {"tensorrt": "tensorrt", "rtx": "tensorrt_rtx"}  # flavour -> Python module


@dataclass(frozen=True)
class Engine:
    """An engine file and its report, the JSON as written by `export.engine`."""

    file: Path
    report: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.file.name} (version {self.report['version']})"


def engine_folder(bundle: Path, part: str) -> Path:
    """Where the engines of a bundle's part lie."""
    return bundle / part / "engines"


def engine_name(flavour: str, target: str, precision: str) -> str:
    """What an engine's file is called."""
    return f"{flavour}-{target}-{precision}.engine"


def report_file(engine: Path) -> Path:
    return engine.with_name(f"{engine.name}.json")


def write_report(engine: Path, report: dict[str, Any]) -> None:
    """Put an engine's report beside it, whole or not at all."""
    file = report_file(engine)
    partial = file.with_name(f".partial-{file.name}")
    partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    partial.replace(file)


def find_engines(bundle: Bundle, part: str) -> list[Engine]:
    """The engines of `part` that have a report, by name. Raises UserError for a report that cannot be read."""
    found: list[Engine] = []
    for file in sorted(engine_folder(bundle.folder, part).glob("*.engine")):
        if report_file(file).is_file():
            found.append(Engine(file, read_report(file)))
    return found


def choose_engine(
    bundle: Bundle, part: str, precision: str, gpu: Callable[[], str], versions: dict[str, str]
) -> Engine:
    """The engine of `part` for the GPU that is here, verified before TensorRT is asked.

    gpu: returns its compute capability, as "sm89", or raises UserError where there is none. versions: flavour ->
    installed version.
    Raises UserError where none fits, with what there is and the command that builds one; where the one that would fit
    is truncated, altered, of another TensorRT version or of another ONNX file than the bundle's; and where there is no
    GPU, but an engine at fault is named before that.
    """
    engines = find_engines(bundle, part)
    target, no_gpu = _ask(gpu)
    fitting = [e for e in engines if e.report["precision"] == precision and target in (None, e.report["target"])]
    if not fitting:
        flavour = next(iter(versions), "rtx")
        there = ", ".join(map(str, engines)) or "none"
        raise UserError(
            f"{bundle.folder}: no {precision} {part} engine for {target or 'a GPU'}; there: {there}; "
            f"the GPU: {target or no_gpu}; build one: python -m export.engine --bundle {bundle.folder} --part {part} "
            f"--precision {precision} --flavour {flavour} "
            f"--target {'current' if flavour == 'tensorrt' else target or 'sm89'}"
        )
    problems: list[str] = []
    for engine in fitting:
        try:
            verify_engine(bundle, engine)
        except UserError as error:
            problems.append(str(error))
            continue
        problem = version_problem(engine, versions)
        if problem is None:
            if target is None:
                there = ", ".join(map(str, fitting))
                raise UserError(f"{bundle.folder}: its {part} engines need an NVIDIA GPU, {no_gpu}; there: {there}")
            return engine
        problems.append(problem)
    raise UserError(problems[0])


def _ask(gpu: Callable[[], str]) -> tuple[str | None, UserError | None]:
    try:
        return gpu(), None
    except UserError as error:
        return None, error


def version_problem(engine: Engine, versions: dict[str, str]) -> str | None:
    """Why the installed TensorRT (flavour -> version) cannot run the engine; None where it can.

    An engine runs on the version that built it alone; a version-compatible one on later ones of the same major version.
    """
    flavour, built = engine.report["flavour"], engine.report["version"]
    installed = versions.get(flavour)
    if installed is None:
        return (
            f"{engine.file}: built by {FLAVOURS[flavour]} {built}, which is not installed: pip install '.[{flavour}]'"
        )
    if installed == built:
        return None
    numbers, needed = (tuple(int(n) for n in re.findall(r"\d+", text)) for text in (installed, built))
    if engine.report["version_compatible"] and numbers[0] == needed[0] and numbers >= needed:
        return None
    return (
        f"{engine.file}: built by {FLAVOURS[flavour]} {built}, another version than the installed {installed}; "
        "build it again with python -m export.engine"
    )


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


def read_report(engine: Path) -> dict[str, Any]:
    """An engine's report. Raises UserError where it cannot be read or is of another format."""
    file = report_file(engine)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read as JSON: {error}") from error
    needed = {"format", "flavour", "version", "version_compatible", "target", "precision", "onnx", "engine", "profiles"}
    report = cast(dict[str, Any], content) if isinstance(content, dict) else {}
    whole = not needed - report.keys() and report["format"] == FORMAT
    if not whole or not _has(report["engine"], "size", "sha256") or not _has(report["onnx"], "file", "sha256"):
        raise UserError(f"{file}: no engine report of format {FORMAT}; build the engine again")
    return report


def _has(section: object, *keys: str) -> bool:
    return isinstance(section, dict) and all(key in section for key in keys)
