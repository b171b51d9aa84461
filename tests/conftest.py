"""Fixtures that several packages share: the conformance data and a bundle made from its checkpoint."""

import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import settings

import runtime  # noqa: F401  # turns telemetry off before a test imports ONNX Runtime
from tests.support.bundles import exported

# No deadline, as a busy machine would miss it; CI draws the same examples each time
settings.register_profile("convllava", deadline=None, max_examples=60, derandomize="CI" in os.environ)
settings.load_profile("convllava")

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def conformance() -> Path:
    """A tiny checkpoint and what the reference implementation computes from it."""
    return DATA / "conformance"


@pytest.fixture(scope="session")
def reference(conformance: Path) -> dict:
    return json.loads((conformance / "reference.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def conformance_bundle() -> Path:
    """A float32 bundle of the conformance checkpoint; copy it before changing it."""
    return exported("--res", 256)


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep remembered hashes out of the user's own cache, and shared between the tests of a run."""
    cache = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    return cache


@pytest.fixture(scope="session")
def built():
    """The kernels: skips where they cannot run, fails where they should have been compiled."""
    from runtime import kernels

    reason = kernels.unavailable()
    if reason and (kernels.processor_flags() >= kernels.NEEDED) and shutil.which("c++"):
        pytest.fail(f"there is a compiler, and yet {reason}")
    if reason:
        pytest.skip(f"the kernels cannot run: {reason}")
