"""A server for ten minutes under what `benchmarks/locustfile.py` sends, by Locust: failures, and memory over time.

    python -m benchmarks.soak [--bundle DIR] [--minutes M] [--users N] [--json F]

Locust lives in an environment of its own (`make peers`). The memory is resident (VmRSS), its least and most after the
first minute in per cent of what it was then.
"""

import argparse
import csv
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from benchmarks import record
from benchmarks.serve import ROOT, Server
from export.cli import BUILD

LOCUST = BUILD / "peers" / "locust" / "bin" / "locust"
PAGES = 24


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__.split("\n")[0])
    parser.add_argument("--bundle", help="default: the demo model's")
    parser.add_argument("--minutes", type=float, default=10.0, metavar="M", help="more than one")
    parser.add_argument("--users", type=int, default=6, metavar="N", help="clients at once")
    parser.add_argument("--json", type=Path, metavar="F", help="default: benchmarks/results/soak.json")
    args = parser.parse_args()
    if not LOCUST.is_file():
        print("error: no Locust here: `make peers` installs it", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        options = ["--pages", str(PAGES), "--split", "test", "--preset", "page-1024", "--out", f"{folder}/pages"]
        subprocess.run([sys.executable, "-m", "train.synth", *options], check=True, stdout=subprocess.DEVNULL)
        pages = os.pathsep.join(str(file) for file in sorted(Path(folder, "pages", "images").iterdir()))
        server = Server(args.bundle, 8)
        memory = Memory(server.pid)
        try:
            command = [LOCUST, "--headless", "--users", args.users, "--spawn-rate", args.users, "--only-summary"]
            command += ["--run-time", f"{round(60 * args.minutes)}s", "--stop-timeout", 120, "--host", server.url]
            command += ["--csv", f"{folder}/locust", "-f", "benchmarks/locustfile.py"]
            subprocess.run([*map(str, command)], cwd=ROOT, env=os.environ | {"SOAK_PAGES": pages}, check=False)
            alive = server.alive
        finally:
            memory.stop()
            server.close()
        rows = rows_of(Path(folder, "locust_stats.csv").read_text(encoding="utf-8"))
    about = memory.after_first_minute() | {"server_alive": alive, "users": args.users, "minutes": args.minutes}
    print(*rows, about, sep="\n")
    record.write("soak", rows, args.json, about)
    return 0


def rows_of(text: str) -> list[dict]:
    """Of Locust's table of requests, a row for each kind, and "Aggregated"."""
    return [
        {
            "request": line["Name"],
            "requests": int(line["Request Count"]),
            "failures": int(line["Failure Count"]),
            "median_ms": round(float(line["Median Response Time"])),
            "p99_ms": round(float(line["99%"])),
        }
        for line in csv.DictReader(text.splitlines())
    ]


class Memory:
    """Samples a process's resident memory, MiB, every second."""

    def __init__(self, pid: int):
        self._file = Path(f"/proc/{pid}/status")
        self.samples: list[tuple[float, float]] = []  # (seconds since the start, MiB)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        begin = time.monotonic()
        while not self._stopped.wait(1):
            found = re.search(r"VmRSS:\s+(\d+) kB", self._file.read_text())
            if found is None:
                return
            self.samples.append((time.monotonic() - begin, int(found[1]) / 1024))

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def after_first_minute(self) -> dict[str, float]:
        later = [mib for seconds, mib in self.samples if seconds >= 60]
        if not later:
            return {}
        base = later[0]
        percent = {name: round(100 * (kind(later) / base - 1), 1) for name, kind in (("least", min), ("most", max))}
        changed = {f"memory_{name}_percent": p for name, p in percent.items()}
        return {"mib_after_a_minute": round(base), **changed, "mib_every_half_minute": [round(m) for m in later[::30]]}


if __name__ == "__main__":
    sys.exit(main())
