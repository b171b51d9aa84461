"""Two minutes of fuzzing, of the same inputs in each run; `make fuzz` tries others, for longer."""

import importlib.util
from pathlib import Path

import pytest

from tests.support.commands import run_module

SECONDS = 60  # of all targets together; the rest goes to starting them
if importlib.util.find_spec("atheris") is None:
    pytest.skip("there is no wheel of atheris for this machine", allow_module_level=True)


def test_the_fuzzer_finds_a_planted_fault(tmp_path: Path):
    done = run_module("tests.fuzz", "planted", "--seconds", 30, "--out", tmp_path)
    assert done.returncode == 1
    (finding,) = tmp_path.iterdir()
    assert finding.read_bytes().startswith(b"!") and str(finding) in done.stdout
    again = run_module("tests.fuzz", "planted", "--input", finding, "--out", tmp_path)
    assert again.returncode != 0 and "ZeroDivisionError: the planted fault" in again.stderr


def test_nothing_is_found_in_two_minutes():
    done = run_module("tests.fuzz", "all", "--seconds", SECONDS, "--seed", 1)
    assert done.returncode == 0, done.stdout + done.stderr
