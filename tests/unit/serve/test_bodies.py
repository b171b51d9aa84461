"""Bodies: whole ones come through, and what is held never grows beyond what there is room for."""

import asyncio
import tracemalloc

import pytest
from fastapi import Request

from runtime.serve.limits import Bodies
from runtime.serve.protocol import ApiError


def sending(*pieces: bytes, pause: float = 0.0) -> Request:
    """A request whose body comes in these pieces, the last after `pause` seconds."""
    left = list(pieces)

    async def receive() -> dict:
        piece = left.pop(0)
        if not left:
            await asyncio.sleep(pause)
        return {"type": "http.request", "body": piece, "more_body": bool(left)}

    return Request({"type": "http"}, receive)


async def held(bodies: Bodies, request: Request, until: asyncio.Event) -> bytes:
    async with bodies.read(request) as body:
        await until.wait()
        return body


def test_a_body_comes_whole():
    async def run():
        async with Bodies(100, seconds=10).read(sending(b"abc", b"", b"def")) as body:
            assert body == b"abcdef"

    asyncio.run(run())


def refused(bodies: Bodies, request: Request) -> ApiError:
    async def run():
        async with bodies.read(request):
            raise AssertionError("it came through")

    with pytest.raises(ApiError) as error:
        asyncio.run(run())
    return error.value


def test_large_and_slow_ones_are_refused():
    assert refused(Bodies(5, seconds=10), sending(b"abc", b"def")).status == 413
    assert refused(Bodies(100, seconds=0.05), sending(b"abc", b"def", pause=5)).status == 408


def test_together_they_have_so_much_room_and_give_it_back():
    async def run():
        bodies, until = Bodies(8, seconds=10, together=12), asyncio.Event()
        first = asyncio.create_task(held(bodies, sending(b"12345678"), until))
        await asyncio.sleep(0.01)
        with pytest.raises(ApiError) as error:
            await held(bodies, sending(b"1234", b"5678"), until)
        assert (error.value.status, error.value.code) == (429, "queue_full")
        assert int(error.value.headers["Retry-After"]) > 0
        small = asyncio.create_task(held(bodies, sending(b"1234"), until))  # the one refused holds nothing any more
        await asyncio.sleep(0.01)
        until.set()
        assert await first == b"12345678"
        assert await small == b"1234"
        with pytest.raises(ApiError):
            await held(bodies, sending(b"1234", b"56789"), until)
        assert await held(bodies, sending(b"87654321"), until) == b"87654321", "everything was given back"

    asyncio.run(run())


def test_what_was_read_in_pieces_is_not_kept_twice():
    async def run():
        bodies = Bodies(100 << 20, seconds=10)
        tracemalloc.start()
        async with bodies.read(sending(*[bytes(1 << 20)] * 32)) as body:
            size, _ = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert len(body) <= size < 1.5 * len(body)

    asyncio.run(run())
