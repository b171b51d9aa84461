"""What the commands of this folder share: the demo model as default, errors as one line, parity tables."""

import contextlib
import importlib.metadata
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from safetensors import SafetensorError

from export.tolerances import ParityError
from runtime.errors import UserError
from runtime.image.preprocess import MAX_RESOLUTION
from train.errors import CheckpointError, TokenizerError
from train.model import Checkpoint

BUILD = Path(__file__).parents[1] / "build"


def open_checkpoint(source: str | None) -> Checkpoint:
    """The checkpoint at `source` (folder or Hub id), or the demo model, made first where it is not there."""
    if source is None:
        from train.model.demo import demo_checkpoint

        source = str(demo_checkpoint(BUILD))
    return Checkpoint.open(source)


def name_of(checkpoint: Checkpoint) -> str:
    """The folder's name; for one from the Hub's cache, the repository's."""
    folder = checkpoint.folder.resolve()
    if folder.parent.name == "snapshots":  # models--owner--name/snapshots/commit
        return folder.parents[1].name.rpartition("--")[2]
    return folder.name


def choose_resolution(asked: int | None, checkpoint: Checkpoint) -> int:
    """`asked`, or the checkpoint's own. Raises UserError unless it is a positive multiple of the stride, MAX_RESOLUTION
    at most."""
    resolution = checkpoint.resolution if asked is None else asked
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


def run(main: Callable[[], int]) -> None:
    """Exit with main's status; with one line and 2 where the user can put it right, 1 where an export went wrong."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that partial folders are cleared away
    try:
        sys.exit(main())
    except (UserError, CheckpointError, TokenizerError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except (OSError, SafetensorError) as error:  # a full disk is either
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except ParityError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
