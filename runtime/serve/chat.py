"""From the body of a chat-completion request to requests of the scheduler; no HTTP."""

import asyncio
import json
import os
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

from pydantic import ValidationError

from runtime.errors import UserError
from runtime.generate.sampler import Sampler
from runtime.generate.session import Generation
from runtime.image.input import ImageInput
from runtime.model import Model
from runtime.serve.limits import Limits
from runtime.serve.protocol import RETRY_AFTER, ApiError, ChatRequest, busy, conversation, image_bytes
from runtime.serve.responses import CompletionStream, api_error
from runtime.serve.scheduler import Scheduler
from runtime.serve.types import Busy, Failed, Request, TokenEvent
from runtime.text.grammar import JsonGrammar
from runtime.types import Options, Sampling

NICE_INCREMENT = 5  # of the threads that open images: they get about a third of a normal thread's share of a CPU
MAX_TOKEN_CHARS = 256
MAX_FETCHES = 8  # remote images at once, of all requests
# Of images: those that Pillow decodes in C, and not before their size is known
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


@dataclass(frozen=True)
class _Prepared:
    """What the choices of one request have in common; of grammars each has its own."""

    token_ids: list[int]
    images: list[ImageInput]
    max_new_tokens: int
    sampling: Sampling
    grammars: list[JsonGrammar | None]


class ChatService:
    """Begins answers."""

    def __init__(
        self,
        model: Model,
        scheduler: Scheduler,
        limits: Limits | None = None,
        fetch: Callable[[str], bytes] | None = None,
    ):
        """
        Args:
            model: for its tokenizer, template and caches.
            scheduler: runs it.
            limits: what one request may ask for.
            fetch: the bytes of a remote image, or ApiError; None: remote images are refused.
        """
        self.model, self.scheduler, self.limits = model, scheduler, limits or Limits()
        self._fetch = fetch
        self._preparing = 0  # answers wanted by requests that are being prepared
        self._fetch_pool = ThreadPoolExecutor(MAX_FETCHES, "fetch")  # of their own: other hosts may be slow
        self._prepare_pool = ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2), "prepare", _lower_priority)

    async def begin(self, body: bytes) -> CompletionStream:
        """Raises ApiError for whatever is wrong with the request, and where the scheduler takes no more."""
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[tuple[int, TokenEvent | Failed]] = asyncio.Queue()
        deadline = time.monotonic() + self.limits.seconds
        chat = await asyncio.to_thread(_parsed, body)
        check_model(chat.model, self.model.bundle.name)
        if chat.choices > self.scheduler.places:
            raise ApiError(400, f"n is {chat.choices}, this server has room for {self.scheduler.places}", param="n")
        with _as_api_errors(self.scheduler):  # before anything is fetched and opened
            self.scheduler.check_room(chat.choices + self._preparing)
        self._preparing += chat.choices
        try:
            prompt, urls = await asyncio.to_thread(self._conversation, chat)
            fetched = await self._fetched(urls)
            prepared = await loop.run_in_executor(self._prepare_pool, self._prepare, chat, prompt, urls, fetched)
        finally:
            self._preparing -= chat.choices

        def sink(index: int) -> Callable[[TokenEvent | Failed], None]:
            def put(event: TokenEvent | Failed) -> None:
                with suppress(RuntimeError):  # the loop has ended: nobody listens
                    loop.call_soon_threadsafe(events.put_nowait, (index, event))

            return put

        requests: list[Request] = []
        for index, grammar in enumerate(prepared.grammars):
            seed = None if chat.seed is None else (chat.seed + index) % 2**63
            sampler = Sampler(replace(prepared.sampling, seed=seed), grammar)
            eos = frozenset[int]() if chat.ignore_eos else self.model.tokenizer.eos_token_ids
            generation = Generation(sampler, prepared.max_new_tokens, eos)
            logprobs = (chat.top_logprobs or 0) if chat.logprobs else None
            requests.append(Request(prepared.token_ids, prepared.images, generation, sink(index), deadline, logprobs))
        with _as_api_errors(self.scheduler):
            self.scheduler.submit(*requests)
        return CompletionStream(self.model, chat, requests, events)

    def _conversation(self, chat: ChatRequest) -> tuple[str, list[str]]:
        """(prompt, URLs of its images)."""
        prompt, urls = conversation(chat.messages, self.model.bundle.prompt)
        if len(urls) > self.limits.images:
            raise ApiError(400, f"{len(urls)} images, at most {self.limits.images} are taken", param="messages")
        return prompt, urls

    async def _fetched(self, urls: list[str]) -> dict[str, bytes]:
        """The contents of those that are remote."""
        remote = list(dict.fromkeys(url for url in urls if not url.startswith("data:")))
        if not remote:
            return {}
        if (fetch := self._fetch) is None:
            raise ApiError(400, "remote images are refused; send a data URL", param="messages")
        loop = asyncio.get_running_loop()
        found = await asyncio.gather(*(loop.run_in_executor(self._fetch_pool, fetch, url) for url in remote))
        return dict(zip(remote, found, strict=True))

    def _prepare(self, chat: ChatRequest, prompt: str, urls: list[str], fetched: dict[str, bytes]) -> _Prepared:
        model, limits = self.model, self.limits
        sampling = Sampling(
            temperature=1.0 if chat.temperature is None else chat.temperature,
            top_p=1.0 if chat.top_p is None else chat.top_p,
        )
        if len(prompt) > MAX_TOKEN_CHARS * model.decoder.capacity:  # which takes long to find out by cutting it up
            message = f"the prompt has {len(prompt)} characters, the context is {model.decoder.capacity} tokens"
            raise ApiError(400, message, param="messages", code="context_length_exceeded")
        try:
            options = Options(limits.output_tokens, sampling, chat.stops)
            images = [self._image(url, fetched, options) for url in urls]
            token_ids = model.tokenizer.encode_prompt(prompt, [image.tokens for image in images])
        except UserError as error:
            raise ApiError(400, str(error), param="messages") from error
        room = model.decoder.capacity - len(token_ids)
        if room < 1:
            message = f"the prompt has {len(token_ids)} tokens, the context is {model.decoder.capacity}"
            raise ApiError(400, message, param="messages", code="context_length_exceeded")
        limit = min(chat.limit or limits.output_tokens, limits.output_tokens, room)
        return _Prepared(token_ids, images, limit, sampling, [self._grammar(chat) for _ in range(chat.choices)])

    def _grammar(self, chat: ChatRequest) -> JsonGrammar | None:
        schema = chat.response_format.schema_of if chat.response_format else None
        if schema is None:
            return None
        if (length := len(json.dumps(schema))) > self.limits.schema_chars:
            message = f"a schema of {length} characters, at most {self.limits.schema_chars} are taken"
            raise ApiError(400, message, param="response_format")
        try:
            return self.model.grammars.of_schema(schema)
        except UserError as error:
            raise ApiError(400, str(error), param="response_format") from error

    def _image(self, url: str, fetched: dict[str, bytes], options: Options) -> ImageInput:
        content = fetched[url] if url in fetched else image_bytes(url, self.limits.image_bytes)
        image = ImageInput(content, self.model.bundle.image, options, self.limits.image_pixels, FORMATS)
        image.compact(self.model.cache)
        return image


