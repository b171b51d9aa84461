"""The HTTP side: OpenAI's chat completions, health, readiness, metrics and the page, over one scheduler."""

import asyncio
import hmac
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from runtime import serve
from runtime.serve.chat import ChatService, check_model
from runtime.serve.limits import Bodies
from runtime.serve.metrics import Metrics
from runtime.serve.protocol import ApiError
from runtime.serve.responses import CompletionStream

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
STARTED = int(time.time())
DISCONNECT_POLL_S = 0.25


def create_app(
    service: ChatService, metrics: Metrics, api_keys: tuple[str, ...] = (), stop_seconds: float = 30.0
) -> FastAPI:
    """api_keys: one of which clients must send; none: nobody need. stop_seconds: that running requests have once the
    server is told to stop."""
    scheduler, name = service.scheduler, service.model.bundle.name
    bodies = Bodies(service.limits.body_bytes, service.limits.seconds)
    metrics.watch(scheduler)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        yield
        await asyncio.to_thread(scheduler.stop, stop_seconds)

    app = new_app(api_keys, lifespan=lifespan)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        async with bodies.read(request) as body:
            completion = await service.begin(body)
        if completion.stream:
            return StreamingResponse(completion.chunks(), media_type="text/event-stream")
        return JSONResponse(await _whole(request, completion))

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

    add_page(app)
    return app


def model_card(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": STARTED, "owned_by": "convllava-deploy"}


def new_app(api_keys: tuple[str, ...], **options: Any) -> FastAPI:
    """An app that checks keys under /v1/, has errors in OpenAI's shape, and /health."""

    # By the route, whatever path a proxy puts before it. No middleware: behind one no client is seen to leave
    async def check_key(request: Request) -> None:
        if api_keys and request.scope["route"].path.startswith("/v1/") and not _has_key(request, api_keys):
            raise ApiError(401, "a valid API key is expected", "authentication_error", code="invalid_api_key")

    checks = {"dependencies": [Depends(check_key)]}
    app = FastAPI(title="ConvLLaVA", docs_url=None, redoc_url=None, openapi_url=None, **checks, **options)

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
        return error_response(ApiError(500, f"{type(error).__name__} in the server", "server_error"))

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok"}

    return app


def add_page(app: FastAPI) -> None:
    """The page at /, after all other paths."""

    @app.get("/")
    @app.get("/{name}")
    async def page(name: str = "index.html") -> Response:
        if name not in PAGE_FILES:
            raise ApiError(404, f"there is nothing at /{name}")
        return FileResponse(PAGE / name, media_type=PAGE_FILES[name], headers=PAGE_HEADERS)


def error_response(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body, error.status, error.headers)


async def _whole(request: Request, completion: CompletionStream) -> dict[str, Any]:
    """The answer, unless the client leaves before it is there."""
    gone, whole = asyncio.create_task(_until_gone(request)), asyncio.create_task(completion.whole())
    try:
        await asyncio.wait({gone, whole}, return_when=asyncio.FIRST_COMPLETED)
        if not whole.done():
            raise ApiError(499, "the client has gone")
        return whole.result()
    finally:
        completion.cancel()
        gone.cancel()
        whole.cancel()


async def _until_gone(request: Request) -> None:
    while not await request.is_disconnected():
        await asyncio.sleep(DISCONNECT_POLL_S)


def _has_key(request: Request, keys: tuple[str, ...]) -> bool:
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    sent = given.strip().encode("latin-1")  # as it came
    matches = [hmac.compare_digest(sent, key.encode()) for key in keys]  # all, in constant time
    return scheme.lower() == "bearer" and any(matches)
