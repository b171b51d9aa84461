"""When those that found no place are told to come again."""

from types import SimpleNamespace

import pytest

from runtime.serve import pace
from runtime.serve.pace import MAX_RETRY_AFTER_S, WINDOW, Pace


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(pace, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    return now


def ended(found, clock, *gaps):
    for gap in gaps:
        clock.seconds += gap
        found.end()


def test_nothing_is_known_before_a_request_has_ended(clock):
    assert Pace().seconds(1) is None


def test_the_mean_gap_counts_for_each_place(clock):
    found = Pace()
    ended(found, clock, 8, 0, 0, 0)  # four that end together, each eight seconds
    assert [found.seconds(count) for count in (1, 3, 4)] == [2, 6, 8]


def test_idle_time_is_no_wait(clock):
    found = Pace()
    ended(found, clock, 3)
    clock.seconds += 1000
    found.begin()
    ended(found, clock, 3)
    assert found.seconds(1) == 3


def test_only_the_last_requests_count(clock):
    found = Pace()
    ended(found, clock, *[50] * WINDOW, *[2] * WINDOW)
    assert found.seconds(1) == 2


def test_it_is_a_second_at_least_and_never_longer_than_clients_wait(clock):
    found = Pace()
    ended(found, clock, 0.001)
    assert (found.seconds(1), found.seconds(1 << 30)) == (1, MAX_RETRY_AFTER_S)
