"""Structures of image files that make a small file take long, judged from its bytes before anything is decoded.

Pillow bounds what it keeps of metadata, and a server's sandbox what decoding takes at all; here is what is refused at
once. No file of a camera, a scanner or an editor comes near these limits.
"""

import re

from runtime.errors import UserError

# Pillow's names of what a server takes: formats that it decodes in C, and not before their size is known
SERVED_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
# Each scan of a progressive JPEG goes over all of its pixels: a third of a second at this limit. Encoders make 10 to 14
MAX_SCANS, MAX_SCANNED_PIXELS = 20, 1_000_000_000
MAX_SEGMENTS = 4096  # of a JPEG; a profile or XMP is cut into some hundred at most
MAX_FILL_BYTES = 1 << 16  # of a JPEG, between segments
MAX_CHUNKS = 1 << 16  # of a PNG; encoders write pixels in chunks of 8 KiB or more

_SIZE_MARKERS = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # SOF0, SOF1, ...
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
_BARE_MARKERS = {0x01, *range(0xD0, 0xD9)}  # without a length
_AFTER_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # neither data nor a restart marker
_MARKER = re.compile(rb"\xff+[^\x00\xff]")


def check_structure(content: bytes, name: str) -> None:
    """Raises UserError for a JPEG or a PNG whose structure makes it slow to decode; `name` is how the error calls it.

    A file that is broken passes: whoever decodes it says so.
    """
    if content.startswith(b"\xff\xd8\xff"):
        _check_jpeg(content, name)
    elif content.startswith(b"\x89PNG\r\n\x1a\n"):
        _check_png(content, name)


def _check_jpeg(content: bytes, name: str) -> None:
    """ITU-T T.81, annex B."""
    at, pixels, scans, filling = 2, 0, 0, 0
    for _ in range(MAX_SEGMENTS):
        found = _MARKER.search(content, at)
        if found is None:
            return
        filling += found.end() - 2 - at
        if filling > MAX_FILL_BYTES:
            raise UserError(f"{name}: a JPEG with more than {MAX_FILL_BYTES} bytes of filling; save it anew")
        marker, at = content[found.end() - 1], found.end()
        if marker == _END_OF_IMAGE:
            return
        if marker in _BARE_MARKERS:
            continue
        if marker in _SIZE_MARKERS:
            height, width = (int.from_bytes(content[at + i : at + i + 2], "big") for i in (3, 5))
            pixels = max(pixels, height * width)
        at += max(2, int.from_bytes(content[at : at + 2], "big"))
        if marker == _START_OF_SCAN:
            scans += 1
            if scans > MAX_SCANS and scans * pixels > MAX_SCANNED_PIXELS:
                raise UserError(f"{name}: a JPEG of {pixels} pixels with more than {scans - 1} scans; save it anew")
            found = _AFTER_SCAN.search(content, at)
            at = found.start() if found else len(content)
    raise UserError(f"{name}: a JPEG with more than {MAX_SEGMENTS} segments; save it anew")


def _check_png(content: bytes, name: str) -> None:
    at = 8
    for _ in range(MAX_CHUNKS):
        if at >= len(content) or content[at + 4 : at + 8] == b"IEND":
            return
        at += 12 + int.from_bytes(content[at : at + 4], "big")
    raise UserError(f"{name}: a PNG with more than {MAX_CHUNKS} chunks; save it anew")
