"""A page that is drawn on and remembers what it shows: every glyph's place, for local supervision and for boxes."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from train.synth.fonts import Glyphs

Colour = tuple[int, int, int]
BLACK, WHITE = (0, 0, 0), (255, 255, 255)


@dataclass(frozen=True)
class Box:
    """Pixels: left, top, right, bottom; the right and bottom edges lie outside."""

    x0: float
    y0: float
    x1: float
    y1: float

    def __or__(self, other: "Box") -> "Box":
        """The smallest box around both."""
        return Box(min(self.x0, other.x0), min(self.y0, other.y0), max(self.x1, other.x1), max(self.y1, other.y1))

    def padded(self, margin: float) -> "Box":
        return Box(self.x0 - margin, self.y0 - margin, self.x1 + margin, self.y1 + margin)

    @property
    def width(self) -> float:
        return self.x1 - self.x0

    @property
    def height(self) -> float:
        return self.y1 - self.y0


@dataclass
class Page:
    """pixels: [height, width, 3] uint8. `characters[i]` stands in the box `places[i]` = (x0, y0, x1, y1), inked pixels
    only; spaces are not listed. `words[i]` is a number that it shares with the other characters of its word."""

    pixels: np.ndarray
    characters: list[str] = field(default_factory=list)
    places: list[tuple[float, float, float, float]] = field(default_factory=list)
    words: list[int] = field(default_factory=list)

    @classmethod
    def blank(cls, width: int, height: int, colour: Colour = WHITE) -> "Page":
        row = np.tile(np.array(colour, np.uint8), width)  # filling row by row is several times faster than by pixel
        return cls(np.tile(row, (height, 1)).reshape(height, width, 3))

    @classmethod
    def beside(cls, pages: "Sequence[Page]") -> "Page":
        """Pages of the same height as one, the first at the left."""
        whole = cls(np.concatenate([page.pixels for page in pages], 1))
        left = word = 0
        for page in pages:
            whole.characters += page.characters
            whole.places += [(x0 + left, y0, x1 + left, y1) for x0, y0, x1, y1 in page.places]
            whole.words += [word + number for number in page.words]
            left, word = left + page.width, max(whole.words, default=-1) + 1
        return whole

    @property
    def width(self) -> int:
        return self.pixels.shape[1]

    @property
    def height(self) -> int:
        return self.pixels.shape[0]

    def text(self, x: float, y: float, text: str, glyphs: Glyphs, colour: Colour = BLACK) -> Box:
        """Draw one line with its pen starting at x and its top at y; what leaves the page is cut off and not listed.

        Returns the box around the line's ink (an empty box at the pen where nothing was inked).
        """
        x, y, pen, word, placed = round(x), round(y), 0, 0, []
        for character in text:
            glyph = glyphs[character]
            if glyph.bitmap.size:
                placed.append((pen + glyph.left, glyph, character, word))
            else:
                word += 1
            pen += glyph.advance
        if not placed:
            return Box(x, y, x, y)
        left = min(at for at, *_ in placed)
        right = max(at + glyph.bitmap.shape[1] for at, glyph, *_ in placed)
        top = min(glyph.top for _, glyph, *_ in placed)
        bottom = max(glyph.top + glyph.bitmap.shape[0] for _, glyph, *_ in placed)
        ink = np.zeros((bottom - top, right - left), np.uint8)
        first = self.words[-1] + 1 if self.words else 0
        for at, glyph, character, word in placed:
            height, width = glyph.bitmap.shape
            target = ink[glyph.top - top : glyph.top - top + height, at - left : at - left + width]
            np.maximum(target, glyph.bitmap, out=target)
            self._note(character, first + word, x + at, y + glyph.top, x + at + width, y + glyph.top + height)
        self._blend(x + left, y + top, ink, colour)
        return Box(x + left, y + top, x + right, y + bottom)

    def rectangle(self, box: Box, colour: Colour, outline: int = 0) -> None:
        """Fill the box, or with `outline` draw its border that many pixels wide."""
        x0, y0, x1, y1 = (max(0, round(value)) for value in (box.x0, box.y0, box.x1, box.y1))
        if not outline:
            x1 = min(x1, self.width)
            if x0 < x1:
                # By whole rows of bytes: numpy assigns a colour pixel by pixel, fifteen times slower
                row = np.tile(np.array(colour, np.uint8), x1 - x0)
                self.pixels.reshape(self.height, -1)[y0:y1, 3 * x0 : 3 * x0 + len(row)] = row
            return
        for edge in ((y0, y0 + outline, x0, x1), (y1 - outline, y1, x0, x1)):
            self.pixels[max(0, edge[0]) : edge[1], edge[2] : edge[3]] = colour
        for edge in ((x0, x0 + outline), (x1 - outline, x1)):
            self.pixels[y0:y1, max(0, edge[0]) : edge[1]] = colour

    def horizontal(self, x0: float, x1: float, y: float, colour: Colour = BLACK, width: int = 1) -> None:
        self.rectangle(Box(x0, y, x1, y + width), colour)

    def vertical(self, x: float, y0: float, y1: float, colour: Colour = BLACK, width: int = 1) -> None:
        self.rectangle(Box(x, y0, x + width, y1), colour)

    def mask(self, x: float, y: float, mask: np.ndarray, colour: Colour) -> None:
        """Blend `colour` in by mask [h, w] uint8 at (x, y): discs, polygons and other shapes."""
        self._blend(round(x), round(y), mask, colour)

    def _note(self, character: str, word: int, x0: int, y0: int, x1: int, y1: int) -> None:
        if 0 <= x0 + x1 < 2 * self.width and 0 <= y0 + y1 < 2 * self.height:  # its centre is on the page
            self.characters.append(character)
            self.places.append((x0, y0, x1, y1))
            self.words.append(word)

    def _blend(self, x: int, y: int, mask: np.ndarray, colour: Colour) -> None:
        x0, y0 = max(0, x), max(0, y)
        x1, y1 = min(self.width, x + mask.shape[1]), min(self.height, y + mask.shape[0])
        if x0 >= x1 or y0 >= y1:
            return
        alpha = mask[y0 - y : y1 - y, x0 - x : x1 - x].astype(np.uint16)
        alpha += alpha >> 7  # 0..255 becomes 0..256, so that the shift divides exactly and full ink is the full colour
        rest = 256 - alpha
        for channel, value in enumerate(colour):  # one by one: numpy's loops over three bytes are several times slower
            under = self.pixels[y0:y1, x0:x1, channel]
            under[...] = (under * rest + alpha * np.uint16(value)) >> 8
