"""What is noted of each HTTP request, for metrics, the log and the client: its ID above all."""

import json
import logging
import re
import time
import uuid
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runtime.serve.metrics import Metrics

MAX_ID_BYTES, MAX_PATH_CHARS = 128, 128
CLIENT_GONE = 499
_NOT_OF_IDS = re.compile(rb"[^\w.:=+/-]")
_logger = logging.getLogger("convllava.serve.requests")
_logger.setLevel(logging.WARNING)  # until `log_as_json`


@dataclass(eq=False)
class RequestRecord:
    """One HTTP request; what is None is not known, or not yet.

    Attributes:
        request_id: the client's, or one that was made.
        arrived: when its head came, of time.monotonic, seconds.
        queued: whether the scheduler has taken it.
        reason: how its answer has ended, or the code of the error.
        ttft_s: from `arrived` until the first token.
        prompt_tokens, image_tokens, cached_tokens, completion_tokens: as in OpenAI's usage.
    """

    request_id: str = ""
    arrived: float = field(default_factory=time.monotonic)
    queued: bool = False
    reason: str | None = None
    ttft_s: float | None = None
    prompt_tokens: int | None = None
    image_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None


_current: ContextVar[RequestRecord | None] = ContextVar("request_record", default=None)


def current_record() -> RequestRecord:
    """Of the request that is being worked on; a new one that nobody reads outside of HTTP."""
    return _current.get() or RequestRecord()


class RequestMonitor:
    """ASGI middleware: gives each request a record and, in the response, its ID; counts and logs those that ask for an
    answer."""

    def __init__(self, app: ASGIApp, metrics: Metrics | None = None):
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record, status = RequestRecord(_request_id(scope)), 500  # where the app raises
        _current.set(record)  # each request has a task of its own

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message.get("headers", ()), (b"x-request-id", record.request_id.encode())]
                message = {**message, "headers": headers}
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            if scope["method"] == "POST" and "/v1/" in scope["path"]:
                self._end(record, scope["path"], status)

    def _end(self, record: RequestRecord, path: str, status: int) -> None:
        seconds = time.monotonic() - record.arrived
        # A stream whose client has left has no reason of its own
        has_left = status == CLIENT_GONE or (record.queued and record.reason is None)
        if self._metrics is not None:
            if record.queued:
                self._metrics.answered(seconds)
            else:
                self._metrics.rejected(status)
        noted = {name: value for name, value in asdict(record).items() if name not in ("arrived", "queued")}
        noted |= {
            "path": path[:MAX_PATH_CHARS],
            "status": status,
            "reason": "cancelled" if has_left else record.reason,
            "duration_s": seconds,
        }
        _logger.info("request", extra={"fields": noted})


def _request_id(scope: Scope) -> str:
    given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
    return _NOT_OF_IDS.sub(b"", given)[:MAX_ID_BYTES].decode() or f"req_{uuid.uuid4().hex}"


class JsonFormatter(logging.Formatter):
    """A line of JSON for each record; `fields` of a record are keys of it."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def log_as_json() -> None:
    """The whole log of the process goes to stderr, a line of JSON each; requests have a line each."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    logging.getLogger().addHandler(handler)
    logging.getLogger("convllava").handlers.clear()
    logging.getLogger("convllava").setLevel(logging.INFO)
    _logger.setLevel(logging.INFO)
