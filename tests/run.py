"""Run the tests of a make target and hold what they took against their budgets.

python -m tests.run test|test-all|test-release [pytest's options]

Each entry of a tier's folder (a package such as tests/unit/runtime, or a file) is run by pytest in its own process:
PyTorch, TensorRT, OpenVINO and their threads all in one have crashed. JOBS entries run at once; what one printed comes
when it has ended. An entry belongs to the group of its name where tests/budgets.toml has one, else to `house`.

Exit code 1: tests failed, or a group took more than TOLERANCE times its budget.
"""

import subprocess
import sys
import time
import tomllib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

TESTS = Path(__file__).parent
TIERS = {"test": ("unit", "integration"), "test-all": ("e2e",), "test-release": ("release",)}
DEFAULT_GROUP = "house"
TOLERANCE = 1.5  # the same machine, on a slow day
JOBS = 2  # most tests keep one core busy
NO_TESTS_COLLECTED = 5  # pytest's exit code, where options leave out all of a folder's tests


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    target, *options = (sys.argv[1:] if argv is None else argv) or [""]
    if target not in TIERS:
        print(f"error: {target!r} is no target, expected one of {', '.join(TIERS)}", file=sys.stderr)
        return 2
    budgets = tomllib.loads((TESTS / "budgets.toml").read_text(encoding="utf-8")).get(target, {})
    seconds: dict[str, float] = {}
    failed = []
    found = entries(TESTS, TIERS[target])
    with ThreadPoolExecutor(JOBS) as pool:
        for entry, (status, output, took) in zip(found, pool.map(lambda one: _run(one, options), found), strict=True):
            name, group = str(entry.relative_to(TESTS.parent)), group_of(entry, budgets)
            print(f"== {name} ({took:.0f} s)\n{output}", flush=True)
            seconds[group] = seconds.get(group, 0.0) + took / JOBS
            if status not in (0, NO_TESTS_COLLECTED):
                failed.append(name)
    lines, over = table(seconds, budgets)
    print("\n".join(lines))
    for name in failed:
        print(f"FAILED: {name}")
    return int(bool(failed) or over)


def _run(entry: Path, options: list[str]) -> tuple[int, str, float]:
    """(exit code, what it printed, seconds) of pytest on one entry, in a process of its own."""
    begin = time.monotonic()
    command = [sys.executable, "-m", "pytest", str(entry.relative_to(TESTS.parent)), *options]
    done = subprocess.run(command, cwd=TESTS.parent, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return done.returncode, done.stdout, time.monotonic() - begin


def entries(tests: Path, tiers: tuple[str, ...]) -> list[Path]:
    """Folders with tests, and files of tests, right under the tiers' folders; those with most code come first, so that
    no core waits for one at the end."""
    sizes = {
        entry: sum(file.stat().st_size for file in ([entry] if entry.is_file() else entry.rglob("test_*.py")))
        for tier in tiers
        for entry in (tests / tier).iterdir()
        if entry.match("test_*.py") or next(entry.rglob("test_*.py"), None)
    }
    return sorted(sizes, key=lambda entry: (-sizes[entry], entry))


def group_of(entry: Path, budgets: Mapping[str, float]) -> str:
    name = entry.stem.removeprefix("test_")
    return name if name in budgets else DEFAULT_GROUP


def table(seconds: Mapping[str, float], budgets: Mapping[str, float]) -> tuple[list[str], bool]:
    """Lines with each group's seconds and budget, and whether one is beyond what is tolerated.

    Args:
        seconds: group -> its share of the machine's time, seconds.
        budgets: group -> minutes that it may take; a group without an entry may take any time.
    """
    lines, failed = [f"{'group':<12} {'seconds':>8} {'budget':>8}"], False
    for group, took in seconds.items():
        budget = budgets.get(group, 0) * 60
        line = f"{group:<12} {took:>8.0f} {budget or '-':>8}"
        if budget and took > budget:
            over = took > TOLERANCE * budget
            line += f"  OVER BUDGET by {took / budget - 1:.0%}" + ", which fails the run" * over
            failed |= over
        lines.append(line)
    return lines, failed


if __name__ == "__main__":
    sys.exit(main())
