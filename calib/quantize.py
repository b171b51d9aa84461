"""Bundle -> bundle with a quantised encoder or decoder.

    python -m calib.quantize --bundle DIR --data FOLDER|dataset.json --out DIR [--precision int8|fp8]
                             [--method mse|minmax|entropy|percentile] [--samples N] [--budget B]
    python -m calib.quantize --part decoder --bundle DIR --data FOLDER|dataset.json --out DIR [--precision int4|int8]
                             [--method q4_1|rtn|gptq|awq] [--samples N]

The encoder gets explicit Q/DQ nodes (`calib.qdq`), for ONNX Runtime, OpenVINO and TensorRT alike; the float32 graph
stays in the bundle beside it. With --budget the layers that lose most are left in higher precision
(`calib.sensitivity`), as few as bring the loss within it. The decoder's weights alone are rounded (`calib.decoder`).
calib/ in the new bundle says what is lost against float32.
"""

import argparse
import json
import math
import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from tqdm import tqdm

from calib import decoder
from calib.activations import KINDS, METHODS, Activations
from calib.evaluation import Evaluation, Loss
from calib.images import HELD_OUT, LEAST, Page, calibration_pixels, find_pages, split, spread
from calib.qdq import Calibrated, measure_means
from calib.report import write_decoder_report, write_encoder_report
from calib.sensitivity import Step, depthwise_of, groups_of, measure, nested, sensitivities, settle
from export.bundle_writer import check_place, write_bundle
from export.graphs.variants import write_variants
from runtime.backends.ort_decoder import OnnxDecoder
from runtime.bundle.manifest import Bundle, open_bundle
from runtime.bundle.verify import MANIFEST
from runtime.errors import UserError

SOURCE = "encoder/fp32.onnx"
REPORT = "calib"  # folder in the bundle
FINAL_QUESTIONS = 1000  # that the loss is measured on once layers are chosen, where there are so many
QUESTIONS_PER_PAGE = 8  # in a search: an image is dear, a question about it is not
MEAN_IMAGES = 16  # that biases are corrected by
METHOD_OF = {"int8": "mse", "fp8": "minmax"}  # floating point rounds small values as well as large ones


@dataclass(frozen=True)
class Options:
    """precision: int8 or fp8. method: of `METHODS`; None takes the precision's own of `METHOD_OF`. samples: images to
    calibrate on, of those there are. questions: that losses are measured on. budget: points of ANLS that may be lost,
    or, where they cannot be told, next tokens that may differ, %; None quantises every group but the depthwise
    convolutions. depthwise: quantise these too (INT8 alone). cache: where the ranges are kept; None: beside the bundle
    while it is made.
    Raises UserError for a value that cannot be.
    """

    precision: str = "int8"
    method: str | None = None
    samples: int = 64
    questions: int = 200
    budget: float | None = None
    depthwise: bool = False
    cache: Path | None = None

    def __post_init__(self):
        if self.precision not in KINDS:
            raise UserError(f"unknown --precision {self.precision!r}, expected {' or '.join(KINDS)}")
        if self.method not in (None, *METHODS):
            raise UserError(f"unknown --method {self.method!r}, expected one of {', '.join(METHODS)}")
        if self.samples < LEAST:
            raise UserError(f"--samples is {self.samples}, expected {LEAST} or more")
        if self.questions < 1:
            raise UserError(f"--questions is {self.questions}, expected 1 or more")
        if self.budget is not None and not 0 <= self.budget <= 100:
            raise UserError(f"--budget is {self.budget}, expected 0 to 100 points")
        if self.depthwise and self.precision == "fp8":
            raise UserError("--depthwise is for int8: TensorRT has no depthwise convolution in FP8")


@dataclass(frozen=True)
class Outcome:
    """warnings: name a tensor or say that a budget is not met. loss: the final one. left: groups in higher precision.
    questions, tokens: that the loss is over."""

    warnings: list[str]
    loss: Loss
    left: tuple[str, ...]
    questions: int
    tokens: int


