"""What the commands of this package share: the checkpoint they work on, its name and resolution, package versions."""

import contextlib
import importlib.metadata
from collections.abc import Iterable
from pathlib import Path

from runtime.errors import UserError
from runtime.image.preprocess import MAX_RESOLUTION
from train.model import Checkpoint

CHECKS = ("full", "none")
CHECK_HELP = "full: compare each graph with PyTorch, layer by layer; none: compare nothing; default: full"
NOTHING_COMPARED = "nothing was compared with PyTorch (--check none)"
BUILD = Path(__file__).parents[1] / "build"


def open_checkpoint(source: str | None) -> Checkpoint:
    """The checkpoint at `source` (folder or Hub id), or the demo model, made first where it is not there."""
    if source is None:
        from train.model.demo import demo_checkpoint

        source = str(demo_checkpoint(BUILD))
    return Checkpoint.open(source)


def check_comparison(check: str) -> None:
    """Raises UserError unless `check` is one of CHECKS."""
    if check not in CHECKS:
        raise UserError(f"--check {check!r}: expected {' or '.join(CHECKS)}")


def name_of(checkpoint: Checkpoint) -> str:
    """The folder's name; for one from the Hub's cache, the repository's."""
    folder = checkpoint.folder.resolve()
    if folder.parent.name == "snapshots":  # models--owner--name/snapshots/commit
        return folder.parents[1].name.rpartition("--")[2]
    return folder.name


def choose_resolution(requested: int | None, checkpoint: Checkpoint) -> int:
    """`requested` in pixels, or the checkpoint's own.

    Raises:
        UserError: it is no positive multiple of the encoder's stride, or above MAX_RESOLUTION.
    """
    resolution = checkpoint.resolution if requested is None else requested
    stride = checkpoint.encoder_config.stride
    if resolution < stride or resolution % stride:
        below = max(resolution // stride, 1) * stride
        raise UserError(
            f"resolution {resolution} is not a multiple of the encoder's stride {stride}; "
            f"try {below} or {below + stride}"
        )
    if resolution > MAX_RESOLUTION:
        raise UserError(f"resolution {resolution} is above {MAX_RESOLUTION}, which images are prepared for at most")
    return resolution


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """package -> version of those that are installed."""
    found = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
