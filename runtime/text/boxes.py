"""Boxes in answers: `[x1,y1,x2,y2]`, fractions of the image's width and height from its upper left corner."""

import re

from PIL import Image, ImageDraw

Corners = tuple[float, float, float, float]  # left, top, right, bottom
COLOUR = (230, 30, 60)
_NUMBER = r"(\d*\.?\d+)"
_BOX = re.compile(r"\[\s*" + r"\s*,\s*".join([_NUMBER] * 4) + r"\s*\]")


def read_boxes(answer: str) -> list[Corners]:
    """Every box in an answer, in its order. Numbers are taken as they are, above 1 too."""
    return [(float(x1), float(y1), float(x2), float(y2)) for x1, y1, x2, y2 in _BOX.findall(answer)]


def draw_boxes(image: Image.Image, boxes: list[Corners]) -> Image.Image:
    """A copy of an RGB image with the boxes outlined; corners in the wrong order are put right."""
    drawn = image.copy()
    pen = ImageDraw.Draw(drawn)
    width = max(2, round(max(image.size) / 300))
    for x1, y1, x2, y2 in boxes:
        xs, ys = sorted((x1 * image.width, x2 * image.width)), sorted((y1 * image.height, y2 * image.height))
        pen.rectangle((xs[0], ys[0], xs[1], ys[1]), outline=COLOUR, width=width)
    return drawn
