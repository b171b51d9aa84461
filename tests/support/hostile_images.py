"""Image files that are small and ask for much: of each kind the structure that a decoder walks, as often as it fits."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

MANY = 4 << 20  # bytes of what is repeated


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(*chunks: bytes, side: int = 8) -> bytes:
    """A grey picture with more chunks before its pixels."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
    pixels = png_chunk(b"IDAT", zlib.compress(bytes((side + 1) * side)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + pixels + png_chunk(b"IEND", b"")


def png_of_many_chunks() -> bytes:
    return png(png_chunk(b"prVt", b"") * (MANY // 12))


def png_of_many_pixel_chunks() -> bytes:
    whole = png()
    at = whole.index(b"IDAT") - 4
    return whole[:at] + png_chunk(b"IDAT", b"") * (MANY // 12) + whole[at:]


def jpeg(side: int = 64, **options) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "JPEG", **options)
    return file.getvalue()


def jpeg_of_many_scans(scans: int, width: int = 2000, height: int = 2000) -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    file = io.BytesIO()
    Image.new("L", (width, height)).save(file, "JPEG", progressive=True)
    content = file.getvalue()
    last, end = content.rindex(b"\xff\xda"), content.rindex(b"\xff\xd9")
    return content[:last] + content[last:end] * scans + content[end:]


def jpeg_of_many_segments() -> bytes:
    content = jpeg()
    return content[:2] + b"\xff\xec\x00\x02" * (MANY // 4) + content[2:]


def jpeg_of_much_filling() -> bytes:
    content = jpeg()
    return content[:2] + b"\xff" * MANY + content[2:]


def tiff(entries: list[tuple[int, int, int, int]], rest: bytes = b"", order: str = "<", side: int = 8) -> bytes:
    """An uncompressed grey picture with more entries (tag, type, count, value or offset) in its directory."""
    usual = {256: (3, 1, side), 257: (3, 1, side), 258: (3, 1, 8), 259: (3, 1, 1), 262: (3, 1, 1), 277: (3, 1, 1)}
    usual |= {273: (4, 1, 8), 278: (3, 1, side), 279: (4, 1, side * side)}
    given = {tag: (kind, count, value) for tag, kind, count, value in entries}
    listed = sorted({tag: (tag, *entry) for tag, entry in (usual | given).items()}.values())
    pixels = bytes(side * side)
    magic = b"II*\0" if order == "<" else b"MM\0*"
    head = magic + struct.pack(f"{order}I", 8 + len(pixels) + len(rest))
    directory = struct.pack(f"{order}H", len(listed))
    for tag, kind, count, value in listed:
        short = kind == 3 and count == 1
        held = struct.pack(f"{order}HH", value, 0) if short else struct.pack(f"{order}I", value)
        directory += struct.pack(f"{order}HHI", tag, kind, count) + held
    return head + pixels + rest + directory + bytes(4)


def tiff_of_overlapping_entries() -> bytes:
    """Each of 4,000 entries holds the same megabyte."""
    return tiff([(tag, 7, 1 << 20, 72) for tag in range(40_000, 44_000)], bytes(1 << 20))


def tiff_of_many_strips() -> bytes:
    count = MANY // 4
    return tiff([(273, 4, count, 72), (279, 4, count, 72)], bytes(4 * count))


def exif_of_overlapping_entries() -> bytes:
    """An EXIF block, larger than a JPEG can hold, that turns the picture by 90 degrees."""
    block = tiff([(274, 3, 1, 6), *((tag, 7, 1 << 20, 72) for tag in range(40_000, 44_000))], bytes(1 << 20))
    return png(png_chunk(b"eXIf", block))


def webp_of_a_large_canvas(width: int = 16_383, height: int = 16_383) -> bytes:
    """An animation whose only frame is a small part of its canvas."""
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "WEBP", lossless=True)
    picture = file.getvalue()[12:]

    def three(number: int) -> bytes:
        return number.to_bytes(3, "little")

    def chunk(kind: bytes, content: bytes) -> bytes:
        return kind + struct.pack("<I", len(content)) + content + bytes(len(content) % 2)

    canvas = chunk(b"VP8X", bytes([2, 0, 0, 0]) + three(width - 1) + three(height - 1))
    frame = chunk(b"ANMF", three(0) * 2 + three(15) * 2 + three(100) + b"\0" + picture)
    body = b"WEBP" + canvas + chunk(b"ANIM", bytes(6)) + frame
    return b"RIFF" + struct.pack("<I", len(body)) + body


def gif_of_many_comments() -> bytes:
    file = io.BytesIO()
    Image.new("P", (8, 8)).save(file, "GIF")
    content = file.getvalue()
    at = content.index(b"\x2c\x00\x00\x00\x00\x08\x00\x08")
    comment = b"\x21\xfe" + (b"\xff" + b"x" * 255) * (MANY // 256) + b"\x00"
    return content[:at] + comment + content[at:]


def bmp_of_runs(side: int = 4000) -> bytes:
    """A run-length encoded picture, a run a pixel."""
    data = b"".join(b"\x01\x07" * side + b"\x00\x00" for _ in range(side)) + b"\x00\x01"
    palette = bytes(256 * 4)
    header = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, len(data), 0, 0, 256, 0)
    offset = 14 + len(header) + len(palette)
    return b"BM" + struct.pack("<IHHI", offset + len(data), 0, 0, offset) + header + palette + data


def bmp_with_alpha(pixels: list[tuple[int, int, int, int]], header: int = 124, width: int = 4) -> bytes:
    """32 bits a pixel with a mask for alpha, by a header of 56 (V3), 108 (V4) or 124 (V5) bytes; RGBA pixels from the
    last row to the first."""
    data = b"".join(bytes((blue, green, red, alpha)) for red, green, blue, alpha in pixels)
    info = struct.pack("<IiiHHIIiiII", header, width, len(pixels) // width, 1, 32, 3, len(data), 0, 0, 0, 0)
    info += struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    info += bytes(header - len(info))
    return b"BM" + struct.pack("<IHHI", 14 + header + len(data), 0, 0, 14 + header) + info + data


HOSTILE = {
    "png, chunks": png_of_many_chunks,
    "png, pixel chunks": png_of_many_pixel_chunks,
    "png, exif": exif_of_overlapping_entries,
    "jpeg, scans": lambda: jpeg_of_many_scans(1500),
    "jpeg, segments": jpeg_of_many_segments,
    "jpeg, filling": jpeg_of_much_filling,
    "tiff, entries": tiff_of_overlapping_entries,
    "tiff, strips": tiff_of_many_strips,
    "webp, canvas": webp_of_a_large_canvas,
    "gif, comments": gif_of_many_comments,
    "bmp, runs": bmp_of_runs,
}
