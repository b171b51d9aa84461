"""Masks of simple shapes, uint8 with smooth edges: 255 inside, 0 outside."""

import functools

import numpy as np
from PIL import Image, ImageDraw


@functools.lru_cache(maxsize=256)
def disc_mask(side: int) -> np.ndarray:
    """[side, side]: the disc that touches the sides."""
    centre = (side - 1) / 2
    across = (np.arange(side, dtype=np.float32) - centre) ** 2
    distance = np.sqrt(across[:, None] + across)
    return (np.clip(side / 2 - distance + 0.5, 0, 1) * 255).astype(np.uint8)


def polygon_mask(width: int, height: int, corners: list[tuple[float, float]]) -> np.ndarray:
    """[height, width]: a polygon with straight sides, convex or not (even-odd rule); corners in pixels."""
    image = Image.new("L", (width * 2, height * 2))
    ImageDraw.Draw(image).polygon([(x * 2, y * 2) for x, y in corners], fill=255)
    return np.asarray(image.reduce(2))


def stroke_mask(width: int, height: int, points: list[tuple[float, float]], thickness: float) -> np.ndarray:
    """[height, width]: a line through the points, pixels."""
    image = Image.new("L", (width * 2, height * 2))
    drawn = [(x * 2, y * 2) for x, y in points]
    ImageDraw.Draw(image).line(drawn, fill=255, width=max(2, round(thickness * 2)), joint="curve")
    return np.asarray(image.reduce(2))
