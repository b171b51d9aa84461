"""Encoder and projector -> ONNX with open batch, height and width, compared with PyTorch.

    python -m export.encoder --res 1536 [--checkpoint DIR] [--precision fp32|fp16] [--out DIR]

The graph: pixel_values [batch, 3, height, width] -> image_embeds [batch, visual_tokens, hidden], both float32 or both
float16; height and width are multiples of the stride, visual_tokens = height/stride * width/stride. Traced with
torch.export, so that the sizes stay symbolic rather than those of an example.
"""

import argparse
import shutil
import tempfile
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import torch

from export.cli import BUILD, choose_resolution, name_of, open_checkpoint
from export.parity import TOLERANCES, Difference, ParityError, compare, report
from runtime.command import run
from runtime.errors import UserError
from runtime.image.preprocess import MAX_RESOLUTION
from train.model import ImageEncoder, check_finite, load_image_encoder

OPSET = 20  # the first with Gelu as one operator
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16}
INLINE_BYTES = 1_500_000_000  # larger weights go to a file beside the graph: one protobuf holds 2 GB


def export_encoder(model: ImageEncoder, file: Path, precision: str) -> None:
    """Write `model` to `file` (and `file`.data for large weights). The model is converted in place for fp16."""
    stride, dtype = model.encoder.config.stride, PRECISIONS[precision]
    model = model.to(dtype).eval()
    # The example only fixes the rank: sizes of 1 or two equal sizes would be taken for constants
    example = torch.zeros(2, 3, 3 * stride, 4 * stride, dtype=dtype)
    side = MAX_RESOLUTION // stride
    dims = {
        0: torch.export.Dim("batch", min=1, max=1024),
        2: stride * torch.export.Dim("rows", min=1, max=side),
        3: stride * torch.export.Dim("columns", min=1, max=side),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's notices about itself
        program = torch.onnx.export(
            model,
            (example,),
            dynamo=True,
            dynamic_shapes=(dims,),
            input_names=["pixel_values"],
            output_names=["image_embeds"],
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None  # so with dynamo
    _tidy(program.model.graph)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    program.save(str(file), external_data=size > INLINE_BYTES)
    onnx.checker.check_model(str(file))


def _tidy(graph: onnx_ir.Graph) -> None:
    """Name the axes for people, and drop the trace's notes: they hold paths of the exporting machine."""
    inputs, outputs = graph.inputs[0].shape, graph.outputs[0].shape
    assert inputs is not None and outputs is not None
    channels, hidden = inputs[1], outputs[2]
    graph.inputs[0].shape = onnx_ir.Shape(["batch", channels, "height", "width"])
    graph.outputs[0].shape = onnx_ir.Shape(["batch", "visual_tokens", hidden])
    for node in graph:
        node.doc_string = None
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
            if value not in graph.outputs:
                value.shape = None  # in terms of the trace's symbols
    for value in (*graph.inputs, *graph.initializers.values()):
        value.metadata_props.clear()
    graph.metadata_props.clear()


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


def pytorch_outputs(model: ImageEncoder, inputs: list[np.ndarray]) -> list[np.ndarray]:
    """image_embeds in float32 of each input; the reference for `check_encoder`."""
    with torch.inference_mode():
        return [model(torch.from_numpy(pixels)).numpy() for pixels in inputs]


def check_encoder(
    file: Path, inputs: list[np.ndarray], references: list[np.ndarray], precision: str
) -> list[Difference]:
    """ONNX Runtime's outputs against PyTorch's in float32, a row for each size."""
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    dtype = np.float16 if precision == "fp16" else np.float32
    rows = []
    for pixels, reference in zip(inputs, references, strict=True):
        found = np.asarray(session.run(None, {"pixel_values": pixels.astype(dtype)})[0])  # [batch, tokens, hidden]
        batch, _, height, width = pixels.shape
        what = f"image_embeds {batch} x {height}x{width} {precision}: {found.shape[1]} tokens"
        rows.append(compare(what, found, reference, TOLERANCES["encoder", precision]))
    return rows


def export_checked(model: ImageEncoder, file: Path, precision: str, resolution: int) -> bool:
    """Export and compare; prints the table. Returns whether every size is within its tolerance.

    References are computed first and the model is given up before the session opens: a large encoder is held once.
    """
    inputs = parity_inputs(resolution, model.encoder.config.stride)
    references = pytorch_outputs(model, inputs)
    export_encoder(model, file, precision)
    model.to("meta")
    return report(check_encoder(file, inputs, references, precision))


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m export.encoder", description="Export the encoder and projector to ONNX."
    )
    parser.add_argument("--res", type=int, help="side of the square that must work, pixels; default: the checkpoint's")
    parser.add_argument("--checkpoint", help="folder or Hub id in the released layout; default: the demo model")
    parser.add_argument("--precision", default="fp32", help="fp32 or fp16; default: fp32")
    parser.add_argument("--out", type=Path, help="folder for the graph; default: build/encoder/<checkpoint>")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    check_precision(args.precision)
    checkpoint = open_checkpoint(args.checkpoint)
    stride = checkpoint.encoder_config.stride
    resolution = choose_resolution(args.res, checkpoint)
    check_finite(checkpoint.vision_tensors(), checkpoint.projector_tensors())
    out = args.out or BUILD / "encoder" / name_of(checkpoint)
    if out.is_file():
        raise UserError(f"--out {out} is a file, expected a folder")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".partial-") as partial:
        good = export_checked(
            load_image_encoder(checkpoint), Path(partial, f"{args.precision}.onnx"), args.precision, resolution
        )
        if good:
            for file in sorted(Path(partial).iterdir(), reverse=True):  # weights before the graph that names them
                shutil.move(file, out / file.name)
    if not good:
        raise ParityError("the exported graph does not compute what the checkpoint does; nothing was written")
    tokens = (resolution // stride) ** 2
    print(f"{out / args.precision}.onnx: {resolution}x{resolution} -> {tokens} visual tokens, opset {OPSET}")
    return 0


if __name__ == "__main__":
    run(main)