def quantise_bundle(bundle: Bundle, out: Path, data: Path, options: Options) -> Outcome:
    """Write a bundle like `bundle`, with a quantised encoder beside the float32 one.

    INT8 becomes the encoder that the runtime takes by itself; FP8 is for TensorRT alone, and float32 stays the one.
    Raises UserError where the bundle has no float32 encoder, and as `find_pages`, `split` and `Activations`.
    """
    check(bundle, out)
    source, precision = bundle.path(SOURCE), options.precision
    final_questions = options.questions if options.budget is None else max(options.questions, FINAL_QUESTIONS)
    calibration, held_out = split(find_pages(data), options.samples, final_questions)
    calibrated, warnings = calibrate(bundle, calibration, out, options)
    pages = held_out or spread(calibration, HELD_OUT)
    evaluation = Evaluation(bundle, for_search(pages, options.questions), options.questions)
    warnings += doubts(evaluation)
    graph = onnx.load(str(source), load_external_data=False).graph
    groups = groups_of(graph)
    always = () if options.depthwise else depthwise_of(graph, groups)
    alone, sets = {}, []

    def loss_of(left: tuple[str, ...]) -> Loss:
        return measure(calibrated, groups, left, evaluation.loss)

    if options.budget is None:
        loss = loss_of(always)
        rounds = [Step(always, loss.sqnr_db, loss)]
    else:
        alone = sensitivities(calibrated, groups, evaluation)
        sets, first = nested(calibrated, groups, always, alone, evaluation), loss_of(always)
        if held_out and final_questions > options.questions:
            evaluation = Evaluation(bundle, pages, final_questions, evaluation.answers, evaluation.model)
        rounds = settle(sets, loss_of, first, options.budget)
    left, loss = rounds[-1].left, rounds[-1].loss
    spared = [node for group in groups if group.name in left for node in group.nodes]

    def fill(folder: Path) -> dict[str, Any]:
        outdated = (f"{REPORT}/encoder-{precision}.", *([f"{REPORT}/decoder."] if precision == "int8" else []))
        sections = copy_bundle(bundle, folder, lambda name: name.startswith(outdated))
        file = folder / "encoder" / f"{precision}.onnx"
        calibrated.write(file, spared)
        if precision == "int8":
            sections["encoder"] |= {"file": f"encoder/{precision}.onnx", "precision": precision}
        about = {
            "precision": precision,
            "method": options.method or METHOD_OF[precision],
            "budget": options.budget,
            "budget_of": "points of ANLS" if loss.anls is not None else "% of next tokens that differ",
            "calibration_images": len(calibration),
            "held_out": bool(held_out),
            **measured_on(evaluation),
        }
        write_encoder_report(folder / REPORT, about, alone, sets, rounds)
        return sections

    write_bundle(out, fill, bundle.name, manifest_of(bundle)["producers"])
    if options.budget is not None and loss.budgeted > options.budget:
        warnings.append(f"{loss.budgeted:.2f} lost, above the budget of {options.budget}")
    if options.cache is None:
        kept_ranges(out, options).unlink()
    return Outcome(warnings, loss, left, evaluation.questions, evaluation.tokens)


@dataclass(frozen=True)
class DecoderOptions:
    """precision: int4 or int8. method: see `calib.decoder`; None takes the precision's own. samples: prompts that gptq
    and awq are calibrated on; None takes the method's own. questions: that losses are measured on. Raises UserError for
    a value that cannot be."""

    precision: str = "int4"
    method: str | None = None
    samples: int | None = None
    questions: int = 200

    def __post_init__(self):
        method = self.method or decoder.DEFAULTS.get(self.precision)
        decoder.check_options(self.precision, method)
        if self.samples is not None and method not in decoder.PROMPTS:
            raise UserError(f"--samples is for {' and '.join(decoder.PROMPTS)}: {method} is not calibrated on any")
        for name in ("samples", "questions"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"--{name} is {value}, expected 1 or more")


