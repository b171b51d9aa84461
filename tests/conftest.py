"""Fixtures that several rooms share: the conformance data and a bundle made from its checkpoint."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONFORMANCE = ROOT.parent / "shared" / "conformance"


@pytest.fixture(scope="session")
def conformance() -> Path:
    """What the original implementation computes; lies beside the repository."""
    if not CONFORMANCE.is_dir():
        pytest.skip(f"no conformance data: {CONFORMANCE} does not exist")
    return CONFORMANCE


@pytest.fixture(scope="session")
def reference(conformance: Path) -> dict:
    return json.loads((conformance / "reference.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def conformance_bundle(conformance: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 bundle of the conformance checkpoint, made by the command a user would type."""
    out = tmp_path_factory.mktemp("bundles") / "conformance"
    run_module(
        "export.bundle", "--checkpoint", conformance / "checkpoint", "--res", 256, "--out", out
    ).check_returncode()
    return out


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep remembered hashes out of the user's own cache, and shared between the tests of a run."""
    cache = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    return cache


def run_module(module: str, *arguments: object, **options) -> subprocess.CompletedProcess[str]:
    """`python -m module arguments...` from the repository's root."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ.copy(), **options)
