"""Peak memory of a process tree: private pages counted, mapped files apart, children included."""

import mmap
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.memory import Memory, PeakMemory, main, run_measured, tree_memory

MIB = 2**20
HOLD = "import sys, time; held = b'x' * (int(sys.argv[1]) * 2**20); time.sleep(0.3)"
NESTED = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {HOLD!r}, sys.argv[1]])"
SHARED = "import mmap, time; held = mmap.mmap(-1, 100 * 2**20); held[:] = b'x' * len(held); time.sleep(0.3)"
TWICE = f"{HOLD}; del held; held = b'y' * 2**20; time.sleep(0.2)"


@pytest.mark.parametrize("code", [HOLD, NESTED, TWICE], ids=["a process", "a child of it", "freed again"])
def test_the_peak_is_what_was_held(code: str):
    plain = run_measured([sys.executable, "-c", code, "0"])
    ran = run_measured([sys.executable, "-c", code, "200"])
    assert (plain.status, ran.status) == (0, 0)
    assert 195 * MIB < ran.peak.own - plain.peak.own < 210 * MIB
    assert ran.seconds > 0.3


def test_shared_memory_counts():
    assert run_measured([sys.executable, "-c", SHARED]).peak.own > 100 * MIB


def test_pages_of_mapped_files_are_counted_apart(tmp_path: Path):
    file = tmp_path / "weights"
    file.write_bytes(b"x" * (100 * MIB))
    with PeakMemory() as before:
        pass
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ) as held, PeakMemory() as memory:
        assert np.frombuffer(held, np.uint8)[:: mmap.PAGESIZE].sum() > 0
    assert memory.peak.mapped - before.peak.mapped > 95 * MIB
    assert abs(memory.peak.own - before.peak.own) < 20 * MIB


def test_a_process_that_has_ended_holds_nothing():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert tree_memory(process.pid) == Memory()


def test_the_command_ends_with_its_command_s_status(capfd):
    assert main([sys.executable, "-c", "print('said'); raise SystemExit(3)"]) == 3
    out, err = capfd.readouterr()
    assert out == "said\n"
    assert err.startswith("peak memory 0.")
    assert main([]) == 2
