"""The demo model's bundle, for commands that are given none."""

import importlib.util
import subprocess
import sys
from pathlib import Path

from runtime.bundle.verify import MANIFEST
from runtime.errors import UserError

ROOT = Path(__file__).parents[1]
DEMO_BUNDLE = ROOT / "build" / "bundle" / "convllava-smol"


def demo_bundle() -> Path:
    """The demo model's bundle. Making it takes the export's packages, so it is left to a process of its own."""
    if not (DEMO_BUNDLE / MANIFEST).is_file():
        if importlib.util.find_spec("torch") is None:
            raise UserError("no --bundle given, and making the demo model's takes the export's packages: `make setup`")
        print(f"making the demo bundle in {DEMO_BUNDLE}", file=sys.stderr)
        command = [sys.executable, "-m", "export.bundle", "--out", str(DEMO_BUNDLE)]
        if subprocess.run(command, cwd=ROOT, stdout=sys.stderr).returncode:
            raise UserError("the demo bundle could not be made; `make setup` installs what its export needs")
    return DEMO_BUNDLE
