"""The released size: ConvLLaVA-7B, of random weights.

    python -m benchmarks.released checkpoint --out DIR [--layers N] [--kv-heads N] [--bin]

checkpoint: write one in the released layout; 13.5 GB in float16 with all 32 layers, and 1.3 GB for the encoder.
"""

import argparse
from pathlib import Path

from benchmarks.released.checkpoint import Shape, write_checkpoint
from runtime.command import run


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.released", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    add_checkpoint(commands.add_parser("checkpoint", help="write a random checkpoint in the released layout"))
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


if __name__ == "__main__":
    run(main)
