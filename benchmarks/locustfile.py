"""What a server meets in a day, for Locust: OpenAI's client asks, streams, reads slowly, leaves; others send what is
broken or too large, or close their half of the connection.

    locust --headless --users 6 --run-time 10m --host http://127.0.0.1:8000 -f benchmarks/locustfile.py

`python -m benchmarks.soak` runs it beside servers. Each request is a line of JSON in the file SOAK_LOG, see `Attempt`.
"""

import base64
import itertools
import json
import os
import random
import re
import socket
import struct
import time
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

from locust import User, between, task  # isort: skip  # first: it replaces blocking sockets by gevent's
import httpx2 as httpx
import openai

PAGES = [
    f"data:image/png;base64,{base64.b64encode(Path(file).read_bytes()).decode()}"
    for file in os.environ["SOAK_PAGES"].split(os.pathsep)
]
LOG = Path(os.environ["SOAK_LOG"])
OVERSIZE = 21 << 20  # bytes, above the server's default
NEW_IMAGES = 0.2  # of all; the others were seen before
PATIENCE_S = 400  # more than the server gives a request
SMALL_BUFFER = 4096  # bytes, that a slow reader's socket takes ahead
SLOW_TOKENS, SLOW_PAUSE_S = 120, 0.1
SCHEMA = {
    "type": "object",
    "properties": {"total": {"type": "string", "maxLength": 12}, "paid": {"type": "boolean"}},
    "required": ["total", "paid"],
    "additionalProperties": False,
}
ENDLESS_SCHEMA = {"type": "integer", "multipleOf": 10_000_019}


class Attempt:
    """A request on its way: when each piece of its answer came. As a line of the log it has

    name: what the client does.
    begin: seconds since the epoch.
    seconds: until its end.
    pieces: of a stream that had come by then.
    gap_s: the longest time between two of them; null where the client itself was slow, or there were fewer.
    said: "200", a status and a code, or the error.
    expected: whether that is what is due.
    """

    def __init__(self, name: str, is_slow: bool = False):
        self.name, self.is_slow = name, is_slow
        self.begin, self.started = time.time(), time.perf_counter()
        self.pieces: list[float] = []

    def row(self, said: str, expected: bool) -> dict:
        gaps = [later - earlier for earlier, later in zip(self.pieces, self.pieces[1:], strict=False)]
        return {
            "name": self.name,
            "begin": self.begin,
            "seconds": time.perf_counter() - self.started,
            "pieces": len(self.pieces),
            "gap_s": None if self.is_slow else max(gaps, default=None),
            "said": said,
            "expected": expected,
        }

    def read(self, stream: Iterable, most: int | None = None) -> list:
        """Up to so many chunks of a stream. Each token is one, for logprobs are asked for."""
        chunks = []
        for chunk in itertools.islice(stream, most):
            if chunk.choices and (chunk.choices[0].delta.content or chunk.choices[0].logprobs):
                self.pieces.append(time.perf_counter())
            chunks.append(chunk)
            if self.is_slow:
                time.sleep(SLOW_PAUSE_S)
        return chunks


