"""Validation of an engine where something can run it: trtexec's figures, its failures, and polygraphy's comparison."""

import json
import os
import stat
import sys

import numpy as np
import onnxruntime
import pytest

from calib.activations import Activations
from calib.qdq import quantize
from export.encoder import export_encoder
from export.parity import ParityError
from export.tensorrt import trtexec, validate
from runtime.bundle.engines import FORMAT, read_report, write_report
from tests.integration.export.test_encoder import tiny
from tests.support.commands import run_module

SAID = """&&&& RUNNING TensorRT.trtexec [v1700] # trtexec --loadEngine=x
[11/25/2026-10:00:00] [I] === Performance summary ===
[11/25/2026-10:00:00] [I] Throughput: 812.427 qps
[11/25/2026-10:00:00] [I] Latency: min = 1.3 ms, max = 2.125 ms, mean = 1.41 ms, median = 1.4 ms, percentile(90%) = 1.5 ms, percentile(95%) = 1.625 ms, percentile(99%) = 2 ms
[11/25/2026-10:00:00] [I] Enqueue Time: min = 0.1 ms, max = 0.5 ms, mean = 0.2 ms, median = 0.2 ms, percentile(90%) = 0.3 ms, percentile(95%) = 0.3 ms, percentile(99%) = 0.4 ms
[11/25/2026-10:00:00] [I] H2D Latency: min = 0.25 ms, max = 0.25 ms, mean = 0.25 ms, median = 0.25 ms, percentile(90%) = 0.25 ms, percentile(95%) = 0.25 ms, percentile(99%) = 0.25 ms
[11/25/2026-10:00:00] [I] GPU Compute Time: min = 1.01 ms, max = 1.75 ms, mean = 1.1 ms, median = 1.09 ms, percentile(90%) = 1.2 ms, percentile(95%) = 1.3 ms, percentile(99%) = 1.6 ms
[11/25/2026-10:00:00] [I] Total Host Walltime: 3.004 s
"""  # noqa: E501
PASSED = SAID + "&&&& PASSED TensorRT.trtexec [v1700] # trtexec --loadEngine=x\n"
FAILED = "[E] Error Code 1: out of memory\n&&&& FAILED TensorRT.trtexec [v1700] # trtexec --loadEngine=x\n"
PROFILE = {"pixel_values": [[1, 3, 128, 128], [1, 3, 256, 256], [2, 3, 256, 256]]}


