"""Bundle -> bundle with a quantized encoder: calibrate, choose the layers to exclude, write, report."""

import os
from dataclasses import dataclass
from pathlib import Path

import onnx
from tqdm import tqdm

from calib.activations import KINDS, METHODS, REMOVED_METHODS, Activations
from calib.bundle import REPORT, SOURCE, Outcome, check_source, copy_bundle, manifest_of
from calib.evaluation import Evaluation, Loss
from calib.images import (
    DEFAULT_QUESTIONS,
    HELD_OUT,
    LEAST,
    Page,
    asked_pages,
    calibration_pixels,
    find_pages,
    split,
    spread,
)
from calib.qdq import Calibrated, measure_means
from calib.report import write_encoder_report
from calib.sensitivity import (
    Group,
    Step,
    candidate_sets,
    depthwise_of,
    groups_of,
    measure,
    nodes_of,
    search,
    sensitivities,
)
from export.bundle_writer import new_bundle, write_manifest
from runtime.bundle.manifest import Bundle
from runtime.errors import UserError

FINAL_QUESTIONS = 1000  # that the loss is measured on once layers are chosen, where there are so many
MEAN_IMAGES = 16  # that biases are corrected by; means need fewer than extremes
DEFAULT_METHODS = {"int8": "mse", "fp8": "minmax"}  # floating point has small codes for small values: nothing to clip


@dataclass(frozen=True)
class EncoderOptions:
    """How to quantize an encoder. Raises UserError for a value that cannot be.

    Args:
        precision: int8 or fp8.
        method: of `calib.activations.METHODS`; None takes the precision's own of `DEFAULT_METHODS`.
        samples: images to calibrate on, of those there are.
        questions: to measure losses on; 0 measures SQNR alone. None: with a budget DEFAULT_QUESTIONS, without one
            those about few images, see `calib.images.asked_pages`.
        budget: points of ANLS that may be lost or, where answers are not known, % of next tokens that may differ.
            None quantizes every group but the depthwise convolutions.
        depthwise: quantize these too (INT8 alone).
        cache: file to keep the ranges in; None keeps them beside the bundle until it is made.
    """

    precision: str = "int8"
    method: str | None = None
    samples: int = 64
    questions: int | None = None
    budget: float | None = None
    depthwise: bool = False
    cache: Path | None = None

    def __post_init__(self):
        if self.precision not in KINDS:
            raise UserError(f"unknown --precision {self.precision!r}, expected {' or '.join(KINDS)}")
        if self.method in REMOVED_METHODS:
            raise UserError(f"--method {self.method} was removed: {REMOVED_METHODS[self.method]}")
        if self.method not in (None, *METHODS):
            raise UserError(f"unknown --method {self.method!r}, expected one of {', '.join(METHODS)}")
        if self.samples < LEAST:
            raise UserError(f"--samples is {self.samples}, expected {LEAST} or more")
        if self.questions is not None and self.questions < 0:
            raise UserError(f"--questions is {self.questions}, expected 0 or more")
        if self.budget is not None and not 0 <= self.budget <= 100:
            raise UserError(f"--budget is {self.budget}, expected 0 to 100 points")
        if self.budget is not None and self.questions == 0:
            raise UserError("--questions is 0, but --budget is a loss on questions; expected 1 or more")
        if self.depthwise and self.precision == "fp8":
            raise UserError("--depthwise is for int8: TensorRT has no depthwise convolution in FP8")


@dataclass(frozen=True)
class _Choice:
    """The groups kept in higher precision and how they were found, for the report."""

    alone: dict[str, Loss]
    sets: list[Step]
    rounds: list[Step]
    evaluation: Evaluation  # that the last round's loss was measured with


def quantize_encoder_bundle(bundle: Bundle, out: Path, data: Path, options: EncoderOptions) -> Outcome:
    """Write a bundle like `bundle`, with a quantized encoder beside the float32 one.

    INT8 becomes the encoder that the runtime uses by default; FP8 is for TensorRT alone, and float32 stays the default.

    Args:
        data: folder of images or dataset, see `calib.images.find_pages`.

    Raises:
        UserError: no float32 encoder in the bundle; as `find_pages`, `split` and `Activations`.
    """
    check_source(bundle, out)
    searched = options.questions if options.questions is not None else DEFAULT_QUESTIONS
    questions = searched if options.budget is None else max(searched, FINAL_QUESTIONS)
    calibration, held_out = split(find_pages(data), options.samples, questions)
    calibrated, warnings = _calibrate(bundle, calibration, out, options)
    pages = held_out or spread(calibration, HELD_OUT)
    evaluation = Evaluation(bundle, *asked_pages(pages, options.questions if options.budget is None else searched))
    warnings += evaluation.warnings()
    groups = groups_of(onnx.load(str(calibrated.source), load_external_data=False).graph)
    if options.budget is None:
        choice = _exclude_depthwise(calibrated, groups, evaluation, options)
    else:
        final_pages = pages if held_out and questions > searched else None
        choice = _exclude_by_budget(calibrated, groups, evaluation, options, final_pages)
    final = choice.rounds[-1]
    assert final.loss is not None
    about = {
        "precision": options.precision,
        "method": options.method or DEFAULT_METHODS[options.precision],
        "budget": options.budget,
        "budget_of": "points of ANLS" if final.loss.anls is not None else "% of next tokens that differ",
        "calibration_images": len(calibration),
        "held_out": bool(held_out),
        **choice.evaluation.about(),
    }
    _write_bundle(bundle, out, calibrated, nodes_of(groups, final.excluded), about, choice)
    if options.budget is not None and final.loss.budgeted > options.budget:
        warnings.append(f"{final.loss.budgeted:.2f} lost, above the budget of {options.budget}")
    if options.cache is None:
        ranges_file(out, options).unlink()
    return Outcome(warnings, final.loss, final.excluded, choice.evaluation.questions, choice.evaluation.tokens)


