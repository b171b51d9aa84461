"""Images in: any file a viewer would show becomes 8-bit RGB, and RGB becomes the encoder's input.

`open_image` decodes a file, bytes or a Pillow image and settles everything that Pillow's own conversion leaves open:
orientation, transparency, deep greyscale, files that are broken or too large. `preprocess` sizes and normalises.

Sources:
- the aspect mode `pad` follows the original LLaVA: its `process_images` pads to a square with the mean colour
  (`expand2square`) and hands the square to CLIP's image processor;
- the arithmetic of that processor, and the aspect mode `crop`, follow `CLIPImageProcessor` of transformers;
- `any` is this project's own: the encoder is convolutional and takes every multiple of its stride.
"""

import dataclasses
import math
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image

from runtime.errors import UserError

ASPECTS = ("pad", "any", "crop")

# Largest side of a model input, in pixels: 16,384 visual tokens at stride 64, beyond any decoder's context.
MAX_RESOLUTION = 8192

# Largest image that is decoded: the size at which Pillow refuses by default. In memory, 4 bytes a pixel: 683 MiB.
MAX_PIXELS = 178_956_970

# Opening untrusted bytes must neither start a program (EPS runs Ghostscript) nor open whatever a wrapper holds (IPTC).
_REFUSED_FORMATS = frozenset({"EPS", "IPTC"})

# What Pillow's plugins raise to say "not mine"; anything else means "mine, but broken".
_NOT_IDENTIFIED = (SyntaxError, IndexError, TypeError, struct.error)

# What undoes each EXIF orientation; 1 and invalid values need nothing.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# P too, as its palette may have alpha.
_MAYBE_TRANSPARENT = frozenset({"RGBA", "RGBa", "LA", "La", "PA", "P"})

# Pillow gives a PNG's transparent colour in the file's samples but the pixels in 8 bits; these bring it to 8 bits.
_PNG_SAMPLE_TO_8_BITS = {
    "L;2": lambda sample: sample * 85,
    "L;4": lambda sample: sample * 17,
    "RGB;16B": lambda samples: tuple(sample >> 8 for sample in samples),
}

_TIFF_WIDTH, _TIFF_HEIGHT, _TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_SAMPLE_FORMAT = 256, 257, 258, 262, 339
_TIFF_WHITE_IS_ZERO, _TIFF_UNSIGNED = 0, 1  # values of the last two

# Up to this side, in pixels, and this ratio of the sides, which every photograph is within, `pad` and `crop` are exact.
# Beyond, they simplify: a few hundred bytes of PNG (1 x 60000) would cost minutes or gigabytes otherwise.
_EXACT_SIDE = 24_576
_EXACT_RATIO = 16
_THIN_SIDE = 8192  # what `pad` shrinks a picture of a larger ratio to

