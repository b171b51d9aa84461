"""Writes a bundle whole or not at all: it is filled in a temporary folder and renamed into place.

with new_bundle(out) as folder:
    ...  # write the parts into `folder`
    write_manifest(folder, name, producers, sections)
"""

import contextlib
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


@contextlib.contextmanager
def new_bundle(out: Path) -> Iterator[Path]:
    """An empty folder that becomes the bundle at `out` when the block ends without an exception.

    A bundle already at `out` is replaced at the very end. Raises UserError if something else is there.
    """
    out = Path(os.path.abspath(out))
    check_place(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=out.parent, prefix=out.name + PARTIAL))
    try:
        yield partial
        for path in (partial, *partial.rglob("*")):  # temporary files are private; a deployment's are not
            path.chmod(0o755 if path.is_dir() else 0o644)
        _swap_in(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_manifest(folder: Path, name: str, producers: dict[str, str], sections: dict[str, Any]) -> None:
    """Write the manifest of the files in `folder`.

    Args:
        producers: package -> version, for the record.
        sections: `image`, `prompt`, `tokenizer`, `encoder` and `decoder` as plain dictionaries.
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
    old = Path(tempfile.mkdtemp(dir=out.parent, prefix=out.name + PARTIAL))
    try:
        replaced = out.rename(old / "replaced")
        try:
            partial.rename(out)
        except BaseException:
            replaced.rename(out)
            raise
    finally:
        shutil.rmtree(old, ignore_errors=True)
