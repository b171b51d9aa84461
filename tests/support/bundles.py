"""Bundles of the conformance checkpoint, exported once for all test processes."""

import contextlib
import fcntl
import hashlib
import shutil
from pathlib import Path

from tests.support.commands import ROOT, run_main

CACHE = ROOT / "build" / "test-bundles"
CHECKPOINT = ROOT / "tests" / "data" / "conformance" / "checkpoint"
SOURCES = ("export", "runtime", "train/model")  # what an export runs


def exported(*options: object) -> Path:
    """The folder that `python -m export.bundle` writes with `options`. Copy it before changing it."""
    assert options, "they name the folder"
    folder = CACHE / _version()
    name = "-".join(str(option).strip("-") for option in options)
    with _lock():
        for stale in CACHE.iterdir():
            if stale.is_dir() and stale != folder:
                shutil.rmtree(stale)
        if not (folder / name).is_dir():
            done = run_main("export.bundle", "--checkpoint", CHECKPOINT, "--out", folder / name, *options)
            assert done.returncode == 0, done.stdout + done.stderr
    return folder / name


@contextlib.contextmanager
def _lock():
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _version() -> str:
    """Hash of the exporter's sources and of the checkpoint."""
    digest = hashlib.sha256()
    files = [file for folder in SOURCES for file in (ROOT / folder).rglob("*.py")]
    for file in sorted([*files, *CHECKPOINT.rglob("*.*"), ROOT / "constraints.txt"]):
        digest.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]