class Client(User):
    wait_time = between(0, 1)

    def on_start(self) -> None:
        self.openai = openai.OpenAI(
            base_url=f"{self.host}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S, http_client=httpx.Client()
        )
        small = [(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER)]
        self.slow_openai = self.openai.with_options(
            http_client=httpx.Client(transport=httpx.HTTPTransport(socket_options=small))
        )
        self.model = self.openai.models.list().data[0].id

    def take(self, attempt: Attempt, send: Callable[[Attempt], str | None], due: str = "200") -> None:
        """Notes what came of it. send: returns what is wrong with the answer."""
        try:
            said = send(attempt) or "200"
        except openai.APIStatusError as error:
            said = f"{error.status_code} {error.code}" if error.code else str(error.status_code)
        except openai.APIError as error:  # an error event in a stream, or no connection
            said = f"error {error.code}" if error.code else type(error).__name__
        except (httpx.HTTPError, OSError) as error:
            said = type(error).__name__
        row = attempt.row(said, re.match(rf"({due}|429)\b", said) is not None)
        with LOG.open("a", encoding="utf-8") as log:
            log.write(json.dumps(row) + "\n")
        self.environment.events.request.fire(
            request_type="POST",
            name=attempt.name,
            response_time=1000 * row["seconds"],
            response_length=0,
            exception=None if row["expected"] else RuntimeError(said),
            context={},
        )

    def body(self, **options) -> dict:
        url = noise() if random.random() < NEW_IMAGES else random.choice(PAGES)
        question = random.choice(("What is the total?", "What is the date?", "Describe the page."))
        content = [{"type": "text", "text": question}, {"type": "image_url", "image_url": {"url": url}}]
        messages = [{"role": "user", "content": content}]
        return {"model": self.model, "messages": messages, "max_tokens": random.randint(1, 48), **options}

    @task(8)
    def question(self) -> None:
        def send(_: Attempt) -> str | None:
            answer = self.openai.chat.completions.create(**self.body())
            return None if answer.choices[0].finish_reason in ("stop", "length") else f"wrong: {answer}"

        self.take(Attempt("question"), send)

    @task(2)
    def text_only(self) -> None:
        def send(_: Attempt) -> str | None:
            messages = [{"role": "user", "content": f"What is {random.random()}?"}]
            answer = self.openai.chat.completions.create(model=self.model, messages=messages, max_tokens=16)
            return None if answer.usage.completion_tokens else f"wrong: {answer}"

        self.take(Attempt("question without an image"), send)

    @task(3)
    def schema(self) -> None:
        def send(_: Attempt) -> str | None:
            followed = {"type": "json_schema", "json_schema": {"name": "bill", "schema": SCHEMA}}
            answer = self.openai.chat.completions.create(**self.body(response_format=followed) | {"max_tokens": 64})
            choice = answer.choices[0]
            whole = choice.finish_reason == "stop"
            return (
                "wrong: not as the schema says" if whole and "total" not in json.loads(choice.message.content) else None
            )

        self.take(Attempt("JSON schema"), send)

    @task(1)
    def endless_schema(self) -> None:
        def send(_: Attempt) -> None:
            followed = {"type": "json_schema", "json_schema": {"name": "n", "schema": ENDLESS_SCHEMA}}
            self.openai.chat.completions.create(**self.body(response_format=followed))

        self.take(Attempt("schema beyond the limits"), send, "400")

    def streamed(self, attempt: Attempt, client: openai.OpenAI, **options) -> None:
        def send(attempt: Attempt) -> str | None:
            body = self.body(stream=True, logprobs=True) | options
            chunks = attempt.read(client.chat.completions.create(**body))
            ended = chunks and chunks[-1].choices[0].finish_reason in ("stop", "length")
            return None if ended else f"wrong: it ends with {chunks[-1:]}"

        self.take(attempt, send)

    @task(6)
    def stream(self) -> None:
        self.streamed(Attempt("stream"), self.openai)

    @task(2)
    def slow_reader(self) -> None:
        """More than sockets hold: the server has to wait for it."""
        more = {"max_tokens": SLOW_TOKENS, "top_logprobs": 20, "extra_body": {"ignore_eos": True}}
        self.streamed(Attempt("stream, read slowly", is_slow=True), self.slow_openai, **more)

    @task(4)
    def leave(self) -> None:
        def send(attempt: Attempt) -> None:
            with self.openai.chat.completions.create(**self.body(stream=True, logprobs=True)) as stream:
                attempt.read(stream, random.randint(1, 12))

        self.take(Attempt("stream, left"), send)

    @task(2)
    def half_closed(self) -> None:
        """A client that ends its half of the connection has left, as for most HTTP servers (RFC 9112, 9.6, allows it):
        the connection ends soon, with an answer or without one."""

        def send(_: Attempt) -> str | None:
            host, port = self.host.removeprefix("http://").split(":")
            content = json.dumps(self.body()).encode()
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
            with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as connection:
                connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
                connection.shutdown(socket.SHUT_WR)
                answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
            return None if re.match(rb"HTTP/1.1 (200|429|499) |$", answer) else f"wrong: {answer[:60]!r}"

        self.take(Attempt("socket half closed"), send)

    @task(3)
    def malformed(self) -> None:
        whole = json.dumps(self.body()).encode()
        broken = random.choice((whole[: random.randint(0, len(whole) - 1)], random.randbytes(1000), b"[]", b"null"))

        def send(_: Attempt) -> None:
            self.openai.post("/chat/completions", cast_to=object, content=broken)

        self.take(Attempt("body that is none"), send, "400")

    @task(1)
    def oversize(self) -> None:
        url = f"data:image/png;base64,{base64.b64encode(random.randbytes(OVERSIZE)).decode()}"
        messages = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]

        def send(_: Attempt) -> None:
            self.openai.chat.completions.create(model=self.model, messages=messages)

        self.take(Attempt("image too large"), send, "413")


def noise() -> str:
    """A picture that nobody has seen, 64 x 64, as a data URL of a PNG."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = b"".join(b"\0" + random.randbytes(3 * 64) for _ in range(64))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 64, 64, 8, 2, 0, 0, 0))
    png = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
