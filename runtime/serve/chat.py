"""From the body of a chat-completion request to requests of the scheduler; no HTTP."""

import asyncio
import json
import os
import socket
import time
from collections.abc import Callable, Coroutine, Generator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

from runtime.errors import UserError
from runtime.generate.sampler import Sampler
from runtime.generate.session import Generation
from runtime.model import Model
from runtime.serve.embeds import embeds_bytes, read_embeds
from runtime.serve.images import ImageOpener, PreparedImage, digest_of
from runtime.serve.limits import Limits
from runtime.serve.named_images import ImageFile, NamedImages
from runtime.serve.protocol import (
    MAX_FIELD_CHARS,
    MAX_NAMED_FIELDS,
    RETRY_AFTER,
    ApiError,
    ChatRequest,
    ImageReference,
    busy,
    conversation,
    image_bytes,
)
from runtime.serve.remote_images import Fetch, cut
from runtime.serve.request_record import current_record
from runtime.serve.responses import ChatCall, CompletionStream, api_error
from runtime.serve.sandbox import Sandbox
from runtime.serve.scheduler import Scheduler
from runtime.serve.sizing import ImageSizes, Sizing
from runtime.serve.tools import callable_tools, told
from runtime.serve.types import Busy, Failed, Request, TokenEvent, logger
from runtime.text.grammar import JsonGrammar
from runtime.text.template import PromptTemplate

MAX_TOKEN_CHARS = 256
MAX_LOGGED_FIELDS = 100
STOP_POLL_S = 0.25  # after which a request that is being prepared looks whether the scheduler stops
MAX_FETCHES = 8  # remote images at once, of all requests
SMALL_BODY_BYTES = 1 << 18  # what is longer waits for its like while it is parsed and tokenized
MAX_JSON_ITEMS = 1 << 18  # of a body, about; so many take some 10 ms to parse
IMAGE_CPU_SECONDS = 10  # an image of 50 million pixels takes 0.7 to 3
MAX_WAITING_PIXEL_BYTES = 1 << 30  # of sized images that wait for the encoder
SCHEMA_JOB = "runtime.serve.sandbox_worker:schema_job"
SCHEMA_CPU_SECONDS, SCHEMA_BYTES = 1, 1 << 26  # for compiling one, which then stays in memory


@dataclass(frozen=True)
class _Prepared:
    """What the choices of one request have in common; of grammars each has its own."""

    token_ids: list[int]
    images: list[PreparedImage]
    max_new_tokens: int
    grammars: list[JsonGrammar | None]


