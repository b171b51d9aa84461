"""What a checkpoint's preprocessor_config.json says of images: read as transformers' CLIPImageProcessor reads it, which
the original hands images to, or refused by the key that `runtime.image.preprocess` does not compute."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from train.errors import CheckpointError
from train.model.configs import preprocessor_config

log = logging.getLogger("convllava.checkpoint")
# key -> the only value that is computed, which is CLIPImageProcessor's default
FIXED = {"do_resize": True, "do_rescale": True, "do_normalize": True, "resample": 3}
BICUBIC = "Pillow's bicubic filter"
CLIP_SIDE = 224  # CLIPImageProcessor's default
RELEASED_SIDE = 256  # of ConvLLaVA's vision configuration where it names no other
LEVELS = np.arange(256)


def default_preprocessor(config: dict[str, Any], vision_config: dict[str, Any], file: Path) -> dict[str, Any]:
    """The release's own settings in place of `file`, which is missing; a log line says which.

    The side is `mm_vision_resolution` of config.json, else `image_size` of the encoder's config.json.
    """
    side = config.get("mm_vision_resolution") or vision_config.get("image_size") or RELEASED_SIDE
    log.warning(
        "%s is missing: taking the release's settings, a side of %s pixels, %s, CLIP's mean and standard deviation",
        file,
        side,
        BICUBIC,
    )
    return preprocessor_config(tuple(OPENAI_CLIP_MEAN), tuple(OPENAI_CLIP_STD), side)


def check_preprocessor(preprocessor: dict[str, Any], file: Path, square: bool) -> None:
    """Raises CheckpointError, naming the key, where `file` asks for what is not computed.

    Args:
        square: images are so before they are resized, so that nothing is left to be cropped.
    """

    def refuse(key: str, expected: object) -> None:
        raise CheckpointError(f"{file}: {key} is {preprocessor[key]!r}, expected {expected}: nothing else is supported")

    for key, value in FIXED.items():
        if preprocessor.get(key, value) != value:
            refuse(key, f"{value} ({BICUBIC})" if key == "resample" else value)
    if not square and not preprocessor.get("do_center_crop", True):
        refuse("do_center_crop", "true where image_aspect_ratio in config.json is not 'pad'")
    if preprocessor.get("do_pad"):
        refuse("do_pad", "none or false")
    factor = preprocessor.get("rescale_factor", 1 / 255)
    # in float32, as the processor computes it
    if not _is_number(factor) or not np.array_equal((LEVELS * factor).astype("f4"), (LEVELS * (1 / 255)).astype("f4")):
        refuse("rescale_factor", f"{1 / 255} (1/255)")


def side_of(preprocessor: dict[str, Any], file: Path, square: bool) -> int:
    """Side of the images, pixels, once they are resized and the centre is cut out.

    Raises CheckpointError where they are not square, or are cut out of more than the shorter side.
    """
    if "size" not in preprocessor and "crop_size" not in preprocessor:
        raise CheckpointError(f"{file}: no crop_size or size, expected the side of the images in pixels")
    size, crop = (preprocessor.get(key, CLIP_SIDE) for key in ("size", "crop_size"))
    # a height and a width do not keep the aspect ratio, which shows unless the image is square
    side = _side(size, "shortest_edge") or (_side(size, "height", "width") if square else None)
    if side is None or (preprocessor.get("do_center_crop", True) and _side(crop, "height", "width") != side):
        raise CheckpointError(
            f"{file}: size is {size!r} and crop_size {crop!r}, expected the same side in both, such as "
            f"{{'shortest_edge': {side or CLIP_SIDE}}} and {{'height': {side or CLIP_SIDE}, "
            f"'width': {side or CLIP_SIDE}}}: nothing else is supported"
        )
    return side


def pixel_statistics(
    preprocessor: dict[str, Any], file: Path
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation of each channel, of pixels from 0 to 1; CLIP's where `preprocessor` has none.

    Raises CheckpointError for what is not three numbers.
    """

    def triple(key: str, default: list[float]) -> tuple[float, float, float]:
        values = preprocessor.get(key, default)
        if not isinstance(values, list | tuple) or len(values) != 3 or not all(map(_is_number, values)):
            raise CheckpointError(f"{file}: {key} is {values!r}, expected a list of three numbers")
        red, green, blue = values
        return red, green, blue

    return triple("image_mean", OPENAI_CLIP_MEAN), triple("image_std", OPENAI_CLIP_STD)


def _side(size: Any, *keys: str) -> int | None:
    """A size in one number, or under `keys` of a dictionary where they agree; None for anything else."""
    if isinstance(size, dict):
        sides = [size.get(key) for key in keys]
        size = sides[0] if size.keys() == set(keys) and sides.count(sides[0]) == len(sides) else None
    return size if isinstance(size, int) and not isinstance(size, bool) and size > 0 else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
