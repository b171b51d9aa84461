"""Runs commands in a home folder of their own, with every name look-up and connection watched, native code's too."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from runtime.telemetry import SWITCHES
from tests.support.commands import ROOT

SOURCE = Path(__file__).parent / "network_watch.c"
# Variables that name folders of the user's, or would switch telemetry off by themselves
UNSET = ("CI", "DO_NOT_TRACK", "DISABLE_TELEMETRY", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
UNSET += ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "MPLCONFIGDIR", "TORCH_HOME", *SWITCHES)


def compiled(folder: Path) -> Path:
    """The watching library, to be preloaded. Raises where there is no C compiler."""
    library = folder / "network_watch.so"
    compiler = shutil.which("cc")
    assert compiler, "watching look-ups takes a C compiler: apt install gcc"
    command = [compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-o", library, SOURCE, "-ldl"]
    subprocess.run(command, check=True)
    return library


@dataclass(frozen=True)
class Watch:
    """library: as `compiled` returns it. folder: for one watched command, empty."""

    library: Path
    folder: Path

    @property
    def home(self) -> Path:
        return self.folder / "home"

    def start(self, *arguments: object, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        """`python arguments...` from the repository's root, in a process group of its own."""
        for folder in (self.home, self.folder / "tmp"):
            folder.mkdir(parents=True, exist_ok=True)
        inherited = {name: value for name, value in os.environ.items() if name not in UNSET}
        own = {
            "HOME": str(self.home),
            "TMPDIR": str(self.folder / "tmp"),
            "LD_PRELOAD": str(self.library),
            "NETWORK_LOG": str(self.folder / "log"),
        }
        return subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            cwd=ROOT,
            env=inherited | own | dict(env or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments: object, env: Mapping[str, str] | None = None) -> str:
        """What the process printed; it must end with 0."""
        process = self.start(*arguments, env=env)
        try:
            output, _ = process.communicate()
        finally:
            kill(process)
        assert process.returncode == 0, output
        return output

    def asked(self) -> set[str]:
        """Names that were looked up and addresses of other machines that were connected to."""
        log = self.folder / "log"
        return set(log.read_text().split()) if log.is_file() else set()

    def left(self) -> set[str]:
        """Files in the home folder, relative to it, and temporary files that are still there."""
        return {str(file.relative_to(base)) for base in (self.home, self.folder / "tmp") for file in base.rglob("*")
                if not file.is_dir()}  # fmt: skip


def kill(process: subprocess.Popen[str]) -> None:
    """The process and those that it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
