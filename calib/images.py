"""Calibration images, through the runtime's own preprocessing: what the encoder will see when it is deployed."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from runtime.errors import UserError
from runtime.image import ImageRule, open_image, preprocess

LEAST = 16  # fewer say too little of the ranges that activations take
SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
SCALES = (1, 2 / 3, 1 / 2)  # of the bundle's resolution: 1536, 1024, 768


def find_images(data: Path, samples: int) -> list[Path]:
    """At most `samples` image files of a folder, or of a dataset in LLaVA's JSON, evenly spread over it.

    Raises UserError where there are fewer than `LEAST`.
    """
    if data.is_dir():
        files = sorted(file for file in data.rglob("*") if file.suffix.lower() in SUFFIXES)
    elif data.is_file():
        files = _of_dataset(data)
    else:
        raise UserError(f"--data {data}: no such folder or file")
    if len(files) < LEAST:
        raise UserError(f"--data {data}: {len(files)} images, at least {LEAST} are needed to calibrate with")
    chosen = np.linspace(0, len(files) - 1, min(samples, len(files))).round().astype(int)
    return [files[i] for i in dict.fromkeys(chosen.tolist())]


def _of_dataset(file: Path) -> list[Path]:
    try:
        text = file.read_text(encoding="utf-8")
        records = json.loads(text) if text.lstrip().startswith("[") else [json.loads(x) for x in text.splitlines() if x]
        names = [record["image"] for record in records if record.get("image")]
    except (ValueError, AttributeError, TypeError, OSError) as error:
        raise UserError(f"--data {file}: cannot be read as LLaVA's JSON: {error}") from error
    flat = [name for entry in names for name in ([entry] if isinstance(entry, str) else entry)]
    return [file.parent / name for name in dict.fromkeys(flat)]


def open_images(files: list[Path]) -> list[Image.Image]:
    """Those that open; the others are named on stderr. Raises UserError where fewer than `LEAST` do."""
    images = []
    for file in files:
        try:
            images.append(open_image(file))
        except UserError as error:
            print(f"skipped: {error}", file=sys.stderr)
    if len(images) < LEAST:
        raise UserError(f"{len(images)} of {len(files)} images can be opened, at least {LEAST} are needed")
    return images


def pixel_values(images: list[Image.Image], rule: ImageRule) -> Iterator[np.ndarray]:
    """float32 [1, 3, H, W] of each image in turn, at the bundle's resolution, two thirds and half of it; every third
    round keeps the aspect ratio, so that oblong sizes come too."""
    sides = [max(round(rule.resolution * scale / rule.multiple), 1) * rule.multiple for scale in SCALES]
    for i, image in enumerate(images):
        aspect = "any" if i // len(sides) % 3 == 2 else rule.aspect
        yield preprocess(image, rule, sides[i % len(sides)], aspect)[None]
