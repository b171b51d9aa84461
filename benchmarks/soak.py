"""Servers for half an hour under what `benchmarks/locustfile.py` sends, by OpenAI's client under Locust, with faults.

    python -m benchmarks.soak [--bundle DIR] [--minutes M] [--users N] [--json F]

The cache folder (XDG_CACHE_HOME) is on a full disk all the time. One phase after another:

load: `python -m runtime.serve`, two thirds of the minutes. Its memory is sampled every second; its slope is that of a
least-squares line after the first WARM_UP of the phase, over the rest of it, in per cent of where the line begins.
SIGTERM: the same server is told to stop in mid-load. What it has begun must be answered within --stop-timeout, new
requests are refused: asked for.
replicas: two on Ray Serve, one of which is killed every KILL_EVERY_S. A stream that has begun on it may end with the
error `crash`: asked for. Everything else is answered by the other.

Locust lives in an environment of its own (`make peers`).
"""

import argparse
import contextlib
import json
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from benchmarks import record
from benchmarks.serve import ROOT, Server
from export.cli import BUILD

LOCUST = BUILD / "peers" / "locust" / "bin" / "locust"
PAGES = 12
IMAGE_CACHE_BYTES = 32 << 20  # those pages of the demo model and as many others: full after the warm-up
SHARES = {"load": 0.66, "SIGTERM": 0.07, "replicas": 0.27}  # of the minutes
WARM_UP = 0.2  # of the load
KILL_EVERY_S = 60
STOP_TIMEOUT_S = 30  # the server's default
DRAIN_S = 330  # a request may take 300
AT_ONCE_S = 1  # a request begun so shortly before SIGTERM may not have reached the server
NO_CONNECTION = (
    "APIConnectionError",
    "RemoteProtocolError",
    "ReadError",
    "ConnectionRefusedError",
    "ConnectionResetError",
)
REPLICA = "SERVE_REPLICA::default#Replica#"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__.split("\n")[0])
    parser.add_argument("--bundle", help="default: the demo model's")
    parser.add_argument("--minutes", type=float, default=30.0, metavar="M", help="default: %(default)g")
    parser.add_argument("--users", type=int, default=6, metavar="N", help="clients at once; default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="F", help="default: benchmarks/results/soak.json")
    args = parser.parse_args()
    if not LOCUST.is_file():
        print("error: no Locust here: `make peers` installs it", file=sys.stderr)
        return 2
    seconds = {phase: 60 * args.minutes * share for phase, share in SHARES.items()}
    with tempfile.TemporaryDirectory() as name, full_disk(Path(name, "cache")) as cache_is:
        locust = Locust(Path(name), args.users)
        server = Server(args.bundle, 8, "--image-cache-bytes", IMAGE_CACHE_BYTES)
        try:
            memory = Memory(server.pid)
            loaded = locust.run("load", server.url, seconds["load"])
            memory.stop()
            about = {"users": args.users, "minutes": args.minutes, "server_alive": server.alive}
            about["unfinished_after_load"] = unfinished(server.url)
            stopped, stopping = terminate(locust, server, seconds["SIGTERM"])
        finally:
            server.close()
        killed, kills = kill_replicas(locust, args.bundle, seconds["replicas"])
    about |= stopping | {"replicas_killed": kills, "cache_folder": cache_is}
    rows = [phase_row("load", loaded), phase_row("SIGTERM", stopped), phase_row("replicas", killed)]
    kinds = [
        {"request": kind} | phase_row("load", [line for line in loaded if line["name"] == kind])
        for kind in sorted({line["name"] for line in loaded})
    ]
    about |= {"memory": memory.rows(), "mib_every_half_minute": memory.samples["RssAnon"][::30]}
    print(*rows, *kinds, about, sep="\n")
    record.write("soak", rows, args.json, about | {"kinds": kinds})
    return 0


@contextlib.contextmanager
def full_disk(folder: Path) -> Iterator[str]:
    """Makes `folder` the cache folder of this process and of those it starts. It yields what the folder is."""
    folder.mkdir()
    os.environ["XDG_CACHE_HOME"] = str(folder)
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode:
        folder.rmdir()
        folder.write_bytes(b"")
        yield "a file, for a full disk takes the right to mount one"
        return
    try:
        with contextlib.suppress(OSError), (folder / "full").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        yield "a full disk (tmpfs)"
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


class Locust:
    """`benchmarks/locustfile.py`, with the same pages in each run."""

    def __init__(self, folder: Path, users: int):
        options = ["--pages", str(PAGES), "--split", "test", "--preset", "page-1024", "--out", f"{folder}/pages"]
        subprocess.run([sys.executable, "-m", "train.synth", *options], check=True, stdout=subprocess.DEVNULL)
        self._pages = os.pathsep.join(str(file) for file in sorted(Path(folder, "pages", "images").iterdir()))
        self._folder, self._users = folder, users

    def run(self, phase: str, url: str, seconds: float, meanwhile: Callable[[], None] = lambda: None) -> list[dict]:
        """What clients noted. meanwhile: what happens to the server once they are there."""
        log = self._folder / f"{phase}.jsonl"
        command = [LOCUST, "--headless", "--users", self._users, "--spawn-rate", self._users, "--only-summary"]
        command += ["--run-time", f"{round(seconds)}s", "--stop-timeout", DRAIN_S, "--host", url]
        environment = os.environ | {"SOAK_PAGES": self._pages, "SOAK_LOG": str(log)}
        command += ["--exit-code-on-error", 0, "--loglevel", "WARNING", "-f", "benchmarks/locustfile.py"]
        process = subprocess.Popen([*map(str, command)], cwd=ROOT, env=environment)
        try:
            meanwhile()
            if process.wait() != 0:
                raise RuntimeError(f"Locust ended with exit code {process.returncode}")
        finally:
            process.kill()
            process.wait()
        return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]


