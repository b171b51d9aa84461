"""Half an hour of every kind of client, with faults: nothing fails but what was asked for, and nothing leaks."""

import json

from tests.support.commands import run_module


def test_soak(tmp_path):
    done = run_module("benchmarks.soak", "--json", tmp_path / "soak.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "soak.json").read_text(encoding="utf-8"))
    assert [(row["phase"], row["failed"]) for row in found["rows"]] == [("load", {}), ("SIGTERM", {}), ("replicas", {})]
    assert found["server_alive"]
    assert found["unfinished_after_load"] == 0
    assert (found["stop_exit_code"], found["stop_s"] < 40) == (143, True)
    assert found["replicas_killed"] >= 3
    slopes = {row["memory"]: row["slope_percent"] for row in found["memory"]}
    assert slopes["RssAnon"] <= 2, found["memory"]
    assert slopes["VmRSS"] <= 2, found["memory"]
