"""The line that tells how far a batch is."""

from types import SimpleNamespace

import pytest

from runtime.batch import progress
from runtime.batch.progress import Progress


@pytest.fixture
def time(monkeypatch):
    """Seconds pass where `time.now` says so."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock.now)
    return clock


def test_rate_and_time_left_are_of_this_run(time, capsys):
    shown = Progress(1000, done=500)
    for number in range(40):
        time.now += 2
        shown.update(failed=number == 3)
    first, second = capsys.readouterr().err.splitlines()
    assert first == "515/1000 questions, 1 failed, 0.5/s, 0:16:10 left"
    assert second == "530/1000 questions, 1 failed, 0.5/s, 0:15:40 left"


def test_a_terminal_has_one_line(time, capsys, monkeypatch):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    shown = Progress(4)
    for _ in range(4):
        time.now += 0.125
        shown.update(failed=False)
    shown.close()
    _, second, last = capsys.readouterr().err.split("\r")
    assert second.startswith("2/4 ") and last == "4/4 questions, 0 failed, 8/s, 0:00:00 left\x1b[K\n"
