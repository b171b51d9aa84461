"""The image encoder through this project's runtime and through what a user would take instead, side by side.

    python -m benchmarks.encoder [--bundle DIR] [--checkpoint ID] [--peers NAME ...] [--sizes HxW ...] [--rounds N]
                                 [--threads N] [--json F]

One image, float32, from pixel values to image embeds; see `benchmarks.decode` for how libraries take turns. `error` is
the relative difference of the embeds from ours. limit: the operations of convolutions and products at the speed of a
large float32 product.
"""

import argparse
import os
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import record
from benchmarks.limits import matmul_rate
from benchmarks.peers.encoders import PEERS
from benchmarks.peers.turns import add_model_options, compared, in_turn, installed, open_model, start_peer
from export.bundle import export_bundle
from export.cli import BUILD, name_of
from runtime.bundle.manifest import open_bundle
from runtime.bundle.verify import MANIFEST
from train.model import load_image_encoder

# ascending, as what a library has taken once it may keep
SIZES = ("256x1024", "512x512", "768x768", "512x2048", "1024x1024", "768x3072", "1536x1536", "2048x2048")
KIND = "encoders"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.encoder", description=__doc__.split("\n")[0])
    known = [name for name in PEERS if name != "ours"]
    add_model_options(parser, "the checkpoint's in build/, made where it is not there")
    parser.add_argument("--peers", nargs="*", default=known, choices=known, help="default: all that are installed")
    parser.add_argument("--sizes", nargs="+", type=size, default=[size(text) for text in SIZES], metavar="HxW")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, metavar="F", help="default: benchmarks/results/encoder.json")
    args = parser.parse_args()
    checkpoint, bundle = open_model(parser, args)
    if bundle is None:
        folder = BUILD / "bundle" / name_of(checkpoint)
        if not (folder / MANIFEST).is_file():
            export_bundle(checkpoint, folder, checkpoint.resolution)
        bundle = open_bundle(folder)
    if not (graph := bundle.encoder_file("fp32")):
        parser.error(f"{bundle.folder} has no float32 encoder, which this compares; export one with --precision fp32")
    rate = matmul_rate(args.threads)
    spec = {"graph": str(bundle.path(graph)), "stride": bundle.encoder.stride, "threads": args.threads}
    spec["checkpoint"] = str(checkpoint.folder)
    workers = {name: start_peer(KIND, name, spec) for name in ("ours", *installed(parser, args.peers))}
    encoder = load_image_encoder(checkpoint).eval()
    rows = []
    for height, width in args.sizes:
        limit = 1e3 * operations(encoder, height, width) / (rate * 1e9)
        found = rows_of(in_turn(workers, args.rounds, "encode", height=height, width=width), height, width, limit)
        print(*found, sep="\n", flush=True)
        rows += found
    for worker in workers.values():
        worker.close()
    about = {"threads": args.threads, "limits": {"matmul_gflop_per_s": round(rate, 1)}}
    record.write("encoder", rows, args.json, about)


def size(text: str) -> tuple[int, int]:
    """(height, width) of "1536x1024"."""
    height, _, width = text.partition("x")
    return int(height), int(width)


def operations(encoder: torch.nn.Module, height: int, width: int) -> int:
    """Multiplications and additions of one image's convolutions and products."""
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        encoder.to("meta")(torch.empty(1, 3, height, width, device="meta"))
    return counter.get_total_flops()


def rows_of(answers: dict[str, list[dict]], height: int, width: int, limit: float) -> list[dict]:
    """A row for each peer of one size."""
    own = answers.pop("ours")
    expected = np.array(own[-1]["values"])
    rows = []
    for peer, other in answers.items():
        error = np.linalg.norm(np.array(other[-1]["values"]) - expected) / np.linalg.norm(expected)
        row = {"work": "encoder", "peer": peer, "precision": "fp32", "batch": 1, "context": f"{height}x{width}"}
        row |= {"metric": "ms", **compared(own, other), "error": float(f"{error:.1e}"), "limit": round(limit, 1)}
        rows.append(row | {"reached": round(limit / row["ours"], 3)})
    return rows


if __name__ == "__main__":
    main()
