from pathlib import Path

import pytest

from tests.support.checkpoints import (
    Parts,
)


@pytest.fixture
def parts() -> Parts:
    return Parts()


@pytest.fixture
def folder(parts: Parts, tmp_path: Path) -> Path:
    """A good checkpoint for a test to spoil."""
    return parts.write(tmp_path / "checkpoint")
