"""Writes bundles: filled in a temporary folder, renamed into place, so that a killed export leaves no half bundle."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runtime.bundle.manifest import FORMAT
from runtime.bundle.verify import MANIFEST, PARTIAL, file_sha256
from runtime.errors import UserError


def write_bundle(
    out: Path,
    fill: Callable[[Path], dict[str, Any]],
    name: str,
    producers: dict[str, str],
) -> None:
    """Make a bundle at `out`.

    fill: called with an empty folder; writes the parts there and returns the manifest's sections `image`, `prompt`,
    `tokenizer`, `encoder`, `decoder` as plain dictionaries.
    producers: package -> version, for the record.
    A bundle already at `out` is replaced at the very end. Raises UserError if something else is there.
    """
    out = Path(os.path.abspath(out))
    check_place(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=out.parent, prefix=out.name + PARTIAL))
    try:
        sections = fill(partial)
        files = {
            str(file.relative_to(partial)): {"sha256": file_sha256(file), "size": file.stat().st_size}
            for file in sorted(partial.rglob("*"))
            if file.is_file()
        }
        manifest = {"format": FORMAT, "name": name, "producers": producers, **sections, "files": files}
        with (partial / MANIFEST).open("w", encoding="utf-8") as stream:
            json.dump(manifest, stream, indent=2, ensure_ascii=False)
            stream.flush()
            os.fsync(stream.fileno())
        for path in (partial, *partial.rglob("*")):  # temporary files are private; a deployment's are not
            path.chmod(0o755 if path.is_dir() else 0o644)
        _swap_in(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_place(out: Path) -> None:
    """Raises UserError where something other than a bundle is at `out`, as `write_bundle` would after the work."""
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / MANIFEST).is_file()):
        raise UserError(f"{out} exists and is no bundle; it is left as it is, choose another --out")


def _swap_in(partial: Path, out: Path) -> None:
    if not out.exists():
        partial.rename(out)
        return
    old = Path(tempfile.mkdtemp(dir=out.parent, prefix=out.name + PARTIAL))
    out.rename(old / "replaced")
    partial.rename(out)
    shutil.rmtree(old, ignore_errors=True)