_STRIP_ROWS = 256


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

    def to_dict(self) -> dict:
        """The rule as plain JSON types."""
        return dataclasses.asdict(self) | {"mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, data: dict) -> "ImageRule":
        """The rule that `to_dict` wrote. Raises UserError naming the key that is missing, unknown or wrong."""
        if not isinstance(data, dict):
            raise UserError(f"image rule: expected an object, found {type(data).__name__}")
        for key in data:
            if key not in _FIELD_READERS:
                raise UserError(f"image rule: unknown key {key!r}; expected {', '.join(_FIELD_READERS)}")
        for key in _FIELD_READERS:
            if key not in data:
                raise UserError(f"image rule: key {key!r} is missing")
        return cls(**{key: read(key, data[key]) for key, read in _FIELD_READERS.items()})


def _read_triple(key: str, value: object) -> tuple[float, float, float]:
    numbers = value if isinstance(value, (list, tuple)) else []
    if len(numbers) != 3 or any(isinstance(n, bool) or not isinstance(n, (int, float)) for n in numbers):
        raise UserError(f"image rule: {key!r} must be a list of three numbers, found {value!r}")
    return tuple(numbers)


def _read_whole(key: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"image rule: {key!r} must be a whole number, found {value!r}")
    return value


def _read_text(key: str, value: object) -> str:
    if not isinstance(value, str):
        raise UserError(f"image rule: {key!r} must be a string, found {value!r}")
    return value


_FIELD_READERS = {
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


def open_image(source: str | os.PathLike | bytes | Image.Image, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image as a viewer would show it.

    source: a path, the bytes of an image file, or a Pillow image (which is loaded, but otherwise left as it is).
    max_pixels: the largest width * height to decode; a larger image is refused once its header has been read.

    Returns a new RGB image, 8 bits a channel:
    - turned upright by its EXIF (or XMP) orientation; metadata that cannot be read counts as upright;
    - the first frame or page of an animation or a document; of a Pillow image, the frame it stands at;
    - anything transparent over white;
    - 16-bit greyscale scaled over its full range (TIFF: by its declared bits, inverted where zero is white);
    - 32-bit integer and float greyscale, whose full range no file states, by what its finite values fit into: 0..1
      (floats only), 0..255, 0..65535 (taken for granted in a PGM), or else stretched from their least to their
      greatest. NaN and -inf turn black, inf turns white;
    - everything else by Pillow's `convert("RGB")`; plain RGB and L images are exactly that. Colour profiles are not
      applied: the models were trained without.

    Raises UserError, one line that names the file (or "image data", or "image"), if there is no such file, or it is
    empty, not an image, truncated, corrupt, without pixels or larger than `max_pixels`.
    """
    if isinstance(source, Image.Image):
        with _damage_as_user_error("image"):
            return _decode(source, "image", max_pixels)
    if isinstance(source, bytes):
        return _open_stream(BytesIO(source), len(source), "image data", max_pixels)
    path = os.fsdecode(source)
    name = path if path.isprintable() else repr(path)
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            kind = "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise UserError(f"{name}: is {kind}; expected an image file")
        # Pillow gets the open file, not the path: from a path it may map the file into memory, and a file that someone
        # shortens meanwhile then ends the process.
        with open(path, "rb") as file:
            return _open_stream(file, status.st_size, name, max_pixels)
    except OSError as error:
        raise UserError(f"{name}: {error.strerror or error}") from error
    except ValueError as error:  # no file system takes such a path: it has a null byte, for one
        raise UserError(f"{name}: not a path ({error})") from error


def _open_stream(stream: BinaryIO, size: int, name: str, max_pixels: int) -> Image.Image:
    if size == 0:
        raise UserError(f"{name}: is empty; expected an image")
    with _damage_as_user_error(name):
        return _decode(_identify(stream, name), name, max_pixels)


@contextmanager
def _damage_as_user_error(name: str) -> Iterator[None]:
    """Pillow's plugins raise nearly every type of exception on broken files; only UserError and MemoryError leave."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(f"{name}: too many pixels ({_reason(error)})") from error
    except Exception as error:
        raise UserError(f"{name}: truncated or corrupt image ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _identify(stream: BinaryIO, name: str) -> Image.Image:
    """Find the format and read the header, as `Image.open` does.

    `Image.open` also judges the size, by a limit that is global to the process, and warns. To silence it would take
    a change to that limit or to the warning filters, under the feet of other threads; so the plugins are asked here.
    """
    prefix = stream.read(16)
    suspicion = ""
    for identifier in _formats():
        factory, accept = Image.OPEN[identifier]
        accepted = False
        try:
            accepted = accept is None or accept(prefix)
            if isinstance(accepted, str):  # the format is known, but this Pillow was built without it
                suspicion = suspicion or accepted
            elif accepted:
                stream.seek(0)
                return factory(stream, "")
        except _NOT_IDENTIFIED as error:
            # A plugin without `accept` tries every file: its failure says nothing.
            if accept is not None and accepted:
                suspicion = suspicion or f"{identifier}: {_reason(error)}"
    if suspicion:
        raise UserError(f"{name}: unsupported, truncated or corrupt image ({suspicion})")
    raise UserError(f"{name}: not an image; expected PNG, JPEG, WebP, GIF, TIFF, BMP or another format Pillow reads")


def _formats() -> Iterator[str]:
    """Pillow's names of the formats, the common ones first: only if those fail are the other plugins imported."""
    Image.preinit()
    common = tuple(Image.ID)
    yield from (identifier for identifier in common if identifier not in _REFUSED_FORMATS)
    Image.init()
    yield from (identifier for identifier in tuple(Image.ID) if identifier not in _REFUSED_FORMATS.union(common))


def _decode(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    _check_pixels(image, name, max_pixels)
    transparent = _png_transparent_colour(image)
    _reserve_tiff(image)
    image.load()
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        rgb = _deep_grey_to_8_bits(image).convert("RGB")
    elif image.mode in _MAYBE_TRANSPARENT or "transparency" in image.info:
        rgb = _over_white(image, transparent)
    else:
        rgb = image.convert("RGB")
    return _upright(rgb, image)


def _check_pixels(image: Image.Image, name: str, max_pixels: int) -> None:
    width, height = image.size
    if width * height == 0:
        raise UserError(f"{name}: has no pixels ({width} x {height})")
    if width * height > max_pixels:
        raise UserError(f"{name}: {width} x {height} pixels are more than the limit of {max_pixels}; scale it down")


def _reserve_tiff(image: Image.Image) -> None:
    """Give a TIFF its memory before it is loaded; else the plugin holds its size against Pillow's limit, and warns."""
    if image.format == "TIFF" and getattr(image, "tile", None):
        # As stored: `image.size` is already that of the image turned upright.
        image.im = Image.new(image.mode, (image.tag_v2[_TIFF_WIDTH], image.tag_v2[_TIFF_HEIGHT])).im


def _png_transparent_colour(image: Image.Image) -> int | tuple[int, int, int] | None:
    """The transparent colour in 8 bits of a PNG whose samples have more or fewer, before it is loaded; else None.

    Of 16-bit colours Pillow keeps the high bytes, so neighbours that differ in the low bytes turn transparent too.
    """
    colour = image.info.get("transparency")
    if image.format != "PNG" or colour is None or not getattr(image, "tile", None):
        return None
    to_8_bits = _PNG_SAMPLE_TO_8_BITS.get(image.tile[0].args)
    return to_8_bits and to_8_bits(colour)


def _over_white(image: Image.Image, transparent: int | tuple[int, int, int] | None) -> Image.Image:
    if transparent is not None:
        image = image.copy()
        image.info["transparency"] = transparent
    rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")  # no direct way from La
    white = Image.new("RGB", image.size, "white")
    white.paste(rgba, mask=rgba)
    return white


def _deep_grey_to_8_bits(image: Image.Image) -> Image.Image:
    """Modes I;16*, I and F as mode L, by the rules in `open_image`."""
    values = np.asarray(image)
    if (image.mode, image.format) == ("I", "TIFF") and _tiff_tag(image, _TIFF_SAMPLE_FORMAT, 1) == _TIFF_UNSIGNED:
        values = values.view(np.uint32)  # Pillow has read them as signed
    levels = values.astype(np.float64)
    black, white = _grey_range(image, levels)
    levels -= black
    levels *= 255
    levels /= white - black
    levels += 0.5
    np.nan_to_num(levels, copy=False, nan=0, posinf=255, neginf=0)
    levels = np.clip(levels, 0, 255, out=levels).astype(np.uint8)
    transparent = image.info.get("transparency")
    if transparent is not None:
        levels[values == transparent] = 255
    return Image.fromarray(levels)


def _grey_range(image: Image.Image, values: np.ndarray) -> tuple[float, float]:
    """The values that stand for black and white."""
    if image.mode not in ("I", "F"):
        full_scale = 2 ** _tiff_tag(image, _TIFF_BITS, 16) - 1
        return (full_scale, 0) if _tiff_tag(image, _TIFF_PHOTOMETRIC) == _TIFF_WHITE_IS_ZERO else (0, full_scale)
    if image.mode == "I" and image.format == "PPM":
        return 0, 65535
    finite = np.isfinite(values)
    least = values.min(where=finite, initial=np.inf)
    greatest = values.max(where=finite, initial=-np.inf)
    if least >= 0:
        for full_scale in (1, 255, 65535) if image.mode == "F" else (255, 65535):
            if greatest <= full_scale:
                return 0, full_scale
    return least, least + (greatest - least or abs(least))  # all one value: black


def _tiff_tag(image: Image.Image, tag: int, default: int | None = None) -> int | None:
    value = getattr(image, "tag_v2", {}).get(tag, default)
    return value[0] if isinstance(value, tuple) else value


def _upright(rgb: Image.Image, image: Image.Image) -> Image.Image:
    """`rgb`, made from `image`, turned as the metadata of `image` say.

    Not Pillow's `exif_transpose`: that writes the remaining metadata anew and fails on tags it cannot write.
    """
    try:
        turn = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # broken metadata raise as many types as broken pixels, and no viewer minds them
        return rgb
    return rgb if turn is None else rgb.transpose(turn)


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
    """Size and normalise an RGB image (as `open_image` returns it) for the encoder.

    resolution, aspect: override the rule's.

    Returns pixel values, float32 [3, H, W], C-contiguous, with (H, W) from `target_size`:
    - `pad`: centred on a square of the mean colour, then resized;
    - `crop`: resized until the shorter side is the resolution, then the centre cut out;
    - `any`: resized straight to (H, W);
    each with Pillow's bicubic filter; then scaled to 0..1 and normalised by the rule's mean and std.

    `pad` and `crop` equal the original to the bit, up to a longer side of 24,576 pixels and a ratio of sides of 16.
    Beyond, `pad` and `any` may first shrink the image by whole factors, and `crop` cuts the ends off the longer side.

    Raises UserError as `target_size` does.
    """
    if image.mode != "RGB":
        raise ValueError(f"preprocess takes an RGB image, as open_image returns it, not {image.mode}")
    aspect = rule.aspect if aspect is None else aspect
    height, width = target_size(*image.size, rule, resolution, aspect)
    if aspect == "pad":
        resized = _pad(image, width, tuple(int(mean * 255) for mean in rule.mean))
    elif aspect == "crop":
        resized = _crop(image, width)
    else:
        resized = _stretch(image, width, height)
    return _normalise(np.asarray(resized), rule)


def _pad(image: Image.Image, side: int, fill: tuple[int, int, int]) -> Image.Image:
    """Pad to a centred square and resize that to side x side, without ever holding the square.

    Pillow resizes rows first, rounds to 8 bits, then resizes columns. Rows of nothing but fill stay fill, so only the
    image's own rows are widened, a strip at a time: the same bytes for a fraction of the memory.
    """
    longest = _EXACT_SIDE if max(image.size) <= _EXACT_RATIO * min(image.size) else _THIN_SIDE
    image = image.reduce(math.ceil(max(image.size) / longest))
    width, height = image.size
    longer = max(width, height)
    left, top = (longer - width) // 2, (longer - height) // 2
    narrowed = Image.new("RGB", (side, longer), fill)  # the square, its rows already resized
    for y in range(0, height, _STRIP_ROWS):
        rows = min(_STRIP_ROWS, height - y)
        strip = Image.new("RGB", (longer, rows), fill)
        strip.paste(image.crop((0, y, width, y + rows)), (left, 0))
        narrowed.paste(strip.resize((side, rows), Image.Resampling.BICUBIC), (0, top + y))
    return narrowed.resize((side, side), Image.Resampling.BICUBIC)


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


def _normalise(pixels: np.ndarray, rule: ImageRule) -> np.ndarray:
    """uint8 [H, W, 3] to float32 [3, H, W].

    A channel has 256 possible values, so the original's arithmetic (scaled in float64, the rest in float32) is done
    once for each of them and looked up for every pixel.
    """
    scaled = (np.arange(256) * (1 / 255)).astype(np.float32)
    mean, std = (np.array(values, np.float32)[:, None] for values in (rule.mean, rule.std))
    levels = (scaled - mean) / std  # [3, 256]
    return np.stack([levels[channel][pixels[..., channel]] for channel in range(3)])
