"""From a page's file and a question to the first token, through this project and through what a user would build.

    python -m benchmarks.first_token [--bundle DIR] [--peers NAME ...] [--rounds N] [--threads N] [--json F]

A drawn page at 1536 and the demo model; see `benchmarks.decode` for how libraries take turns.

first_token: against OpenVINO and llama.cpp one after the other (our decoder in 4 bits), and PyTorch with transformers
(float32); and against ourselves, where the image has been seen before (its embeds are kept) or is held (its keys and
values are). load: from the start of the process until it can be asked.
vit-l-tiles is another comparison: ConvNeXt-L with the fifth stage on the whole page against CLIP's ViT-L/14-336 on the
page and its quarters, both of random weights in PyTorch, before the same decoder of the demo model in 4 bits.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import record
from benchmarks.peers.turns import Running, compared, in_turn, versions_of_peers, with_llama_cpp
from export.bundle import export_bundle
from export.cli import BUILD, open_checkpoint
from runtime.bundle import Bundle, open_bundle
from runtime.prompt import first_turn
from runtime.tokenizer import Tokenizer
from train.model.demo import GGUF

KIND = "chains"
PRECISIONS = {"openvino+llama.cpp": "int4", "torch+transformers": "fp32"}  # of our decoder beside them
TILED = "vit-l-tiles"
RELEASED = (768, 1024, 1536)  # resolutions of the released encoder beside the tiles
LONG_ROUNDS = 2  # of these, which take a minute each
QUESTION, ANOTHER = "What is the total?", "Who issued this document?"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first_token", description=__doc__.split("\n")[0])
    known = [*PRECISIONS, TILED]
    parser.add_argument("--bundle", metavar="DIR", help="in place of the demo model's with 4 bits, against peers of 4")
    parser.add_argument("--peers", nargs="*", default=known, choices=known, help="default: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, metavar="F", help="default: benchmarks/results/first_token.json")
    args = parser.parse_args()
    checkpoint = open_checkpoint(None)
    with tempfile.TemporaryDirectory(dir=BUILD) as folder:
        bundles = {}
        for precision in ("fp32", "int4"):
            out = Path(folder, precision)
            if precision == "int4" and args.bundle:
                out = args.bundle
            else:
                export_bundle(checkpoint, out, checkpoint.resolution, decoder_precision=precision)
            bundles[precision] = open_bundle(out)
        specs = {precision: spec_of(bundle, page(Path(folder)), args.threads) for precision, bundle in bundles.items()}
        for spec in specs.values():
            spec |= {"gguf": str(BUILD / "smollm2" / GGUF), "checkpoint": str(checkpoint.folder)}
        rows = beside_peers(specs, args)
        if TILED in args.peers:
            rows += beside_tiles(specs["int4"])
    record.write("first_token", rows, args.json, {"threads": args.threads, "versions_of_peers": versions_of_peers()})


def page(folder: Path) -> Path:
    """A drawn document, made once in `folder`."""
    out = folder / "page"
    if not out.is_dir():
        options = ["--pages", "1", "--split", "test", "--preset", "page-1536", "--out", str(out)]
        subprocess.run([sys.executable, "-m", "train.data.documents", *options], check=True, stdout=subprocess.DEVNULL)
    return next((out / "images").iterdir())


def spec_of(bundle: Bundle, image: Path, threads: int) -> dict:
    """What every worker is told of the work."""
    tokenizer = Tokenizer(bundle.path(bundle.tokenizer["file"]), bundle.tokenizer)
    ids = tokenizer.encode_prompt(first_turn(bundle.prompt, QUESTION, 1), [1])
    at, rule = ids.index(-1), bundle.image
    visual = (rule.resolution // bundle.encoder.stride) ** 2
    return {
        "bundle": str(bundle.folder),
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


def beside_peers(specs: dict[str, dict], args: argparse.Namespace) -> list[dict]:
    """Rows of `load` and `first_token`."""
    rows = []
    for peer in [name for name in args.peers if name != TILED]:
        precision = PRECISIONS[peer]
        spec, start = specs[precision], with_llama_cpp if "llama.cpp" in peer else Running
        workers, starts = {}, {"ours": [], peer: []}
        for _ in range(args.rounds + 1):  # the first one fills the page cache
            for name, taken in starts.items():
                if name in workers:
                    workers[name].close()
                if (worker := (Running if name == "ours" else start)(KIND, name, spec)) is None:
                    break
                workers[name] = worker
                taken.append(worker.start)
        if peer not in workers:
            workers["ours"].close()
            continue
        row = {"peer": peer, "precision": precision, "batch": 1}
        compared_starts = compared(starts["ours"][1:], starts[peer][1:])
        rows.append(row | {"work": "load", "image": "", "context": "", "metric": "ms", "same": "", **compared_starts})
        answers = in_turn(workers, args.rounds, "first_token")
        rows.append(row_of(row | {"image": "new"}, answers["ours"], answers[peer]))
        workers[peer].close()
        if precision == "int4":
            for image in ("seen", "held"):
                again = in_turn({"ours": workers["ours"]}, args.rounds, "first_token", image=image)["ours"]
                row = {"peer": "ours, the image new", "precision": precision, "batch": 1, "image": image}
                rows.append(row_of(row, again, answers["ours"]))
        workers["ours"].close()
        print(*rows, sep="\n", flush=True)
    return rows


def beside_tiles(spec: dict) -> list[dict]:
    """Rows of the released encoder at several resolutions against the tiles."""
    workers = {str(side): Running(KIND, "convnext-l", spec | {"resolution": side}) for side in RELEASED}
    tiles = Running(KIND, TILED, spec | {"capacity": 4096})
    answers = in_turn(workers | {TILED: tiles}, LONG_ROUNDS, "first_token")
    rows = []
    for side, worker in workers.items():
        row = {"peer": TILED, "precision": "int4", "batch": 1, "image": f"new, ConvNeXt-L at {side}"}
        rows.append(row_of(row, answers[side], answers[TILED]) | {"same": ""})
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
