"""Decoding against Pillow's own conversion and values worked out by hand; damaged files."""

import math
import random
import re
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO, StringIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, PngImagePlugin, TiffImagePlugin

from runtime.errors import UserError
from runtime.image.decode import MAX_PIXELS, open_image

WHITE, BLACK, RED = (255, 255, 255), (0, 0, 0), (255, 0, 0)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, form: str, **options) -> bytes:
    buffer = BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def png(width: int, height: int, depth: int, colour: int, rows: bytes, before: list = (), after: list = ()) -> bytes:
    """A PNG byte by byte: `rows` with their filter bytes; `before` and `after` the pixels, (name, body) of chunks."""
    header = (b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    chunks = [header, *before, (b"IDAT", zlib.compress(rows)), *after, (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )


def grey_tiff(bits: int, row: bytes, width: int, photometric: int = 1) -> bytes:
    """A little-endian TIFF of one row of unsigned grey samples; photometric 1: black is zero, 0: white is zero."""
    tags = {256: width, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 1, 279: len(row)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return struct.pack("<2sHI", b"II", 42, 8 + len(row)) + row + struct.pack("<H", len(tags)) + entries + bytes(4)


def pixels(image: Image.Image) -> list[tuple[int, int, int]]:
    assert image.mode == "RGB"
    return [tuple(pixel) for row in np.asarray(image).tolist() for pixel in row]


def greys(source) -> list[int]:
    """The levels of an image that must have come out grey."""
    opened = pixels(open_image(source))
    assert all(red == green == blue for red, green, blue in opened)
    return [red for red, _, _ in opened]


def refusal(source, **options) -> str:
    """The message of the UserError that opening `source` must raise: one printable line."""
    with pytest.raises(UserError) as caught:
        open_image(source, **options)
    assert str(caught.value).isprintable()
    return str(caught.value)


# --- decoding: ways in ---


def test_path_bytes_and_image_give_the_same(tmp_path: Path):
    data = encoded(noise(20, 10), "PNG")
    path = tmp_path / "näme with space.jpg"  # the bytes tell the format, not the name
    path.write_bytes(data)
    expected = pixels(noise(20, 10))
    for source in (path, str(path), data, Image.open(path), noise(20, 10)):
        assert pixels(open_image(source)) == expected


def test_an_image_given_stays_as_it_was():
    source = Image.new("RGBA", (2, 3), (255, 0, 0, 0))
    opened = open_image(source)
    assert (source.mode, source.size, source.getpixel((0, 0))) == ("RGBA", (2, 3), (255, 0, 0, 0))
    rgb = noise(4, 4)
    opened = open_image(rgb)
    opened.paste(BLACK, (0, 0, 4, 4))
    assert pixels(rgb) == pixels(noise(4, 4))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM"])
def test_plain_images_are_exactly_pillows_conversion(form: str):
    for mode in ("RGB", "L"):
        data = encoded(noise(37, 23).convert(mode), form)
        assert pixels(open_image(data)) == pixels(Image.open(BytesIO(data)).convert("RGB"))


def test_colours_and_bits_beyond_rgb():
    assert pixels(open_image(Image.new("CMYK", (1, 1), (0, 255, 255, 0)))) == [RED]
    assert pixels(open_image(Image.new("YCbCr", (1, 1), (255, 128, 128)))) == [WHITE]
    assert pixels(open_image(Image.new("HSV", (1, 1), (0, 255, 255)))) == [RED]
    assert pixels(open_image(Image.new("RGBX", (1, 1), (255, 0, 0, 0)))) == [RED]
    bits = Image.new("1", (2, 1))
    bits.putpixel((0, 0), 255)
    for source in (bits, encoded(bits, "PNG"), encoded(bits, "TIFF")):
        assert greys(source) == [255, 0]


@pytest.mark.parametrize("lightness", [0, 50, 100])
def test_lab_is_converted_by_its_lightness(lightness: int):
    linear = ((lightness + 16) / 116) ** 3 if lightness > 8 else 0
    expected = round(255 * (1.055 * linear ** (1 / 2.4) - 0.055)) if lightness else 0
    image = Image.new("LAB", (2, 1), (round(lightness * 2.55), 128, 128))
    for source in (image, encoded(image, "TIFF")):
        np.testing.assert_allclose(pixels(open_image(source)), expected, atol=1)


def test_cmyk_files_are_not_inverted():
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    jpeg = encoded(image, "JPEG", quality=100)
    assert b"Adobe" in jpeg  # the marker of inverted samples
    for data in (jpeg, encoded(image, "TIFF")):
        np.testing.assert_allclose(pixels(open_image(data))[0], RED, atol=3)


# --- decoding: orientation ---

# What a viewer does to the stored rows, by orientation.
UPRIGHT = {
    0: lambda rows: rows,
    1: lambda rows: rows,
    2: lambda rows: rows[:, ::-1],
    3: lambda rows: rows[::-1, ::-1],
    4: lambda rows: rows[::-1],
    5: lambda rows: rows.swapaxes(0, 1),
    6: lambda rows: rows[::-1].swapaxes(0, 1),
    7: lambda rows: rows[::-1, ::-1].swapaxes(0, 1),
    8: lambda rows: rows[:, ::-1].swapaxes(0, 1),
    9: lambda rows: rows,
}


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[274] = orientation
    return tags


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_orientation_is_applied(orientation: int):
    image = noise(16, 8)
    forms = [("PNG", {}), ("JPEG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})]
    if 1 <= orientation <= 8:  # libtiff writes no other
        forms.append(("TIFF", {"compression": "tiff_lzw"}))
    for form, options in forms:
        data = encoded(image, form, **options)
        turned = encoded(image, form, exif=exif(orientation), **options)
        np.testing.assert_array_equal(open_image(turned), UPRIGHT[orientation](np.asarray(open_image(data))), form)


def test_orientation_applies_to_transparent_and_deep_images():
    half = Image.new("LA", (2, 1), (0, 255))
    half.putpixel((1, 0), (0, 0))
    assert greys(encoded(half, "PNG", exif=exif(3))) == [255, 0]
    deep = Image.fromarray(np.array([[0, 65535]], np.uint16))
    assert greys(encoded(deep, "PNG", exif=exif(3))) == [255, 0]


def test_orientation_from_xmp():
    packet = PngImagePlugin.PngInfo()
    packet.add_itxt("XML:com.adobe.xmp", '<x:xmpmeta><rdf:Description tiff:Orientation="3"/></x:xmpmeta>')
    image = noise(8, 8)
    opened = open_image(encoded(image, "PNG", pnginfo=packet))
    np.testing.assert_array_equal(opened, np.asarray(image)[::-1, ::-1])


@pytest.mark.parametrize(
    "body",
    [b"", b"Exif\0\0", b"Exif\0\0II*\0", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0" + bytes(40), b"Exif\0\0garbage"],
)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_exif_leaves_the_image_as_stored(body: bytes):
    image = noise(8, 8)
    jpeg = encoded(image, "JPEG", exif=body)
    assert pixels(open_image(jpeg)) == pixels(Image.open(BytesIO(jpeg)))


def test_exif_that_pillow_cannot_even_parse():
    profile = (b"tEXt", b"Raw profile type exif\0\nexif\n4\nno hex digits")
    data = png(2, 1, 8, 0, bytes([0, 10, 20]), before=[profile])
    with pytest.raises(ValueError, match="hex"):
        Image.open(BytesIO(data)).getexif()
    assert greys(data) == [10, 20]


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's remarks on the tag
def test_orientation_beside_a_broken_tag():
    image = noise(5, 3)
    # A good orientation, then a text whose 500 characters lie far beyond the end.
    body = struct.pack("<2sHIHHHIIHHIII", b"II", 42, 8, 2, 274, 3, 1, 3, 305, 2, 500, 9000, 0)
    opened = open_image(encoded(image, "PNG", exif=b"Exif\0\0" + body))
    np.testing.assert_array_equal(opened, np.asarray(image)[::-1, ::-1])


# --- decoding: frames ---


@pytest.mark.parametrize(("form", "options"), [("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})])
def test_the_first_frame_is_shown(form: str, options: dict):
    frames = [Image.new("RGB", (16, 16), colour) for colour in (RED, WHITE, BLACK)]
    data = encoded(frames[0], form, save_all=True, append_images=frames[1:], **options)
    assert Image.open(BytesIO(data)).n_frames == 3
    assert pixels(open_image(data)) == [RED] * 256


# --- decoding: transparency over white ---

HALF_RED = (255, 127, 127)  # (255, 0, 0) at alpha 128: 255 - 128 = 127 in the others


@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP"])
def test_alpha_is_composited_over_white(form: str):
    image = Image.new("RGBA", (3, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (255, 0, 0, 128))
    image.putpixel((2, 0), (255, 0, 0, 0))
    options = {"lossless": True, "exact": True} if form == "WEBP" else {}
    for source in (image, encoded(image, form, **options)):
        assert pixels(open_image(source)) == [RED, HALF_RED, WHITE]


def test_grey_and_palette_alpha():
    for source in (grey := Image.new("LA", (1, 1), (0, 128)), encoded(grey, "PNG")):
        assert greys(source) == [127]
    assert greys(Image.new("PA", (1, 1), (0, 0))) == [255]
    assert greys(Image.new("La", (1, 1), (64, 128))) == [191]  # premultiplied: 64 + (255 - 128)
    assert pixels(open_image(Image.new("RGBa", (1, 1), (128, 0, 0, 128)))) == [HALF_RED]


def palette_image() -> Image.Image:
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 0, 0, 0, 0, 255])
    image.putdata([0, 1, 2])
    return image


def test_palette_transparency():
    blue = (0, 0, 255)
    assert pixels(open_image(encoded(palette_image(), "PNG"))) == [RED, BLACK, blue]
    for form in ("PNG", "GIF"):
        assert pixels(open_image(encoded(palette_image(), form, transparency=1))) == [RED, WHITE, blue]
    shades = encoded(palette_image(), "PNG", transparency=bytes([128, 0, 255]))
    assert pixels(open_image(shades)) == [HALF_RED, WHITE, blue]
    alpha_palette = Image.new("P", (1, 1))
    alpha_palette.putpalette([255, 0, 0, 128], "RGBA")
    assert pixels(open_image(alpha_palette)) == [HALF_RED]


@pytest.mark.parametrize(
    ("depth", "colour", "row", "width", "key", "expected"),
    [
        (8, 0, [10, 20], 2, [0, 20], [10, 255]),
        (1, 0, [0b01000000], 2, [0, 0], [255, 255]),
        (1, 0, [0b01000000], 2, [0, 1], [0, 255]),
        (2, 0, [0b00011011], 4, [0, 2], [0, 85, 255, 255]),
        (4, 0, [0x3F], 2, [0, 15], [51, 255]),
        (4, 0, [0x3F], 2, [0, 3], [255, 255]),
        (16, 0, [0, 0, 0x80, 0x80], 2, [0, 0], [255, 128]),
        (8, 2, [9, 9, 9, 7, 7, 7], 2, [0, 7, 0, 7, 0, 7], [9, 255]),
        (16, 2, [9, 1, 9, 1, 9, 1, 7, 2, 7, 2, 7, 2], 2, [7, 2, 7, 2, 7, 2], [9, 255]),
    ],
)
def test_the_transparent_colour_of_a_png_of_any_depth(depth, colour, row, width, key, expected):
    data = png(width, 1, depth, colour, bytes([0, *row]), before=[(b"tRNS", bytes(key))])
    assert greys(data) == expected


# --- decoding: deep greyscale ---

DEEP = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
DEEP_IN_8_BITS = [0, 0, 1, 1, 128, 255]  # value / 257, rounded: 128 / 257 = 0.498, 129 / 257 = 0.502


def test_16_bit_grey_is_scaled_not_clipped():
    deep = Image.fromarray(DEEP)
    big_endian = encoded(Image.frombytes("I;16B", (6, 1), DEEP.astype(">u2").tobytes()), "TIFF")
    assert Image.open(BytesIO(big_endian)).mode == "I;16B"
    pgm = b"P5 6 1 65535\n" + DEEP.astype(">u2").tobytes()
    for source in (deep, encoded(deep, "PNG"), encoded(deep, "TIFF"), big_endian, pgm):
        assert greys(source) == DEEP_IN_8_BITS


def test_tiff_grey_by_its_own_scale():
    assert greys(grey_tiff(12, bytes([0xFF, 0xF8, 0x00, 0x00, 0x00, 0x00]), 4)) == [255, 128, 0, 0]
    assert greys(grey_tiff(16, DEEP.astype("<u2").tobytes(), 6, photometric=0)) == [255, 255, 254, 254, 127, 0]
    assert greys(grey_tiff(8, bytes([0, 255]), 2, photometric=0)) == [255, 0]
    assert greys(grey_tiff(32, struct.pack("<3I", 0, 2**31, 2**32 - 1), 3)) == [0, 128, 255]


@pytest.mark.filterwarnings("error::RuntimeWarning")  # a division by zero
@pytest.mark.parametrize(
    ("dtype", "values", "expected"),
    [
        (np.int32, [0, 1, 255], [0, 1, 255]),
        (np.int32, [0, 257, 65535], [0, 1, 255]),
        (np.int32, [0, 100_000, 200_000], [0, 128, 255]),
        (np.int32, [-100, 0, 100], [0, 128, 255]),
        (np.int32, [-(2**31), 0, 2**31 - 1], [0, 128, 255]),
        (np.int32, [70_000, 70_000, 70_000], [0, 0, 0]),
        (np.float32, [0, 0.5, 1], [0, 128, 255]),
        (np.float32, [0, 0.1, 0.2], [0, 26, 51]),
        (np.float32, [0, 1.5, 255], [0, 2, 255]),
        (np.float32, [0, 257, 65535], [0, 1, 255]),
        (np.float32, [-1, 0, 1], [0, 128, 255]),
        (np.float32, [-3e38, 0, 3e38], [0, 128, 255]),
        (np.float32, [1e20, 1e20, 1e20], [0, 0, 0]),
        (np.float32, [math.nan, 0.2, 1], [0, 51, 255]),
        (np.float32, [-math.inf, math.inf, 0.2], [0, 255, 51]),
        (np.float32, [math.nan, math.nan, math.inf], [0, 0, 255]),
    ],
)
def test_grey_of_unstated_range(dtype: type, values: list, expected: list[int]):
    image = Image.fromarray(np.array([values], dtype))
    for source in (image, encoded(image, "TIFF")):
        assert greys(source) == expected


# --- decoding: refusals ---


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b"hello, this is no picture at all\n", "not an image"),
        (b"%PDF-1.4\n%\xe2\xe3\xcf\xd3\n", "a PDF document, which is not supported"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "a HEIC image, which is not supported"),
        (b"\0\0\0\x18ftypisom\0\0\2\0isomiso2", "a video"),
        (b"\n <svg xmlns='http://www.w3.org/2000/svg'/>", "an SVG drawing"),
        (b"\xff\x0a\xfa\x7f\x01\x90\x08\x06\x01\0", "a JPEG XL image"),
        (b"\x1a\x45\xdf\xa3\x01\0\0\0", "a video"),
        (bytes(5000), "not an image"),
        (encoded(noise(20, 20), "EPS"), "a PostScript document"),  # would run Ghostscript
        (encoded(noise(20, 20), "PNG")[:20], "truncated"),
        (encoded(noise(20, 20), "PNG")[:300], "truncated"),
        (encoded(noise(20, 20), "JPEG")[:400], "truncated"),
        (encoded(noise(20, 20), "BMP")[:100], "truncated"),
        (png(2, 2, 8, 2, b"\0too short"), "truncated"),
        (png(2, 2, 8, 7, bytes(14)), "corrupt"),
        (encoded(noise(9, 9), "PNG").replace(b"IDAT", b"IDOT"), "corrupt"),
        (png(0, 5, 8, 2, b""), "corrupt"),
    ],
)
def test_files_that_are_no_images(tmp_path: Path, content: bytes, said: str):
    path = tmp_path / "broken.png"
    path.write_bytes(content)
    message = refusal(path)
    assert message.startswith(f"{path}: ")
    assert said in message
    assert refusal(content) == message.replace(str(path), "image data")


def test_paths_that_lead_to_no_file(tmp_path: Path):
    assert refusal(tmp_path / "none.png") == f"{tmp_path}/none.png: No such file or directory"
    assert refusal(tmp_path) == f"{tmp_path}: is a directory; expected an image file"
    assert "not a regular file" in refusal("/dev/null")
    assert "not a path" in refusal("null\0byte.png")
    assert "two\\nlines.png" in refusal(tmp_path / "two\nlines.png")


def test_an_image_without_pixels():
    assert "0 x 5" in refusal(Image.new("RGB", (0, 5)))


def test_too_many_pixels_are_refused_before_decoding(tmp_path: Path):
    path = tmp_path / "bomb.png"
    path.write_bytes(png(20_000, 10_000, 8, 2, b"no pixel is ever read"))
    message = refusal(path)
    assert str(path) in message
    assert "20000 x 10000" in message
    assert str(MAX_PIXELS) in message


def test_the_limit_is_the_callers():
    data = encoded(noise(30, 20), "PNG")
    assert open_image(data, max_pixels=600).size == (30, 20)
    assert "599" in refusal(data, max_pixels=599)
    assert "599" in refusal(noise(30, 20), max_pixels=599)


@pytest.mark.parametrize("pillows_limit", [500, 100])  # where Pillow would warn of 600 pixels, and where it would raise
def test_pillows_own_limit_is_not_heard_of(monkeypatch: pytest.MonkeyPatch, pillows_limit: int):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillows_limit)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for form in ("PNG", "JPEG", "GIF", "TIFF", "BMP"):
            assert open_image(encoded(noise(30, 20), form)).size == (30, 20)
        for compression in ("raw", "tiff_lzw"):
            turned = encoded(noise(30, 20), "TIFF", compression=compression, exif=exif(6))
            assert open_image(turned).size == (20, 30)


def test_a_frame_larger_than_its_icon_is_refused(monkeypatch: pytest.MonkeyPatch):
    inner = encoded(noise(30, 20), "PNG")
    icon = struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 24, len(inner), 22) + inner
    with pytest.warns(UserWarning, match="expected size"):
        assert "30 x 20" in refusal(icon, max_pixels=599)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert "too many pixels" in refusal(icon)


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("name", [b"zTXt", b"iTXt"])
def test_a_text_chunk_that_swells_is_an_error(place: str, name: bytes):
    text = zlib.compress(bytes(PngImagePlugin.MAX_TEXT_CHUNK + 1))
    body = b"key\0\0" + text if name == b"zTXt" else b"key\0\x01\0\0\0" + text
    assert "too large" in refusal(png(1, 1, 8, 0, b"\0\0", **{place: [(name, body)]}))


# --- decoding: damage of every kind ---


def samples() -> list[bytes]:
    image = noise(24, 18).resize((48, 36))
    deep = Image.fromarray(np.arange(48 * 36, dtype=np.uint16).reshape(36, 48) * 37)
    return [
        encoded(image, "PNG", exif=exif(6)),
        encoded(image.convert("P"), "PNG", transparency=3),
        encoded(deep, "PNG"),
        encoded(image, "JPEG", exif=exif(6)),
        encoded(image, "JPEG", progressive=True),
        encoded(image.convert("CMYK"), "JPEG"),
        encoded(image, "GIF", save_all=True, append_images=[noise(48, 36)]),
        encoded(image, "WEBP"),
        encoded(image, "WEBP", lossless=True, exif=exif(6)),
        encoded(image, "TIFF", exif=exif(6)),
        encoded(image.convert("LAB"), "TIFF"),
        encoded(deep, "TIFF", compression="tiff_lzw"),
        encoded(image.convert("F"), "TIFF"),
        encoded(image, "BMP"),
        encoded(image.convert("P"), "BMP"),
    ]


def outcome(data: bytes) -> str:
    """What became of damaged bytes; any other exception than UserError fails the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks on broken metadata
        try:
            image = open_image(data, max_pixels=1_000_000)
        except UserError as error:
            assert str(error).isprintable()
            return "refused"
    assert image.mode == "RGB"
    assert np.asarray(image).shape == (image.height, image.width, 3)
    return "shown"


def test_whole_files_are_shown_and_truncated_ones_refused():
    for data in samples():
        assert outcome(data) == "shown"
        assert outcome(data[: len(data) // 3]) == "refused"


@settings(max_examples=2000)
@given(sample=st.sampled_from(samples()), seed=st.integers(0, 2**32), in_header=st.booleans(), is_cut=st.booleans())
def test_damage_anywhere_is_shown_or_refused(sample: bytes, seed: int, in_header: bool, is_cut: bool):
    """Some bytes changed; then perhaps cut, and noise put behind."""
    chance, damaged = random.Random(seed), bytearray(sample)
    for _ in range(chance.choice((1, 4, 16))):
        damaged[chance.randrange(100 if in_header else len(sample))] ^= chance.randrange(1, 256)
    kept = chance.randrange(len(sample)) if is_cut else len(sample)
    outcome(bytes(damaged[:kept]) + chance.randbytes(300 * is_cut))


def test_memory_running_out_is_not_called_damage(monkeypatch: pytest.MonkeyPatch):
    def exhausted(image):
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", exhausted)
    with pytest.raises(MemoryError):
        open_image(encoded(noise(4, 4), "BMP"))


# --- threads ---


def test_many_threads_and_no_global_change():
    good, broken = samples(), [data[: len(data) // 3] for data in samples()]
    expected = [open_image(data).tobytes() for data in good]

    def state() -> tuple:
        limits = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, PngImagePlugin.MAX_TEXT_CHUNK
        return *limits, TiffImagePlugin.READ_LIBTIFF, list(warnings.filters)

    def both(number: int) -> bytes:
        refusal(broken[number])
        return open_image(good[number]).tobytes()

    before = state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(both, list(range(len(good))) * 4))
    assert results == expected * 4
    assert state() == before


def test_content_may_come_in_any_usual_form():
    picture = noise(20, 30)
    content, pixels = encoded(picture, "PNG"), np.asarray(picture)
    for source in (bytearray(content), memoryview(content), BytesIO(content), pixels, pixels[::1, ::1]):
        np.testing.assert_array_equal(np.asarray(open_image(source)), pixels)
    grey = open_image(pixels[..., 0])
    np.testing.assert_array_equal(np.asarray(grey), np.stack([pixels[..., 0]] * 3, axis=-1))


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (5, "int is none; expected a path"),
        (None, "NoneType is none"),
        (StringIO("text"), "a file of str is none"),
        (np.zeros((4, 4, 3), np.float32), "float32 [4, 4, 3]; expected uint8"),
        (np.zeros((4, 4, 4), np.uint8), "uint8 [4, 4, 4]"),
        (np.zeros((3, 4, 4), np.uint8), "uint8 [3, 4, 4]"),
        (np.zeros((1, 4, 4, 3), np.uint8), "uint8 [1, 4, 4, 3]"),
        (np.zeros((0, 4, 3), np.uint8), "no pixels"),
        (bytearray(), "is empty"),
    ],
)
def test_what_is_no_image_is_told_what_is_expected(source, said):
    with pytest.raises(UserError, match=re.escape(said)) as error:
        open_image(source)
    assert "\n" not in str(error.value)
