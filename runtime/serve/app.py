"""The HTTP side: OpenAI's chat completions and responses, health, metrics and the page, over one scheduler."""

import asyncio
import hmac
import importlib.metadata
import time
from collections.abc import AsyncGenerator, AsyncIterable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from fastapi import Depends, FastAPI, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from runtime import serve
from runtime.serve.chat import ChatService, check_model
from runtime.serve.limits import Bodies
from runtime.serve.metrics import Metrics
from runtime.serve.openapi import document
from runtime.serve.origins import OriginCheck
from runtime.serve.protocol import ApiError
from runtime.serve.request_record import RequestMonitor, current_record
from runtime.serve.responses import ChatCall
from runtime.serve.responses_api import ResponsesCall

T = TypeVar("T")
PAGE = Path(serve.__file__).parent / "web"
PAGE_FILES = {
    "index.html": "text/html; charset=utf-8",
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "example.png": "image/png",
}
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # proxies pass on each event as it comes
STARTED = int(time.time())
DISCONNECT_POLL_S = 0.25


def create_app(
    service: ChatService,
    metrics: Metrics,
    api_keys: tuple[str, ...] = (),
    stop_seconds: float = 30.0,
    allowed_hosts: tuple[str, ...] = (),
    cors_origins: tuple[str, ...] = (),
    docs: bool = False,
) -> FastAPI:
    """api_keys: one of which clients must send; none: nobody need. stop_seconds: that running requests have once the
    server is told to stop. allowed_hosts, cors_origins: as `OriginCheck`. docs: whether there is a page at /docs, whose
    script browsers load from a CDN."""
    scheduler, name = service.scheduler, service.model.bundle.name
    bodies = Bodies(service.limits.body_bytes, service.limits.seconds)
    metrics.watch(service.model, scheduler, lambda: service.preparing)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        yield
        await asyncio.to_thread(scheduler.stop, stop_seconds)
        await asyncio.to_thread(service.close)

    app = new_app(api_keys, allowed_hosts, cors_origins, metrics, lifespan=lifespan)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await answered(request, ChatCall())

    @app.post("/v1/responses")
    async def responses(request: Request) -> Response:
        return await answered(request, ResponsesCall())

    async def answered(request: Request, call: ChatCall) -> Response:
        owner = request.headers.get("authorization", "")
        async with bodies.read(request) as body:
            completion = await _unless_gone(request, service.begin(body, call, owner))
        del body  # it may be large, and does not count any more
        if completion.stream:
            return event_stream(completion.chunks(), completion.headers)
        try:
            whole = await _unless_gone(request, completion.whole())
            return await asyncio.to_thread(JSONResponse, whole, headers=completion.headers)
        finally:
            completion.cancel()

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model_card(name)]}

    @app.get("/v1/models/{model:path}")
    async def one_model(model: str) -> dict[str, Any]:
        check_model(model, name)
        return model_card(name)

    @app.get("/ready")
    async def ready() -> Response:
        why = "crashed" if scheduler.crashed is not None else "ready" if scheduler.accepting else "stopping"
        return JSONResponse({"status": why}, 200 if scheduler.accepting else 503)

    @app.get("/metrics")
    async def measured() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    description = document(importlib.metadata.version("convllava-deploy"), bool(api_keys))

    # Not by FastAPI's own options, whose routes are not checked as the others are
    @app.get("/openapi.json")
    async def openapi() -> Response:
        return JSONResponse(description)

    if docs:

        @app.get("/docs")
        async def docs_page() -> Response:
            return get_swagger_ui_html(openapi_url="openapi.json", title="ConvLLaVA")

    add_page(app)
    return app


def model_card(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": STARTED, "owned_by": "convllava-deploy"}


def new_app(
    api_keys: tuple[str, ...],
    allowed_hosts: tuple[str, ...],
    cors_origins: tuple[str, ...],
    metrics: Metrics | None = None,
    **options: Any,
) -> FastAPI:
    """An app that checks hosts, origins, and keys under /v1/, has errors in OpenAI's shape, and /health."""
    check_origin = OriginCheck(allowed_hosts, cors_origins, has_keys=bool(api_keys))

    # By the route, whatever path a proxy puts before it
    async def check(request: Request) -> None:
        check_origin(request)
        if api_keys and request.scope["route"].path.startswith("/v1/") and not _has_key(request, api_keys):
            raise ApiError(
                401,
                "a valid API key is expected",
                "authentication_error",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if (encoding := request.headers.get("content-encoding", "identity")).lower() != "identity":
            raise ApiError(415, f"Content-Encoding is {encoding!r}, expected a body that is not compressed")

    checks = {"dependencies": [Depends(check)]}
    app = FastAPI(title="ConvLLaVA", docs_url=None, redoc_url=None, openapi_url=None, **checks, **options)
    # Middleware is plain ASGI: behind a BaseHTTPMiddleware no client would be seen to leave
    app.add_middleware(HeadAsGet)
    if cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "x-ignored-fields", "Retry-After"],
        )
    app.add_middleware(RequestMonitor, metrics=metrics)

    @app.exception_handler(ApiError)
    async def say_error(_: Request, error: ApiError) -> JSONResponse:
        return error_response(error)

    @app.exception_handler(ClientDisconnect)
    async def say_gone(_: Request, error: ClientDisconnect) -> JSONResponse:
        return error_response(ApiError(499, "the client has gone"))

    @app.exception_handler(HTTPException)
    async def say_http_error(_: Request, error: HTTPException) -> JSONResponse:
        return error_response(ApiError(error.status_code, str(error.detail), headers=error.headers))

    @app.exception_handler(Exception)
    async def say_bug(_: Request, error: Exception) -> JSONResponse:
        headers = {"x-request-id": current_record().request_id}  # this answer is made outside of all middleware
        return error_response(ApiError(500, f"{type(error).__name__} in the server", "server_error", headers=headers))

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok"}

    return app


class HeadAsGet:
    """HEAD of every path that has GET. The HTTP server below leaves the body out."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}
        await self._app(scope, receive, send)


def add_page(app: FastAPI) -> None:
    """The page at /, after all other paths."""

    @app.get("/")
    @app.get("/{name}")
    async def page(name: str = "index.html") -> Response:
        if name not in PAGE_FILES:
            raise ApiError(404, f"there is nothing at /{name}")
        return FileResponse(PAGE / name, media_type=PAGE_FILES[name], headers=PAGE_HEADERS)


def event_stream(events: AsyncIterable[str], headers: dict[str, str]) -> StreamingResponse:
    """Server-sent events."""
    return StreamingResponse(events, media_type="text/event-stream", headers=STREAM_HEADERS | headers)


def error_response(error: ApiError) -> JSONResponse:
    current_record().reason = error.code or error.kind
    return JSONResponse(error.body, error.status, error.headers)


async def _unless_gone(request: Request, wanted: Coroutine[Any, Any, T]) -> T:
    """What is wanted, which is cancelled where the client leaves before it is there."""
    gone, task = asyncio.create_task(_until_gone(request)), asyncio.create_task(wanted)
    try:
        await asyncio.wait({gone, task}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client has gone", code="cancelled")
        return task.result()
    finally:
        gone.cancel()
        task.cancel()


async def _until_gone(request: Request) -> None:
    while not await request.is_disconnected():
        await asyncio.sleep(DISCONNECT_POLL_S)


def _has_key(request: Request, keys: tuple[str, ...]) -> bool:
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    sent = given.strip().encode("latin-1")  # as it came
    matches = [hmac.compare_digest(sent, key.encode()) for key in keys]  # all, in constant time
    return scheme.lower() == "bearer" and any(matches)