def unfinished(url: str) -> int:
    """Requests that wait or run, by the server's own metrics: clients that left must leave none behind."""
    text = urllib.request.urlopen(f"{url}/metrics", timeout=30).read().decode()
    return round(sum(map(float, re.findall(r"^convllava_(?:preparing|queue_depth|running) (\S+)", text, re.MULTILINE))))


def terminate(locust: Locust, server: Server, seconds: float) -> tuple[list[dict], dict]:
    """SIGTERM after half of the time. What clients noted, and how the server ended."""
    how: dict = {}

    def stop() -> None:
        time.sleep(seconds / 2)
        how["at"], begin = time.time(), time.monotonic()
        code = server.close()
        how.update(stop_s=round(time.monotonic() - begin, 1), stop_exit_code=code if code >= 0 else 128 - code)

    lines = locust.run("SIGTERM", server.url, seconds, stop)
    at = how.pop("at")
    return [line | {"asked_for": is_of_stop(line, at)} for line in lines], how


def is_of_stop(line: dict, at: float) -> bool:
    """Whether a request was refused as one is of a server that was told to stop then, or was given up after its time
    to stop."""
    refused = "stopping" in line["said"] or line["said"] in NO_CONNECTION
    return refused and (line["begin"] > at - AT_ONCE_S or line["begin"] + line["seconds"] >= at + STOP_TIMEOUT_S)


def kill_replicas(locust: Locust, bundle: str | None, seconds: float) -> tuple[list[dict], int]:
    """What clients noted, and how many replicas were killed."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120"}
    import ray
    from ray import serve

    from runtime.serve import ray_app

    def replicas() -> list[str]:
        names = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
        return [name for name in names if name.startswith(REPLICA)]

    kills = 0

    def kill() -> None:
        nonlocal kills
        end = time.monotonic() + seconds
        while time.monotonic() + min(KILL_EVERY_S, seconds / 2) < end:
            time.sleep(min(KILL_EVERY_S, seconds / 2))
            if len(found := replicas()) == 2:
                ray.kill(ray.get_actor(random.choice(found), namespace="serve"))
                kills += 1

    port = free_port()
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        settings = {"replicas": "2", "threads": "1"} | ({"bundle": str(Path(bundle).resolve())} if bundle else {})
        serve.run(ray_app.build(settings))
        lines = locust.run("replicas", f"http://127.0.0.1:{port}", seconds, kill)
    finally:
        serve.shutdown()
        ray.shutdown()
    return [line | {"asked_for": line["pieces"] > 0 and line["said"] == "error crash"} for line in lines], kills


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def phase_row(phase: str, lines: list[dict]) -> dict:
    """Of what clients noted (see `Attempt` in the locustfile): how many requests, which of them failed, how long those
    took that were answered as is due, and the longest time between two tokens."""
    wrong = [line for line in lines if not line["expected"]]
    asked_for = [line for line in wrong if line.get("asked_for")]
    failed = Counter(line["said"] for line in wrong if not line.get("asked_for"))
    seconds = [line["seconds"] for line in lines if line["expected"]]
    p50, p99 = np.percentile(seconds, (50, 99)) if seconds else (0, 0)
    return {
        "phase": phase,
        "requests": len(lines),
        "failures": failed.total(),
        "asked_for_failures": len(asked_for),
        "p50_s": round(float(p50), 2),
        "p99_s": round(float(p99), 2),
        "longest_gap_s": round(max((line["gap_s"] or 0 for line in lines), default=0), 2),
        "failed": dict(failed),
    }


class Memory:
    """Samples the memory of a process, and of those that it has started, MiB, every second.

    samples: RssAnon and VmRSS of the process, and RssAnon of its children together.
    """

    def __init__(self, pid: int):
        self._pid = pid
        self.samples: dict[str, list[int]] = {"RssAnon": [], "VmRSS": [], "RssAnon of its processes": []}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        while not self._stopped.wait(1):
            private, resident = (memory_of(self._pid, field) for field in ("RssAnon", "VmRSS"))
            children = sum(memory_of(pid, "RssAnon") for pid in children_of(self._pid))
            for values, mib in zip(self.samples.values(), (private, resident, children), strict=True):
                values.append(mib)

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def rows(self) -> list[dict]:
        return [
            {"memory": name, **slope(values[round(WARM_UP * len(values)) :]), "most_mib": max(values)}
            for name, values in self.samples.items()
        ]


def memory_of(pid: int, field: str) -> int:
    """MiB; 0 of a process that has ended."""
    try:
        found = re.search(rf"{field}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return round(int(found[1]) / 1024) if found else 0


def children_of(pid: int) -> list[int]:
    """Those that any thread of a process has started and that still run."""
    found: list[int] = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += map(int, file.read_text().split())
    return found


def slope(values: list[int]) -> dict:
    """Of the least-squares line through values at equal distances: where it begins and ends, and its rise over all of
    them in per cent of its begin."""
    rise, begin = np.polyfit(np.arange(len(values)), values, 1) if len(values) > 1 else (0.0, float(sum(values)))
    end = begin + rise * (len(values) - 1)
    percent = 100 * (end / begin - 1) if begin else 0.0
    return {"begin_mib": round(begin), "end_mib": round(end), "slope_percent": round(float(percent), 2)}


if __name__ == "__main__":
    sys.exit(main())
