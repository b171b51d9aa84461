"""A server under attack: what others wait for while clients send what is slow, explosive, broken or never finished.

    python -m benchmarks.hostile [--bundle DIR] [--minutes M] [--json F]

Text-only questions are asked one after the other, first of an idle server, then for so many minutes, at least
REQUESTS of them, while every kind of hostile client is at work; so are questions about an image that was seen before.
The memory is the server's private one (RssAnon), in per cent of what it was after two minutes, without the processes
that open images and compile schemas.
"""

import argparse
import asyncio
import base64
import io
import itertools
import json
import multiprocessing
import os
import random
import re
import struct
import sys
import time
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable
from multiprocessing.connection import Connection
from pathlib import Path

import httpx2 as httpx
import numpy as np
from PIL import Image

from benchmarks import record
from benchmarks.serve import Server

REQUESTS = 200
SLOTS = 8
TOKENS = 16  # of each answer
PAUSE_S = 0.5  # between two questions of a measured client
WARM_UP_MINUTES = 2
CLIENTS = 2  # of each hostile kind
PATIENCE_S = 180
ATTACKERS_NICE = 10


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hostile", description=__doc__.split("\n")[0])
    parser.add_argument("--bundle", help="default: the demo model's")
    parser.add_argument("--minutes", type=float, default=10.0, metavar="M", help="default: %(default)g; more than two")
    parser.add_argument("--json", type=Path, metavar="F", help="default: benchmarks/results/hostile.json")
    args = parser.parse_args()
    server = Server(args.bundle, SLOTS)
    try:
        rows, about = asyncio.run(measure(server, args.minutes))
    finally:
        server.close()
    print(*rows, about, sep="\n")
    record.write("hostile", rows, args.json, about)
    return 0


async def measure(server: Server, minutes: float) -> tuple[list[dict], dict]:
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_S) as client:
        page = png(np.random.default_rng(0).integers(0, 255, (700, 700, 3), dtype=np.uint8))
        kinds: dict[str, Callable[[int], list[dict]]] = {
            "text": lambda number: [text(f"What is {number}?")],
            "seen image": lambda number: [image(page), text(f"What is {number}?")],
        }
        await asked(client, kinds["seen image"](0))
        idle = {kind: Times() for kind in kinds}
        for kind, content in kinds.items():
            for number in range(REQUESTS):
                await idle[kind].take(asked(client, content(number)))
        attacked = {kind: Times() for kind in kinds}
        large = [image(content) for content in large_pngs()]
        memory = asyncio.create_task(private_memory(server.pid))
        ours, theirs = multiprocessing.Pipe()
        attackers = multiprocessing.get_context("spawn").Process(target=attack_until_told, args=(server.url, theirs))
        attackers.start()
        end = time.monotonic() + 60 * minutes
        # Long prompts all at once; as they share their images, they fill a few slots of the KV cache only
        longest = [asyncio.create_task(asked(client, [*large, text(f"Count to {slot}.")])) for slot in range(SLOTS)]

        async def go_on(kind: str) -> None:
            for number in itertools.count(REQUESTS):
                if time.monotonic() > end and number >= 2 * REQUESTS:
                    return
                await attacked[kind].take(asked(client, kinds[kind](number)))
                await asyncio.sleep(PAUSE_S)

        await asyncio.gather(*(go_on(kind) for kind in kinds))
        await asyncio.gather(*longest)
        ours.send("stop")
        statuses: Counter[str] = await asyncio.to_thread(ours.recv)
        attackers.join()
        memory.cancel()
        samples = await asyncio.gather(memory, return_exceptions=True)
    rows = [
        {"requests_of": kind, "load": load, **times[kind].row()}
        for kind in kinds
        for load, times in (("idle", idle), ("hostile", attacked))
    ]
    about = {"minutes": minutes, "server_alive": server.alive, "hostile_answers": dict(sorted(statuses.items()))}
    return rows, about | grown(samples[0])


class Times:
    """Of requests that must be answered."""

    def __init__(self):
        self.seconds: list[float] = []
        self.failures: Counter[str] = Counter()

    async def take(self, asking: Awaitable[str]) -> None:
        begin = time.perf_counter()
        said = await asking
        self.seconds.append(time.perf_counter() - begin)
        if said != "200":
            self.failures[said] += 1

    def row(self) -> dict:
        p50, p95, p100 = (round(float(np.percentile(self.seconds, p)), 3) for p in (50, 95, 100))
        count = len(self.seconds)
        failures = {"failed": sum(self.failures.values()), "failures": dict(self.failures)}
        return {"requests": count, **failures, "p50_s": p50, "p95_s": p95, "longest_s": p100}


def text(content: str) -> dict:
    return {"type": "text", "text": content}


def image(content: bytes) -> dict:
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(content).decode()}"}}


def png(pixels: np.ndarray, form: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form, **options)
    return file.getvalue()


def large_pngs() -> list[bytes]:
    """Of 49 million pixels each, some 50 KB."""
    return [png(np.full((7000, 7000), shade, np.uint8)) for shade in range(8)]


def renewed(content: bytes) -> bytes:
    """The same picture in a PNG that was not seen before."""
    comment = b"tEXtComment\0" + random.randbytes(8).hex().encode()
    chunk = struct.pack(">I", len(comment) - 4) + comment + struct.pack(">I", zlib.crc32(comment))
    return content[:33] + chunk + content[33:]  # after its header


def body(content: list[dict], **options) -> dict:
    messages = [{"role": "user", "content": content}]
    return {"messages": messages, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, **options}


