"""The same API on Ray Serve: replicas behind one ingress, on one machine or many.

    serve run runtime.serve.ray_app:build bundle=/models/bundle replicas=2 max_replicas=8

The ingress sends a conversation to the replica that has its images (Ray's multiplexing, keyed by the images), Ray
starts replicas where more requests wait than `target` for each, and a request whose replica dies before its first token
is sent to another one. Keys, limits and the page are the ingress's.
"""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from typing import Any, cast

# Ray's handles and its actors' methods have no types
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false
from fastapi import Request
from fastapi.responses import JSONResponse, Response
from pydantic import NonNegativeFloat, PositiveInt
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from runtime.backends.memory_plan import MAX_SLOTS
from runtime.serve.app import add_page, error_response, event_stream, model_card, new_app
from runtime.serve.chat import check_model
from runtime.serve.limits import Bodies
from runtime.serve.protocol import ApiError, busy
from runtime.serve.responses import SCHEDULER_GRACE_S, ChatCall
from runtime.serve.responses_api import ResponsesCall
from runtime.serve.settings import Settings as ServerSettings
from runtime.serve.settings import listed

TRIES = 5  # of a request whose replica dies
PAUSE = 0.5  # seconds, times the tries so far
CALLS = {"chat": ChatCall, "responses": ResponsesCall}
IMAGES = 256  # keys that a replica is known to have


class Settings(ServerSettings):
    """What `serve run ... key=value` may set. target: requests under way that a replica is to have. cpus, gpus: that
    Ray counts for one replica. api_key_file: as of `python -m runtime.serve`."""

    replicas: PositiveInt = 1
    max_replicas: PositiveInt | None = None
    target: PositiveInt = 8
    cpus: NonNegativeFloat = 1
    gpus: NonNegativeFloat = 0
    api_key_file: str | None = None


@serve.deployment(health_check_period_s=2, health_check_timeout_s=30)
class Replica:
    """One scheduler. Its answers are streams whose first item says what kind of answer follows."""

    def __init__(self, settings: Settings):
        fitted, _ = settings.fitted()
        self._service = fitted.service(fitted.load())

    @serve.multiplexed(max_num_models_per_replica=IMAGES)
    async def _has_images(self, key: str) -> str:
        """Lets Ray know that this replica is the one for these images."""
        return key

    async def answer(self, body: bytes, api: str, owner: str) -> AsyncIterator[Any]:
        """api: a key of CALLS. owner: as of `ChatService.begin`.

        {"status", "stream", ...}, then texts. Nothing is said before the first token is there, so that until then
        another replica can begin anew."""
        if key := serve.get_multiplexed_model_id():
            await self._has_images(key)  # pyright: ignore[reportCallIssue]  # Ray types methods as functions
        completion = None
        try:
            completion = await self._service.begin(body, CALLS[api](), owner)
            if not completion.stream:
                whole = await completion.whole()
                yield {"status": 200, "stream": False, "headers": completion.headers}
                yield await asyncio.to_thread(json.dumps, whole)
                return
            pieces = completion.chunks(raising=True)
            # what comes before a token comes at once, a token when it is there
            first = [await anext(pieces) for _ in range(completion.choices + 1)]
            yield {"status": 200, "stream": True, "headers": completion.headers}
            for piece in first:
                yield piece
            async for piece in pieces:
                yield piece
        except ApiError as error:
            yield {"status": error.status, "body": error.body, "headers": error.headers}
        finally:
            if completion is not None:
                completion.cancel()

    def name(self) -> str:
        """Of the model."""
        return self._service.model.bundle.name

    def check_health(self) -> None:
        """Ray replaces a replica whose scheduler has crashed."""
        if self._service.scheduler.crashed is not None:
            raise RuntimeError(f"the engine has crashed: {self._service.scheduler.crashed}")


def build(args: dict[str, str]) -> serve.Application:
    """For `serve run` and `serve build`. Raises pydantic's ValidationError for an unknown or wrong setting."""
    from pathlib import Path

    from runtime.serve.__main__ import read_keys

    settings = Settings.model_validate(args)
    keys = read_keys(Path(settings.api_key_file)) if settings.api_key_file else ()
    most = max(settings.max_replicas or settings.replicas, settings.replicas)
    scaling = {"min_replicas": settings.replicas, "max_replicas": most, "target_ongoing_requests": settings.target}
    replica = Replica.options(
        autoscaling_config=scaling,
        max_ongoing_requests=(settings.max_batch or MAX_SLOTS) + settings.max_queue,
        max_queued_requests=settings.max_queue,  # at the ingress, while every replica has so many
        graceful_shutdown_timeout_s=settings.timeout + SCHEDULER_GRACE_S,  # what it has begun is finished
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus},
    )
    return _ingress(keys, settings).bind(replica.bind(settings))


