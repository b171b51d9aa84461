"""Telemetry of other packages is off unless it was asked for, whichever package of ours is imported first."""

import subprocess
import sys
from pathlib import Path

import pytest

from runtime.telemetry import SWITCHES

ROOT = Path(__file__).parents[3]
SHOW = f"import os, sys; print({{n: os.environ.get(n) for n in {[*SWITCHES]}}}, 'openvino_telemetry' in sys.modules)"


def environment(code: str, **env: str) -> str:
    """Of a process after it has run `code`: the switches, and whether openvino_telemetry is hidden."""
    command = [sys.executable, "-c", f"{code}\n{SHOW}"]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("package", ["runtime", "train", "export", "calib", "benchmarks", "runtime.errors"])
def test_a_first_import_turns_everything_off(package):
    assert environment(f"import {package}") == f"{SWITCHES} True"


def test_what_was_asked_for_is_kept():
    asked = dict.fromkeys(SWITCHES, "asked")
    assert environment("import runtime", **asked) == f"{asked} True"


def test_openvino_s_telemetry_is_kept_where_it_was_imported_first():
    code = "import sys; sys.modules['openvino_telemetry'] = kept = object(); import runtime"
    environment(f"{code}; assert sys.modules['openvino_telemetry'] is kept")
