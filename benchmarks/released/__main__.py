"""The released size, ConvLLaVA-7B of random weights: through this project and through what a user would take instead.

    python -m benchmarks.released [--layers N] [--work NAME ...] [--peers NAME ...] [--tokens N ...] [--contexts N ...]
                                  [--res N] [--rounds N] [--threads N] [--folder DIR] [--json F]
    python -m benchmarks.released checkpoint --out DIR [--layers N] [--kv-heads N] [--bin]

checkpoint: write one in the released layout; 13.5 GB in float16 with all 32 layers, and 1.3 GB for the encoder.

Without it, checkpoint, bundles and what peers make of them are made in --folder and stay there for the next run; each
peer then takes turns with ours (`benchmarks.decode` says how), while no other peer is in memory.
export: from the checkpoint to files; ours with encoder and comparisons with PyTorch, llama.cpp's the language model.
load: from the start of a process until it can be asked. encoder: one image. prefill: so many image embeddings to the
first token. decode: greedy steps after so many positions. first_token: a new image from its file, against the fastest
encoder before the fastest decoder of the others.
limit: what the machine allows at best, measured in the same run; `reached` is our share of it.
"""

import argparse
import os
from pathlib import Path

from benchmarks import record
from benchmarks.released.checkpoint import Shape, write_checkpoint
from benchmarks.released.rows import PEERS, WORKS
from export.cli import BUILD
from runtime.command import run


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.released", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", metavar="checkpoint")
    add_checkpoint(commands.add_parser("checkpoint", help="write a random checkpoint in the released layout"))
    add_comparison(parser)
    args = parser.parse_args(argv)
    return args.run(args)


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--layers", type=int, default=Shape.layers, metavar="N", help="of 32 (default)")
    parser.add_argument(
        "--kv-heads",
        type=int,
        default=Shape.kv_heads,
        choices=(1, 2, 4, 8, 16, 32),
        help="default: 32, as Vicuna has; fewer: grouped-query attention",
    )
    parser.add_argument("--bin", action="store_true", help="shards as torch.save writes them, not .safetensors")
    parser.set_defaults(run=checkpoint)


def checkpoint(args: argparse.Namespace) -> int:
    write_checkpoint(args.out, Shape(layers=args.layers, kv_heads=args.kv_heads), args.bin)
    print(args.out)
    return 0


def add_comparison(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", type=int, default=Shape.layers, metavar="N", help="of 32 (default)")
    parser.add_argument("--work", nargs="+", default=WORKS, choices=WORKS, help="default: all")
    parser.add_argument("--peers", nargs="*", default=PEERS, choices=PEERS, help="default: all")
    parser.add_argument("--tokens", nargs="*", type=int, default=[640], metavar="N", help="to prefill; default: 640")
    parser.add_argument(
        "--contexts", nargs="*", type=int, default=[128, 640, 2048], metavar="N", help="default: 128 640 2048"
    )
    parser.add_argument("--res", type=int, default=Shape.resolution, help="side of the image, pixels; default: 1536")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--folder", type=Path, metavar="DIR", help="default: build/released-LAYERS")
    parser.add_argument("--json", type=Path, metavar="F", help="default: benchmarks/results/released.json")
    parser.set_defaults(run=comparison)


def comparison(args: argparse.Namespace) -> int:
    from benchmarks.released.compare import Comparison, Plan  # PyTorch and the exporters, which a checkpoint needs less

    folder = args.folder or BUILD / f"released-{args.layers}"
    folder.mkdir(parents=True, exist_ok=True)
    plan = Plan(
        folder, args.layers, args.res, args.work, args.peers, args.tokens, args.contexts, args.rounds, args.threads
    )
    compared = Comparison(plan)
    about = compared.run()
    record.write("released", compared.rows, args.json, about)
    return 0


if __name__ == "__main__":
    run(main)
