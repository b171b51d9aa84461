"""What a process costs: its figures are of the bundle that it holds."""

import json

from tests.support.commands import run_module


def test_starts_and_memory_are_those_of_a_bundle(conformance_bundle, tmp_path):
    file = tmp_path / "load.json"
    run_module("benchmarks.load", "--bundle", conformance_bundle, "--rounds", 1, "--json", file).check_returncode()
    first, again = json.loads(file.read_text())["rows"]
    assert (first["start"], again["start"]) == ("first", "again")
    size = sum(path.stat().st_size for path in conformance_bundle.rglob("*") if path.is_file()) / 2**20
    for row in (first, again):
        assert (row["work"], row["decoder"]) == ("load", "fp32")
        assert 0 < row["load_ms"] < 1000 * row["seconds"]
        assert 10 < row["own_mib"] < 1000
        assert 0 <= row["shared_mib"] <= size
