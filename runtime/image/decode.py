"""Image files in: any file a viewer would show becomes 8-bit RGB.

`open_image` decodes a file, bytes or a Pillow image and settles everything that Pillow's own conversion leaves open:
orientation, transparency, deep greyscale, files that are broken or too large.
"""

import os
import stat
import struct
from collections.abc import Callable, Collection, Generator, Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any, BinaryIO, cast

import numpy as np
from PIL import ExifTags, Image

from runtime.errors import UserError
from runtime.image.limits import check_structure
from runtime.types import ImageSource

# Largest image that is decoded: the size at which Pillow refuses by default. In memory, 4 bytes a pixel: 683 MiB.
MAX_PIXELS = 178_956_970
# Opening untrusted bytes must neither start a program (EPS runs Ghostscript) nor open whatever a wrapper holds (IPTC).
_REFUSED_FORMATS = frozenset({"EPS", "IPTC"})
_HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
_OTHER_FORMATS = {
    b"%PDF": "a PDF document",
    b"<svg": "an SVG drawing",
    b"<?xml": "an XML document, perhaps an SVG drawing",
    b"\0\0\0\x0cJXL ": "a JPEG XL image",
    b"\xff\x0a": "a JPEG XL image",
    b"\x1a\x45\xdf\xa3": "a video (WebM)",
    b"%!PS": "a PostScript document",
}
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
# Pillow gives a PNG's transparent colour in the file's samples but the pixels in 8 bits; these bring it to 8 bits.
_PNG_SAMPLE_TO_8_BITS: dict[str, Callable[[Any], Any]] = {
    "L;2": lambda sample: sample * 85,
    "L;4": lambda sample: sample * 17,
    "RGB;16B": lambda samples: tuple(sample >> 8 for sample in samples),
}
_TIFF_WIDTH, _TIFF_HEIGHT, _TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_SAMPLE_FORMAT = 256, 257, 258, 262, 339
_TIFF_WHITE_IS_ZERO, _TIFF_UNSIGNED = 0, 1  # values of the last two


def open_image(
    source: ImageSource,
    max_pixels: int = MAX_PIXELS,
    formats: Collection[str] | None = None,
) -> Image.Image:
    """Decode an image as a viewer would show it.

    source: a path, the bytes of an image file, such a file opened for reading, an array uint8 [H, W, 3] (red first) or
    [H, W], or a Pillow image (which is loaded, but otherwise left as it is).
    max_pixels: the largest width * height to decode; a larger image is refused once its header has been read, a larger
    icon (ICO, ICNS) once Pillow has decoded it, within MAX_PIXELS.
    formats: Pillow's names of those that are taken, from a path or bytes; None: all that are safe to open.

    Returns a new RGB image, 8 bits a channel:
    - turned upright by its EXIF (or XMP) orientation; metadata that cannot be read counts as upright;
    - the first frame or page of an animation or a document; of a Pillow image, the frame it stands at;
    - anything transparent over white, except that a bitmap (BMP) without any opaque pixel is opaque;
    - 16-bit greyscale scaled over its full range (TIFF: by its declared bits, inverted where zero is white);
    - 32-bit integer and float greyscale, whose full range no file states, by what its finite values fit into: 0..1
      (floats only), 0..255, 0..65535 (taken for granted in a PGM), or else stretched from their least to their
      greatest. NaN and -inf turn black, inf turns white;
    - everything else by Pillow's `convert("RGB")`; plain RGB and L images are exactly that. Colour profiles are not
      applied: the models were trained without.

    Raises UserError, one line that names the file (or "image data", or "image"), if there is no such file, or it is
    empty, not an image, truncated, corrupt, without pixels or larger than `max_pixels`, and for another kind of source.
    """
    if isinstance(source, np.ndarray):
        source = _of_array(source)
    if isinstance(source, Image.Image):
        with _damage_as_user_error("image"):
            rgb = _decode(source, "image", max_pixels)
            return rgb.copy() if rgb is source else rgb
    if not isinstance(source, str | os.PathLike):
        return _open_content(source, max_pixels, formats)
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
            return _open_stream(file, status.st_size, name, max_pixels, formats)
    except OSError as error:
        raise UserError(f"{name}: {error.strerror or error}") from error
    except ValueError as error:  # no file system takes such a path: it has a null byte, for one
        raise UserError(f"{name}: not a path ({error})") from error