async def asked(client: httpx.AsyncClient, content: list[dict], **options) -> str:
    """What came of a question: its status, or the error."""
    try:
        answer = await client.post("/v1/chat/completions", json=body(content, **options))
        return str(answer.status_code)
    except httpx.HTTPError as error:
        return type(error).__name__


Attack = Callable[[httpx.AsyncClient], Awaitable[str]]


def attack_until_told(url: str, pipe: Connection) -> None:
    """In a process of its own, which comes after the server's: elsewhere it would take nothing of its processor. Sends
    what came of the attacks in the end."""
    os.nice(ATTACKERS_NICE)
    statuses: Counter[str] = Counter()

    async def attack(client: httpx.AsyncClient, name: str, send: Attack) -> None:
        while True:
            try:
                said = await send(client)
            except (httpx.HTTPError, OSError) as error:
                said = type(error).__name__
            statuses[f"{name}: {said}"] += 1
            await asyncio.sleep(random.uniform(0, 0.2))

    async def all_of_them() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_S) as client:
            tasks = [
                asyncio.create_task(attack(client, name, send))
                for name, send in attacks(url).items()
                for _ in range(CLIENTS)
            ]
            await asyncio.to_thread(pipe.recv)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(all_of_them())
    pipe.send(statuses)


def attacks(url: str) -> dict[str, Attack]:
    """Each sends once and says what came of it."""
    large = large_pngs()
    slow = png(np.zeros((7000, 7000), np.uint8), "JPEG", progressive=True)
    last, end = slow.rindex(b"\xff\xda"), slow.rindex(b"\xff\xd9")
    scans = slow[:last] + slow[last:end] * 1000 + slow[end:]
    explosive = [
        {"type": "integer", "multipleOf": 10_000_019},
        {"allOf": [{"type": "integer", "multipleOf": 997}, {"type": "integer", "multipleOf": 991}]},
        {"type": "string", "pattern": "^((a|b|c){1,100}d){1,100}$"},
        {"enum": [f"value {i}" for i in range(4000)]},
    ]
    random_bytes = random.Random(0).randbytes
    small = json.dumps(body([text("What?")])).encode()
    broken = [
        random_bytes(1 << 20),
        small[:-20],
        b"[" * (1 << 20),
        b'{"messages": [' + b"{}," * (1 << 22) + b"{}]}",
        json.dumps(body([image(large[0][:5000])])).encode(),
        json.dumps(body([image(random_bytes(1 << 20))])).encode(),
        json.dumps(body([text("a" * 1_000_000)])).encode(),
        small.replace(b"What?", b"\\ud800"),
    ]
    host, port = url.removeprefix("http://").split(":")

    async def large_images(client: httpx.AsyncClient) -> str:
        return await asked(client, [*(image(renewed(one)) for one in large), text(f"What is {random.random()}?")])

    async def many_scans(client: httpx.AsyncClient) -> str:
        return await asked(client, [image(scans), text("What?")])

    async def new_images(client: httpx.AsyncClient) -> str:
        pixels = np.random.default_rng().integers(0, 255, (64, 64, 3), dtype=np.uint8)
        return await asked(client, [image(png(pixels.repeat(20, 0).repeat(20, 1))), text("What?")])

    async def schemas(client: httpx.AsyncClient) -> str:
        schema = {"name": "n", "schema": random.choice(explosive) | {"title": str(random.random())}}
        return await asked(client, [text("What?")], response_format={"type": "json_schema", "json_schema": schema})

    async def disconnects(client: httpx.AsyncClient) -> str:
        content = random.choice([[text("Count.")], [image(renewed(random.choice(large))), text("What?")]])
        try:
            options = {"max_tokens": 500, "stream": random.random() < 0.5}
            await client.post("/v1/chat/completions", json=body(content) | options, timeout=random.uniform(0.05, 1))
            return "200"
        except httpx.HTTPError:
            return "left"

    async def malformed(client: httpx.AsyncClient) -> str:
        answer = await client.post(
            "/v1/chat/completions", content=random.choice(broken), headers={"Content-Type": "application/json"}
        )
        return str(answer.status_code)

    async def half_bodies(client: httpx.AsyncClient) -> str:
        _, writer = await asyncio.open_connection(host, int(port))
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: 1000000\r\n\r\n".encode() + bytes(random.randrange(100_000)))
        await writer.drain()
        await asyncio.sleep(random.uniform(0, 5))
        writer.close()
        return "left"

    named = (large_images, many_scans, new_images, schemas, disconnects, malformed, half_bodies)
    return {function.__name__: function for function in named}


async def private_memory(pid: int) -> list[tuple[float, float]]:
    """(minutes, MiB) every second until it is cancelled."""
    samples: list[tuple[float, float]] = []
    begin = time.monotonic()
    try:
        while found := re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text()):
            samples.append(((time.monotonic() - begin) / 60, int(found[1]) / 1024))
            await asyncio.sleep(1)
    except asyncio.CancelledError:
        pass
    return samples


def grown(samples: list[tuple[float, float]]) -> dict:
    """The mean of the last minute against that of the one after WARM_UP_MINUTES."""
    later = [(minute, mib) for minute, mib in samples if minute >= WARM_UP_MINUTES]
    if not later:
        return {}
    first = np.mean([mib for minute, mib in later if minute < WARM_UP_MINUTES + 1])
    last = np.mean([mib for minute, mib in later if minute >= later[-1][0] - 1])
    most = max(mib for _, mib in later)
    return {
        "mib_after_two_minutes": round(float(first)),
        "memory_grown_percent": round(100 * float(last / first - 1), 1),
        "mib_most": round(most),
        "mib_every_half_minute": [round(mib) for _, mib in samples[::30]],
    }


if __name__ == "__main__":
    sys.exit(main())
