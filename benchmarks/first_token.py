"""From a page's file and a question to the first token, through this project and through what a user would build.

    python -m benchmarks.first_token [--bundle DIR] [--checkpoint ID] [--peers NAME ...] [--rounds N] [--threads N]
                                     [--json F]

A drawn page at 1536 and the demo model; see `benchmarks.decode` for how libraries take turns.

first_token: against OpenVINO and llama.cpp one after the other (our decoder in 4 bits), and PyTorch with transformers
(float32); and against ourselves, beside the first of them, where the image has been seen before (its embeds are kept)
or is held (its keys and values are). With --bundle, ours is that one beside all. limit: the encoder's operations and
the prefill's, or what is left of them, at the speeds that `benchmarks.decode` says; never less than reading the
decoder's weights. loads: from the start of the process until it can be asked.
vit-l-tiles is another comparison: ConvNeXt-L with the fifth stage on the whole page against CLIP's ViT-L/14-336 on the
page and its quarters, both of random weights in PyTorch, before the same decoder of the demo model in 4 bits.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig

from benchmarks import record
from benchmarks.encoder import operations
from benchmarks.limits import DecoderFiles, machine_limits, prefill_ms
from benchmarks.peers.chains import released_encoder
from benchmarks.peers.products import gguf_files
from benchmarks.peers.turns import (
    Running,
    add_model_options,
    compared,
    in_turn,
    installed,
    open_model,
    start_peer,
    versions_of_peers,
)
from export.bundle import export_bundle
from export.cli import BUILD
from runtime.bundle.manifest import Bundle, open_bundle
from runtime.text.template import first_turn
from runtime.text.tokenizer import Tokenizer
from train.model import load_image_encoder

KIND = "chains"
PRECISIONS = {"openvino+llama.cpp": "int4", "torch+transformers": "fp32"}  # of our decoder beside them
FASTEST = "q4_0"  # of llama.cpp's formats, at prompts
TILED = "vit-l-tiles"
RELEASED = (768, 1024, 1536)  # resolutions of the released encoder beside the tiles
LONG_ROUNDS = 2  # of these, which take a minute each
QUESTION, ANOTHER = "What is the total?", "Who issued this document?"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first_token", description=__doc__.split("\n")[0])
    known = [*PRECISIONS, TILED]
    parts = sorted({part for name in PRECISIONS for part in name.split("+")})
    add_model_options(parser, "made of the checkpoint, with 4 bits and with float32")
    parser.add_argument(
        "--peers", nargs="*", default=known, choices=known + parts, help="or parts of them; default: all installed"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, metavar="F", help="default: benchmarks/results/first_token.json")
    args = parser.parse_args()
    checkpoint, bundle = open_model(parser, args)
    if bundle and not bundle.encoder_file("fp32"):
        parser.error(f"{bundle.folder} has no float32 encoder, which OpenVINO runs; export one with --precision fp32")
    asked = [name for name in known if {name, *name.split("+")} & set(args.peers)]
    args.peers = installed(parser, asked)
    limits = machine_limits(args.threads)
    with tempfile.TemporaryDirectory(dir=BUILD) as folder:
        beside = {name: bundle.decoder.precision if bundle else PRECISIONS.get(name, "int4") for name in args.peers}
        bundles = {bundle.decoder.precision: bundle} if bundle else {}
        for precision in sorted(set(beside.values()) - bundles.keys()):
            out = Path(folder, precision)
            export_bundle(checkpoint, out, checkpoint.resolution, decoder_precision=precision)
            bundles[precision] = open_bundle(out)
        image = page(Path(folder))
        common = {"checkpoint": str(checkpoint.folder)}
        if any("llama.cpp" in name for name in args.peers):
            common["gguf"] = str(gguf_files(checkpoint.folder, Path(folder), [FASTEST])[FASTEST][0])
        specs = {name: spec_of(part, image, args.threads) | common for name, part in bundles.items()}
        least = {
            name: ChainLimit(checkpoint.llama_config, DecoderFiles.of(part), limits) for name, part in bundles.items()
        }
        encoder = load_image_encoder(checkpoint)
        rows, loads = [], []
        for peer in [name for name in args.peers if name != TILED]:
            precision = beside[peer]
            encode_ms = least[precision].encode_ms(encoder, specs[precision]["resolution"])
            again = () if rows else ("seen", "held")
            load, found = beside_peer(
                peer, again, specs[precision], precision, least[precision], encode_ms, args.rounds
            )
            loads.append(load)
            rows += found
        if TILED in args.peers:
            rows += beside_tiles(specs[beside[TILED]], beside[TILED], least[beside[TILED]])
    about = {"threads": args.threads, "versions_of_peers": versions_of_peers()}
    about |= {"limits": {key: round(value, 1) for key, value in limits.items()}, "loads": loads}
    record.write("first_token", rows, args.json, about)


@dataclass(frozen=True)
class ChainLimit:
    """What the machine's limits leave of a bundle's chain."""

    config: LlamaConfig
    part: DecoderFiles
    limits: dict[str, float]

    def encode_ms(self, encoder: torch.nn.Module, side: int) -> float:
        """An encoder's operations at the speed of a float32 product."""
        return operations(encoder, side, side) / (1e6 * self.limits["matmul_gflop_per_s"])

    def row(self, prefilled: int, encode_ms: float, ours: float) -> dict:
        """Columns of a row. ours: ms."""
        limit = encode_ms + prefill_ms(self.config, prefilled, self.part, self.limits)
        return {"limit": round(limit, 1), "reached": round(limit / ours, 3)}


