"""Runs the project's commands from tests."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_module(module: str, *arguments: object, **options) -> subprocess.CompletedProcess[str]:
    """`python -m module arguments...` from the repository's root."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ.copy(), **options)
