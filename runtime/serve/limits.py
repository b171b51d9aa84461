"""What a request may ask for, and reading request bodies within the memory and the time that there is for them."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from fastapi import Request

from runtime.serve.protocol import ApiError, busy

MAX_BODIES_BYTES = 1 << 30  # of all that are being read or prepared


@dataclass(frozen=True)
class Limits:
    """What one request may ask for. body_bytes, image_bytes; image_pixels: of one image; images; schema_chars: of a
    JSON schema, a million of which take a second to compile; output_tokens; and seconds until a request is given up."""

    body_bytes: int = 64 << 20
    image_bytes: int = 20 << 20
    image_pixels: int = 50_000_000
    images: int = 8
    schema_chars: int = 1 << 16
    output_tokens: int = 4096
    seconds: float = 300.0


class Bodies:
    """each: bytes that one body may have. together: that all may have which are being read or prepared. seconds: that a
    client may take to send one."""

    def __init__(self, each: int, seconds: float, together: int = MAX_BODIES_BYTES):
        self._each, self._seconds, self._together = each, seconds, max(together, each)
        self._held = 0

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncGenerator[bytes]:
        """The body, which counts until the block is left.

        Raises ApiError for one that is too large, once so many bytes have come, or too slow, and where there is no room
        for it now; whatever `Request.stream` raises where the client goes.
        """
        body, size = bytearray(), 0
        try:
            try:
                async with asyncio.timeout(self._seconds):
                    async for piece in request.stream():
                        body += piece
                        size += len(piece)
                        self._held += len(piece)
                        self._check(size)
            except TimeoutError:
                raise ApiError(408, f"the body has not come within {self._seconds:g} s", code="body_too_slow") from None
            content = bytes(body)
            body.clear()
            yield content
        finally:
            self._held -= size

    def _check(self, size: int) -> None:
        if size > self._each:
            raise ApiError(413, f"the body is larger than {self._each} bytes", code="body_too_large")
        if self._held > self._together:
            raise busy(f"requests of {self._together} bytes are being read, there is no room for another")
