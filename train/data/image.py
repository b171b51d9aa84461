"""Image files to pixel values, as the model will get them where it is deployed.

`pad` follows the original LLaVA: pad to a square with the mean colour (`expand2square`), resize, normalise as
transformers' CLIPImageProcessor. `any` is this project's own: the nearest grid of whole tokens to the aspect ratio.
Unlike the original, EXIF orientation is applied and transparency lies on white.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

# A side beyond this would make `pad` fill gigabytes with the mean colour
MAX_SIDE = 20_000


@dataclass(frozen=True)
class ImageRule:
    """How images are made.

    mean, std: per channel, for pixels scaled to 0..1. aspect: `pad` or `any`. resolution: side in pixels.
    multiple: the encoder's stride. max_visual_tokens: the most that `any` may make.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    aspect: str
    resolution: int
    multiple: int
    max_visual_tokens: int

    def tokens(self, pixels: np.ndarray) -> int:
        """Visual tokens of pixel values [3, H, W]."""
        return pixels.shape[1] // self.multiple * (pixels.shape[2] // self.multiple)


def open_image(file: Path) -> Image.Image:
    """RGB, upright, on white. Raises ValueError, one line, for what is no image of 8 bits a channel."""
    try:
        with Image.open(file) as image:
            if max(image.size) > MAX_SIDE:
                raise ValueError(f"{image.width} x {image.height} pixels; a side may have {MAX_SIDE}")
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"mode {image.mode}; expected 8 bits a channel")
            transparent = image.has_transparency_data
            upright = ImageOps.exif_transpose(image)
    except FileNotFoundError:
        raise ValueError("no such file") from None
    except ValueError:
        raise
    except Exception as error:  # Pillow's plugins raise nearly every type on broken files
        raise ValueError(f"truncated, corrupt or no image ({' '.join(str(error).split())})") from error
    if not transparent:
        return upright.convert("RGB")
    rgba = upright.convert("RGBA")
    white = Image.new("RGB", rgba.size, "white")
    white.paste(rgba, mask=rgba)
    return white


def preprocess(image: Image.Image, rule: ImageRule) -> np.ndarray:
    """RGB image -> pixel values, float32 [3, H, W]."""
    if rule.aspect == "pad":
        size = (rule.resolution, rule.resolution)
        image = _square(image, tuple(int(mean * 255) for mean in rule.mean))
    else:
        rows, columns = _token_grid(*image.size, min(rule.max_visual_tokens, (rule.resolution // rule.multiple) ** 2))
        size = (columns * rule.multiple, rows * rule.multiple)
    pixels = np.asarray(image.resize(size, Image.Resampling.BICUBIC))
    # The arithmetic of CLIPImageProcessor: scaled in float64, the rest in float32; once for each of 256 values
    levels = (np.arange(256) * (1 / 255)).astype(np.float32)
    channels = [
        ((levels - np.float32(mean)) / np.float32(std))[pixels[..., channel]]
        for channel, (mean, std) in enumerate(zip(rule.mean, rule.std, strict=True))
    ]
    return np.stack(channels)


def _square(image: Image.Image, fill: tuple[int, int, int]) -> Image.Image:
    side = max(image.size)
    square = Image.new("RGB", (side, side), fill)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _token_grid(width: int, height: int, limit: int) -> tuple[int, int]:
    """(rows, columns), at most `limit` tokens, that keep the aspect ratio best; each side rounded to whole tokens.

    Where rounding goes over the limit, one of the sides is cut: the one that leaves the ratio closer.
    """
    rows = min(max(int(math.sqrt(limit * height / width) + 0.5), 1), limit)
    columns = min(max(int(math.sqrt(limit * width / height) + 0.5), 1), limit)
    if rows * columns <= limit:
        return rows, columns

    def distortion(grid: tuple[int, int]) -> float:
        across, down = grid[1] * height, grid[0] * width
        return max(across / down, down / across)

    return min((rows, limit // rows), (limit // columns, columns), key=distortion)
