"""Validation of an engine on its GPU: outputs compared with ONNX Runtime, latency measured by trtexec.

trtexec does not check outputs, so the comparison runs whether trtexec is there or not. The engine's report says which
of the two ran, at which shapes, and their figures. Where neither can run, it says `executed: false`.
"""

import contextlib
import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper

from export.parity import TOLERANCES, ParityError, compare
from export.tensorrt import trtexec
from runtime.backends.ort_portable import PortableSequence
from runtime.backends.ort_session import open_session
from runtime.backends.tensorrt import DTYPES, EngineDecoder
from runtime.bundle.engines import Engine, read_report, write_report
from runtime.device.cuda import Cuda, present_gpu
from runtime.errors import UserError

DECODER_PROMPT, DECODER_STEPS = 64, 8
POLYGRAPHY_FLAVOUR = "POLYGRAPHY_USE_TENSORRT_RTX"  # read when polygraphy is imported


def validate(engine: Path, source_file: Path) -> dict | None:
    """Run an engine and write into its report what came of it: `executed` and `validation`.

    source_file: the ONNX file that it was built from.
    Returns the validation, {"tool", "runs"}: of the comparison, then of trtexec where that is on PATH; of trtexec alone
    where the GPU cannot be asked what it is. None, with a line on stderr, where nothing here can run it.
    Raises ParityError where the tool fails or the outputs differ too much; the report then says executed: false.
    """
    report = read_report(engine)
    tool, target = trtexec.TOOLS[report["flavour"]], report["target"]
    on_path = trtexec.on_path(report["flavour"])
    try:
        gpu, unknown = present_gpu(), ""
    except UserError as error:
        gpu, unknown = None, str(error)
    if gpu is None and not on_path:
        print(f"{engine}: not executed: no {tool} on PATH, and {unknown}", file=sys.stderr)
        return None
    if gpu not in (None, target):
        print(f"{engine}: not executed: the GPU here is {gpu}, not {target}", file=sys.stderr)
        return None
    done = []
    if gpu is None:
        print(f"{engine}: timed by {tool}, its outputs not compared: {unknown}", file=sys.stderr)
    else:
        compared = _with_runtime if report["part"] == "decoder" else _with_polygraphy
        done.append(compared(engine, report, source_file))
    if on_path:
        done.append(_with_trtexec(engine, report))
    validation = {"tool": " and ".join(one["tool"] for one in done), "runs": [r for one in done for r in one["runs"]]}
    write_report(engine, report | {"executed": True, "validation": validation})
    return validation


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
                figures = trtexec.measure(report["flavour"], engine, report["inputs"], shapes, number)
            except trtexec.TrtexecError as error:
                raise ParityError(f"{engine} at {shapes}: {error}") from error
            runs.append({"profile": number, "shapes": shapes, **figures})
    return {"tool": trtexec.TOOLS[report["flavour"]], "runs": runs}


