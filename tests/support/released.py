"""Commands at the released size, with the memory they take."""

import sys

from benchmarks.memory import Ran, run_measured
from tests.support.commands import ROOT


def run_command(module: str, *arguments: object) -> Ran:
    """`python -m module arguments...` in a process of its own; it has to succeed."""
    ran = run_measured([sys.executable, "-m", module, *map(str, arguments)], cwd=ROOT)
    assert ran.status == 0, ran.output
    return ran
