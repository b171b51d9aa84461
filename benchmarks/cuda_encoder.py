"""The image encoder on an NVIDIA GPU at the released size, next to PyTorch.

    python -m benchmarks.cuda_encoder [--peers NAME ...] [--sizes HxW ...] [--rounds N] [--variant large]
                               [--fifth-stage BLOCKS CHANNELS] [--hidden N] [--json F]

A ConvNeXt-L with a fifth stage and a projector, random weights, in half precision; one image that lies on the GPU, to
embeds that do. Libraries take turns in processes of their own, as in `benchmarks.decode`. `error`: relative difference
of the embeds from ours. limit: the operations at the rate of a large product in half precision. depthwise: what the
depthwise convolutions take in PyTorch, and what they would take if they read and wrote as fast as a copy does.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks import record
from benchmarks.cuda_decode import device_name
from benchmarks.encoder import operations, size
from benchmarks.peers.cuda_encoders import DTYPES, PEERS, random_encoder
from benchmarks.peers.turns import Running, compared, in_turn
from export.cli import BUILD
from export.encoder import export_encoder
from train.model import ImageEncoder

SIZES = ("768x768", "1024x1024", "1536x1536")
KIND = "cuda_encoders"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda_encoder", description=__doc__.split("\n")[0])
    known = [name for name in PEERS if name != "ours"]
    parser.add_argument("--peers", nargs="*", default=known, choices=known, help="default: all")
    parser.add_argument("--sizes", nargs="+", type=size, default=[size(text) for text in SIZES], metavar="HxW")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda", choices=DTYPES, help="cpu: to try it out, small and in float32")
    parser.add_argument("--variant", default="large", help="timm's name of the ConvNeXt; default: large")
    parser.add_argument("--fifth-stage", nargs=2, type=int, default=[6, 3072], metavar="N", help="blocks and channels")
    parser.add_argument("--hidden", type=int, default=4096, metavar="N", help="width of an embed; default: 4096")
    parser.add_argument("--json", type=Path, metavar="F", help="default: benchmarks/results/cuda_encoder.json")
    args = parser.parse_args()
    BUILD.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD) as scratch:
        file = Path(scratch, "encoder.onnx")
        encoder = random_encoder(args.variant, args.fifth_stage, args.hidden)
        export_encoder(encoder, file, "fp16" if args.device == "cuda" else "fp32")
        spec = {"device": args.device, "variant": args.variant, "fifth_stage": args.fifth_stage}
        spec |= {"hidden": args.hidden, "graph": str(file)}
        workers = {name: Running(KIND, name, spec) for name in ("ours", *args.peers)}
        limits = workers["ours"].ask("limits") if args.device == "cuda" else {}
        rows = [row for at in args.sizes for row in measured(workers, args, encoder, at, limits)]
        for worker in workers.values():
            worker.close()
    record.write("cuda_encoder", rows, args.json, {"device": device_name(args.device), "limits": limits})


def measured(
    workers: dict[str, Running], args: argparse.Namespace, encoder: torch.nn.Module, at: tuple[int, int], limits: dict
) -> list[dict]:
    """A row for each peer of one size; without peers, one with ours alone."""
    height, width = at
    answers = in_turn(workers, args.rounds, "encode", height=height, width=width)
    own = answers["ours"]
    expected, rows = np.array(own[-1]["values"]), []
    limit = 1e3 * operations(encoder, height, width) / limits["product"] if limits else None
    for peer, other in list(answers.items())[1:] or [("", own)]:
        error = np.linalg.norm(np.array(other[-1]["values"]) - expected) / np.linalg.norm(expected)
        row = {"work": "encoder", "peer": peer, "batch": 1, "context": f"{height}x{width}", "metric": "ms"}
        row |= {**compared(own, other), "error": float(f"{error:.1e}")}
        if limit:
            row |= {"limit": round(limit, 2), "reached": round(limit / row["ours"], 3)}
        if peer.startswith("torch") and peer != "torch-compile":
            row["depthwise"] = round(1e3 * workers[peer].ask("depthwise", height=height, width=width)["seconds"], 2)
            if limits:
                row["depthwise_limit"] = round(1e3 * depthwise_bytes(encoder, height, width) / limits["copy"], 2)
        print(row, flush=True)
        rows.append(row)
    return rows


def depthwise_bytes(encoder: ImageEncoder, height: int, width: int) -> int:
    """What the depthwise convolutions of one image read and write in half precision, their weights aside."""
    config, total = encoder.encoder.config, 0
    for stage, (blocks, channels) in enumerate(zip(config.depths, config.widths, strict=True)):
        stride = config.patch_size * 2**stage
        total += blocks * channels * (height // stride) * (width // stride)
    return 2 * 2 * total


if __name__ == "__main__":
    main()