def quantise_decoder_bundle(bundle: Bundle, out: Path, data: Path, options: DecoderOptions) -> Outcome:
    """Write a bundle like `bundle`, with a decoder of 4 or 8 bits in place of the float32 one.

    The loss is that of the bundle's encoder and the new decoder together, against float32.
    Raises UserError where the bundle's decoder is not in float32, and as `quantise_bundle`.
    """
    check(bundle, out)
    part = bundle.decoder
    if part.precision != "fp32":
        raise UserError(f"{bundle.folder} has a decoder in {part.precision}; export it with --decoder-precision fp32")
    method = options.method or decoder.DEFAULTS[options.precision]
    decoder.check_source(bundle.path(part.file), method)
    samples = options.samples or decoder.PROMPTS.get(method, LEAST)
    calibration, held_out = split(find_pages(data), max(samples, LEAST), options.questions)
    pages = held_out or spread(calibration, HELD_OUT)
    evaluation = Evaluation(bundle, for_search(pages, options.questions), options.questions)
    feeds = decoder.prompts(bundle, bundle.path(SOURCE), spread(calibration, samples))
    result = []

    def fill(folder: Path) -> dict[str, Any]:
        report = f"{REPORT}/decoder."
        sections = copy_bundle(bundle, folder, lambda name: name.startswith((part.file, report)))
        file = folder / part.file
        decoder.quantise_decoder(bundle.path(part.file), file, options.precision, method, feeds)
        variants = {key: path.relative_to(folder).as_posix() for key, path in write_variants(file).items()}
        sections["decoder"] |= {"precision": options.precision, **variants}
        opened = OnnxDecoder(file, part)
        rows = {"decoder alone": evaluation.loss(decoder=opened)}
        if bundle.encoder.precision != "fp32":
            both = f"with the encoder in {bundle.encoder.precision}"
            rows[both] = evaluation.loss(bundle.path(bundle.encoder.file), opened)
        result.extend(rows.values())
        about = {
            "precision": options.precision,
            "method": method,
            "calibration_prompts": min(samples, len(calibration)) if method in decoder.PROMPTS else 0,
            "bytes": sum(path.stat().st_size for path in file.parent.glob(f"{file.name}*")),
            "held_out": bool(held_out),
            **measured_on(evaluation),
        }
        write_decoder_report(folder / REPORT, about, rows)
        return sections

    write_bundle(out, fill, bundle.name, manifest_of(bundle)["producers"])
    return Outcome(doubts(evaluation), result[-1], (), evaluation.questions, evaluation.tokens)


def measured_on(evaluation: Evaluation) -> dict[str, Any]:
    """What a report says of its questions, and of what is compared with."""
    score = evaluation.score
    return {
        "decoder_compared_with": evaluation.model.bundle.decoder.precision,
        "questions": evaluation.questions,
        "next_tokens": evaluation.tokens,
        "float32": {"perplexity": evaluation.perplexity} | ({} if score is None else vars(score)),
    }


def doubts(evaluation: Evaluation) -> list[str]:
    if evaluation.score is None or evaluation.answers:
        return []
    return ["the float32 model does not give the known answers either; next tokens are compared instead"]


def check(bundle: Bundle, out: Path) -> None:
    """Raises UserError where there is no float32 encoder to compare with, and where something other than a bundle, or
    the one that the new one is made of, is at `out`."""
    if SOURCE not in bundle.files:
        raise UserError(f"{bundle.folder} has no {SOURCE}; export it with --precision fp32")
    check_place(out)
    if out.resolve() == bundle.folder.resolve():
        raise UserError(f"--out {out} is the bundle itself, whose engines would be lost; choose another")


def calibrate(bundle: Bundle, pages: list[Page], out: Path, options: Options) -> tuple[Calibrated, list[str]]:
    """(what a Q/DQ graph is made with, warnings that name a tensor). Ranges are kept beside `out` from image to image.

    Raises UserError as `Activations`.
    """
    source = bundle.path(SOURCE)
    cache = kept_ranges(out, options)
    cache.parent.mkdir(parents=True, exist_ok=True)
    activations = Activations(source, cache)
    feeds = calibration_pixels(pages, bundle.image)
    activations.collect(tqdm(feeds, "calibrating", len(pages), unit="image", disable=None))
    ranges, warnings = activations.ranges(options.method or METHOD_OF[options.precision], options.precision)
    feeds = calibration_pixels(spread(pages, MEAN_IMAGES), bundle.image)
    feeds = tqdm(feeds, "correcting biases", min(len(pages), MEAN_IMAGES), unit="image", disable=None)
    means = measure_means(source, ranges, options.precision, feeds)
    return Calibrated(source, options.precision, ranges, means), warnings


def kept_ranges(out: Path, options: Options) -> Path:
    """Where ranges are kept from image to image; without `Options.cache` until the bundle is there."""
    out = Path(os.path.abspath(out))  # "." has no name of its own
    return options.cache or out.with_name(f"{out.name}.ranges.npz")


