"""What a process costs before its first answer: time until it can be asked, and memory that it has for itself.

    python -m benchmarks.load [--bundle DIR ...] [--rounds N] [--json F]

For each bundle, by default the demo model's with each precision of the decoder, processes are started one after the
other, in rounds through all bundles. first: without remembered hashes, so that each file is read for its sha256, and
without its files in the page cache where the system lets them go. again: as every later start. Medians of seconds from
the start of the process until `runtime.load` is done; of them, `load_ms` is spent in it and in `import runtime`.

Then two processes hold the same bundle and have answered: what is one's own (`own_mib`), and what both have resident of
the bundle's mapped files (`shared_mib`), as Linux counts it (/proc/PID/smaps).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import record
from benchmarks.chain import PRECISIONS, bundle_of
from runtime.bundle.manifest import open_bundle

ROOT = Path(__file__).parents[1]
HELD = """
import json, sys, time
begin = time.perf_counter()
import runtime
model = runtime.load(sys.argv[1])
print(json.dumps({"load_ms": 1000 * (time.perf_counter() - begin)}), flush=True)
for line in sys.stdin:
    list(model.generate([], "Count.", runtime.Options(max_new_tokens=2)))
    print("{}", flush=True)
"""


class Held:
    """A process that holds a bundle. seconds: until it did; load_ms: of them, in importing and loading."""

    def __init__(self, bundle: Path, cache: Path):
        """cache: where it remembers hashes."""
        environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        begin = time.perf_counter()
        self.process = subprocess.Popen([sys.executable, "-c", HELD, str(bundle)], cwd=ROOT, env=environment, **pipes)
        self.load_ms = self._answer()["load_ms"]
        self.seconds = time.perf_counter() - begin

    def ask(self) -> None:
        """One answer of two tokens, without an image."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self._answer()

    def mib(self, bundle: Path) -> dict[str, float]:
        """own: of all its mappings what nobody else has. shared: of the bundle's files what somebody else has too."""
        found, of_bundle = {"own": 0.0, "shared": 0.0}, False
        for line in Path(f"/proc/{self.process.pid}/smaps").read_text().splitlines():
            key, *values = line.split(maxsplit=5)
            if not key.endswith(":"):  # a mapping's addresses, and at the end its file
                of_bundle = str(bundle.resolve()) in line
            elif key.startswith("Private_"):
                found["own"] += int(values[0]) / 1024
            elif key.startswith("Shared_") and of_bundle:
                found["shared"] += int(values[0]) / 1024
        return found

    def _answer(self) -> dict:
        if not (line := self.process.stdout.readline()):
            raise RuntimeError(f"{self.process.args[-1]} cannot be held: status {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load", description=__doc__.split("\n")[0])
    parser.add_argument("--bundle", type=Path, nargs="+", metavar="DIR", help="default: the demo model's")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="F", help="default: benchmarks/results/load.json")
    args = parser.parse_args()
    bundles = args.bundle or [bundle_of(precision) for precision in PRECISIONS]
    starts: dict[tuple[Path, str], list[Held]] = {}
    for _ in range(args.rounds):
        for bundle in bundles:
            with tempfile.TemporaryDirectory() as cache:
                let_go(bundle)
                for which in ("first", "again"):
                    held = Held(bundle, Path(cache))
                    held.close()
                    starts.setdefault((bundle, which), []).append(held)
    rows = [row for bundle in bundles for row in rows_of(bundle, starts)]
    record.write("load", rows, args.json)


def let_go(bundle: Path) -> None:
    """Ask the system to drop the bundle's files from its page cache."""
    for file in filter(Path.is_file, bundle.rglob("*")):
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def rows_of(bundle: Path, starts: dict[tuple[Path, str], list[Held]]) -> list[dict]:
    precision = open_bundle(bundle).decoder.precision
    with tempfile.TemporaryDirectory() as cache:
        two = [Held(bundle, Path(cache)) for _ in range(2)]
        for held in two:
            held.ask()
        memory = {f"{whose}_mib": round(mib) for whose, mib in two[1].mib(bundle).items()}
        for held in two:
            held.close()
    rows = []
    for which in ("first", "again"):
        taken = starts[bundle, which]
        row = {"work": "load", "decoder": precision, "start": which}
        row["seconds"] = round(statistics.median(held.seconds for held in taken), 2)
        row["load_ms"] = round(statistics.median(held.load_ms for held in taken))
        rows.append(row | memory)
        print(rows[-1], flush=True)
    return rows


if __name__ == "__main__":
    main()
