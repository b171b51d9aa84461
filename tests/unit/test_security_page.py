"""docs/security.md names every limit and every switch that there is."""

import dataclasses
from pathlib import Path

from runtime.serve.limits import Limits
from runtime.telemetry import SWITCHES

PAGE = (Path(__file__).parents[2] / "docs" / "security.md").read_text(encoding="utf-8")


def test_it_has_a_row_for_each_limit_and_no_other():
    section = PAGE.partition("## What a request may cost")[2].partition("\n## ")[0]
    rows = {line.split("`")[1] for line in section.splitlines() if line.startswith("| `")}
    assert rows == {field.name for field in dataclasses.fields(Limits)}


def test_it_has_each_switch_with_its_value():
    for name, value in SWITCHES.items():
        assert f"`{name}={value}`" in PAGE
