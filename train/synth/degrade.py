"""What cameras and scanners do to a page: turning, blur, uneven light, noise, JPEG artefacts."""

import functools
import io
import math
from dataclasses import replace

import numpy as np
from PIL import Image, ImageFilter

from train.synth.document import Document
from train.synth.page import Box, Page

MAX_TURN = 2.5  # degrees
NOISE_SIDE = 256


def degrade(document: Document, rng: np.random.Generator, strength: float = 1.0) -> Document:
    """The document as a worse picture of itself; boxes and places move with what they name.

    strength: 0 leaves the page as drawn; 1 is the worst that stays readable at 12 pixels. Each defect comes at random.
    """
    page, questions = document.page, document.questions
    if strength <= 0:
        return document
    if rng.random() < 0.3 * strength:
        degrees = rng.uniform(-MAX_TURN, MAX_TURN) * strength
        page, turned = _turn(page, degrees)
        questions = [q if q.box is None else replace(q, box=turned(q.box)) for q in questions]
    pixels = page.pixels
    if rng.random() < 0.3 * strength:
        pixels = _light(pixels, rng, strength)
    if rng.random() < 0.3 * strength:
        pixels = _blur(pixels, rng.uniform(0.2, 0.7) * strength)
    if rng.random() < 0.5 * strength:
        pixels = _noise(pixels, rng, rng.uniform(2, 12) * strength)
    if rng.random() < 0.4 * strength:
        pixels = _jpeg(pixels, int(rng.integers(45, 95)))
    return replace(document, page=replace(page, pixels=pixels), questions=questions)


def _turn(page: Page, degrees: float):
    """The page turned counterclockwise about its centre, and the map of boxes that goes with it."""
    corner = tuple(int(value) for value in page.pixels[0, 0])
    turned = Image.fromarray(page.pixels).rotate(degrees, Image.Resampling.BILINEAR, fillcolor=corner)
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    cx, cy = page.width / 2, page.height / 2

    def move(box: Box) -> Box:
        # The box's centre goes round; its sides keep their length, plus what the slope adds.
        x, y = (box.x0 + box.x1) / 2 - cx, (box.y0 + box.y1) / 2 - cy
        x, y = cx + x * cos + y * sin, cy - x * sin + y * cos
        half_width = (box.width * cos + box.height * abs(sin)) / 2
        half_height = (box.height * cos + box.width * abs(sin)) / 2
        return Box(
            max(0, x - half_width),
            max(0, y - half_height),
            min(page.width, x + half_width),
            min(page.height, y + half_height),
        )

    places = []
    for place in page.places:
        box = move(Box(*place))
        places.append((box.x0, box.y0, box.x1, box.y1))
    return replace(page, pixels=np.asarray(turned), places=places), move


def _light(pixels: np.ndarray, rng: np.random.Generator, strength: float) -> np.ndarray:
    """Brightness that falls off linearly across the page."""
    height, width = pixels.shape[:2]
    slope = rng.uniform(-0.25, 0.25, 2) * strength
    across = np.linspace(-slope[0], slope[0], width, dtype=np.float32).repeat(3)
    down = np.linspace(-slope[1], slope[1], height, dtype=np.float32)
    factor = np.clip(0.9 + (across + down[:, None]) / 2, 0.5, 1.0) * np.float32(256)
    # Rows of width * 3 values: numpy is several times slower where the innermost axis is only the 3 channels
    lit = pixels.reshape(height, -1) * factor.astype(np.uint16) >> 8
    return lit.astype(np.uint8).reshape(pixels.shape)


def _blur(pixels: np.ndarray, radius: float) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).filter(ImageFilter.BoxBlur(radius)))


def _noise(pixels: np.ndarray, rng: np.random.Generator, deviation: float) -> np.ndarray:
    """Normal noise, equal in the three channels, from one tile laid at a random place."""
    height, width = pixels.shape[:2]
    tile = np.roll(_noise_tile(), tuple(rng.integers(0, NOISE_SIDE, 2)), (0, 1))
    tile = (tile * np.float32(deviation)).astype(np.int16).repeat(3, axis=1)
    field = np.tile(tile, (-(-height // NOISE_SIDE), -(-width // NOISE_SIDE)))[:height, : width * 3]
    field += pixels.reshape(height, -1)
    return np.clip(field, 0, 255, out=field).astype(np.uint8).reshape(pixels.shape)


@functools.cache
def _noise_tile() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((NOISE_SIDE, NOISE_SIDE), np.float32)


def _jpeg(pixels: np.ndarray, quality: int) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))
