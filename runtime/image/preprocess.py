"""RGB images become the encoder's input: `preprocess` sizes and normalises, as the bundle's `ImageRule` says.

Sources:
- the aspect mode `pad` follows the original LLaVA: its `process_images` pads to a square with the mean colour
  (`expand2square`) and hands the square to CLIP's image processor;
- the arithmetic of that processor, and the aspect mode `crop`, follow `CLIPImageProcessor` of transformers;
- `any` is this project's own: the encoder is convolutional and takes every multiple of its stride.
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from PIL import Image

from runtime.errors import UserError
from runtime.image.resize import look_up, resize_columns, resize_rows


def visual_tokens(height: int, width: int, stride: int) -> int:
    """Visual tokens of an image of height x width pixels, both multiples of the encoder's stride."""
    return height // stride * (width // stride)


ASPECTS = ("pad", "any", "crop")
# Largest side of a model input, in pixels: 16,384 visual tokens at stride 64, beyond any decoder's context.
MAX_RESOLUTION = 8192
# Up to this side, in pixels, and this ratio of the sides, which every photograph is within, `pad` and `crop` are exact.
# Beyond, they simplify: a few hundred bytes of PNG (1 x 60000) would cost minutes or gigabytes otherwise.
_EXACT_SIDE = 24_576
_EXACT_RATIO = 16
_THIN_SIDE = 8192  # what `pad` shrinks a picture of a larger ratio to
_STRIP_ROWS = 64


