"""Checkpoint -> decoder graph, compared with PyTorch.

python -m export.decoder [--checkpoint DIR] [--precision fp32|fp16|int8|int4|w4a16] [--graph fused|portable]
                         [--capacity N] [--check full|none] [--out DIR]
"""

import argparse
from dataclasses import replace
from pathlib import Path

from export.bundle_writer import move_graph, partial_folder
from export.cli import BUILD, CHECK_HELP, NOTHING_COMPARED, check_comparison, name_of, open_checkpoint
from export.decoder.check import check_decoder
from export.decoder.export import CAPACITY_HELP, PRECISIONS, check_options, export_decoder
from export.estimate import Job, Sizes, require_room
from export.parity import ParityError, report
from runtime.command import run
from train.model import check_finite


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m export.decoder", description="Export the decoder to ONNX.")
    parser.add_argument("--checkpoint", help="folder or Hub id in the released layout; default: the demo model")
    parser.add_argument("--precision", default="fp32", help=f"one of {', '.join(PRECISIONS)}; default: fp32")
    parser.add_argument("--graph", default="fused", help="fused (ONNX Runtime) or portable (standard operators)")
    parser.add_argument("--capacity", type=int, metavar="N", help=CAPACITY_HELP)
    parser.add_argument("--check", default="full", help=CHECK_HELP)
    parser.add_argument(
        "--out", type=Path, help="folder for the graph; default: build/decoder/<checkpoint>-<precision>"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    check_options(args.precision, args.graph, args.capacity)
    check_comparison(args.check)
    checkpoint = open_checkpoint(args.checkpoint)
    out = args.out or BUILD / "decoder" / f"{name_of(checkpoint)}-{args.precision}"
    part = "decoder" if args.graph == "fused" else "portable"
    job = replace(Job(checkpoint.resolution, check=args.check), **{part: args.precision})
    room = require_room(Sizes.of(checkpoint), job, out, {"decoder": "--precision"})
    check_finite(checkpoint.language_tensors())
    print(room, flush=True)
    with partial_folder(out) as partial:
        file = export_decoder(checkpoint, partial, args.precision, args.graph, args.capacity)
        if args.check == "none":
            print(NOTHING_COMPARED)
        elif not report(check_decoder(checkpoint, file, args.precision, args.graph)):
            raise ParityError("the exported graph does not compute what the checkpoint does; nothing was written")
        size = sum(written.stat().st_size for written in partial.iterdir())
        move_graph(partial, out, file.name)
    print(f"{out / file.name}: {args.graph} {args.precision}, {size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    run(main)
