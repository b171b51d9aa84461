"""What the soak makes of its samples and of what clients noted."""

import subprocess
import sys

import numpy as np
import pytest

from benchmarks import soak


def noted(said="200", begin=0.0, seconds=1.0, gap_s=None, **more):
    return {"name": "question", "begin": begin, "seconds": seconds, "pieces": 0, "gap_s": gap_s, "said": said} | {
        "expected": said == "200",
        **more,
    }


@pytest.mark.parametrize(
    ("values", "percent"),
    [([200] * 10, 0.0), (list(range(100, 151)), 50.0), (list(range(150, 99, -1)), -33.33), ([0, 0], 0.0), ([7], 0.0)],
)
def test_the_slope_is_that_of_a_line_from_its_begin_to_its_end(values, percent):
    assert soak.slope(values)["slope_percent"] == pytest.approx(percent, abs=0.01)


def test_the_slope_is_least_squares():
    values = np.random.default_rng(0).integers(1000, 1100, 500)
    fitted = np.polynomial.Polynomial.fit(np.arange(500), values, 1)
    found = soak.slope(list(values))
    assert found["slope_percent"] == pytest.approx(100 * (fitted(499) / fitted(0) - 1), abs=0.01)
    assert (found["begin_mib"], found["end_mib"]) == (round(fitted(0)), round(fitted(499)))


def test_failures_that_were_asked_for_are_counted_apart():
    lines = [noted(seconds=s, gap_s=g) for s, g in ((1.0, None), (2.0, 0.5), (3.0, 0.25))]
    lines += [noted("error crash", asked_for=True), noted("500 internal", asked_for=False, seconds=99.0), noted("500")]
    row = soak.phase_row("load", lines)
    assert (row["requests"], row["failures"], row["asked_for_failures"]) == (6, 2, 1)
    assert row["failed"] == {"500 internal": 1, "500": 1}
    assert (row["p50_s"], row["longest_gap_s"]) == (2.0, 0.5)


def test_a_phase_without_answers_has_a_row():
    assert soak.phase_row("load", [])["requests"] == 0


@pytest.mark.parametrize(
    ("line", "asked_for"),
    [
        (noted("503 stopping", begin=101), True),
        (noted("APIConnectionError", begin=101), True),
        (noted("APIConnectionError", begin=99.5), True),  # on its way
        (noted("APIConnectionError", begin=90), False),  # it was running: an answer is due
        (noted("503 stopping", begin=90, seconds=15), False),  # given up before the time to stop was over
        (noted("503 stopping", begin=90, seconds=45), True),
        (noted("error stopping", begin=90, seconds=45), True),
        (noted("RemoteProtocolError", begin=90, seconds=20), False),
        (noted("RemoteProtocolError", begin=90, seconds=45), True),
        (noted("500 internal", begin=101), False),
        (noted("500 internal", begin=90, seconds=45), False),
    ],
)
def test_what_sigterm_may_end(line, asked_for):
    assert soak.is_of_stop(line, at=100.0) == asked_for


def test_memory_is_that_of_a_process_and_of_its_children():
    child = "import sys; print(1, flush=True); sys.stdin.read()"
    start = f"subprocess.Popen([sys.executable, '-c', '{child}'])"
    code = f"import subprocess, sys; hold = bytearray(b'1') * (64 << 20); {start}; sys.stdin.read()"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"1\n", "the child is there"
        assert soak.memory_of(process.pid, "RssAnon") >= 64
        assert soak.memory_of(process.pid, "VmRSS") >= soak.memory_of(process.pid, "RssAnon")
        (child,) = soak.children_of(process.pid)
        assert 0 < soak.memory_of(child, "VmRSS") < 64
    assert soak.memory_of(process.pid, "VmRSS") == 0
    assert soak.children_of(process.pid) == []
