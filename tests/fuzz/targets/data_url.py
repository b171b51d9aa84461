"""Data URLs of images, against the standard library's own base64 where that reads them."""

import base64
import binascii
from urllib.parse import unquote_to_bytes

from runtime.serve.protocol import image_bytes

MOST = 4096


def seeds() -> list[bytes]:
    content = bytes(range(256))
    plain = b"data:image/png;base64," + base64.b64encode(content)
    return [
        plain,
        b"data:image/png;base64," + base64.urlsafe_b64encode(content),
        plain.replace(b"+", b"%2B").replace(b"=", b"%3d") + b"#end",
        b" data: image/svg+xml;charset=utf-8;a=b; base64 ,QUJD\nRA%%3",
    ]


def fuzz(content: bytes) -> None:
    url = content.decode("utf-8", "surrogateescape")
    found = image_bytes(url, MOST)
    assert len(found) <= MOST
    text = unquote_to_bytes(url.strip().partition(",")[2].partition("#")[0])
    text = text.translate(bytes.maketrans(b"-_", b"+/"), b" \t\n\f\r=")
    try:
        expected = base64.b64decode(text + b"=" * (-len(text) % 4))
    except binascii.Error:
        raise AssertionError("read what the standard library does not") from None
    assert found == expected
