"""Encoder and projector -> ONNX with open batch, height and width, compared with PyTorch.

    python -m export.encoder --res 1536 [--checkpoint DIR] [--precision fp32|fp16] [--check full|none] [--out DIR]

The graph: pixel_values [batch, 3, height, width] -> image_embeds [batch, visual_tokens, hidden], both float32 or both
float16; height and width are multiples of the stride, visual_tokens = height/stride * width/stride. Weights pass from
the checkpoint's mapped files to the graph's one at a time, and the comparison holds one block of either.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from tqdm import tqdm

from export.bundle_writer import move_graph, partial_folder
from export.cli import (
    BUILD,
    CHECK_HELP,
    NOTHING_COMPARED,
    check_comparison,
    choose_resolution,
    name_of,
    open_checkpoint,
)
from export.encoder_graph import OPSET, write_encoder
from export.estimate import Job, Sizes, require_room
from export.graphs.pieces import cut, open_piece, run_piece
from export.parity import TOLERANCES, Difference, ParityError, compare, report
from runtime import kernels
from runtime.command import run
from runtime.errors import UserError
from train.model import ImageEncoder, check_finite, load_image_encoder
from train.model.streamed import named_blocks, run_block

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16}
INLINE_BYTES = 200_000_000  # larger weights go to a file beside the graph, from which they can be mapped


def export_encoder(model: ImageEncoder, file: Path, precision: str) -> None:
    """Write `model` to `file` (and `file`.data for large weights), one tensor at a time.

    Args:
        model: parameters of any float type; they may be mapped files, as `load_image_encoder(checkpoint, None)` gives
            them.
    """
    dtype = PRECISIONS[precision]
    size = sum(parameter.numel() * dtype.itemsize for parameter in model.parameters())
    write_encoder(model, file, dtype, external=size > INLINE_BYTES)
    onnx.checker.check_model(str(file))


def check_precision(precision: str) -> None:
    """Raises UserError unless an encoder can be exported in `precision`."""
    if precision not in PRECISIONS:
        raise UserError(
            f"unknown precision {precision!r}, expected {' or '.join(PRECISIONS)} (int8 is made from a bundle)"
        )


def parity_inputs(resolution: int, stride: int) -> list[np.ndarray]:
    """float32 pixel_values at the resolution, an oblong size and a batch of small images."""
    half = max(resolution // 2 // stride, 1) * stride
    quarter = max(resolution // 4 // stride, 1) * stride
    random = np.random.default_rng(0)
    shapes = [(1, 3, resolution, resolution), (1, 3, quarter, half + stride), (2, 3, quarter, quarter)]
    return [random.standard_normal(shape, dtype=np.float32) for shape in shapes]


def check_encoder(file: Path, model: ImageEncoder, inputs: list[np.ndarray], precision: str) -> list[Difference]:
    """ONNX Runtime's hidden states against PyTorch's in float32, block by block: both hold one block at a time.

    Args:
        model: what the graph was made from, parameters of any float type.
        inputs: float32 pixel_values; the last one goes through the file as a whole too.

    Returns:
        A row for the block that differs most, one for the image embeddings of each input and one for the whole file;
        where a block exceeds the tolerance, a row for the first such block alone.
    """
    tolerance, dtype = TOLERANCES["encoder", precision], np.dtype(str(PRECISIONS[precision]).removeprefix("torch."))
    blocks = list(named_blocks(model))
    borders = [*(name for name, _ in blocks[:-1]), "image_embeds"]
    pieces = cut(onnx.load(str(file), load_external_data=False), borders)
    expected, found = [torch.from_numpy(pixels) for pixels in inputs], [pixels.astype(dtype) for pixels in inputs]
    worst = Difference("", -1.0, tolerance)
    bar = tqdm(zip(blocks, pieces, strict=True), "encoder: check", len(blocks), unit="block", disable=None)
    for (name, module), piece in bar:
        expected = run_block(name, module, expected)
        session = open_piece(piece, file.parent)
        for i, reference in enumerate(expected):
            found[i] = run_piece(session, found[i])
            row = compare(name, found[i], reference.numpy(), tolerance)
            if not row.ok:
                return [replace(row, what=f"first bad block: {name}")]
            worst = max(worst, row, key=lambda row: row.error)
        del session  # and what it has kept for the next run, before PyTorch computes the next block
    rows = [replace(worst, what=f"worst block: {worst.what}")]
    sizes = [f"{len(pixels)} x {pixels.shape[2]}x{pixels.shape[3]} {precision}" for pixels in inputs]
    for size, ours, theirs in zip(sizes, found, expected, strict=True):
        rows.append(compare(f"image_embeds {size}: {ours.shape[1]} tokens", ours, theirs.numpy(), tolerance))
    whole = run_piece(_open_whole(file), inputs[-1].astype(dtype))
    return [*rows, compare(f"the same, whole file {sizes[-1]}", whole, expected[-1].numpy(), tolerance)]


def check_kernels(file: Path, source: Path, pixel_values: np.ndarray) -> list[Difference]:
    """The graph with the operators of `runtime.kernels` against the float32 graph `source` that it was made from."""
    expected = run_piece(_open_whole(source), pixel_values)
    found = run_piece(_open_whole(file, kernels.library()), pixel_values)
    size = f"{len(pixel_values)} x {pixel_values.shape[2]}x{pixel_values.shape[3]}"
    return [compare(f"image_embeds by kernels {size}", found, expected, TOLERANCES["encoder", "int8"])]


def _open_whole(file: Path, operators: Path | None = None) -> onnxruntime.InferenceSession:
    """A session that maps the weights: without what would copy them to rearrange them."""
    options = onnxruntime.SessionOptions()
    if operators is not None:
        options.register_custom_ops_library(str(operators))
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m export.encoder", description="Export the encoder and projector to ONNX."
    )
    parser.add_argument("--res", type=int, help="side of the square that must work, pixels; default: the checkpoint's")
    parser.add_argument("--checkpoint", help="folder or Hub id in the released layout; default: the demo model")
    parser.add_argument("--precision", default="fp32", help="fp32 or fp16; default: fp32")
    parser.add_argument("--check", default="full", help=CHECK_HELP)
    parser.add_argument("--out", type=Path, help="folder for the graph; default: build/encoder/<checkpoint>")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    check_precision(args.precision)
    check_comparison(args.check)
    checkpoint = open_checkpoint(args.checkpoint)
    stride = checkpoint.encoder_config.stride
    resolution = choose_resolution(args.res, checkpoint)
    out = args.out or BUILD / "encoder" / name_of(checkpoint)
    if out.is_file():
        raise UserError(f"--out {out} is a file, expected a folder")
    job = Job(resolution, encoder=args.precision, check=args.check)
    room = require_room(Sizes.of(checkpoint), job, out, {"encoder": "--precision"})
    check_finite(checkpoint.vision_tensors(), checkpoint.projector_tensors())
    print(room, flush=True)
    model = load_image_encoder(checkpoint, None)
    with partial_folder(out) as partial:
        file = partial / f"{args.precision}.onnx"
        export_encoder(model, file, args.precision)
        inputs = parity_inputs(resolution, stride)
        if args.check == "none":
            print(NOTHING_COMPARED)
        elif not report(check_encoder(file, model, inputs, args.precision)):
            raise ParityError("the exported graph does not compute what the checkpoint does; nothing was written")
        move_graph(partial, out, file.name)
    tokens = (resolution // stride) ** 2
    print(f"{out / args.precision}.onnx: {resolution}x{resolution} -> {tokens} visual tokens, opset {OPSET}")
    return 0


if __name__ == "__main__":
    run(main)
