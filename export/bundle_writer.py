"""Writes a bundle whole or not at all: it is filled in a temporary folder and renamed into place.

What a killed process leaves of such a folder is removed by the next one that writes to the same place.

with new_bundle(out) as folder:
    ...  # write the parts into `folder`
    write_manifest(folder, name, producers, sections)
"""

import contextlib
import fcntl
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runtime.bundle.manifest import FORMAT
from runtime.bundle.verify import MANIFEST, PARTIAL, file_sha256
from runtime.errors import UserError

REPLACED = "replaced"  # the bundle that was in the new one's place, in its temporary folder


@contextlib.contextmanager
def new_bundle(out: Path) -> Iterator[Path]:
    """An empty folder that becomes the bundle at `out` when the block ends without an exception.

    A bundle already at `out` is replaced at the very end. Raises UserError if something else is there.
    """
    out = Path(os.path.abspath(out))
    check_place(out)
    with partial_folder(out.parent, out.name + PARTIAL) as partial:
        yield partial
        for path in (partial, *partial.rglob("*")):  # temporary files are private; a deployment's are not
            path.chmod(0o755 if path.is_dir() else 0o644)
        _swap_in(partial, out)


@contextlib.contextmanager
def partial_folder(parent: Path, prefix: str = PARTIAL) -> Iterator[Path]:
    """A temporary folder in `parent`, which is made where it is missing; it is removed when the block ends.

    Folders of that prefix whose process has died are removed first. A living one's is locked; the system unlocks it
    when the process ends, however it does.
    """
    parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        with _locked(parent, fcntl.LOCK_EX):  # between a folder's making and its own lock nobody looks at it
            _remove_abandoned(parent, prefix)
            folder = Path(tempfile.mkdtemp(dir=parent, prefix=prefix))
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            stack.enter_context(_locked(folder, fcntl.LOCK_EX))
        yield folder


def move_graph(partial: Path, out: Path, name: str) -> None:
    """Move the graph `name` and its weights from `partial` to `out`, so that at no moment a graph lies beside others'
    weights."""
    (out / name).unlink(missing_ok=True)
    for file in sorted(partial.iterdir(), key=lambda file: file.name == name):  # the graph last
        file.replace(out / file.name)


@contextlib.contextmanager
def _locked(folder: Path, how: int) -> Iterator[bool]:
    """Whether the folder could be locked: another process holds it, or the file system knows no locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, how)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def _remove_abandoned(parent: Path, prefix: str) -> None:
    for folder in parent.glob(f"{glob.escape(prefix)}*"):
        with contextlib.suppress(OSError), _locked(folder, fcntl.LOCK_EX | fcntl.LOCK_NB) as abandoned:
            if not abandoned:
                continue
            out = parent / prefix.removesuffix(PARTIAL)
            if (replaced := folder / REPLACED).exists() and not out.exists():  # killed between two renames
                replaced.rename(out)
            shutil.rmtree(folder, ignore_errors=True)


def write_manifest(folder: Path, name: str, producers: dict[str, str], sections: dict[str, Any]) -> None:
    """Write the manifest of the files in `folder`.

    Args:
        producers: package -> version, for the record.
        sections: `image`, `prompt`, `tokenizer`, `encoder` and `decoder` as plain dictionaries, `checked` where
            graphs were compared with PyTorch or could have been.
    """
    files = {
        str(file.relative_to(folder)): {"sha256": file_sha256(file), "size": file.stat().st_size}
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    manifest = {"format": FORMAT, "name": name, "producers": producers, **sections, "files": files}
    with (folder / MANIFEST).open("w", encoding="utf-8") as stream:
        json.dump(manifest, stream, indent=2, ensure_ascii=False)
        stream.flush()
        os.fsync(stream.fileno())


def check_place(out: Path) -> None:
    """Raises UserError where something other than a bundle is at `out`, before any work."""
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / MANIFEST).is_file()):
        raise UserError(f"{out} exists and is no bundle; it is left as it is, choose another --out")


def _swap_in(partial: Path, out: Path) -> None:
    if not out.exists():
        partial.rename(out)
        return
    with partial_folder(out.parent, out.name + PARTIAL) as old:
        replaced = out.rename(old / REPLACED)
        try:
            partial.rename(out)
        except BaseException:
            replaced.rename(out)
            raise