def _ingress(keys: tuple[str, ...], settings: Settings) -> serve.Deployment:
    app, limits = new_app(keys, listed(settings.allowed_host), listed(settings.cors_origin)), settings.limits

    @serve.deployment(
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=1000,
        graceful_shutdown_timeout_s=limits.seconds + SCHEDULER_GRACE_S,
    )
    @serve.ingress(app)  # pyright: ignore[reportUntypedClassDecorator]  # Ray does not say what it returns
    class Ingress:
        """HTTP in front of the replicas."""

        def __init__(self, replicas: DeploymentHandle[Any]):
            self._replicas: Any = replicas  # its methods are those of `Replica`
            self._bodies = Bodies(limits.body_bytes, limits.seconds)
            self._name: str | None = None  # of the model, once a replica has said it

        async def _model(self) -> str:
            name: str = self._name or await self._replicas.name.remote()
            self._name = name
            return name

        @app.post("/v1/chat/completions")
        async def chat_completions(self, request: Request) -> Response:
            return await self._answered(request, "chat")

        @app.post("/v1/responses")
        async def responses(self, request: Request) -> Response:
            return await self._answered(request, "responses")

        async def _answered(self, request: Request, api: str) -> Response:
            async with self._bodies.read(request) as body:
                head, pieces = await self._begin(body, api, request.headers.get("authorization", ""))
            del body  # it may be large, and does not count any more
            if "body" in head:
                return JSONResponse(head["body"], head["status"], head["headers"])
            if head["stream"]:
                return event_stream(_texts(pieces), head["headers"])
            return Response(await anext(pieces), media_type="application/json", headers=head["headers"])

        async def _begin(self, body: bytes, api: str, owner: str) -> tuple[dict[str, Any], AsyncIterator[str]]:
            """The head of the answer and what comes after it, from whichever replica gets so far."""
            key = await asyncio.to_thread(image_key, body)
            handle = self._replicas.options(stream=True, multiplexed_model_id=key)
            for tried in range(TRIES):
                pieces = handle.answer.remote(body, api, owner)
                try:
                    head = await anext(pieces)
                    if not is_of_crash(head):
                        return head, pieces
                except asyncio.CancelledError:
                    pieces.cancel()
                    raise
                except BackPressureError as error:
                    raise busy("every replica has all that it takes") from error
                except RayTaskError as error:  # another replica would do the same
                    raise ApiError(500, f"{type(error.cause).__name__} in a replica", "server_error") from error
                except (RayError, RayServeException, StopAsyncIteration):  # it died, or was taken away
                    pass
                await asyncio.sleep(PAUSE * (tried + 1))
            raise ApiError(503, "no replica answers", "server_error", code="unavailable", headers={"Retry-After": "5"})

        @app.get("/v1/models")
        async def models(self) -> dict[str, Any]:
            return {"object": "list", "data": [model_card(await self._model())]}

        @app.get("/v1/models/{model:path}")
        async def one_model(self, model: str) -> dict[str, Any]:
            check_model(model, await self._model())
            return model_card(model)

        @app.get("/ready")
        async def ready(self) -> Response:
            try:
                await asyncio.wait_for(self._replicas.name.remote(), 5)
            except (RayError, RayServeException, TimeoutError):
                return error_response(ApiError(503, "no replica answers", "server_error"))
            return JSONResponse({"status": "ready"})

    add_page(app)
    return Ingress


async def _texts(pieces: Any) -> AsyncIterator[str]:
    """Of a stream that has begun; where its replica dies, the client is told in OpenAI's shape."""
    try:
        async for piece in pieces:
            yield piece
    except RayError:
        error = ApiError(500, "the replica has died", "server_error", code="crash")
        yield f"data: {json.dumps(error.body)}\n\ndata: [DONE]\n\n"
    finally:
        pieces.cancel()


def is_of_crash(head: dict[str, Any]) -> bool:
    """Whether a replica says that its engine has crashed; Ray takes some seconds to replace it."""
    return "body" in head and head["body"]["error"]["code"] == "crash"


def image_key(body: bytes) -> str:
    """The same for conversations that begin with the same image, or the same name of one; "" where there is none, or
    the body is not what it should be."""
    try:
        request: Any = json.loads(body)
        messages: list[Any] = request["messages"] if "messages" in request else request["input"]
        contents: list[Any] = [message.get("content") for message in messages]
        parts: list[Any] = [
            part for content in contents if isinstance(content, list) for part in cast(list[Any], content)
        ]
        images = [part for part in parts if part.get("type") in ("image_url", "input_image", "image_embeds")]
        first: Any = images[0] if images else {}
        image: Any = first.get("uuid") or first.get("image_url") or first.get("image_embeds") or ""
        name: str = image if isinstance(image, str) else image["url"]
        return hashlib.blake2b(name.encode(), digest_size=16).hexdigest() if name else ""
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return ""
