"""How much memory a process may still take on this machine: Linux's figure, and the limits of its control groups."""

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
# of both versions of control groups: limit, usage, and the lines of memory.stat that count pages of files
FILES = {
    2: ("memory.max", "memory.current", ("active_file", "inactive_file")),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file")),
}


def available_bytes(proc: Path = Path("/proc"), cgroups: Path = CGROUPS) -> int | None:
    """Bytes that this process can take without another one having to give them up; None where nothing says so.

    Pages of files, such as weights that other processes have mapped, count as available: they are read again.
    """
    found = list(_limits(proc, cgroups))
    with suppress(OSError):
        if match := re.search(r"MemAvailable:\s+(\d+) kB", (proc / "meminfo").read_text()):
            found.append(int(match[1]) << 10)
    return max(min(found), 0) if found else None


def _limits(proc: Path, cgroups: Path) -> Iterator[int]:
    """What the process's control groups and those above them leave."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = cgroups / "memory" if controllers else cgroups
        group = root / path.lstrip("/")
        # Inside a container the path is that of the machine, and the container's own group lies at the root
        for folder in (group, *group.parents):
            if folder.is_relative_to(root):
                with suppress(OSError, ValueError):
                    yield _left(folder, *FILES[1 if controllers else 2])


def _left(folder: Path, limit: str, usage: str, file_pages: tuple[str, ...]) -> int:
    """Raises OSError and ValueError (no limit is `max`) where the group has no limit."""
    most, taken = int((folder / limit).read_text()), int((folder / usage).read_text())
    stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    return most - taken + sum(int(stat.get(name, 0)) for name in file_pages)
