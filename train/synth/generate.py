"""Documents on demand: page `index` of a split is drawn when it is asked for, the same wherever that happens."""

import math
from dataclasses import dataclass, replace

from runtime.errors import UserError
from train.synth import split as splits
from train.synth.content import Dice
from train.synth.degrade import degrade
from train.synth.document import Document
from train.synth.layouts import FAMILIES, Template
from train.synth.page import Page
from train.synth.questions import grounded
from train.synth.sheet import Sheet
from train.synth.style import allowed_sizes, draw_style

EVEN = {name: 1.0 for name in FAMILIES if name != "figures"}  # figures are no documents
ATTEMPTS = 8


@dataclass(frozen=True)
class SizeRange:
    """Pages of different shapes. longest: of the longer side, pixels. ratio: the most that it exceeds the other by."""

    longest: tuple[int, int]
    ratio: float = 2.0

    def draw(self, dice: Dice) -> tuple[int, int]:
        """(width, height): half of the pages square, most of the others near it, upright as often as not."""
        longest = dice.whole(*self.longest)
        style = dice.uniform(0, 1)
        most = 1.0 if style < 0.5 else min(self.ratio, 1.45) if style < 0.9 else self.ratio
        shorter = round(longest / most ** dice.uniform(0, 1))
        return (longest, shorter) if dice.chance(0.5) else (shorter, longest)


@dataclass(frozen=True)
class PageOptions:
    """What pages are drawn.

    sizes: (width, height) of pages, pixels, to choose from, or a range. min_px, max_px: of text sizes.
    families: weights by name in `FAMILIES`.
    strength: of degradation, 0 to 1. questions: the most that are kept of a page.
    """

    sizes: tuple[tuple[int, int], ...] | SizeRange = SizeRange((1400, 1536))
    min_px: int = 12
    max_px: int = 48
    families: tuple[tuple[str, float], ...] = tuple((EVEN | {"words": 0.3}).items())
    strength: float = 0.5
    questions: int = 12

    def __post_init__(self):
        unknown = [name for name, _ in self.families if name not in FAMILIES]
        if unknown:
            raise ValueError(f"unknown families {', '.join(unknown)}, expected some of {', '.join(FAMILIES)}")
        allowed_sizes(self.min_px, self.max_px)


def render(index: int, split: str, seed: int = 0, options: PageOptions = PageOptions()) -> Document:
    """Page `index` of a split: a function of its arguments alone.

    Raises ValueError for an unknown split, UserError where no question fits the page.
    """
    chosen = splits.named(split)
    rng = chosen.rng(seed, index)
    dice = Dice(rng)
    for _ in range(ATTEMPTS):
        sheet, template = _drawn(dice, chosen, options)
        asked = sheet.questions(options.questions)
        if asked:
            break
    else:
        raise UserError(f"no question fits page {index} of {split}, seed {seed}: is {options} too small for its text?")
    return _with_boxes(degrade(Document(sheet.page, template.name, asked), rng, options.strength))


def draw(template: Template, dice: Dice, size: tuple[int, int], faces: tuple, options: PageOptions) -> Sheet:
    """The template on a page of (width, height) pixels, undegraded."""
    sizes = allowed_sizes(options.min_px, options.max_px)
    # Text so small that the layout would be lost on the page is left out, within what the options allow
    large_enough = tuple(size_px for size_px in sizes if size_px >= min(sizes[-1], size[0] / template.most_ems))
    style = draw_style(dice, faces, large_enough, size[0] / template.ems, dice.chance(template.dark))
    sheet = Sheet(Page.blank(*size, style.paper), dice, style, sizes)
    template.draw(sheet)
    return sheet


def _drawn(dice: Dice, split: splits.Split, options: PageOptions) -> tuple[Sheet, Template]:
    family = _weighted(dice, options.families)
    template = dice.pick(split.templates(family))
    size = options.sizes.draw(dice) if isinstance(options.sizes, SizeRange) else dice.pick(options.sizes)
    return draw(template, dice, size, split.faces, options), template


def _weighted(dice: Dice, weights: tuple[tuple[str, float], ...]) -> str:
    at = dice.uniform(0, math.fsum(weight for _, weight in weights))
    for name, weight in weights:
        at -= weight
        if at < 0:
            return name
    return weights[-1][0]


def _with_boxes(document: Document) -> Document:
    """Answers to grounding questions, read off where degradation has left the boxes."""
    width, height = document.page.width, document.page.height
    answered = [
        replace(q, answer=grounded(q.box, width, height)) if q.kind == "ground" else q for q in document.questions
    ]
    return replace(document, questions=answered)


PRESETS = {
    # The curriculum: few large words first, then whole documents with ever smaller text
    "line-256": PageOptions(((256, 64),), 20, 36, (("words", 1.0),), strength=0.3),
    "figures-320": PageOptions(((320, 320),), 20, 48, (("figures", 1.0),), strength=0.3, questions=6),
    "figures-768": PageOptions(((768, 768),), 20, 48, (("figures", 1.0),), strength=0.3),
    "figures-1536": PageOptions(((1536, 1536),), 20, 48, (("figures", 1.0),), strength=0.3, questions=16),
    "words-256": PageOptions(((256, 256),), 24, 40, (("words", 1.0),), strength=0.3),
    "small-512": PageOptions(SizeRange((512, 512)), 20, 48, tuple((EVEN | {"words": 2.0}).items()), strength=0.4),
    "page-768": PageOptions(SizeRange((768, 768)), 16, 48, tuple((EVEN | {"words": 0.7}).items())),
    "page-1024": PageOptions(SizeRange((1024, 1024)), 14, 48, tuple((EVEN | {"words": 0.5}).items())),
    "page-1536": PageOptions(),
}