@dataclass(frozen=True)
class ImageRule:
    """How a bundle's images are made; stored in the bundle's manifest.

    mean, std: per channel (red, green, blue), for pixels scaled to 0..1.
    aspect: the default aspect mode, one of `ASPECTS`.
    resolution: the default side in pixels, a multiple of `multiple`.
    multiple: the encoder's total stride in pixels: 64, or 32 without a fifth stage.
    max_visual_tokens: the most tokens, H/multiple * W/multiple, that the aspect mode `any` may make.

    Raises UserError for a value out of range.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    aspect: str
    resolution: int
    multiple: int
    max_visual_tokens: int

    def __post_init__(self) -> None:
        if not all(0 <= value <= 1 for value in self.mean):
            raise UserError(f"image rule: 'mean' must be three numbers from 0 to 1, found {list(self.mean)}")
        if not all(0 < value <= 1 for value in self.std):
            raise UserError(f"image rule: 'std' must be three numbers above 0, at most 1, found {list(self.std)}")
        if not 1 <= self.multiple <= MAX_RESOLUTION:
            raise UserError(f"image rule: 'multiple' must be from 1 to {MAX_RESOLUTION}, found {self.multiple}")
        if self.max_visual_tokens < 1:
            raise UserError(f"image rule: 'max_visual_tokens' must be at least 1, found {self.max_visual_tokens}")
        _check_aspect(self.aspect)
        _check_resolution(self.resolution, self.multiple)

    def tokens(self, height: int, width: int) -> int:
        """Visual tokens of a preprocessed image, height x width pixels."""
        return visual_tokens(height, width, self.multiple)

    def to_dict(self) -> dict[str, Any]:
        """The rule as plain JSON types."""
        return dataclasses.asdict(self) | {"mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "ImageRule":
        """The rule that `to_dict` wrote. Raises UserError naming the key that is missing, unknown or wrong."""
        for key in data:
            if key not in _FIELD_READERS:
                raise UserError(f"image rule: unknown key {key!r}; expected {', '.join(_FIELD_READERS)}")
        for key in _FIELD_READERS:
            if key not in data:
                raise UserError(f"image rule: key {key!r} is missing")
        return cls(**{key: read(key, data[key]) for key, read in _FIELD_READERS.items()})


def _read_triple(key: str, value: object) -> tuple[float, float, float]:
    numbers = cast(list[Any], value) if isinstance(value, list | tuple) else []
    if len(numbers) != 3 or any(isinstance(n, bool) or not isinstance(n, (int, float)) for n in numbers):
        raise UserError(f"image rule: {key!r} must be a list of three numbers, found {value!r}")
    red, green, blue = numbers
    return red, green, blue


def _read_whole(key: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"image rule: {key!r} must be a whole number, found {value!r}")
    return value


def _read_text(key: str, value: object) -> str:
    if not isinstance(value, str):
        raise UserError(f"image rule: {key!r} must be a string, found {value!r}")
    return value


_FIELD_READERS: dict[str, Callable[[str, object], Any]] = {
    "mean": _read_triple,
    "std": _read_triple,
    "aspect": _read_text,
    "resolution": _read_whole,
    "multiple": _read_whole,
    "max_visual_tokens": _read_whole,
}


def _check_aspect(aspect: str) -> None:
    if aspect not in ASPECTS:
        raise UserError(f"unknown aspect mode {aspect!r}; expected one of {', '.join(ASPECTS)}")


def _check_resolution(resolution: int, multiple: int) -> None:
    largest = MAX_RESOLUTION // multiple * multiple
    if multiple <= resolution <= largest and resolution % multiple == 0:
        return
    below = resolution // multiple * multiple
    nearest = sorted({min(max(side, multiple), largest) for side in (below, below + multiple)})
    raise UserError(
        f"resolution {resolution} is not a multiple of {multiple} from {multiple} to {largest}; "
        f"nearest valid: {' or '.join(map(str, nearest))}"
    )


def target_size(
    width: int, height: int, rule: ImageRule, resolution: int | None = None, aspect: str | None = None
) -> tuple[int, int]:
    """The (height, width) in pixels, multiples of `rule.multiple`, that `preprocess` gives a width x height image.

    resolution, aspect: override the rule's.

    `pad` and `crop` give resolution x resolution. `any` keeps the aspect ratio as well as whole tokens allow. With
    m = `rule.multiple` and a limit of n = min(`rule.max_visual_tokens`, (resolution / m)^2) tokens:
    1. the sides in tokens that keep the ratio and use all n are h = sqrt(n * height / width) and w = n / h; a small
       image is enlarged to that, as `pad` enlarges it: the models were trained on pictures scaled to the resolution;
    2. each is rounded to the nearest whole number (half up), at least 1 and at most n;
    3. if h * w is still above n, either w is cut to floor(n / h) or h to floor(n / w), whichever leaves the ratio w / h
       closer to the image's (in its logarithm; w if equal).

    Raises UserError for an unknown aspect mode, or a resolution that is not a multiple of m up to `MAX_RESOLUTION`.
    """
    aspect = rule.aspect if aspect is None else aspect
    resolution = rule.resolution if resolution is None else resolution
    _check_aspect(aspect)
    _check_resolution(resolution, rule.multiple)
    if aspect != "any":
        return resolution, resolution
    limit = min(rule.max_visual_tokens, (resolution // rule.multiple) ** 2)
    rows, columns = _token_grid(width, height, limit)
    return rows * rule.multiple, columns * rule.multiple


def _token_grid(width: int, height: int, limit: int) -> tuple[int, int]:
    """(rows, columns) of at most `limit` tokens for an image of width x height; the steps of `target_size`."""
    rows = min(max(int(math.sqrt(limit * height / width) + 0.5), 1), limit)
    columns = min(max(int(math.sqrt(limit * width / height) + 0.5), 1), limit)
    if rows * columns <= limit:
        return rows, columns

    def distortion(grid: tuple[int, int]) -> float:
        across, down = grid[1] * height, grid[0] * width
        return max(across / down, down / across)

    return min((rows, limit // rows), (limit // columns, columns), key=distortion)


def preprocess(
    image: Image.Image, rule: ImageRule, resolution: int | None = None, aspect: str | None = None
) -> np.ndarray:
    """Size and normalise an RGB image (as `open_image` returns it) for the encoder: `resized`, then `normalised`.

    resolution, aspect: override the rule's.

    Returns pixel values, float32 [3, H, W], C-contiguous, with (H, W) from `target_size`.

    `pad` and `crop` equal the original to the bit, up to a longer side of 24,576 pixels and a ratio of sides of 16.

    Raises UserError as `target_size` does.
    """
    return normalised(resized(image, rule, resolution, aspect), rule)


def resized(
    image: Image.Image, rule: ImageRule, resolution: int | None = None, aspect: str | None = None
) -> np.ndarray:
    """Size an RGB image for the encoder; returns uint8 [H, W, 3] with (H, W) from `target_size`.

    resolution, aspect: override the rule's. With Pillow's bicubic filter,
    - `pad`: centred on a square of the mean colour, then resized;
    - `crop`: resized until the shorter side is the resolution, then the centre cut out;
    - `any`: resized straight to (H, W).
    Beyond the limits that `preprocess` names, `pad` and `any` may first shrink the image by whole factors, and `crop`
    cuts the ends off the longer side.

    Raises UserError as `target_size` does.
    """
    if image.mode != "RGB":
        raise ValueError(f"an RGB image is expected, as open_image returns it, not {image.mode}")
    aspect = rule.aspect if aspect is None else aspect
    height, width = target_size(*image.size, rule, resolution, aspect)
    if aspect == "pad":
        return _pad(image, width, tuple(int(mean * 255) for mean in rule.mean))
    return np.asarray(_crop(image, width) if aspect == "crop" else _stretch(image, width, height))


def _pad(image: Image.Image, side: int, fill: tuple[int, ...]) -> np.ndarray:
    """Pad to a centred square and resize that to side x side, without ever holding the square.

    Pillow resizes rows first, rounds to 8 bits, then resizes columns. Rows of nothing but fill stay fill, so only the
    image's own rows are widened, a strip at a time: the same bytes for a fraction of the memory.
    """
    longest = _EXACT_SIDE if max(image.size) <= _EXACT_RATIO * min(image.size) else _THIN_SIDE
    if (factor := math.ceil(max(image.size) / longest)) > 1:
        image = image.reduce(factor)
    width, height = image.size
    longer = max(width, height)
    left, top = (longer - width) // 2, (longer - height) // 2
    narrowed = np.empty((longer, side, 3), np.uint8)  # the square, its rows already resized
    narrowed[:top] = narrowed[top + height :] = np.full((side, 3), fill, np.uint8)
    padded = np.full((_STRIP_ROWS, longer, 3), fill, np.uint8)
    for y in range(0, height, _STRIP_ROWS):
        rows = min(_STRIP_ROWS, height - y)
        strip = np.asarray(image.crop((0, y, width, y + rows)))
        if width < longer:
            padded[:rows, left : left + width] = strip
            strip = padded[:rows]
        resize_rows(strip, narrowed[top + y : top + y + rows])
    return resize_columns(narrowed, side)


def _crop(image: Image.Image, side: int) -> Image.Image:
    """Resize the shorter side to `side` (the longer one rounded down) and cut out the centre (offsets rounded down)."""
    longest = _EXACT_RATIO * min(image.size)
    if max(image.size) > longest:
        image = _centre(image, min(image.width, longest), min(image.height, longest))
    shorter = min(image.size)
    size = (side * image.width // shorter, side * image.height // shorter)
    return _centre(image.resize(size, Image.Resampling.BICUBIC), side, side)


def _centre(image: Image.Image, width: int, height: int) -> Image.Image:
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _stretch(image: Image.Image, width: int, height: int) -> Image.Image:
    if max(image.size) > _EXACT_SIDE:  # with nothing lost that the target could show
        image = image.reduce((max(image.width // (4 * width), 1), max(image.height // (4 * height), 1)))
    return image.resize((width, height), Image.Resampling.BICUBIC)


def digest(pixels: np.ndarray) -> str:
    """Of the shape and the values of pixels, uint8 [H, W, 3]: equal where `normalised` gives equal pixel values."""
    hashed = hashlib.sha256(repr(pixels.shape).encode())
    hashed.update(np.ascontiguousarray(pixels).data)
    return hashed.hexdigest()


def normalised(pixels: np.ndarray, rule: ImageRule) -> np.ndarray:
    """Pixels, uint8 [H, W, 3], scaled to 0..1 and normalised by the rule's mean and std: float32 [3, H, W].

    A channel has 256 possible values, so the original's arithmetic (scaled in float64, the rest in float32) is done
    once for each of them and looked up for every pixel.
    """
    scaled = (np.arange(256) * (1 / 255)).astype(np.float32)
    mean, std = (np.array(values, np.float32)[:, None] for values in (rule.mean, rule.std))
    levels = (scaled - mean) / std  # [3, 256]
    return look_up(pixels, levels)