def put_tool(folder, name: str, said: str, status: int = 0) -> str:
    """An executable that writes its arguments down and says something; returns a PATH that begins with it."""
    file = folder / name
    file.write_text(f"#!/bin/sh\necho \"$@\" >> '{folder / 'calls'}'\ncat <<'END'\n{said}\nEND\nexit {status}\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    file = tmp_path_factory.mktemp("graph") / "fp32.onnx"
    export_encoder(tiny(), file, "fp32")
    return file


@pytest.fixture
def engine(tmp_path):
    """An engine that only its report knows."""
    file = tmp_path / "rtx-sm89-fp16.engine"
    file.write_bytes(b"")
    report = {
        "format": FORMAT, "flavour": "rtx", "version": "1.0", "version_compatible": False, "target": "sm89",
        "precision": "fp16", "profiles": [PROFILE], "executed": False, "validation": None,
        "part": "encoder", "engine": {"size": 0, "sha256": ""}, "onnx": {"file": "fp32.onnx", "sha256": {}},
        "inputs": [{"name": "pixel_values", "dtype": "HALF", "shape": [-1, 3, -1, -1]}],
        "outputs": [{"name": "image_embeds", "dtype": "HALF"}],
    }  # fmt: skip
    write_report(file, report)
    return file


def test_figures_are_read():
    figures = trtexec.parse(PASSED)
    assert figures["throughput_qps"] == 812.427
    assert figures["latency_ms"] == {
        "min": 1.3, "max": 2.125, "mean": 1.41, "median": 1.4, "p90": 1.5, "p95": 1.625, "p99": 2.0
    }  # fmt: skip
    assert figures["h2d_ms"]["mean"] == 0.25
    assert figures["gpu_compute_ms"]["p99"] == 1.6
    assert "d2h_ms" not in figures
    assert trtexec.parse("") == {}


def test_every_corner_is_run_once():
    shapes = [shape["pixel_values"] for shape in validate.corners(PROFILE)]
    expected = [[1, 3, 128, 128], [1, 3, 256, 256], [2, 3, 256, 256], [1, 3, 128, 256], [1, 3, 256, 128]]
    assert shapes == expected


def test_trtexec_runs_at_the_profile_s_shapes(engine, graph, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", put_tool(tmp_path, "tensorrt_rtx", PASSED))
    validation = validate.validate(engine, graph)
    report = read_report(engine)
    assert report["executed"] is True
    assert report["validation"] == validation
    assert validation["tool"] == "tensorrt_rtx"
    assert [run["gpu_compute_ms"]["median"] for run in validation["runs"]] == [1.09] * 5
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[3] == f"--loadEngine={engine} --shapes=pixel_values:1x3x128x256"


@pytest.mark.parametrize(("said", "status"), [(FAILED, 0), (PASSED, 3), (FAILED, 1), ("", 0), ("[I] Throughput:", 0)])
def test_a_tool_that_fails_fails_the_build(engine, graph, tmp_path, monkeypatch, said, status):
    monkeypatch.setenv("PATH", put_tool(tmp_path, "tensorrt_rtx", said, status))
    with pytest.raises(ParityError, match="tensorrt_rtx"):
        validate.validate(engine, graph)
    assert read_report(engine)["executed"] is False


def test_without_gpu_and_tool_nothing_is_claimed(engine, graph, capsys, monkeypatch):
    monkeypatch.setattr(trtexec, "on_path", lambda flavour: False)
    assert validate.validate(engine, graph) is None
    assert read_report(engine)["executed"] is False
    assert "not executed: no tensorrt_rtx on PATH, and no NVIDIA GPU" in capsys.readouterr().err


class Runner:
    """polygraphy's interface on ONNX Runtime, off by `error`."""

    def __init__(self, file, error: float = 0.0):
        self._session, self._error, self.seen = onnxruntime.InferenceSession(file), error, []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def infer(self, feeds):
        self.seen.append({name: (value.dtype, value.shape) for name, value in feeds.items()})
        feeds = {name: value.astype(np.float32) for name, value in feeds.items()}
        return {"image_embeds": self._session.run(None, feeds)[0] * (1 + self._error)}


@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize(("error", "good"), [(0.0, True), (0.01, True), (0.1, False), (float("nan"), False)])
def test_polygraphy_compares_at_the_corners_where_the_gpu_is(engine, graph, tmp_path, monkeypatch, error, good, timed):
    """Whether trtexec is there or not, which passes whatever the outputs are."""
    found, reference = Runner(graph, error), Runner(graph)
    if timed:
        monkeypatch.setenv("PATH", put_tool(tmp_path, "tensorrt_rtx", PASSED))
    monkeypatch.setattr(validate, "present_gpu", lambda: "sm89")
    monkeypatch.setattr(validate, "polygraphy_runners", lambda *_: (found, reference))
    if not good:
        with pytest.raises(ParityError, match="relative error"):
            validate.validate(engine, graph)
        assert read_report(engine)["executed"] is False
        return
    validation = validate.validate(engine, graph)
    assert validation["tool"] == ("polygraphy and tensorrt_rtx" if timed else "polygraphy")
    assert [run["error"] for run in validation["runs"][:5]] == pytest.approx([error] * 5, abs=2e-3)
    assert [run["latency_ms"]["median"] for run in validation["runs"][5:]] == [1.4] * 5 * timed
    assert read_report(engine)["executed"] is True
    assert {dtype for seen in found.seen for dtype, _ in seen.values()} == {np.dtype(np.float16)}
    assert [seen["pixel_values"][1] for seen in found.seen] == [
        tuple(s["pixel_values"]) for s in validate.corners(PROFILE)
    ]


def test_a_graph_in_float16_is_given_what_it_takes(engine, tmp_path, monkeypatch):
    half = tmp_path / "fp16.onnx"
    export_encoder(tiny(), half, "fp16")

    class Half(Runner):
        def infer(self, feeds):
            return {"image_embeds": self._session.run(None, feeds)[0]}

    monkeypatch.setattr(trtexec, "on_path", lambda flavour: False)
    monkeypatch.setattr(validate, "present_gpu", lambda: "sm89")
    monkeypatch.setattr(validate, "polygraphy_runners", lambda *_: (Half(half), Half(half)))
    assert {run["error"] for run in validate.validate(engine, half)["runs"]} == {0.0}


def test_polygraphy_s_runners_are_those_of_the_flavour(engine, graph, monkeypatch):
    """One flavor after the other in one process. They are made, not run: a GPU is what running takes."""
    monkeypatch.delenv(validate.POLYGRAPHY_FLAVOUR, raising=False)
    for flavour in ("rtx", "tensorrt", "rtx"):
        found, reference = validate.polygraphy_runners(engine, read_report(engine) | {"flavour": flavour}, graph)
        runner = sys.modules[type(found).__module__]
        assert (type(found).__name__, runner.config.USE_TENSORRT_RTX) == ("TrtRunner", flavour == "rtx")
        assert validate.POLYGRAPHY_FLAVOUR not in os.environ
    pixels = np.random.default_rng(0).standard_normal((1, 3, 128, 64), dtype=np.float32)
    with reference as session:
        assert session.infer({"pixel_values": pixels})["image_embeds"].shape == (1, 2, 48)


def test_an_fp8_engine_is_compared_with_the_fp8_graph(engine, graph, tmp_path):
    pixels = [np.random.default_rng(i).standard_normal((1, 3, 128, 64), dtype=np.float32) for i in range(16)]
    activations = Activations(graph)
    activations.collect((str(i), image) for i, image in enumerate(pixels))
    quantize(graph, tmp_path / "fp8.onnx", activations.ranges("minmax")[0], "fp8")
    _, reference = validate.polygraphy_runners(engine, read_report(engine), tmp_path / "fp8.onnx")
    with reference as session:
        found = session.infer({"pixel_values": pixels[0]})["image_embeds"]
    (expected,) = onnxruntime.InferenceSession(graph).run(None, {"pixel_values": pixels[0]})
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert 1e-2 < error < 0.2, "weights and activations are rounded to three bits of mantissa"


@pytest.mark.parametrize("tool", [False, True])
def test_another_gpu_is_no_place_to_run_it(engine, graph, monkeypatch, capsys, tool):
    monkeypatch.setattr(trtexec, "on_path", lambda flavour: tool)
    monkeypatch.setattr(validate, "present_gpu", lambda: "sm120")
    assert validate.validate(engine, graph) is None
    assert "the GPU here is sm120, not sm89" in capsys.readouterr().err


def test_the_command_builds_and_validates(graph, tmp_path, monkeypatch):
    (tmp_path / "fp32.onnx").write_bytes(graph.read_bytes())
    monkeypatch.setenv("PATH", put_tool(tmp_path, "tensorrt_rtx", PASSED))
    arguments = ("--onnx", tmp_path / "fp32.onnx", "--target", "sm89", "--max-res", 1536, "--validate")
    done = run_module("export.engine", *arguments)
    assert done.returncode == 0, done.stderr
    engine = tmp_path / "engines" / "rtx-sm89-fp16.engine"
    assert "validated with tensorrt_rtx" in done.stdout
    assert f"tensorrt_rtx --loadEngine={engine} --shapes=pixel_values:1x3x1536x1536" in done.stdout
    report = json.loads((tmp_path / "engines" / "rtx-sm89-fp16.engine.json").read_text())
    assert report["validation"]["runs"][0]["latency_ms"]["median"] == 1.4
    put_tool(tmp_path, "tensorrt_rtx", FAILED)
    done = run_module("export.engine", *arguments)
    assert done.returncode == 1
    assert "out of memory" in done.stderr