def _with_polygraphy(engine: Path, report: dict, source_file: Path) -> dict:
    found_runner, reference_runner = polygraphy_runners(engine, report, source_file)
    random, runs = np.random.default_rng(0), []
    (profile,) = report["profiles"]
    given = onnx.load(str(source_file), load_external_data=False).graph.input
    types = {value.name: helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type) for value in given}
    with found_runner as found, reference_runner as reference:
        for shapes in corners(profile):
            feeds = {name: random.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
            outputs = _outputs(found, reference, feeds, report, types)
            runs.append({"profile": 0, "shapes": shapes, "error": _checked_error(engine, shapes, report, *outputs)})
    return {"tool": "polygraphy", "runs": runs}


def polygraphy_runners(engine: Path, report: dict, source_file: Path) -> tuple[Any, Any]:
    """polygraphy's runners of the engine, and of its ONNX file on ONNX Runtime's CPU provider."""
    with _polygraphy_for(report["flavour"]):
        from polygraphy.backend.common import BytesFromPath
        from polygraphy.backend.onnxrt import OnnxrtRunner
        from polygraphy.backend.trt import EngineFromBytes, TrtRunner

        found = TrtRunner(EngineFromBytes(BytesFromPath(str(engine))))
        return found, OnnxrtRunner(lambda: open_session(source_file, None))


@contextlib.contextmanager
def _polygraphy_for(flavour: str) -> Iterator[None]:
    """Lets polygraphy be imported for one flavor of TensorRT, anew where it was imported for the other."""
    before = os.environ.get(POLYGRAPHY_FLAVOUR)
    config = sys.modules.get("polygraphy.config")
    if config is not None and (flavour == "rtx") != config.USE_TENSORRT_RTX:
        for name in [name for name in sys.modules if name.split(".")[0] == "polygraphy"]:
            del sys.modules[name]
    os.environ[POLYGRAPHY_FLAVOUR] = str(int(flavour == "rtx"))
    try:
        yield
    finally:
        if before is None:
            del os.environ[POLYGRAPHY_FLAVOUR]
        else:
            os.environ[POLYGRAPHY_FLAVOUR] = before


def _outputs(
    found: Any, reference: Any, feeds: dict[str, np.ndarray], report: dict, types: dict[str, np.dtype]
) -> tuple[np.ndarray, np.ndarray]:
    """What engine and reference make of the same float32 inputs; either may take them in FP16. types: the
    reference's."""
    (output,) = report["outputs"]
    of_engine = {tensor["name"]: feeds[tensor["name"]].astype(DTYPES[tensor["dtype"]]) for tensor in report["inputs"]}
    of_reference = {name: values.astype(types[name]) for name, values in feeds.items()}
    return found.infer(of_engine)[output["name"]], reference.infer(of_reference)[output["name"]]


def _with_runtime(engine: Path, report: dict, source_file: Path) -> dict:
    """A decoder, whose past and present must be the same memory, which polygraphy cannot do: by the runtime's own loop,
    a prompt with images and single steps after it."""
    random = np.random.default_rng(0)
    decoder = EngineDecoder(Engine(engine, report), Cuda())
    length = min(DECODER_PROMPT, decoder.capacity - DECODER_STEPS)
    found = decoder.start(DECODER_STEPS + length)
    reference = PortableSequence(source_file)
    shapes = {tensor["name"]: tensor["shape"] for tensor in (*report["inputs"], *report["outputs"])}
    embeds = random.standard_normal((length // 2, shapes["image_embeds"][1]), dtype=np.float32)
    tokens = random.integers(0, shapes["logits"][2], length - len(embeds) + DECODER_STEPS).tolist()
    prompt = [*tokens[DECODER_STEPS:], *range(-1, -len(embeds) - 1, -1)]
    runs = []
    for step in range(DECODER_STEPS + 1):
        ids, images = (prompt, embeds) if step == 0 else (tokens[step - 1 : step], None)
        shapes, outputs = {"input_ids": [1, len(ids)]}, (found.forward(ids, images), reference.forward(ids, images))
        error = _checked_error(engine, shapes, report, *outputs)
        runs.append({"profile": int(step > 0), "shapes": shapes, "error": error})
    return {"tool": "runtime", "runs": runs}


def _checked_error(engine: Path, shapes: dict, report: dict, found: np.ndarray, expected: np.ndarray) -> float:
    """The relative error of an engine's output. Raises ParityError above the tolerance of the engine's precision."""
    what = f"{engine} at {shapes}"
    difference = compare(what, found, expected, TOLERANCES["engine", report["precision"]])
    if not difference.ok:
        raise ParityError(f"{what}: relative error {difference.error:.2e} to ONNX Runtime")
    return difference.error


def describe_run(run: dict) -> str:
    """One line about one run of a validation."""
    shown = {name: "x".join(map(str, shape)) for name, shape in run["shapes"].items() if "past" not in name}
    shapes = ", ".join(f"{name} {shape}" for name, shape in shown.items())
    if "error" in run:
        return f"{shapes}: relative error {run['error']:.1e} to ONNX Runtime"
    return f"{shapes}: latency {run['latency_ms']['median']} ms (median), {run['throughput_qps']:.1f} a second"
