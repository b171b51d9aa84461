"""The demo model's bundles: untrained, for commands that are given none, and trained, for `convllava demo`."""

import argparse
import importlib.util
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TextIO

from runtime.command import run
from runtime.errors import UserError

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build"
DEMO_BUNDLE = BUILD / "bundle" / "convllava-smol"
TRAINED_BUNDLE = BUILD / "bundle" / "pages"
TRAINED_WEIGHTS = ROOT / "train" / "runs" / "convllava-smol" / "reader_fifth.safetensors"
TRAINED_CHECKPOINT = BUILD / "carried" / "reader_fifth"
QUESTIONS = (
    ["--image", "assets/board.png", "--prompt", 'What is written for "Number"?'],
    [
        *("--res", "320", "--image", "assets/figures.png"),
        *("--prompt", "Where is the battery? Answer with a box.", "--draw", "build/figures.png"),
    ],
)


def demo_bundle() -> Path:
    """The untrained demo model's bundle, exported first where it is not there."""
    if not DEMO_BUNDLE.is_dir():
        print(f"making the demo bundle in {DEMO_BUNDLE}", file=sys.stderr)
        _export("--out", DEMO_BUNDLE)
    return DEMO_BUNDLE


def trained_bundle() -> Path:
    """The trained demo model's bundle, exported first where it is not there.

    Raises:
        UserError: the weights or the export's packages are missing, or the export failed.
    """
    if TRAINED_BUNDLE.is_dir():
        return TRAINED_BUNDLE
    if not TRAINED_WEIGHTS.is_file():
        raise UserError(f"the demo needs {TRAINED_WEIGHTS}, which only the repository has; run it from a clone")
    if not TRAINED_CHECKPOINT.is_dir():
        _module("train.model.demo", "--unpack", TRAINED_WEIGHTS, TRAINED_CHECKPOINT)
    _export("--checkpoint", TRAINED_CHECKPOINT, "--res", "1536", "--out", TRAINED_BUNDLE)
    return TRAINED_BUNDLE


def main(argv: list[str] | None = None) -> int:
    """Make the trained demo model's bundle and ask it about two pages of assets/."""
    argparse.ArgumentParser(description=main.__doc__).parse_args(argv)
    bundle = trained_bundle()
    for question in QUESTIONS:
        _module("runtime.infer", "--bundle", bundle, *question)
    return 0


def _export(*options: str | Path) -> None:
    if importlib.util.find_spec("torch") is None:
        raise UserError("making the demo model's bundle takes the export's packages: `make setup`, or name a --bundle")
    _module("export.bundle", *options, stdout=sys.stderr)


def _module(module: str, *options: str | Path, stdout: TextIO | None = None) -> None:
    """Run `python -m module` from the project's folder, in a process of its own: the runtime imports no export."""
    arguments = [str(o.relative_to(ROOT)) if isinstance(o, Path) else o for o in options]
    print(shlex.join(["python", "-m", module, *arguments]), file=sys.stderr, flush=True)
    if status := subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, stdout=stdout).returncode:
        raise UserError(f"python -m {module} failed with exit code {status}; the lines above say why")


if __name__ == "__main__":
    run(main)