def _of_array(pixels: np.ndarray) -> Image.Image:
    if pixels.dtype != np.uint8 or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3)):
        found = f"{pixels.dtype} {list(pixels.shape)}"
        raise UserError(f"image: an array of {found}; expected uint8 [height, width, 3], red first")
    return Image.fromarray(pixels)


def _open_content(source: Any, max_pixels: int, formats: Collection[str] | None) -> Image.Image:
    """The content of a file, or a file opened for reading."""
    content = source.read() if hasattr(source, "read") else source
    if not isinstance(content, bytes | bytearray | memoryview):
        found = type(content).__name__ if content is source else f"a file of {type(content).__name__}"
        raise UserError(f"image: {found} is none; expected a path, bytes, a file opened with 'rb' or an array")
    stream = BytesIO(cast(bytes, content))
    return _open_stream(stream, stream.getbuffer().nbytes, "image data", max_pixels, formats)


def _open_stream(
    stream: BinaryIO, size: int, name: str, max_pixels: int, formats: Collection[str] | None
) -> Image.Image:
    if size == 0:
        raise UserError(f"{name}: is empty; expected an image")
    check_structure(stream.read(), name)
    stream.seek(0)
    with _damage_as_user_error(name):
        return _decode(_identify(stream, name, formats), name, max_pixels)


@contextmanager
def _damage_as_user_error(name: str) -> Generator[None]:
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


def _identify(stream: BinaryIO, name: str, formats: Collection[str] | None) -> Image.Image:
    """Find the format and read the header, as `Image.open` does.

    `Image.open` also judges the size, by a limit that is global to the process, and warns. To silence it would take
    a change to that limit or to the warning filters, under the feet of other threads; so the plugins are asked here.
    """
    prefix = stream.read(16)
    suspicion = ""
    for identifier in _formats():
        if formats is not None and identifier not in formats:
            continue
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
    usual = "PNG, JPEG, WebP, GIF, TIFF, BMP or another format Pillow reads"
    what = f"{known}, which is not supported" if (known := _known_format(prefix)) else "not an image"
    raise UserError(f"{name}: {what}; expected {usual if formats is None else ', '.join(formats)}")


def _known_format(prefix: bytes) -> str | None:
    """Names what begins with these 16 bytes, of formats that people send and nobody here opens."""
    if prefix[4:8] == b"ftyp":
        return "a HEIC image" if prefix[8:12] in _HEIC_BRANDS else "a video (MP4)"
    return next((name for start, name in _OTHER_FORMATS.items() if prefix.lstrip().startswith(start)), None)


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
    elif _has_empty_alpha(image):
        rgb = image.convert("RGB")
    elif image.has_transparency_data:
        rgb = _over_white(image, transparent)
    else:
        rgb = image if image.mode == "RGB" else image.convert("RGB")
    return _upright(rgb, image)


def _has_empty_alpha(image: Image.Image) -> bool:
    """Whether it is a bitmap whose alpha is zero everywhere: writers that know of no alpha leave it so."""
    return image.format in ("BMP", "DIB") and image.mode == "RGBA" and image.getchannel("A").getextrema() == (0, 0)


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
        image.im = Image.new(image.mode, (_tiff_tag(image, _TIFF_WIDTH), _tiff_tag(image, _TIFF_HEIGHT))).im


def _png_transparent_colour(image: Image.Image) -> int | tuple[int, int, int] | None:
    """The transparent colour in 8 bits of a PNG whose samples have more or fewer, before it is loaded; else None.

    Of 16-bit colours Pillow keeps the high bytes, so neighbours that differ in the low bytes turn transparent too.
    """
    colour = image.info.get("transparency")
    tile = getattr(image, "tile", None)
    if image.format != "PNG" or colour is None or not tile:
        return None
    to_8_bits = _PNG_SAMPLE_TO_8_BITS.get(tile[0].args)
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


def _tiff_tag(image: Image.Image, tag: int, default: int | None = None) -> Any:
    value = getattr(image, "tag_v2", {}).get(tag, default)
    return cast(tuple[Any, ...], value)[0] if isinstance(value, tuple) else value


def _upright(rgb: Image.Image, image: Image.Image) -> Image.Image:
    """`rgb`, made from `image`, turned as the metadata of `image` say.

    Not Pillow's `exif_transpose`: that writes the remaining metadata anew and fails on tags it cannot write.
    """
    try:
        turn = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # broken metadata raise as many types as broken pixels, and no viewer minds them
        return rgb
    return rgb if turn is None else rgb.transpose(turn)
