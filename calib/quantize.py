"""Bundle -> bundle whose encoder has explicit Q/DQ nodes, for ONNX Runtime, OpenVINO and TensorRT alike.

    python -m calib.quantize --bundle DIR --data FOLDER|dataset.json --precision int8|fp8 --out DIR
                             [--method minmax|entropy|percentile] [--samples N] [--budget PERCENT]

The quantised graph (`calib.qdq`) comes beside the float32 one, which stays in the bundle. With --budget the layers that
lose most are left in higher precision (`calib.sensitivity`), as few as bring the loss within it. calib/ in the new
bundle says what the encoder costs against float32.
"""

import argparse
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from tqdm import tqdm

from calib.images import LEAST, find_images, open_images, pixel_values
from calib.qdq import METHODS, PRECISIONS, calibrate, quantise
from calib.report import write_report
from calib.sensitivity import Evaluation, Step, groups_of, search, sensitivities
from runtime.bundle import MANIFEST, Bundle, open_bundle, write_bundle
from runtime.errors import UserError

SOURCE = "encoder/fp32.onnx"
REPORT = "calib"  # folder in the bundle
HELD_OUT = 12  # images that the loss is measured on


@dataclass(frozen=True)
class Options:
    """precision: int8 or fp8. method: a key of `METHODS`. samples: images to calibrate on, of those there are.

    budget: next tokens that may differ from the float32 encoder's, %; None quantises everything.
    Raises UserError for a value that cannot be.
    """

    precision: str = "int8"
    method: str = "minmax"
    samples: int = 64
    budget: float | None = None

    def __post_init__(self):
        if self.precision not in PRECISIONS:
            raise UserError(f"unknown --precision {self.precision!r}, expected {' or '.join(PRECISIONS)}")
        if self.method not in METHODS:
            raise UserError(f"unknown --method {self.method!r}, expected one of {', '.join(METHODS)}")
        if self.samples < LEAST:
            raise UserError(f"--samples is {self.samples}, expected {LEAST} or more")
        if self.budget is not None and not 0 <= self.budget <= 100:
            raise UserError(f"--budget is {self.budget}, expected 0 to 100 % of next tokens")
        if self.budget is not None and self.precision == "fp8":
            raise UserError("--budget is for int8: ONNX Runtime's CPU provider, which measures the loss, has no FP8")


def quantise_bundle(bundle: Bundle, out: Path, data: Path, options: Options) -> tuple[list[str], Step | None]:
    """Write a bundle like `bundle`, with a quantised encoder beside the float32 one.

    INT8 becomes the encoder that the runtime takes by itself; FP8 is for TensorRT alone, and float32 stays the one.
    Returns (warnings, what is left in higher precision and what the rest costs; None for FP8).
    Raises UserError where the bundle has no float32 encoder, and as `find_images`, `open_images` and `calibrate`.
    """
    if SOURCE not in bundle.files:
        raise UserError(f"{bundle.folder} has no {SOURCE} to quantise; export it with --precision fp32")
    if out.resolve() == bundle.folder.resolve():
        raise UserError(f"--out {out} is the bundle itself, whose engines would be lost; choose another")
    source, precision = bundle.path(SOURCE), options.precision
    images = open_images(find_images(data, options.samples + HELD_OUT))
    calibration, evaluation = split(images)
    feeds = tqdm(pixel_values(calibration, bundle.image), "calibrating", len(calibration), unit="image", disable=None)
    ranges, warnings = calibrate(source, feeds, options.method)
    manifest = json.loads((bundle.folder / MANIFEST).read_text(encoding="utf-8"))
    sections = {name: manifest[name] for name in ("image", "prompt", "tokenizer", "encoder", "decoder")}
    noise, steps = {}, []
    if precision == "int8":
        measured = Evaluation(bundle, source, list(pixel_values(evaluation or calibration[:HELD_OUT], bundle.image)))
        groups = groups_of(onnx.load(str(source), load_external_data=False).graph)
        if options.budget is not None:
            noise = sensitivities(source, ranges, precision, groups, measured)
        budget = 100.0 if options.budget is None else options.budget  # 100 % takes the first step there is
        steps = search(source, ranges, precision, groups, noise, measured, budget)
        sections["encoder"] |= {"file": f"encoder/{precision}.onnx", "precision": precision}

    def fill(folder: Path) -> dict[str, Any]:
        for name in bundle.files:
            if not name.startswith(f"{REPORT}/"):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(bundle.path(name), folder / name)  # not linked: onnx refuses linked weights
        left = {node for group in groups if group.name in steps[-1].left for node in group.nodes} if steps else ()
        quantise(source, folder / "encoder" / f"{precision}.onnx", ranges, precision, left)
        if steps:
            about = {
                "precision": precision,
                "method": options.method,
                "budget": options.budget,
                "calibration_images": len(calibration),
                "evaluation_images": len(evaluation or calibration[:HELD_OUT]),
                "held_out": bool(evaluation),
            }
            write_report(folder / REPORT, about, noise, steps)
        return sections

    write_bundle(out, fill, bundle.name, manifest["producers"])
    return warnings, steps[-1] if steps else None


def split(images: list) -> tuple[list, list]:
    """(images to calibrate on, others to evaluate on, evenly spread; none where too few would be left to calibrate)."""
    if len(images) < LEAST + HELD_OUT:
        return images, []
    held = {round(i) for i in np.linspace(0, len(images) - 1, HELD_OUT)}
    return [x for i, x in enumerate(images) if i not in held], [images[i] for i in sorted(held)]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m calib.quantize", description=__doc__.split("\n")[0])
    parser.add_argument("--bundle", help="folder made by export.bundle; default: the demo model's")
    parser.add_argument("--data", type=Path, required=True, help="folder of images, or a dataset in LLaVA's JSON")
    parser.add_argument("--precision", default="int8", help="int8 (default), or fp8 for TensorRT")
    parser.add_argument("--method", default="minmax", help="of ranges: minmax (default), entropy or percentile")
    parser.add_argument("--samples", type=int, default=64, metavar="N", help="images to calibrate on; default: 64")
    parser.add_argument("--budget", type=float, metavar="PERCENT", help="next tokens that may differ from float32's")
    parser.add_argument("--out", type=Path, required=True, help="the new bundle's folder")
    args = parser.parse_args()
    options = Options(args.precision, args.method, args.samples, args.budget)
    warnings, step = quantise_bundle(open_bundle(args.bundle), args.out, args.data, options)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    size = (args.out / "encoder" / f"{args.precision}.onnx").stat().st_size / 1e6
    if step is None:
        print(f"{args.out}: encoder fp8, {size:.1f} MB; for engines, ONNX Runtime goes on with float32")
        return 0
    print(
        f"{args.out}: encoder int8, {size:.1f} MB; in higher precision: {', '.join(step.left) or 'nothing'}; SQNR "
        f"{step.loss.sqnr_db:.1f} dB, {step.loss.differing:.2f} % of next tokens differ from float32"
    )
    if args.budget is not None and step.loss.differing > args.budget:
        print(f"warning: above the budget of {args.budget} %, whatever is left", file=sys.stderr)
    return 0


def run() -> None:
    """Exit with main's status; with 2 and one line for what the user can put right."""
    try:
        sys.exit(main())
    except (UserError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    run()
