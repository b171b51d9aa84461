"""An engine, run where there is a GPU: by trtexec for its latency, or by polygraphy against ONNX Runtime.

The report says which of them ran, at which shapes, and what came of it. Where neither can run it says
`executed: false`, and nothing else is claimed.
"""

import itertools
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from export import trtexec
from export.cli import ParityError
from runtime.device import present_gpu
from runtime.engines import read_report, write_report
from runtime.errors import UserError

# Relative error against the graph in the bundle on ONNX Runtime. FP16 has 11 bits; a quantised graph rounds the same
# values to the same few steps, but those that lie between two of them fall either way.
BOUNDS = {"fp16": 2e-2, "int8": 0.1, "fp8": 0.1}


def validate(engine: Path, source_file: Path) -> dict | None:
    """Run an engine and write into its report what came of it: `executed` and `validation`.

    source_file: the ONNX file that it was built from.
    Returns the validation; None, with a line on stderr, where nothing here can run it.
    Raises ParityError where the tool fails or the outputs differ too much; the report then says executed: false.
    """
    report = read_report(engine)
    flavour = report["flavour"]
    if trtexec.on_path(flavour):
        validation = _with_trtexec(engine, report)
    elif (reason := _no_gpu_for(report["target"])) is None:
        validation = _with_polygraphy(engine, report, source_file)
    else:
        print(f"{engine}: not executed: no {trtexec.TOOLS[flavour]} on PATH, and {reason}", file=sys.stderr)
        return None
    write_report(engine, report | {"executed": True, "validation": validation})
    return validation


def _no_gpu_for(target: str) -> str | None:
    try:
        gpu = present_gpu()
    except UserError as error:
        return str(error)
    return None if gpu == target else f"the GPU here is {gpu}, not {target}"


def corners(profile: dict[str, list]) -> list[dict[str, list[int]]]:
    """The smallest, usual and largest shapes of a profile, input name -> shape, each once; and for an image the oblong
    ones between them, since the sides are bounded each on its own."""
    found = [{name: list(sizes[i]) for name, sizes in profile.items()} for i in range(3)]
    if "pixel_values" in profile:
        least, _, most = profile["pixel_values"]
        sides = itertools.product((least[2], most[2]), (least[3], most[3]))
        found += [{"pixel_values": [least[0], least[1], *side]} for side in sides]
    return [shapes for i, shapes in enumerate(found) if shapes not in found[:i]]


def _with_trtexec(engine: Path, report: dict) -> dict:
    runs = []
    for number, profile in enumerate(report["profiles"]):
        for shapes in corners(profile):
            try:
                figures = trtexec.measure(report["flavour"], engine, shapes, number)
            except trtexec.TrtexecError as error:
                raise ParityError(f"{engine} at {shapes}: {error}") from error
            runs.append({"profile": number, "shapes": shapes, **figures})
    return {"tool": trtexec.TOOLS[report["flavour"]], "runs": runs}


def _with_polygraphy(engine: Path, report: dict, source_file: Path) -> dict:
    found_runner, reference_runner = polygraphy_runners(engine, report, source_file)
    random, runs = np.random.default_rng(0), []
    with found_runner as found, reference_runner as reference:
        for number, profile in enumerate(report["profiles"]):
            if len(report["profiles"]) > 1:
                found.set_profile(number)
            for shapes in corners(profile):
                feeds = {name: _values(name, shape, random) for name, shape in shapes.items()}
                run = {"profile": number, "shapes": shapes, "error": _error(found, reference, feeds, report)}
                runs.append(run)
                if not run["error"] <= BOUNDS[report["precision"]]:
                    raise ParityError(f"{engine} at {shapes}: relative error {run['error']:.2e} to ONNX Runtime")
    return {"tool": "polygraphy", "runs": runs}


def polygraphy_runners(engine: Path, report: dict, source_file: Path) -> tuple[Any, Any]:
    """polygraphy's runners of the engine, and of its ONNX file on ONNX Runtime's CPU provider."""
    if report["flavour"] == "rtx":
        os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1"  # read once, when polygraphy is imported
    from polygraphy.backend.common import BytesFromPath
    from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
    from polygraphy.backend.trt import EngineFromBytes, TrtRunner

    found = TrtRunner(EngineFromBytes(BytesFromPath(str(engine))))
    return found, OnnxrtRunner(SessionFromOnnx(str(source_file), providers=["CPUExecutionProvider"]))


def _values(name: str, shape: list[int], random: np.random.Generator) -> np.ndarray:
    return random.standard_normal(shape, dtype=np.float32)


def _error(found: Any, reference: Any, feeds: dict[str, np.ndarray], report: dict) -> float:
    """Relative error of the first output."""
    name = report["outputs"][0]["name"]
    dtypes = {"HALF": np.float16, "FLOAT": np.float32}
    engine_feeds = {t["name"]: feeds[t["name"]].astype(dtypes[t["dtype"]]) for t in report["inputs"]}
    values = np.asarray(found.infer(engine_feeds)[name], np.float64)
    expected = np.asarray(reference.infer(feeds)[name], np.float64)
    return float(np.linalg.norm(values - expected) / np.linalg.norm(expected))