def check_model(wanted: str | None, served: str) -> None:
    """Raises ApiError where another model is asked for."""
    if wanted is not None and wanted != served:
        message = f"model {wanted!r} is not served here, {served!r} is"
        raise ApiError(404, message, param="model", code="model_not_found")


def _lower_priority() -> None:
    """Let the calling thread run after those that encode and decode: an image that comes later must not delay the
    answers before it."""
    with suppress(AttributeError, OSError):  # of other systems
        os.setpriority(os.PRIO_PROCESS, 0, NICE_INCREMENT)


def _parsed(body: bytes) -> ChatRequest:
    try:
        return ChatRequest.model_validate(json.loads(body))
    except ValidationError as error:
        first = error.errors()[0]
        param = ".".join(str(part) for part in first["loc"]) or None
        message = f"{param}: {first['msg']}" if param else first["msg"]
        raise ApiError(400, message, param=param) from error
    except (ValueError, RecursionError) as error:  # of json: no JSON, no UTF-8, a number of too many digits
        raise ApiError(400, f"the body is not JSON: {error}") from error


@contextmanager
def _as_api_errors(scheduler: Scheduler) -> Generator[None]:
    """What a scheduler says that takes no request."""
    try:
        yield
    except Busy as full:
        if scheduler.accepting:
            raise busy(str(full)) from full
        headers = {"Retry-After": str(RETRY_AFTER)}
        raise ApiError(503, str(full), "server_error", code="stopping", headers=headers) from full
    except Failed as failed:
        raise api_error(failed) from failed
