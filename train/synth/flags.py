"""Flags of countries, put together from stripes, crosses and discs; only such as these shapes draw fully."""

import functools
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

from train.synth.page import Colour

RED, BLUE, YELLOW = (206, 17, 38), (0, 56, 147), (252, 209, 22)
WHITE, BLACK, ORANGE = (255, 255, 255), (0, 0, 0), (255, 136, 62)
RATIO = 1.5  # of width to height, for all
Draw = Callable[[ImageDraw.ImageDraw, int, int], None]


def _stripes(colours: tuple[Colour, ...], upright: bool, weights: tuple[int, ...] | None = None) -> Draw:
    def draw(canvas: ImageDraw.ImageDraw, width: int, height: int) -> None:
        shares = weights or (1,) * len(colours)
        length, at = (width if upright else height), 0.0
        for colour, share in zip(colours, shares, strict=True):
            end = at + length * share / sum(shares)
            box = (at, 0, end, height) if upright else (0, at, width, end)
            canvas.rectangle(box, fill=colour)
            at = end

    return draw


def _cross(ground: Colour, cross: Colour, inner: Colour | None = None) -> Draw:
    """The Nordic cross."""

    def draw(canvas: ImageDraw.ImageDraw, width: int, height: int) -> None:
        canvas.rectangle((0, 0, width, height), fill=ground)
        x, y = width * 0.36, height / 2
        for colour, half in ((cross, height * 0.11), (inner, height * 0.055)):
            if colour is not None:
                canvas.rectangle((x - half, 0, x + half, height), fill=colour)
                canvas.rectangle((0, y - half, width, y + half), fill=colour)

    return draw


def _disc(ground: Colour, disc: Colour, x: float = 0.5) -> Draw:
    def draw(canvas: ImageDraw.ImageDraw, width: int, height: int) -> None:
        canvas.rectangle((0, 0, width, height), fill=ground)
        centre, radius = width * x, height * 0.3
        box = (centre - radius, height / 2 - radius, centre + radius, height / 2 + radius)
        canvas.ellipse(box, fill=disc)

    return draw


def _switzerland(canvas: ImageDraw.ImageDraw, width: int, height: int) -> None:
    canvas.rectangle((0, 0, width, height), fill=RED)
    x, y, arm, half = width / 2, height / 2, height * 0.3, height * 0.09
    canvas.rectangle((x - arm, y - half, x + arm, y + half), fill=WHITE)
    canvas.rectangle((x - half, y - arm, x + half, y + arm), fill=WHITE)


def _wedge(stripes: Draw, colour: Colour, reach: float) -> Draw:
    """Stripes with a triangle at the hoist."""

    def draw(canvas: ImageDraw.ImageDraw, width: int, height: int) -> None:
        stripes(canvas, width, height)
        canvas.polygon(((0, 0), (width * reach, height / 2), (0, height)), fill=colour)

    return draw


def _greece(canvas: ImageDraw.ImageDraw, width: int, height: int) -> None:
    _stripes((BLUE, WHITE) * 4 + (BLUE,), upright=False)(canvas, width, height)
    side, arm = height * 5 / 9, height / 9
    canvas.rectangle((0, 0, side, side), fill=BLUE)
    canvas.rectangle((0, side / 2 - arm / 2, side, side / 2 + arm / 2), fill=WHITE)
    canvas.rectangle((side / 2 - arm / 2, 0, side / 2 + arm / 2, side), fill=WHITE)


def _level(*colours: Colour, weights: tuple[int, ...] | None = None) -> Draw:
    return _stripes(colours, upright=False, weights=weights)


def _upright(*colours: Colour) -> Draw:
    return _stripes(colours, upright=True)


