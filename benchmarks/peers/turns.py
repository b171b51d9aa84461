"""Libraries in processes of their own, taking turns at the same work, so that a slow minute of the machine falls on all
of them."""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from benchmarks.memory import PeakMemory
from export.cli import BUILD, open_checkpoint
from runtime.bundle.manifest import Bundle, open_bundle
from train.model import Checkpoint

ROOT = Path(__file__).parents[2]
ENVIRONMENTS = BUILD / "peers"  # made by `make peers`
# peer with an environment of its own -> its package
OWN = {"llama.cpp": "llama-cpp-python", "optimum": "optimum-onnx", "ort-genai": "onnxruntime-genai"}
# what a peer's name has -> module, and the package that brings it
PACKAGES = {
    "torch": ("torch", "torch"),
    "torch-compile": ("torch", "torch"),
    "transformers": ("transformers", "transformers"),
    "transformers-bf16": ("transformers", "transformers"),
    "transformers-static": ("transformers", "transformers"),
    "openvino": ("openvino", "openvino"),
    "vit-l-tiles": ("timm", "timm"),
}


class Running:
    """A worker process. kind, name: see `benchmarks.peers.worker`.

    load_s: what it took to import the library and open the weights. start: seconds from the start of the process until
    it is ready, and its peak memory until then. Answers have two kinds of peak: `mib`, of all resident pages, and as
    `benchmarks.memory` counts them `own_mib` and `mapped_mib`.
    """

    def __init__(self, kind: str, name: str, spec: dict, python: str | Path = sys.executable):
        self.name = name
        command = [str(python), "-m", "benchmarks.peers.worker", kind, name, json.dumps(spec)]
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115  libraries chat; shown where one fails
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._said}
        begin = time.perf_counter()
        self._process = subprocess.Popen(command, cwd=ROOT, text=True, **pipes)
        loaded = self._answer()
        self.load_s = loaded.pop("load_s")
        self.start = {"seconds": time.perf_counter() - begin, **loaded}

    def ask(self, work: str, **arguments) -> dict:
        self._process.stdin.write(json.dumps({"work": work, **arguments}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict:
        with PeakMemory(self._process.pid) as memory:
            line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            self._said.seek(0)
            raise RuntimeError(f"{self.name} ended with {status}: {''.join(self._said.readlines()[-5:])}")
        own, mapped = memory.peak.own // 2**20, memory.peak.mapped // 2**20
        return json.loads(line) | {"own_mib": own, "mapped_mib": mapped}

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._said.close()


def installed(parser: argparse.ArgumentParser, names: Sequence[str]) -> list[str]:
    """Those of the peers that can take part, and a word on stderr for each that cannot. Ends the process where none is
    left."""
    found = []
    for name in names:
        if how := not_installed(name):
            print(f"{name} is left out: {how}", file=sys.stderr)
        else:
            found.append(name)
    if not found:
        parser.error("there is no peer to compare with")
    return found


def not_installed(name: str) -> str | None:
    """How to install what a peer is without; None if it is without nothing."""
    package = _lacks(name)
    return package and f"{'`make peers`' if package in OWN else f'pip install {package}'} installs it"


def _lacks(name: str) -> str | None:
    """What a peer is without; None if nothing."""
    if environment := own_environment(name):
        return None if (ENVIRONMENTS / environment / ".installed").is_file() else environment
    modules = {module: package for part, (module, package) in PACKAGES.items() if part in name.split("+")}
    return next((package for module, package in modules.items() if not _found(module)), None)


def own_environment(name: str) -> str | None:
    """The environment of its own that a peer lives in, if it has one."""
    return next((environment for environment in OWN if environment in name), None)


def interpreter(name: str) -> Path:
    """The Python of the environment that a peer lives in."""
    environment = own_environment(name)
    return ENVIRONMENTS / environment / "bin" / "python" if environment else Path(sys.executable)


def optimum_export(source: Path, out: Path, opset: int | None = None) -> None:
    """Write optimum-onnx's float32 export of the Hugging Face folder `source` into the folder `out`.

    Raises:
        RuntimeError: the export failed.
    """
    _export("optimum", "benchmarks.peers.optimum_export", source, out, *([opset] if opset else []))


def genai_export(source: Path, out: Path) -> None:
    """Write ONNX Runtime GenAI's 4-bit graph for a CPU of the Hugging Face folder `source` into the folder `out`.

    Raises:
        RuntimeError: the export failed.
    """
    _export("ort-genai", "benchmarks.peers.genai_export", source, out, "int4", "cpu")


def _export(peer: str, module: str, *arguments: object) -> None:
    done = subprocess.run([*map(str, (interpreter(peer), "-m", module, *arguments))], cwd=ROOT, capture_output=True)
    if done.returncode:
        raise RuntimeError(f"the export of {peer} failed: {done.stderr.decode(errors='replace')}")


def _found(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of what it lies in
        return False


def start_peer(kind: str, name: str, spec: dict) -> Running:
    """The worker of a peer that is `installed`, in the environment that it lives in."""
    return Running(kind, name, spec, interpreter(name))


def add_model_options(parser: argparse.ArgumentParser, what: str) -> None:
    """The options `--bundle` and `--checkpoint`."""
    parser.add_argument("--bundle", type=Path, metavar="DIR", help=f"of the same model; default: {what}")
    parser.add_argument("--checkpoint", metavar="ID", help="what peers in PyTorch load; default: the demo model's")


def open_model(parser: argparse.ArgumentParser, args: argparse.Namespace) -> tuple[Checkpoint, Bundle | None]:
    """What the options of `add_model_options` name; ends the process where the two cannot be of one model."""
    checkpoint = open_checkpoint(args.checkpoint)
    bundle = open_bundle(args.bundle) if args.bundle else None
    if bundle and bundle.encoder.hidden_size != checkpoint.llama_config.hidden_size:
        parser.error(
            f"--bundle {args.bundle}: its image embeds have {bundle.encoder.hidden_size} values, those of the "
            f"checkpoint's language model {checkpoint.llama_config.hidden_size}; name its own by --checkpoint"
        )
    return checkpoint, bundle


def versions_of_peers() -> dict[str, str]:
    """Of what lives in other environments."""
    found = {}
    for name, package in OWN.items():
        if _lacks(name) is None:
            code = f"import importlib.metadata as m; print(m.version({package!r}))"
            done = subprocess.run([interpreter(name), "-c", code], capture_output=True, text=True, check=True)
            found[package] = done.stdout.strip()
    return found


class Worker(Protocol):
    """`Running`, or what asks one."""

    def ask(self, work: str, **arguments) -> dict:
        """Do a piece of work; returns its answer."""


def in_turn(workers: Mapping[str, Worker], rounds: int, work: str, **arguments) -> dict[str, list[dict]]:
    """Each worker's answers, a round through all of them at a time, without those of a round before to warm up."""
    samples: dict[str, list[dict]] = {name: [] for name in workers}
    for _ in range(rounds + 1):
        for name, worker in workers.items():
            samples[name].append(worker.ask(work, **arguments))
    return {name: answers[1:] for name, answers in samples.items()}


def compared(own: list[dict], other: list[dict], amount: float | None = None) -> dict:
    """Columns of a row: medians of both, and how many times as fast ours is, as the median, the least and the most of
    the ratios round by round.

    own, other: answers with `seconds` and `mib`. amount: of what was done, for rates a second; None: milliseconds.
    """
    seconds = [[answer["seconds"] for answer in answers] for answers in (own, other)]
    medians = [statistics.median(taken) for taken in seconds]
    ours, theirs = (amount / m for m in medians) if amount else (1000 * m for m in medians)
    ratios = [theirs / ours for ours, theirs in zip(*seconds, strict=True)]
    return {
        "ours": round(ours, 2),
        "theirs": round(theirs, 2),
        "ratio": round(statistics.median(ratios), 2),
        "ratio_least": round(min(ratios), 2),
        "ratio_most": round(max(ratios), 2),
        "peak_mib": max(answer["mib"] for answer in own),
        "peer_peak_mib": max(answer["mib"] for answer in other),
    }


def same(one: list[int], other: list[int]) -> int:
    """How many ids agree before the first that differs."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))
