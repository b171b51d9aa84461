"""How well a bundle reads documents: ANLS, exact match and grounding on held-out rendered pages, through the runtime.

    python -m benchmarks.accuracy --bundle DIR [--res 768 1024 1536] [--split test unseen] [--questions 1000]
                                  [--preset page-1536] [--kinds KIND ...] [--json FILE] [--png FILE]

A page is drawn once, about as large as the largest resolution, and every resolution sees the same pages and questions:
what changes is how far the runtime shrinks them. The questions of a page share its encoding and prefill. Decoding is
greedy.
"""

import argparse
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

import runtime
from benchmarks import record
from calib.metrics import anls, exact_match, iou
from runtime.text.boxes import Corners, read_boxes
from train.synth import KINDS, PRESETS, SPLITS, Document, PageOptions, Question, render
from train.synth.questions import fractions

RESOLUTIONS = (768, 1024, 1536)
PRESET = "page-1536"
MAX_NEW_TOKENS = 48  # a box takes about 22, the longest transcribed line fewer
NAME = "accuracy"
PATIENCE = 500  # pages


@dataclass(frozen=True)
class Answered:
    """One question and what the model said. box: the true one, fractions of the page, where one is asked for."""

    kind: str
    wanted: str
    said: str
    box: Corners | None = None

    @property
    def grounding(self) -> bool:
        return self.box is not None


@dataclass(frozen=True)
class Row:
    """One resolution and split. anls, exact_match: means over the questions whose answer is text. iou50: share of the
    grounding questions whose box meets the true one by at least a half. All 0 to 1, and 0 where no such question was
    asked: `questions`, of both sorts, and `grounding_questions` say how many were."""

    res: int
    visual_tokens: int
    split: str
    anls: float
    exact_match: float
    iou50: float
    questions: int
    grounding_questions: int
    anls_by_kind: dict[str, float]


def main() -> None:
    args = parse()
    model = runtime.load(args.bundle, args.threads)
    rows = []
    for split in args.split:
        for res in args.res:
            row = measure(model, res, split, args.questions, args.seed, PRESETS[args.preset], args.kinds)
            print(f"{row.res} {row.split}: ANLS {row.anls:.3f}, exact {row.exact_match:.3f}, IoU@0.5 {row.iou50:.3f}")
            rows.append(asdict(row))
    content = {"bundle": model.bundle.name, "seed": args.seed, "preset": args.preset, "kinds": args.kinds}
    file = record.write(NAME, rows, args.json, content)
    plot(rows, args.png or file.with_suffix(".png"))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__.split("\n")[0])
    parser.add_argument("--bundle", help="folder made by export.bundle; default: the demo model's")
    parser.add_argument("--res", type=int, nargs="+", default=RESOLUTIONS, metavar="N", help="sides, pixels")
    parser.add_argument("--questions", type=int, default=1000, metavar="N", help="for each resolution and split")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the pages")
    parser.add_argument("--split", nargs="+", default=["test", "unseen"], choices=sorted(SPLITS), metavar="S")
    parser.add_argument("--preset", choices=PRESETS, default=PRESET, help=f"of the pages; default: {PRESET}")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, metavar="KIND", help="of questions")
    parser.add_argument("--threads", type=int, metavar="N", help="of one operator; default: one a physical core")
    parser.add_argument("--json", type=Path, metavar="FILE", help=f"default: {record.RESULTS.name}/{NAME}.json")
    parser.add_argument("--png", type=Path, metavar="FILE", help="default: beside the JSON")
    args = parser.parse_args()
    if args.questions < 1:
        parser.error(f"argument --questions: {args.questions}, expected at least 1")
    return args


def measure(
    model: runtime.Model,
    res: int,
    split: str,
    count: int,
    seed: int,
    options: PageOptions = PRESETS[PRESET],
    kinds: Sequence[str] = KINDS,
) -> Row:
    """Ask `count` questions of some kinds about the pages of a split."""
    answered, visual_tokens = [], []
    with tqdm(total=count, desc=f"{res} {split}", unit="question") as bar:
        for document, questions in pages(split, count, seed, options, kinds):
            answers, tokens = ask(model, document, questions, res)
            answered += answers
            visual_tokens.append(tokens)
            bar.update(len(questions))
    texts = [a for a in answered if not a.grounding]
    boxes = [a for a in answered if a.grounding]
    kinds = sorted({a.kind for a in texts})
    return Row(
        res,
        round(statistics.median(visual_tokens)),
        split,
        _mean(anls(a.said, a.wanted) for a in texts),
        _mean(exact_match(a.said, a.wanted) for a in texts),
        _mean(_meets(a) for a in boxes),
        len(answered),
        len(boxes),
        {kind: _mean(anls(a.said, a.wanted) for a in texts if a.kind == kind) for kind in kinds},
    )


def pages(
    split: str, count: int, seed: int, options: PageOptions = PRESETS[PRESET], kinds: Sequence[str] = KINDS
) -> Iterator[tuple[Document, list[Question]]]:
    """Pages with questions of some kinds, `count` of these in all. Raises ValueError where the first PATIENCE pages
    have none."""
    index, wanted = 0, count
    while count > 0:
        if index == PATIENCE and count == wanted:
            raise ValueError(f"no question of kind {', '.join(kinds)} on {index} pages")
        document = render(index, split, seed, options)
        questions = [question for question in document.questions if question.kind in kinds][:count]
        if questions:
            yield document, questions
        count -= len(questions)
        index += 1


def ask(model: runtime.Model, document: Document, questions: list[Question], res: int) -> tuple[list[Answered], int]:
    """The answers, and the visual tokens of the page."""
    page = document.page
    about = model.about([Image.fromarray(page.pixels)], runtime.Options(MAX_NEW_TOKENS, resolution=res))
    answered, tokens = [], 0
    for question in questions:
        *_, last = about.ask(question.prompt)
        box = fractions(question.box, page.width, page.height) if question.kind == "ground" else None
        answered.append(Answered(question.kind, question.answer, last.result.text, box))
        tokens = last.result.visual_tokens
    return answered, tokens


def plot(rows: list[dict], file: Path) -> None:
    """ANLS and grounding over resolution, a line a split."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots(1, 2, sharex=True)
    for axis, key, title in zip(axes, ("anls", "iou50"), ("ANLS", "grounding, IoU ≥ 0.5"), strict=True):
        for split in dict.fromkeys(row["split"] for row in rows):
            points = [(row["res"], row[key]) for row in rows if row["split"] == split]
            axis.plot(*zip(*points, strict=True), marker="o", label=split)
        axis.set(title=title, xlabel="resolution, pixels", ylim=(0, 1))
        axis.grid(alpha=0.3)
    axes[0].set_xticks(sorted({row["res"] for row in rows}))
    axes[0].legend()
    figure.savefig(file, dpi=110)


def _meets(answer: Answered) -> bool:
    said = read_boxes(answer.said)
    return bool(said) and iou(said[0], answer.box) >= 0.5


def _mean(values: Iterator[float]) -> float:
    found = [float(value) for value in values]
    return round(statistics.fmean(found), 4) if found else 0.0


if __name__ == "__main__":
    main()
