"""Memory that is left, by Linux's files of both versions of control groups."""

from pathlib import Path

import pytest

from runtime.device.host_memory import available_bytes

MIB = 1 << 20


@pytest.fixture
def machine(tmp_path):
    """A machine with 1000 MiB available; returns its /proc and its control groups."""
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(f"MemTotal: 4096000 kB\nMemAvailable: {1000 << 10} kB\n")
    return proc, groups


def put_group(folder: Path, names: tuple[str, str], limit: object, usage: int, stat: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip((*names, "memory.stat"), (limit, usage, stat), strict=True):
        (folder / name).write_text(f"{value}\n")


V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")
V2 = ("memory.max", "memory.current")


def test_without_control_groups_it_is_what_linux_says(machine):
    assert available_bytes(*machine) == 1000 * MIB


def test_pages_of_files_in_a_group_count_as_available(machine):
    proc, groups = machine
    (proc / "self" / "cgroup").write_text("0::/box\n")
    stat = f"anon {5 * MIB}\nactive_file {100 * MIB}\ninactive_file {50 * MIB}"
    put_group(groups / "box", V2, 500 * MIB, 300 * MIB, stat)
    assert available_bytes(proc, groups) == 350 * MIB


def test_a_group_without_a_limit_is_none_and_one_above_it_counts(machine):
    proc, groups = machine
    (proc / "self" / "cgroup").write_text("0::/outer/inner\n")
    put_group(groups / "outer" / "inner", V2, "max", 10 * MIB, "active_file 0")
    put_group(groups / "outer", V2, 200 * MIB, 150 * MIB, "active_file 0")
    assert available_bytes(proc, groups) == 50 * MIB


def test_version_1_and_the_root_of_a_container(machine):
    proc, groups = machine
    (proc / "self" / "cgroup").write_text("5:devices:/x\n4:cpu,memory:/docker/not-here\n0::/\n")
    put_group(groups / "memory", V1, 400 * MIB, 390 * MIB, f"total_active_file {20 * MIB}\ntotal_inactive_file 0")
    assert available_bytes(proc, groups) == 30 * MIB


def test_more_taken_than_allowed_leaves_nothing(machine):
    proc, groups = machine
    (proc / "self" / "cgroup").write_text("0::/box\n")
    put_group(groups / "box", V2, 100 * MIB, 120 * MIB, "active_file 0")
    assert available_bytes(proc, groups) == 0


def test_another_system_says_nothing(tmp_path):
    assert available_bytes(tmp_path, tmp_path) is None
