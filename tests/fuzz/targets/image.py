"""Image files, as a server takes them and as the command line does."""

import io
import struct

from PIL import Image

from runtime.errors import UserError
from runtime.image.decode import open_image
from runtime.image.limits import SERVED_FORMATS
from tests.support.hostile_images import bmp_with_alpha, png_chunk, tiff

MAX_PIXELS = 1 << 16
_PNG_HEAD = b"\x89PNG\r\n\x1a\n"


def seeds() -> list[bytes]:
    gradient = Image.linear_gradient("L").resize((12, 8))
    colour, palette = gradient.convert("RGB"), gradient.convert("P")
    palette.info["transparency"] = 3
    exif = Image.Exif()
    exif[274] = 6
    pictures = [
        *((colour, kind, {}) for kind in ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM", "TGA", "PCX", "ICO", "QOI")),
        *((gradient, kind, {}) for kind in ("JPEG2000", "SGI", "DDS", "IM")),
        (colour, "JPEG", {"exif": exif, "progressive": True}),
        (colour, "WEBP", {"exif": exif, "lossless": True}),
        (palette, "PNG", {}),
        (palette, "GIF", {"save_all": True, "append_images": [palette.rotate(90, expand=False)]}),
        (gradient.convert("I;16"), "PNG", {}),
        (gradient.convert("F"), "TIFF", {}),
        (colour, "TIFF", {"compression": "tiff_lzw"}),
        (colour, "TIFF", {"compression": "jpeg"}),
        (gradient.convert("1"), "TIFF", {"compression": "group4"}),
    ]
    found = [tiff([(274, 3, 1, 6)], order=">"), bmp_with_alpha([(1, 2, 3, 4)] * 8)]
    for picture, kind, options in pictures:
        file = io.BytesIO()
        picture.save(file, kind, **options)
        found.append(file.getvalue())
    return found


def fuzz(content: bytes) -> None:
    if content.startswith(_PNG_HEAD):
        content = _with_checksums(content)
    for formats in (SERVED_FORMATS, None):
        try:
            image = open_image(content, MAX_PIXELS, formats)
        except UserError as error:
            assert "\n" not in str(error)
            if formats is None:
                raise
            continue
        assert image.mode == "RGB" and 0 < image.width * image.height <= MAX_PIXELS
        image.tobytes()


def _with_checksums(content: bytes) -> bytes:
    """A PNG with the checksums of its chunks put right, which would hide what lies behind them."""
    at, chunks = len(_PNG_HEAD), [_PNG_HEAD]
    while len(content) - at >= 12:
        (size,) = struct.unpack_from(">I", content, at)
        if at + 12 + size > len(content):
            break
        kind, data = content[at + 4 : at + 8], content[at + 8 : at + 8 + size]
        chunks.append(png_chunk(kind, data))
        at += 12 + size
    return b"".join(chunks) + content[at:]
