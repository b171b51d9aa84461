"""The decoder through this project's runtime and through what a user would take instead, side by side.

    python -m benchmarks.decode [--peers NAME ...] [--contexts N ...] [--tokens N ...] [--rounds N] [--threads N]
                                [--json F]

Every library runs in a process of its own, llama.cpp in the environment that `make peers` makes. They take turns, a
round through all, so that a slow minute of the machine falls on all of them; the first round warms up. Medians are
recorded, and the median of the ratios round by round; above 1 this project is ahead. Each peer is compared with our
decoder of the same weights: float32, or 4 bits where the peer has 4. llama.cpp reads the GGUF that the demo model's
weights come from, with its usual cache in 16 bits; ours holds the same weights (`calib.blocks`) and a cache in 32.
GenAI's own 4 bits are others.

prefill: so many image embeds (ids where a library cannot begin with embeds) to the first token. decode: greedy steps
after so many ids of English; `same` counts the ids that agree with ours before the first that differs.
limit: what the machine allows at best, reading weights and cache once a step, or multiplying as fast as a large float32
product does (no limit where 4-bit weights meet inputs in 8 bits); `reached` is our share of it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import record
from benchmarks.calibration import english
from benchmarks.limits import matmul_rate, read_bandwidth
from benchmarks.peers.decoders import PEERS
from export.bundle import export_bundle
from export.cli import BUILD, open_checkpoint
from export.decoder import quietly, write_llama
from runtime.bundle import open_bundle
from runtime.tokenizer import Tokenizer
from train.model.demo import GGUF

ROOT = Path(__file__).parents[1]
FOUR_BITS = ("llama.cpp", "ort-genai")  # the others compute in float32
LLAMA_CPP = BUILD / "peers" / "llama.cpp" / "bin" / "python"
INSTALLED = LLAMA_CPP.parents[1] / ".installed"
STEPS = 32


class Running:
    """A worker process. load_s: what it took to open the weights."""

    def __init__(self, name: str, python: Path, spec: dict):
        self.name = name
        command = [str(python), "-m", "benchmarks.peers.worker", name, json.dumps(spec)]
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115  libraries chat; shown where one fails
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._said}
        self._process = subprocess.Popen(command, cwd=ROOT, text=True, **pipes)
        self.load_s = self._answer()["load_s"]

    def ask(self, work: str, **arguments) -> dict:
        self._process.stdin.write(json.dumps({"work": work, **arguments}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            self._said.seek(0)
            raise RuntimeError(f"{self.name} ended with {status}: {''.join(self._said.readlines()[-5:])}")
        return json.loads(line)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._said.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", description=__doc__.split("\n")[0])
    known = [name for name in PEERS if name != "ours"]
    parser.add_argument("--peers", nargs="*", default=known, choices=known, help="default: all")
    parser.add_argument("--contexts", nargs="*", type=int, default=[128, 640, 2048], metavar="N")
    parser.add_argument("--tokens", nargs="*", type=int, default=[144, 256, 640], metavar="N", help="to prefill")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, metavar="F", help="default: benchmarks/results/decode.json")
    args = parser.parse_args()
    checkpoint = open_checkpoint(None)
    limits = {"read_gb_per_s": read_bandwidth(args.threads), "matmul_gflop_per_s": matmul_rate(args.threads)}
    about = {"threads": args.threads, "versions_of_peers": versions()}
    about["limits"] = {key: round(value, 1) for key, value in limits.items()}
    capacity = max([*args.contexts, *args.tokens]) + STEPS + 1
    common = {"threads": args.threads, "capacity": capacity, "gguf": str(BUILD / "smollm2" / GGUF)}
    common |= {"hidden": checkpoint.llama_config.hidden_size, "checkpoint": str(checkpoint.folder)}
    with tempfile.TemporaryDirectory(dir=BUILD) as folder:
        common["folders"] = folders(checkpoint, Path(folder), args.peers)
        bundles, ours, theirs = {}, {}, {}
        for precision in sorted({precision_of(name) for name in args.peers}):
            out = Path(folder, precision)
            export_bundle(checkpoint, out, checkpoint.resolution, decoder_precision=precision)
            bundles[precision] = open_bundle(out)
        tokenizer = next(iter(bundles.values())).tokenizer
        common["ids"] = english(Tokenizer(out / tokenizer["file"], tokenizer), capacity)
        for precision, bundle in bundles.items():
            ours[precision] = Running("ours", sys.executable, common | {"bundle": str(bundle.folder)})
        for name in args.peers:
            if name != "llama.cpp":
                theirs[name] = Running(name, sys.executable, common)
            elif INSTALLED.is_file():
                theirs[name] = Running(name, LLAMA_CPP, common)
            else:
                print(f"{name} is left out: `make peers` installs it", file=sys.stderr)
        rows = measured(ours, theirs, args)
        for row in rows:
            part = bundles[row["precision"]].decoder
            file = bundles[row["precision"]].path(part.file)
            row |= limit_of(row, sum(p.stat().st_size for p in file.parent.glob(f"{file.name}*")), checkpoint, limits)
            print(row, flush=True)
        for worker in (*ours.values(), *theirs.values()):
            worker.close()
    record.write("decode", rows, args.json, about)


def precision_of(peer: str) -> str:
    return "int4" if peer in FOUR_BITS else "fp32"


def folders(checkpoint, folder: Path, peers: list[str]) -> dict[str, str]:
    """What GenAI and optimum make of the language model for themselves."""
    found, source = {}, folder / "llama"
    write_llama(checkpoint, source)
    if "optimum" in peers:
        from optimum.exporters.onnx import main_export

        options = {"task": "text-generation-with-past", "do_validation": False}
        quietly(lambda: main_export(str(source), output=folder / "optimum", **options))
        found["optimum"] = str(folder / "optimum")
    if "ort-genai" in peers:
        from onnxruntime_genai.models.builder import create_model, parse_extra_options

        out = str(folder / "ort-genai")
        arguments = ("llama", str(source), out, "int4", "cpu", str(folder / "cache"))
        quietly(lambda: create_model(*arguments, **parse_extra_options(*arguments, ["prune_lm_head=true"])))
        found["ort-genai"] = out
    return found


def measured(ours: dict[str, Running], theirs: dict[str, Running], args: argparse.Namespace) -> list[dict]:
    """A row for each piece of work and peer."""
    pieces = [("prefill", {"tokens": tokens}) for tokens in args.tokens]
    pieces += [("decode", {"context": context, "steps": STEPS}) for context in args.contexts]
    rows = []
    for work, arguments in pieces:
        workers = ours | theirs
        samples: dict[str, list[dict]] = {name: [] for name in workers}
        for _ in range(args.rounds + 1):
            for name, worker in workers.items():
                samples[name].append(worker.ask(work, **arguments))
        for peer in theirs:
            own, other = samples[precision_of(peer)], samples[peer]
            size = arguments.get("tokens") or arguments["context"]
            row = {"work": work, "peer": peer, "precision": precision_of(peer), "batch": 1, "context": size}
            seconds = [[answer["seconds"] for answer in answers[1:]] for answers in (own, other)]
            if work == "prefill":
                row |= {"metric": "ms", "same": ""}
                row |= {key: statistics.median(s) * 1000 for key, s in zip(("ours", "theirs"), seconds, strict=True)}
            else:
                row |= {"metric": "tokens/s", "same": same(own[0]["ids"], other[0]["ids"])}
                row |= {key: STEPS / statistics.median(s) for key, s in zip(("ours", "theirs"), seconds, strict=True)}
            row |= {"load_s": ours[precision_of(peer)].load_s, "peer_load_s": theirs[peer].load_s}
            row |= {"peak_mib": max(a["mib"] for a in own), "peer_peak_mib": max(a["mib"] for a in other)}
            row["ratio"] = statistics.median(t / o for o, t in zip(*seconds, strict=True))
            rows.append(row | {key: round(row[key], 2) for key in ("ours", "theirs", "ratio", "load_s", "peer_load_s")})
    return rows


def same(one: list[int], other: list[int]) -> int:
    """How many ids agree before the first that differs."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))