class ChatService:
    """Begins answers. For the thread of one event loop.

    A request is prepared in lanes, so that none waits for what it does not need: short bodies, long bodies, images and
    schemas (in sandboxes), remote images.
    """

    def __init__(
        self,
        model: Model,
        scheduler: Scheduler,
        limits: Limits | None = None,
        fetch: Fetch | None = None,
        sizes: ImageSizes | None = None,
        takes_embeds: bool = False,
    ):
        """
        Args:
            model: for its tokenizer, template and caches.
            scheduler: runs it.
            limits: what one request may ask for.
            fetch: the bytes of a remote image, or ApiError; None: remote images are refused.
            sizes: that images are sized to; None: the bundle's.
            takes_embeds: whether clients may send embeddings of images.
        """
        self.model, self.scheduler, self.limits = model, scheduler, limits or Limits()
        self._fetch, self._takes_embeds, self._named = fetch, takes_embeds, NamedImages()
        self._ignored: set[str] = set()  # names of fields, of which the log has told
        self.preparing = 0  # requests that are being prepared
        self._preparing = 0  # answers that they want
        self._opening = 0  # images of such requests
        self._short, self._long = ThreadPoolExecutor(4, "short"), ThreadPoolExecutor(1, "long")
        self._fetches = ThreadPoolExecutor(MAX_FETCHES, "fetch")
        rule, tokenizer = model.bundle.image, model.bundle.path(model.bundle.tokenizer["file"])
        self._sizes = sizes or ImageSizes(rule)
        self._max_waiting_images = max(1, MAX_WAITING_PIXEL_BYTES // (3 * self._sizes.largest**2))
        self._processes = max(1, (os.cpu_count() or 1) // 2)
        self._images = ImageOpener(rule, model.cache, self.limits.image_pixels, IMAGE_CPU_SECONDS, self._processes)
        vocabulary = {
            "tokenizer": str(tokenizer),
            "vocab_size": model.bundle.decoder.vocab_size,
            "eos_token_ids": sorted(model.tokenizer.eos_token_ids),
        }
        self._schemas = Sandbox("a JSON schema", SCHEMA_JOB, vocabulary, 1, SCHEMA_BYTES, SCHEMA_CPU_SECONDS)

    async def begin(self, body: bytes, call: ChatCall | None = None, owner: str = "") -> CompletionStream:
        """Whoever is cancelled while waiting for it ends what is done for the request.

        Args:
            body: of the request.
            call: of another API than that of chat completions.
            owner: of the names that its images have.

        Raises:
            ApiError: for whatever is wrong with the request, and where the scheduler takes no more.
        """
        call = call or ChatCall()
        try:
            return await self._begin(body, call, owner)
        except ApiError as error:
            call.rename(error)
            raise

    async def _begin(self, body: bytes, call: ChatCall, owner: str) -> CompletionStream:
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[tuple[int, TokenEvent | Failed]] = asyncio.Queue()
        record, deadline = current_record(), time.monotonic() + self.limits.seconds
        lane = self._short if len(body) <= SMALL_BODY_BYTES else self._long
        self.preparing += 1
        try:
            async with asyncio.timeout(self.limits.seconds):
                chat = await loop.run_in_executor(lane, _parsed, body, call)
                prepared = await self._while_accepting(self._prepare(chat, lane, owner))
        except TimeoutError as error:
            raise api_error(Failed("deadline", "the request has reached its deadline")) from error
        finally:
            self.preparing -= 1

        self._log_ignored(chat)

        def sink(index: int) -> Callable[[TokenEvent | Failed], None]:
            def put(event: TokenEvent | Failed) -> None:
                with suppress(RuntimeError):  # the loop has ended: nobody listens
                    loop.call_soon_threadsafe(events.put_nowait, (index, event))

            return put

        requests: list[Request] = []
        for index, grammar in enumerate(prepared.grammars):
            seed = None if chat.seed is None else (chat.seed + index) % 2**63
            sampler = Sampler(replace(chat.sampling, seed=seed), grammar)
            eos = frozenset[int]() if chat.ignore_eos else self.model.tokenizer.eos_token_ids
            generation = Generation(sampler, prepared.max_new_tokens, eos)
            logprobs = (chat.top_logprobs or 0) if chat.logprobs else None
            request = Request(prepared.token_ids, prepared.images, generation, sink(index), deadline, logprobs)
            request.arrived = record.arrived
            requests.append(request)
        with _as_api_errors(self.scheduler):
            self.scheduler.submit(*requests)
        record.queued = True
        return call.stream(self.model, chat, requests, events)

    async def _while_accepting(self, wanted: Coroutine[Any, Any, _Prepared]) -> _Prepared:
        """What is wanted, which is given up where the scheduler stops or crashes meanwhile."""
        task = asyncio.create_task(wanted)
        try:
            while not (await asyncio.wait({task}, timeout=STOP_POLL_S))[0]:
                with _as_api_errors(self.scheduler):
                    self.scheduler.check_room(0)
            return task.result()
        finally:
            task.cancel()

    def _log_ignored(self, chat: ChatRequest) -> None:
        """Each field once."""
        names = {path.rpartition(".")[2][:MAX_FIELD_CHARS] for path in chat.ignored[:MAX_NAMED_FIELDS]}
        for name in sorted(names - self._ignored)[: MAX_LOGGED_FIELDS - len(self._ignored)]:
            self._ignored.add(name)
            logger.warning("the field %r of requests has no effect", name)

    def start(self) -> None:
        """Start the processes that open images, which the first image would wait for."""
        self._images.start()

    def close(self) -> None:
        """End the processes that prepare requests; there may be none any more."""
        self._images.close()
        self._schemas.close()

    async def _prepare(self, chat: ChatRequest, lane: Executor, owner: str) -> _Prepared:
        loop = asyncio.get_running_loop()
        check_model(chat.model, self.model.bundle.name)
        if chat.choices > self.scheduler.places:
            raise ApiError(400, f"n is {chat.choices}, this server has room for {self.scheduler.places}", param="n")
        with _as_api_errors(self.scheduler):  # before anything is fetched and opened
            self.scheduler.check_room(chat.choices + self._preparing)
        self._preparing += chat.choices
        try:
            prompt, named = await loop.run_in_executor(lane, _rendered, chat, self.model.bundle.prompt)
            images = await self._opened(named, [self._sizing(image, chat) for image in named], lane, owner)
            token_ids = await loop.run_in_executor(lane, self._token_ids, prompt, [image.tokens for image in images])
            capacity, most = self.model.decoder.capacity, self.limits.output_tokens
            limit = min(chat.limit or most, most, capacity - len(token_ids))
            return _Prepared(token_ids, images, limit, await self._grammars(chat, lane))
        finally:
            self._preparing -= chat.choices

    def _sizing(self, image: ImageReference, chat: ChatRequest) -> Sizing:
        return self._sizes.of(image.detail, chat.processor.res, chat.processor.aspect)

    async def _opened(
        self, named: list[ImageReference], sizings: list[Sizing], lane: Executor, owner: str
    ) -> list[PreparedImage]:
        """Images opened and sized; one that is there twice at the same size is opened once."""
        if len(named) > self.limits.images:
            raise ApiError(400, f"{len(named)} images, at most {self.limits.images} are taken", param="messages")
        wanted = [(image._replace(path="", detail=None), sizing) for image, sizing in zip(named, sizings, strict=True)]
        distinct = dict(zip(reversed(wanted), reversed(named), strict=True))  # the first of its like, for errors
        if self._opening + self.scheduler.waiting_images + len(distinct) > self._max_waiting_images:
            raise busy(f"{self._max_waiting_images} images are waiting already", self.scheduler.retry_after())
        self._opening += len(distinct)
        at_once = asyncio.Semaphore(self._processes)  # so that requests take turns
        tasks = [
            asyncio.create_task(self._image(image, sizing, lane, at_once, owner))
            for (_, sizing), image in distinct.items()
        ]
        try:
            found = dict(zip(distinct, await asyncio.gather(*tasks), strict=True))
        finally:
            self._opening -= len(distinct)
            for task in tasks:
                task.cancel()
        return [found[one] for one in wanted]

    async def _image(
        self, image: ImageReference, sizing: Sizing, lane: Executor, at_once: asyncio.Semaphore, owner: str
    ) -> PreparedImage:
        try:
            if image.is_embeds and not self._takes_embeds:
                raise ApiError(400, "embeddings are refused: the server was started without --enable-mm-embeds")
            file = await self._file(image, lane, owner)
            async with at_once:
                if image.is_embeds:
                    prepared = await asyncio.get_running_loop().run_in_executor(lane, self._embeds, file)
                else:
                    prepared = await self._images.open(file.content, file.digest, sizing)
            if image.uuid is not None:
                self._named.put(owner, image.uuid, file)
            return prepared
        except UserError as error:
            raise ApiError(400, str(error), param=image.path) from error
        except ApiError as error:
            error.param = image.path
            raise

    async def _file(self, image: ImageReference, lane: Executor, owner: str) -> ImageFile:
        """What was sent, now or before."""
        loop, url = asyncio.get_running_loop(), image.url
        if url is None:
            file = self._named.get(owner, image.uuid or "")
            if file is None or file.is_embeds != image.is_embeds:
                message = f"no image is known by the uuid {image.uuid!r} (any more): send it again"
                raise ApiError(404, message, code="unknown_image_uuid")
            return file
        if image.is_embeds:
            content = await loop.run_in_executor(lane, embeds_bytes, url, self.limits.image_bytes)
        elif url.lstrip()[:5].lower() == "data:":
            content = await loop.run_in_executor(lane, image_bytes, url, self.limits.image_bytes)
        else:
            content = await self._fetched(url)
        return ImageFile(content, await loop.run_in_executor(lane, digest_of, content), image.is_embeds)

    def _embeds(self, file: ImageFile) -> PreparedImage:
        bundle = self.model.bundle
        embeddings = read_embeds(file.content, bundle.encoder.hidden_size)
        return PreparedImage(("embeds", file.digest), len(embeddings), bundle.image, embeddings=embeddings)

    async def _fetched(self, url: str) -> bytes:
        if self._fetch is None:
            raise ApiError(400, "remote images are refused; send a data URL", param="messages")
        connections: list[socket.socket] = []
        try:
            return await asyncio.get_running_loop().run_in_executor(self._fetches, self._fetch, url, connections.append)
        finally:
            for connection in connections:
                cut(connection)

    def _token_ids(self, prompt: str, image_tokens: list[int]) -> list[int]:
        model = self.model
        if len(prompt) > MAX_TOKEN_CHARS * model.decoder.capacity:  # which takes long to find out by cutting it up
            raise self._too_long(f"{len(prompt)} characters")
        try:
            token_ids = model.tokenizer.encode_prompt(prompt, image_tokens)
        except UserError as error:
            raise ApiError(400, str(error), param="messages") from error
        if len(token_ids) >= model.decoder.capacity:
            raise self._too_long(f"{len(token_ids)} tokens, {sum(image_tokens)} of them of images")
        return token_ids

    def _too_long(self, size: str) -> ApiError:
        """In words by which LiteLLM, LangChain and their like know that a prompt has to be shortened."""
        message = (
            f"This model's maximum context length is {self.model.decoder.capacity} tokens. However, your messages have "
            f"{size}, which exceeds the context window: shorten them or lower the resolution of images."
        )
        return ApiError(400, message, param="messages", code="context_length_exceeded")

    async def _grammars(self, chat: ChatRequest, lane: Executor) -> list[JsonGrammar | None]:
        """One for each choice."""
        schema = chat.response_format.schema_of if chat.response_format else None
        tools = callable_tools(chat.tools, chat.tool_choice, self.model.bundle.prompt.tools)
        if schema is None and tools is None:
            return [None] * chat.choices
        param = "tools" if tools else "response_format"
        loop = asyncio.get_running_loop()
        try:
            source = await loop.run_in_executor(lane, tools.grammar if tools else json.dumps, schema)
            if len(source) > self.limits.schema_chars:
                message = f"a schema of {len(source)} characters, at most {self.limits.schema_chars} are taken"
                raise ApiError(400, message, param=param)
            grammars = await loop.run_in_executor(lane, lambda: self.model.grammars)
            if not grammars.known(source):
                await self._schemas.run(source.encode())
            return [await loop.run_in_executor(lane, grammars.of_source, source) for _ in range(chat.choices)]
        except UserError as error:
            raise ApiError(400, str(error), param=param) from error


def check_model(wanted: str | None, served: str) -> None:
    """Raises ApiError where another model is asked for."""
    if wanted is not None and wanted != served:
        message = f"model {wanted!r} is not served here, {served!r} is"
        raise ApiError(404, message, param="model", code="model_not_found")


def _rendered(chat: ChatRequest, template: PromptTemplate) -> tuple[str, list[ImageReference]]:
    return conversation(chat.messages, template, told(chat.tools, chat.tool_choice, template.tools))


def _parsed(body: bytes, call: ChatCall) -> ChatRequest:
    if body.count(b",") + body.count(b"[") + body.count(b"{") > MAX_JSON_ITEMS:
        raise ApiError(400, f"the body has more than {MAX_JSON_ITEMS} items", code="body_too_large")
    return call.read(body)


@contextmanager
def _as_api_errors(scheduler: Scheduler) -> Generator[None]:
    """What a scheduler says that takes no request."""
    try:
        yield
    except Busy as full:
        if scheduler.accepting:
            raise busy(str(full), scheduler.retry_after()) from full
        headers = {"Retry-After": str(RETRY_AFTER)}
        raise ApiError(503, str(full), "server_error", code="stopping", headers=headers) from full
    except Failed as failed:
        raise api_error(failed) from failed
