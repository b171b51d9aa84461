"""Checkpoints of the released width with a few layers, made once for all tests here."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from benchmarks.memory import Ran
from benchmarks.released.checkpoint import Shape, write_checkpoint
from tests.support.released import run_command


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Layers -> a checkpoint's folder, with the whole image encoder."""

    @cache
    def made(layers: int) -> Path:
        folder = tmp_path_factory.mktemp("released") / f"{layers}-layers"
        write_checkpoint(folder, Shape(layers=layers))
        return folder

    return made


@pytest.fixture(scope="session")
def exported(checkpoint_of: Callable[[int], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ran]:
    """A bundle of 2 layers with a 4-bit decoder, and what its export took. Copy it before changing it."""
    folder = tmp_path_factory.mktemp("bundle") / "int4"
    arguments = ["--checkpoint", checkpoint_of(2), "--decoder-precision", "int4", "--out", folder]
    return folder, run_command("export.bundle", *arguments)