def limit_of(row: dict, size: int, checkpoint, limits: dict[str, float]) -> dict:
    """size: bytes of the weights, whose embeddings are the head's. The head is computed for the last position alone."""
    if row["work"] == "prefill" and row["precision"] == "int4":
        return {"limit": "", "reached": ""}
    config = checkpoint.llama_config
    if row["work"] == "decode":
        cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4 * row["context"]
        limit = limits["read_gb_per_s"] * 1e9 / (size + cache)
        return {"limit": round(limit, 1), "reached": round(row["ours"] / limit, 3)}
    width, layers, tokens = config.hidden_size, config.num_hidden_layers, row["context"]
    attended = config.num_attention_heads * config.head_dim
    matrices = width * (2 * attended + 2 * config.num_key_value_heads * config.head_dim + 3 * config.intermediate_size)
    operations = 2 * tokens * layers * (matrices + attended * tokens) + 2 * width * config.vocab_size
    limit = operations / limits["matmul_gflop_per_s"] / 1e6
    return {"limit": round(limit, 1), "reached": round(limit / row["ours"], 3)}


def versions() -> dict[str, str]:
    """Of what lives in other environments."""
    if not INSTALLED.is_file():
        return {}
    code = "import importlib.metadata as m; print(m.version('llama-cpp-python'))"
    found = subprocess.run([LLAMA_CPP, "-c", code], capture_output=True, text=True, check=True)
    return {"llama-cpp-python": found.stdout.strip()}


if __name__ == "__main__":
    main()