def _calibrate(bundle: Bundle, pages: list[Page], out: Path, options: EncoderOptions) -> tuple[Calibrated, list[str]]:
    """(what a Q/DQ graph is made with, warnings that name a tensor). Raises UserError as `Activations`."""
    source = bundle.path(SOURCE)
    cache = ranges_file(out, options)
    cache.parent.mkdir(parents=True, exist_ok=True)
    activations = Activations(source, cache)
    feeds = calibration_pixels(pages, bundle.image)
    activations.collect(tqdm(feeds, "calibrating", len(pages), unit="image", disable=None))
    ranges, warnings = activations.ranges(options.method or DEFAULT_METHODS[options.precision], options.precision)
    feeds = calibration_pixels(spread(pages, MEAN_IMAGES), bundle.image)
    feeds = tqdm(feeds, "correcting biases", min(len(pages), MEAN_IMAGES), unit="image", disable=None)
    means = measure_means(source, ranges, options.precision, feeds)
    return Calibrated(source, options.precision, ranges, means), warnings


def ranges_file(out: Path, options: EncoderOptions) -> Path:
    """Where ranges are kept from image to image, so that an interrupted calibration resumes."""
    out = Path(os.path.abspath(out))  # "." has no name of its own
    return options.cache or out.with_name(f"{out.name}.ranges.npz")


def _always_excluded(calibrated: Calibrated, groups: list[Group], options: EncoderOptions) -> tuple[str, ...]:
    graph = onnx.load(str(calibrated.source), load_external_data=False).graph
    return () if options.depthwise else depthwise_of(graph, groups)


def _exclude_depthwise(
    calibrated: Calibrated, groups: list[Group], evaluation: Evaluation, options: EncoderOptions
) -> _Choice:
    excluded = _always_excluded(calibrated, groups, options)
    loss = measure(calibrated, groups, excluded, evaluation.loss)
    assert loss.sqnr_db is not None
    return _Choice({}, [], [Step(excluded, loss.sqnr_db, loss)], evaluation)


def _exclude_by_budget(
    calibrated: Calibrated,
    groups: list[Group],
    evaluation: Evaluation,
    options: EncoderOptions,
    final_pages: list[Page] | None,
) -> _Choice:
    """final_pages: what the loss is measured on at last; None measures it on the questions of `evaluation`."""
    assert options.budget is not None
    always = _always_excluded(calibrated, groups, options)
    alone = sensitivities(calibrated, groups, evaluation)
    sets = candidate_sets(calibrated, groups, always, alone, evaluation)
    first = measure(calibrated, groups, always, evaluation.loss)
    if final_pages is not None:
        evaluation = Evaluation(
            evaluation.bundle, final_pages, FINAL_QUESTIONS, scored=evaluation.answers, model=evaluation.model
        )
    rounds = search(
        sets, lambda excluded: measure(calibrated, groups, excluded, evaluation.loss), first, options.budget
    )
    return _Choice(alone, sets, rounds, evaluation)


def _write_bundle(
    bundle: Bundle, out: Path, calibrated: Calibrated, excluded_nodes: list[str], about: dict, choice: _Choice
) -> None:
    precision = calibrated.precision
    outdated = (f"{REPORT}/encoder-{precision}.", *([f"{REPORT}/decoder."] if precision == "int8" else []))
    with new_bundle(out) as folder:
        sections = copy_bundle(bundle, folder, lambda name: name.startswith(outdated))
        file = f"encoder/{precision}.onnx"
        calibrated.write(folder / file, excluded_nodes)
        if precision == "int8":
            sections["encoder"] |= {"file": file, "precision": precision}
        write_encoder_report(folder / REPORT, about, choice.alone, choice.sets, choice.rounds)
        write_manifest(folder, bundle.name, manifest_of(bundle)["producers"], sections)
