"""Peak memory of a process and all that it starts.

    python -m benchmarks.memory COMMAND...

runs the command, says its peak on stderr and ends with its exit code. Peak memory is the highest sum over the process
tree of RssAnon and RssShmem in /proc/PID/status: what the processes hold themselves. Pages of mapped files are the page
cache's, which drops them where memory runs short; they are reported apart, once for each process that maps them.
"""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

INTERVAL_S = 0.05
GIB = 2**30


@dataclass(frozen=True)
class Memory:
    """Bytes. own: RssAnon and RssShmem; mapped: RssFile."""

    own: int = 0
    mapped: int = 0


def tree_memory(root: int) -> Memory:
    """What a process and its descendants hold at this moment; 0 bytes for one that has ended."""
    own = mapped = 0
    waiting = [root]
    while waiting:
        folder = Path("/proc", str(waiting.pop()))
        try:
            sizes = _status(folder)
            tasks = [task.read_text() for task in folder.glob("task/*/children")]
        except (FileNotFoundError, ProcessLookupError):  # it ended
            continue
        own += sizes.get("RssAnon", 0) + sizes.get("RssShmem", 0)
        mapped += sizes.get("RssFile", 0)
        waiting += [int(child) for task in tasks for child in task.split()]
    return Memory(own, mapped)


class PeakMemory:
    """Context manager: the peak of a process tree, sampled every INTERVAL_S by a thread of this process.

    pid: the tree's root; None: this process.
    peak: the highest of each of its two sums so far.
    """

    def __init__(self, pid: int | None = None):
        self._root = os.getpid() if pid is None else pid
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self.peak = Memory()

    def __enter__(self) -> Self:
        self._look()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._look()
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._done.wait(INTERVAL_S):
            self._look()

    def _look(self) -> None:
        now = tree_memory(self._root)
        self.peak = Memory(max(self.peak.own, now.own), max(self.peak.mapped, now.mapped))


@dataclass(frozen=True)
class Ran:
    """A command that has ended. output: its stdout and stderr where they were captured."""

    status: int
    seconds: float
    peak: Memory
    output: str

    def __str__(self) -> str:
        own, mapped = self.peak.own / GIB, self.peak.mapped / GIB
        return f"peak memory {own:.2f} GiB, beside it {mapped:.2f} GiB of mapped files; {self.seconds:.0f} s"


def run_measured(command: Sequence[str | Path], capture: bool = True, **options) -> Ran:
    """Run a command to its end. capture: keep what it prints, else it goes where this process prints.

    options: `subprocess.Popen`'s, such as cwd and env.
    """
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True} if capture else {}
    begin = time.perf_counter()
    with subprocess.Popen([*map(str, command)], **streams, **options) as process, PeakMemory(process.pid) as memory:
        output, _ = process.communicate()
    return Ran(process.returncode, time.perf_counter() - begin, memory.peak, output or "")


def _status(folder: Path) -> dict[str, int]:
    """The sizes in a process's status, bytes."""
    lines = (line.split() for line in (folder / "status").read_text().splitlines())
    return {fields[0].rstrip(":"): 1024 * int(fields[1]) for fields in lines if fields[-1:] == ["kB"]}


def main(argv: list[str] | None = None) -> int:
    command = sys.argv[1:] if argv is None else argv
    if not command or command[0] in ("-h", "--help"):
        print(__doc__.split("\n")[0], "usage: python -m benchmarks.memory COMMAND...", sep="\n")
        return 0 if command else 2
    ran = run_measured(command, capture=False)
    print(ran, file=sys.stderr)
    return ran.status


if __name__ == "__main__":
    sys.exit(main())
