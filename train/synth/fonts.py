"""The typefaces of rendered documents, and their glyphs as bitmaps that are drawn once and pasted ever after.

The font files (npm's `@fontsource` packages, SIL Open Font License) lie in `fonts/`, so that the same seed draws the
same page on every machine. `fonts.json` names package, version, licence and split of each family; the families of
`unseen` are never trained on.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ImageFont

FOLDER = Path(__file__).parent / "fonts"
SIZES = (10, 11, 12, 13, 14, 15, 16, 18, 20, 22, 24, 26, 28, 32, 36, 40, 44, 48, 56, 64, 72, 80, 96)  # pixels
SPLITS = ("seen", "unseen")


@dataclass(frozen=True)
class Face:
    """One font file: `family` and `weight` (400 regular, 700 bold)."""

    family: str
    weight: int
    file: Path

    def bold(self) -> "Face":
        """The bold face of the family, or this one where there is none."""
        file = self.file.with_name(f"{self.family}-700.woff2")
        return Face(self.family, 700, file) if file.is_file() else self


@dataclass(frozen=True)
class Glyph:
    """advance: pixels to the next glyph. left, top: where `bitmap`, [h, w] uint8, lies from pen and line's top."""

    advance: int
    left: int
    top: int
    bitmap: np.ndarray


class Glyphs:
    """The glyphs of a face at one size, drawn when first asked for."""

    def __init__(self, face: Face, size: int):
        # Basic layout: a glyph's advance depends on itself alone, so a cached one can be pasted anywhere.
        self._font = ImageFont.truetype(face.file, size, layout_engine=ImageFont.Layout.BASIC)
        ascent, descent = self._font.getmetrics()
        self.size, self.height = size, ascent + descent
        self._drawn: dict[str, Glyph] = {}

    def __getitem__(self, character: str) -> Glyph:
        glyph = self._drawn.get(character)
        if glyph is None:
            glyph = self._drawn[character] = self._draw(character)
        return glyph

    def width(self, text: str) -> int:
        """Pixels from the first pen position to the last."""
        return sum(self[character].advance for character in text)

    def _draw(self, character: str) -> Glyph:
        mask, (left, top) = self._font.getmask2(character, mode="L")
        width, height = mask.size
        bitmap = np.array(mask, dtype=np.uint8).reshape(height, width)
        return Glyph(max(1, round(self._font.getlength(character))), left, top, bitmap)


@functools.cache
def faces(split: str) -> tuple[Face, ...]:
    """Every regular face of `seen` or `unseen` families. Raises ValueError for another split."""
    if split not in SPLITS:
        raise ValueError(f"unknown font split {split!r}, expected one of {', '.join(SPLITS)}")
    rows = json.loads((FOLDER / "fonts.json").read_text(encoding="utf-8"))
    return tuple(Face(row["family"], 400, FOLDER / row["files"][0]) for row in rows if row["split"] == split)


@functools.lru_cache(maxsize=2048)  # every face at every size of the largest split
def glyphs(face: Face, size: int) -> Glyphs:
    """The cached glyphs of a face at a size in pixels per em (a cap height is about 0.7 of it)."""
    return Glyphs(face, size)


def nearest_size(size: float) -> int:
    """The nearest size of `SIZES`, of which alone glyphs are kept."""
    return min(SIZES, key=lambda known: abs(known - size))
