"""Pages full of characters that mean nothing: the most to read per pixel, for local supervision."""

import math

import numpy as np

from train.synth import split as splits
from train.synth.degrade import degrade
from train.synth.document import Document
from train.synth.fonts import Glyphs, glyphs, nearest_size
from train.synth.page import Colour, Page

LOWER, UPPER, DIGITS = "abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "0123456789"
SIGNS = "$€£%#&@.,:;-/()+*'\"!?=_[]<>{}|~^`\\"
# (probability, (alphabet, share of the word's length) ...)
KINDS = (
    (0.30, ((LOWER, 1.0),)),
    (0.15, ((UPPER, 0.0), (LOWER, 1.0))),
    (0.10, ((UPPER, 1.0),)),
    (0.20, ((DIGITS, 1.0),)),
    (0.10, ((DIGITS, 0.6), (".,:/-", 0.0), (DIGITS, 0.4))),
    (0.15, ((LOWER + UPPER + DIGITS + 2 * SIGNS, 1.0),)),
)
_LIMITS = np.cumsum([probability for probability, _ in KINDS])
DARK = 0.12  # share of pages with light ink on dark paper


def dense_page(
    index: int, split: str, seed: int, size: tuple[int, int], min_px: int, max_px: int, strength: float = 1.0
) -> Document:
    """Page `index`, of (width, height) pixels, in lines of random strings; no questions. A function of its arguments
    alone, as `render`; the two draw from different streams. Raises ValueError for an unknown split."""
    chosen = splits.named(split)
    rng = np.random.default_rng([chosen.stream, seed, index, 1])
    dark = rng.random() < DARK
    paper, ink = _colour(rng, 200, 256), _colour(rng, 0, 90)
    if dark:
        paper, ink = _colour(rng, 0, 60), _colour(rng, 170, 256)
    page = Page.blank(*size, paper)
    y = int(rng.integers(0, min_px))
    face = chosen.faces[rng.integers(len(chosen.faces))]
    while True:
        if rng.random() < 0.4:
            face = chosen.faces[rng.integers(len(chosen.faces))]
        px = nearest_size(math.exp(rng.uniform(math.log(min_px), math.log(max_px))))
        line = glyphs(face.bold() if rng.random() < 0.3 else face, px)
        if y + line.height > page.height:
            return degrade(Document(page, "dense"), rng, strength)
        _fill_line(page, y, line, ink, rng)
        y += int(line.height * rng.uniform(0.85, 1.5)) + 1


def _fill_line(page: Page, y: int, line: Glyphs, ink: Colour, rng: np.random.Generator) -> None:
    x = int(rng.integers(0, page.width // 3))
    while True:
        word = _word(rng)
        if x + line.width(word) > page.width:
            return
        x = int(page.text(x, y, word, line, ink).x1 + line.size * rng.uniform(0.25, 0.8))
        if rng.random() < 0.1:
            x += int(rng.integers(0, page.width // 2))


def _word(rng: np.random.Generator) -> str:
    length = int(rng.integers(2, 10))
    _, parts = KINDS[int(np.searchsorted(_LIMITS, rng.random() * _LIMITS[-1]))]
    word = ""
    for alphabet, share in parts:
        count = max(1, round(length * share))
        word += "".join(alphabet[at] for at in rng.integers(0, len(alphabet), count))
    return word


def _colour(rng: np.random.Generator, low: int, high: int) -> Colour:
    return tuple(int(value) for value in rng.integers(low, high, 3))
