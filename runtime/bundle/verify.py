"""Files of a bundle against its manifest: present, whole, unchanged."""

import contextlib
import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any, cast

from runtime.errors import UserError

MANIFEST = "manifest.json"
PARTIAL = ".partial-"


def check_files(folder: Path, files: dict[str, Any]) -> None:
    for name, expected in files.items():
        file = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:  # a link is no matter: the hash is of the content
            raise UserError(f"{folder / MANIFEST}: names {name!r}, a file outside the bundle")
        if not isinstance(expected, dict) or not {"sha256", "size"} <= expected.keys():
            raise UserError(f"{folder / MANIFEST}: no sha256 and size for {name!r}")
        try:
            stat = file.stat()
        except (OSError, ValueError):  # ValueError: no path at all
            raise UserError(f"{file}: missing from the bundle; export it again") from None
        if stat.st_size != expected["size"]:
            raise UserError(
                f"{file}: altered since the export ({stat.st_size} bytes, the manifest says {expected['size']}); "
                "export it again"
            )


def check_hashes(folder: Path, files: dict[str, Any], given_up: threading.Event) -> None:
    memory = _HashMemory()
    for name, expected in files.items():
        file = folder / name
        if given_up.is_set():
            return
        if memory.sha256(file, file.stat()) != expected["sha256"]:
            raise UserError(f"{file}: altered since the export (its sha256 is not the manifest's); export it again")
    memory.save()


class _HashMemory:
    """sha256 by path, size, inode and times, kept in the user's cache folder; a folder that cannot be written is let
    be, at the price of hashing at each start."""

    def __init__(self):
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        self._file = Path(cache) / "convllava-deploy" / "sha256.json"
        self._known: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError, TypeError):
            self._known = dict(json.loads(self._file.read_text(encoding="utf-8")))
        self._changed = False

    def sha256(self, file: Path, stat: os.stat_result) -> str:
        path = str(file.resolve())
        state = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        known = self._known.get(path)
        if isinstance(known, list) and known[:-1] == state:
            return cast(str, known[-1])
        digest = file_sha256(file)
        self._known[path] = [*state, digest]
        self._changed = True
        return digest

    def save(self) -> None:
        if not self._changed or not self._file.is_absolute():  # "~" stays where the user has no home
            return
        with contextlib.suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            partial = self._file.with_name(f"{self._file.name}{PARTIAL}{os.getpid()}")
            partial.write_text(json.dumps(self._known), encoding="utf-8")
            partial.replace(self._file)


def file_sha256(file: Path) -> str:
    """sha256 of a file's content, hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