def for_search(pages: list[Page], questions: int) -> list[Page]:
    """Fewer pages, with several questions each where they have them."""
    mean = sum(len(page.questions) for page in pages) / len(pages)
    return spread(pages, math.ceil(questions / min(QUESTIONS_PER_PAGE, mean)))


def manifest_of(bundle: Bundle) -> dict:
    return json.loads((bundle.folder / MANIFEST).read_text(encoding="utf-8"))


def copy_bundle(bundle: Bundle, folder: Path, but: Callable[[str], bool]) -> dict[str, Any]:
    """Copy the files of a bundle, except those that `but` says; returns the manifest's sections."""
    for name in bundle.files:
        if not but(name):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle.path(name), folder / name)  # not linked: onnx refuses linked weights
    manifest = manifest_of(bundle)
    return {name: manifest[name] for name in ("image", "prompt", "tokenizer", "encoder", "decoder")}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m calib.quantize", description=__doc__.split("\n")[0])
    parser.add_argument("--bundle", help="folder made by export.bundle; default: the demo model's")
    parser.add_argument("--data", type=Path, required=True, help="folder of images, or a dataset in LLaVA's JSON")
    parser.add_argument("--part", choices=["encoder", "decoder"], default="encoder", help="default: encoder")
    parser.add_argument("--precision", help="encoder: int8 (default) or fp8; decoder: int4 (default) or int8")
    parser.add_argument(
        "--method",
        help="encoder: mse (int8's default), minmax (fp8's), entropy, percentile; "
        "decoder: q4_1 (int4's default), rtn (int8's), gptq, awq",
    )
    parser.add_argument(
        "--samples", type=int, metavar="N", help="images to calibrate on; default: 64, gptq 128, awq 16"
    )
    parser.add_argument("--questions", type=int, metavar="N", help="to measure losses on; default: 200")
    parser.add_argument("--budget", type=float, metavar="B", help="points of ANLS, or else %% of next tokens, to lose")
    parser.add_argument("--depthwise", action="store_true", help="quantise depthwise convolutions too")
    parser.add_argument("--cache", type=Path, metavar="FILE", help="keep the ranges, for another method")
    parser.add_argument("--out", type=Path, required=True, help="the new bundle's folder")
    args = parser.parse_args(argv)
    names = ("precision", "method", "samples", "questions")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    bundle = open_bundle(args.bundle)
    if args.part == "encoder":
        options = Options(**given, budget=args.budget, depthwise=args.depthwise, cache=args.cache)
        outcome = quantise_bundle(bundle, args.out, args.data, options)
        file = args.out / "encoder" / f"{options.precision}.onnx"
    else:
        for name in ("budget", "depthwise", "cache"):
            value = getattr(args, name)
            if value is not None and value is not False:  # a budget of 0 is one
                raise UserError(f"--{name} is for --part encoder")
        options = DecoderOptions(**given)
        outcome = quantise_decoder_bundle(bundle, args.out, args.data, options)
        file = args.out / bundle.decoder.file
    for warning in outcome.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    size = sum(path.stat().st_size for path in file.parent.glob(f"{file.name}*")) / 1e6
    others = f"; for engines, ONNX Runtime goes on with {bundle.encoder.precision}"
    use = others if options.precision == "fp8" else ""
    print(f"{args.out}: {args.part} {options.precision}, {size:.1f} MB{use}")
    if args.part == "encoder":
        print(f"in higher precision: {', '.join(outcome.left) or 'nothing'}")
    print(describe(outcome.loss, outcome.questions, outcome.tokens))
    return 0


def describe(loss: Loss, questions: int, tokens: int) -> str:
    """One line for people."""
    parts = [] if loss.sqnr_db is None else [f"SQNR {loss.sqnr_db:.1f} dB"]
    parts.append(f"{loss.differing:.2f} % of {tokens:,} next tokens differ from float32")
    if loss.anls is not None:
        parts.append(f"{loss.anls:.2f} points of ANLS lost")
    if loss.grounding is not None:
        parts.append(f"{loss.grounding:.2f} points of grounding accuracy lost")
    return f"{'; '.join(parts)} ({questions:,} questions)"


def run() -> None:
    """Exit with main's status; with 2 and one line for what the user can put right."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that partial folders are cleared away
    try:
        sys.exit(main())
    except (UserError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    run()