@dataclass(frozen=True)
class Asked:
    """A worker that is asked with some arguments each time, in turn with others."""

    worker: Running
    arguments: dict

    def ask(self, work: str) -> dict:
        return self.worker.ask(work, **self.arguments)


def page(folder: Path) -> Path:
    """A drawn document, made once in `folder`."""
    out = folder / "page"
    if not out.is_dir():
        options = ["--pages", "1", "--split", "test", "--preset", "page-1536", "--out", str(out)]
        subprocess.run([sys.executable, "-m", "train.synth", *options], check=True, stdout=subprocess.DEVNULL)
    return next((out / "images").iterdir())


def spec_of(bundle: Bundle, image: Path, threads: int) -> dict:
    """What every worker is told of the work."""
    tokenizer = Tokenizer(bundle.path(bundle.tokenizer["file"]), bundle.tokenizer, bundle.decoder.vocab_size)
    ids = tokenizer.encode_prompt(first_turn(bundle.prompt, QUESTION, 1), [1])
    at, rule = ids.index(-1), bundle.image
    visual = (rule.resolution // bundle.encoder.stride) ** 2
    return {
        "bundle": str(bundle.folder),
        "graph": str(bundle.path("encoder/fp32.onnx")),
        "image": str(image),
        "question": QUESTION,
        "another_question": ANOTHER,
        "before": ids[:at],
        "after": ids[at + 1 :],
        "resolution": rule.resolution,
        "mean": list(rule.mean),
        "std": list(rule.std),
        "hidden": bundle.encoder.hidden_size,
        "capacity": len(ids) + visual,
        "threads": threads,
    }


def beside_peer(
    peer: str, again: Sequence[str], spec: dict, precision: str, least: ChainLimit, encode_ms: float, rounds: int
) -> tuple[dict, list[dict]]:
    """A row about loading, and those about the first token, of an image that is new and such as `again` says."""
    workers, starts = {}, {"ours": [], peer: []}
    for _ in range(rounds + 1):  # the first one fills the page cache
        for name, taken in starts.items():
            if name in workers:
                workers[name].close()
            workers[name] = start_peer(KIND, name, spec)
            taken.append(workers[name].start)
    common = {"peer": peer, "precision": precision, "batch": 1}
    load = common | {"metric": "ms", **compared(starts["ours"][1:], starts[peer][1:])}
    print(load, flush=True)
    taking = {"ours": workers["ours"], peer: workers[peer]}
    taking |= {image: Asked(workers["ours"], {"image": image}) for image in again}
    answers = in_turn(taking, rounds, "first_token")
    for worker in workers.values():
        worker.close()
    own = answers["ours"]
    rows = [row_of(common | {"image": "new"}, own, answers[peer])]
    for image in again:
        rows.append(row_of(common | {"peer": "ours, the image new", "image": image}, answers[image], own))
    for row, found in zip(rows, (own, *(answers[image] for image in again)), strict=True):
        row |= least.row(found[-1]["prefilled"], encode_ms if row["image"] == "new" else 0, row["ours"])
    print(*rows, sep="\n", flush=True)
    return load, rows


def beside_tiles(spec: dict, precision: str, least: ChainLimit) -> list[dict]:
    """Rows of the released encoder at several resolutions against the tiles."""
    workers = {str(side): Running(KIND, "convnext-l", spec | {"resolution": side}) for side in RELEASED}
    tiles = Running(KIND, TILED, spec | {"capacity": 4096})
    answers = in_turn(workers | {TILED: tiles}, LONG_ROUNDS, "first_token")
    with torch.device("meta"):
        encoder = released_encoder(spec["hidden"])
    rows = []
    for side, worker in workers.items():
        row = {"peer": TILED, "precision": precision, "batch": 1, "image": f"new, ConvNeXt-L at {side}"}
        row = row_of(row, answers[side], answers[TILED]) | {"same": ""}
        prefilled = row["context"] + len(spec["before"]) + len(spec["after"])
        rows.append(row | least.row(prefilled, least.encode_ms(encoder, int(side)), row["ours"]))
        worker.close()
    tiles.close()
    print(*rows, sep="\n", flush=True)
    return rows


def row_of(row: dict, own: list[dict], other: list[dict]) -> dict:
    """encode_ms, peer_encode_ms: of the first round, until the image is encoded; context: visual tokens."""
    tokens = [answers[-1]["tokens"] for answers in (own, other)]
    encode = [round(1000 * min(answer["encode_s"] for answer in answers), 1) for answers in (own, other)]
    row |= {"work": "first_token", "context": tokens[0], "peer_context": tokens[1], "metric": "ms"}
    row |= compared(own, other) | {"encode_ms": encode[0], "peer_encode_ms": encode[1]}
    return row | {"same": "yes" if own[-1]["token"] == other[-1]["token"] else "no"}


if __name__ == "__main__":
    main()
