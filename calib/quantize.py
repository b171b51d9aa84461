"""Bundle -> bundle with a quantized encoder or decoder.

    python -m calib.quantize --bundle DIR --data FOLDER|dataset.json --out DIR [--precision int8|fp8]
                             [--method mse|minmax|percentile] [--samples N] [--budget B]
    python -m calib.quantize --part decoder --bundle DIR --data FOLDER|dataset.json --out DIR [--precision int4|int8]
                             [--method q4_1|rtn|gptq] [--samples N]

The encoder gets explicit Q/DQ nodes (`calib.qdq`), for ONNX Runtime, OpenVINO and TensorRT alike; the float32 graph
stays in the bundle beside it. With --budget the most sensitive layers stay in higher precision (`calib.sensitivity`),
as few as bring the loss within it. Of the decoder, in float32 or float16, only the weights are rounded
(`calib.decoder`). The report in calib/ of the new bundle says what is lost against float32. Both parts are looked at a
block or layer at a time, so that memory does not grow with their depth.
"""

import argparse
import sys
from pathlib import Path

from calib.bundle import Outcome
from calib.decoder import DecoderOptions, quantize_decoder_bundle
from calib.encoder import EncoderOptions, quantize_encoder_bundle
from runtime.bundle.manifest import open_bundle
from runtime.command import run
from runtime.errors import UserError


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m calib.quantize", description="Quantize the encoder or decoder of a bundle."
    )
    parser.add_argument("--bundle", help="folder made by export.bundle; default: the demo model's")
    parser.add_argument("--data", type=Path, required=True, help="folder of images, or a dataset in LLaVA's JSON")
    parser.add_argument("--part", choices=["encoder", "decoder"], default="encoder", help="default: encoder")
    parser.add_argument("--precision", help="encoder: int8 (default) or fp8; decoder: int4 (default) or int8")
    parser.add_argument(
        "--method",
        help="encoder: mse (int8's default), minmax (fp8's), percentile; "
        "decoder: q4_1 (int4's default), rtn (int8's), gptq",
    )
    parser.add_argument(
        "--samples",
        type=int,
        metavar="N",
        help="images or, for gptq, prompts to calibrate on, whose number its time grows with; default: 64, gptq 128",
    )
    parser.add_argument(
        "--questions",
        type=int,
        metavar="N",
        help="to measure losses on; 0: the encoder's SQNR alone; default: 200 with --budget, else those about 8 images "
        "(of a decoder in float16: none)",
    )
    parser.add_argument("--budget", type=float, metavar="B", help="points of ANLS, or else %% of next tokens, to lose")
    parser.add_argument("--depthwise", action="store_true", help="quantize depthwise convolutions too")
    parser.add_argument("--cache", type=Path, metavar="FILE", help="keep the ranges, for another method")
    parser.add_argument("--out", type=Path, required=True, help="the new bundle's folder")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    names = ("precision", "method", "samples", "questions")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.part == "encoder":
        options = EncoderOptions(**given, budget=args.budget, depthwise=args.depthwise, cache=args.cache)
        bundle = open_bundle(args.bundle)
        outcome = quantize_encoder_bundle(bundle, args.out, args.data, options)
        file = args.out / "encoder" / f"{options.precision}.onnx"
    else:
        for name in ("budget", "depthwise", "cache"):
            value = getattr(args, name)
            if value is not None and value is not False:  # a budget of 0 is one
                raise UserError(f"--{name} is for --part encoder")
        options = DecoderOptions(**given)
        bundle = open_bundle(args.bundle)
        outcome = quantize_decoder_bundle(bundle, args.out, args.data, options)
        file = args.out / bundle.decoder.file
    for warning in outcome.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    size = sum(path.stat().st_size for path in file.parent.glob(f"{file.name}*")) / 1e6
    use = f"; for engines, ONNX Runtime goes on with {bundle.encoder.precision}" if options.precision == "fp8" else ""
    print(f"{args.out}: {args.part} {options.precision}, {size:.1f} MB{use}")
    if args.part == "encoder":
        print(f"in higher precision: {', '.join(outcome.excluded) or 'nothing'}")
    print(describe(outcome))
    return 0


def describe(outcome: Outcome) -> str:
    """The loss in one line."""
    loss = outcome.loss
    parts = [] if loss.sqnr_db is None else [f"SQNR {loss.sqnr_db:.1f} dB"]
    if loss.differing is not None:
        parts.append(f"{loss.differing:.2f} % of {outcome.tokens:,} next tokens differ from float32")
    if loss.anls is not None:
        parts.append(f"{loss.anls:.2f} points of ANLS lost")
    if loss.grounding is not None:
        parts.append(f"{loss.grounding:.2f} points of grounding accuracy lost")
    return f"{'; '.join(parts) or 'nothing was measured'} ({outcome.questions:,} questions)"


if __name__ == "__main__":
    run(main)