FLAGS: dict[str, Draw] = {
    "France": _upright((0, 50, 160), WHITE, (230, 40, 55)),
    "Italy": _upright((0, 140, 70), WHITE, RED),
    "Ireland": _upright((22, 155, 98), WHITE, ORANGE),
    "Belgium": _upright(BLACK, (253, 218, 36), (239, 51, 64)),
    "Romania": _upright((0, 43, 127), YELLOW, RED),
    "Nigeria": _upright((0, 135, 81), WHITE, (0, 135, 81)),
    "Peru": _upright((217, 16, 35), WHITE, (217, 16, 35)),
    "Guinea": _upright(RED, YELLOW, (0, 148, 96)),
    "Mali": _upright((20, 181, 58), YELLOW, RED),
    "Ivory Coast": _upright(ORANGE, WHITE, (0, 158, 96)),
    "Germany": _level(BLACK, (221, 0, 0), (255, 206, 0)),
    "Netherlands": _level((174, 28, 40), WHITE, (33, 70, 139)),
    "Austria": _level((237, 41, 57), WHITE, (237, 41, 57)),
    "Hungary": _level((205, 42, 62), WHITE, (67, 111, 77)),
    "Bulgaria": _level(WHITE, (0, 150, 110), (214, 38, 18)),
    "Russia": _level(WHITE, (0, 57, 166), (213, 43, 30)),
    "Estonia": _level((0, 114, 206), BLACK, WHITE),
    "Lithuania": _level((253, 185, 19), (0, 106, 68), (193, 39, 45)),
    "Latvia": _level((158, 48, 57), WHITE, (158, 48, 57), weights=(2, 1, 2)),
    "Poland": _level(WHITE, (220, 20, 60)),
    "Ukraine": _level((0, 87, 183), (255, 215, 0)),
    "Colombia": _level((252, 209, 22), BLUE, RED, weights=(2, 1, 1)),
    "Yemen": _level(RED, WHITE, BLACK),
    "Thailand": _level((165, 25, 49), WHITE, (45, 42, 74), WHITE, (165, 25, 49), weights=(1, 1, 2, 1, 1)),
    "Costa Rica": _level((0, 43, 127), WHITE, RED, WHITE, (0, 43, 127), weights=(1, 1, 2, 1, 1)),
    "Armenia": _level((217, 0, 18), (0, 51, 160), (242, 168, 0)),
    "Gabon": _level((0, 158, 96), YELLOW, (58, 117, 196)),
    "Sierra Leone": _level((30, 181, 58), WHITE, (0, 114, 198)),
    "Mauritius": _level((234, 40, 57), (26, 32, 109), (255, 213, 0), (0, 165, 81)),
    "Sweden": _cross((0, 106, 167), (254, 204, 0)),
    "Denmark": _cross((198, 12, 48), WHITE),
    "Finland": _cross(WHITE, (0, 53, 128)),
    "Norway": _cross((186, 12, 47), WHITE, (0, 32, 91)),
    "Iceland": _cross((2, 82, 156), WHITE, (220, 30, 53)),
    "Japan": _disc(WHITE, (188, 0, 45)),
    "Bangladesh": _disc((0, 106, 78), (244, 42, 65), 0.45),
    "Palau": _disc((74, 173, 214), (255, 222, 0), 0.45),
    "Switzerland": _switzerland,
    "Greece": _greece,
    "Czechia": _wedge(_level(WHITE, (215, 20, 26)), (17, 69, 126), 0.5),
    "Sudan": _wedge(_level((210, 16, 52), WHITE, BLACK), (0, 114, 41), 0.33),
    "Bahamas": _wedge(_level((0, 119, 139), (255, 199, 44), (0, 119, 139)), BLACK, 0.4),
}


@functools.lru_cache(maxsize=512)
def flag(country: str, height: int) -> np.ndarray:
    """[height, RATIO * height, 3] uint8: the flag, with smooth edges."""
    width = round(height * RATIO)
    image = Image.new("RGB", (width * 2, height * 2))
    FLAGS[country](ImageDraw.Draw(image), width * 2, height * 2)
    pixels = np.array(image.reduce(2))
    pixels.setflags(write=False)  # it is shared
    return pixels
