"""Typeface, text sizes and colours of one page, drawn so that ink always stands out from what lies under it."""

import colorsys
from dataclasses import dataclass

from train.synth.content import Dice
from train.synth.fonts import SIZES, Face
from train.synth.page import BLACK, WHITE, Colour

# Dark enough for white text on them (contrast of 4.5 and more), light enough to be told from black
ACCENTS: tuple[Colour, ...] = (
    *((20, 60, 120), (0, 90, 160), (140, 30, 40), (170, 40, 30), (20, 100, 60), (0, 110, 100), (90, 40, 130)),
    *((60, 60, 70), (120, 70, 20), (150, 30, 100), (40, 40, 120), (80, 90, 20), (30, 80, 90), (0, 0, 0)),
)
INKS: tuple[Colour, ...] = (BLACK, BLACK, BLACK, (30, 30, 40), (20, 30, 70), (50, 40, 30), (60, 60, 60), (20, 50, 40))


@dataclass(frozen=True)
class Style:
    """small, body, large: text sizes in pixels. muted: a weaker ink, for secondary text and rules. tint: a paper that
    can be told from `paper` and still carries `ink`. accent: carries white text. strong: for headings on paper."""

    face: Face
    bold: Face
    small: int
    body: int
    large: int
    paper: Colour
    tint: Colour
    ink: Colour
    muted: Colour
    accent: Colour
    strong: Colour


def allowed_sizes(min_px: int, max_px: int) -> tuple[int, ...]:
    """The sizes glyphs are kept in, between two bounds. Raises ValueError where there are none."""
    sizes = tuple(size for size in SIZES if min_px <= size <= max_px)
    if not sizes:
        raise ValueError(f"no text size between {min_px} and {max_px} pixels, expected a range with one of {SIZES}")
    return sizes


def draw_style(dice: Dice, faces: tuple[Face, ...], sizes: tuple[int, ...], largest: float, dark: bool) -> Style:
    """A style with body text up to `largest` pixels, small sizes and large ones alike often.

    dark: light ink on dark paper.
    """
    face = dice.pick(faces)
    low, high = sizes[0], max(sizes[0], min(sizes[-1], largest))
    body = _at_most(sizes, low * (high / low) ** dice.uniform(0, 1.0) + 0.5)
    large = _at_most(sizes, body * dice.uniform(1.2, 1.8))
    small = _at_most(sizes, body * dice.uniform(0.75, 1.0))
    paper, ink = _paper(dice), dice.pick(INKS)
    tint = mix(paper, ink, dice.uniform(0.06, 0.14))
    if dark:
        paper, ink = mix(dice.pick(ACCENTS), BLACK, 0.65), _paper(dice)
        tint = mix(paper, WHITE, 0.12)
    accent = dice.pick(ACCENTS)
    strong = accent if not dark and dice.chance(0.4) else ink
    return Style(face, face.bold(), small, body, large, paper, tint, ink, mix(ink, paper, 0.25), accent, strong)


def mix(colour: Colour, other: Colour, share: float) -> Colour:
    """The colour with `share` of the other in it."""
    return tuple(round(a + (b - a) * share) for a, b in zip(colour, other, strict=True))


def contrast(colour: Colour, other: Colour) -> float:
    """WCAG 2's contrast ratio, 1 to 21; text is readable from about 4."""
    light, dark = sorted((_luminance(colour), _luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def ink_on(ground: Colour) -> Colour:
    """Black or white, whichever stands out more."""
    return WHITE if contrast(WHITE, ground) >= contrast(BLACK, ground) else BLACK


def _luminance(colour: Colour) -> float:
    parts = [value / 255 for value in colour]
    red, green, blue = (p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _paper(dice: Dice) -> Colour:
    if dice.chance(0.4):
        return WHITE
    red, green, blue = colorsys.hsv_to_rgb(dice.uniform(0, 1), dice.uniform(0, 0.12), dice.uniform(0.92, 1.0))
    return round(red * 255), round(green * 255), round(blue * 255)


def _at_most(sizes: tuple[int, ...], size: float) -> int:
    """The largest of the sizes up to `size`, or the smallest of all."""
    return max((known for known in sizes if known <= size), default=sizes[0])
