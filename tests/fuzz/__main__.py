"""Fuzz what reads bytes of others, with atheris (libFuzzer).

python -m tests.fuzz TARGET|all [--seconds N] [--seed N] [--out DIR]

Each target starts from generated seeds, in a process of its own, since a native library may crash; JOBS targets run at
once. A finding is an exception other than UserError and ApiError, a message of several lines, more than TIMEOUT_S
seconds or MEMORY_MIB for one input, or a crash. Its input is written to DIR and printed in base64, and
`python -m tests.fuzz TARGET --input FILE` runs it again.

Exit code 1: there are findings.
"""

import argparse
import base64
import importlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

from tests.fuzz.targets import INSTRUMENTED, TARGETS

ROOT = Path(__file__).parents[2]
JOBS = 2
TIMEOUT_S = 20
MEMORY_MIB = 2048
MAX_BYTES = 16_384  # of an input; seeds are smaller
START_S = 120  # that a process may take besides the seconds it fuzzes
RAW_CHANCE = 4  # one of so many changes is libFuzzer's own, the others follow the input's structure


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Fuzz what reads bytes of others.")
    parser.add_argument("target", help=f"all, or one of {', '.join(TARGETS)}")
    parser.add_argument("--seconds", type=int, default=60, help="in all, for all targets together; 60")
    parser.add_argument(
        "--seed", type=int, default=0, help="above 0: the same inputs in each run; default: others each time"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "fuzz", help="folder of findings; build/fuzz")
    parser.add_argument("--input", type=Path, help="a file to run once")
    parser.add_argument("--corpus", type=Path, help=argparse.SUPPRESS)  # of a process that fuzzes
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.input:
        target = importlib.import_module(f"tests.fuzz.targets.{options.target}")
        target.seeds()
        checked(target.fuzz)(options.input.read_bytes())
        return 0
    if options.corpus:
        fuzz(options)
    names = TARGETS if options.target == "all" else (options.target,)
    jobs = min(JOBS, len(names))
    seconds = max(options.seconds * jobs // len(names), 1)
    print(f"{'target':<14} {'seconds':>8} {'inputs':>10} {'a second':>9}  findings", flush=True)
    with ThreadPoolExecutor(jobs) as pool:
        results = list(pool.map(lambda name: run(name, seconds, options.seed, options.out), names))
    return int(not all(results))


def run(name: str, seconds: int, random_seed: int, out: Path) -> bool:
    """Fuzzes a target in a process of its own and prints a line, with each finding; returns whether there are none."""
    command = [sys.executable, "-m", "tests.fuzz", name, "--seconds", str(seconds), "--seed", str(random_seed)]
    before, begin = set(out.glob(f"{name}-*")), time.monotonic()
    with tempfile.TemporaryDirectory() as corpus:
        done = subprocess.run(
            [*command, "--out", str(out), "--corpus", corpus],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=seconds + START_S,
        )
    took = time.monotonic() - begin
    inputs = int(
        (re.findall(r"number_of_executed_units: (\d+)", done.stdout) or re.findall(r"#(\d+)", done.stdout) or [0])[-1]
    )
    found = sorted(set(out.glob(f"{name}-*")) - before)
    lines = [f"{name:<14} {took:>8.0f} {inputs:>10} {inputs / seconds:>9.0f}  {len(found)}"]
    for file in found:
        lines += [f"{file}:", base64.b64encode(file.read_bytes()).decode()]
    if failed := bool(found or done.returncode):
        lines.append(done.stdout[-6000:])
    print("\n".join(lines), flush=True)
    return not failed


def fuzz(options: argparse.Namespace) -> None:
    """Fuzzes a target in this process, which then ends."""
    import atheris

    with atheris.instrument_imports(include=INSTRUMENTED):
        target = importlib.import_module(f"tests.fuzz.targets.{options.target}")
    for number, seed in enumerate(target.seeds()):
        (options.corpus / str(number)).write_bytes(seed)
    libfuzzer = [
        *(
            f"-max_total_time={options.seconds}",
            f"-seed={options.seed}",
            f"-timeout={TIMEOUT_S}",
            f"-rss_limit_mb={MEMORY_MIB}",
            f"-max_len={MAX_BYTES}",
        ),
        *("-print_final_stats=1", "-verbosity=0", f"-artifact_prefix={options.out}/{options.target}-"),
        str(options.corpus),
    ]
    atheris.Setup([sys.argv[0], *libfuzzer], checked(target.fuzz), **mutation(target))
    atheris.Fuzz()


def mutation(target: ModuleType) -> dict[str, Callable[[bytes, int, int], bytes]]:
    """atheris' options: the target's own changes where it has some, and now and then libFuzzer's."""
    import atheris

    if not hasattr(target, "mutate"):
        return {}

    def change(content: bytes, max_size: int, seed: int) -> bytes:
        found = target.mutate(content, seed) if seed % RAW_CHANCE else None
        return found if found is not None and len(found) <= max_size else atheris.Mutate(content, max_size)

    return {"custom_mutator": change}


def checked(read: Callable[[bytes], None]) -> Callable[[bytes], None]:
    """`read`, where errors that a user is meant to read are right if they are a single line."""
    from runtime.errors import UserError
    from runtime.serve.protocol import ApiError

    def read_or_refuse(content: bytes) -> None:
        try:
            read(content)
        except (UserError, ApiError) as error:
            assert "\n" not in str(error), "an error of several lines"

    return read_or_refuse


if __name__ == "__main__":
    sys.exit(main())
