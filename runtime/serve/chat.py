"""From the body of a chat-completion request to what OpenAI's clients read, over one engine; no HTTP."""

import asyncio
import json
import os
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from runtime.errors import UserError
from runtime.generate.sampler import Sampling
from runtime.image.input import Picture
from runtime.model import Model
from runtime.serve.protocol import RETRY_AFTER, ApiError, ChatRequest, busy, conversation, image_bytes
from runtime.serve.scheduler import Busy, Engine, Failed, Request, Token
from runtime.text.grammar import JsonGrammar
from runtime.types import Options

GRACE = 30  # seconds after its deadline, until a request is given up of which the engine says nothing
NICE = 5  # of the threads that open images; with it Linux gives them a third of what a thread beside them gets
LONGEST_TOKEN = 256  # characters
FETCHES = 8  # remote images at once, of all requests
# Of images: those that Pillow decodes in C, and not before their size is known
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


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


class Asking:
    """Begins answers. fetch: the bytes of a remote image, or ApiError; None: remote images are refused."""

    def __init__(
        self, model: Model, engine: Engine, limits: Limits | None = None, fetch: Callable[[str], bytes] | None = None
    ):
        self.model, self.engine, self.limits = model, engine, limits or Limits()
        self._fetch = fetch
        self._coming = 0  # answers that are asked for by requests which are being prepared
        self._fetching = ThreadPoolExecutor(FETCHES, "fetch")  # of their own: other hosts may be slow
        self._preparing = ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2), "prepare", _yield_to_others)

    async def begin(self, body: bytes) -> "Answering":
        """Raises ApiError for whatever is wrong with the request, and where the engine takes no more."""
        loop, said = asyncio.get_running_loop(), asyncio.Queue()
        deadline = time.monotonic() + self.limits.seconds
        chat = await asyncio.to_thread(_parsed, body)
        check_model(chat.model, self.model.bundle.name)
        if chat.choices > self.engine.places:
            raise ApiError(400, f"n is {chat.choices}, this server has room for {self.engine.places}", param="n")
        with _as_api_errors(self.engine):  # before anything is fetched and opened
            self.engine.check_room(chat.choices + self._coming)
        self._coming += chat.choices
        try:
            prompt, urls = await asyncio.to_thread(self._conversation, chat)
            fetched = await self._fetched(urls)
            prepared, grammars = await loop.run_in_executor(self._preparing, self._prepare, chat, prompt, urls, fetched)
        finally:
            self._coming -= chat.choices

        def sink(index: int) -> Callable[[Token | Failed], None]:
            def put(event: Token | Failed) -> None:
                with suppress(RuntimeError):  # the loop has ended: nobody listens
                    loop.call_soon_threadsafe(said.put_nowait, (index, event))

            return put

        requests = []
        for index in range(chat.choices):
            drawn = None if chat.seed is None else (chat.seed + index) % 2**63
            options = replace(prepared.options, sampling=replace(prepared.options.sampling, seed=drawn))
            wanted = (chat.top_logprobs or 0) if chat.logprobs else None
            changed = {"options": options, "sink": sink(index), "deadline": deadline, "logprobs": wanted}
            requests.append(replace(prepared, grammar=grammars[index], **changed))
        with _as_api_errors(self.engine):
            self.engine.submit(*requests)
        return Answering(self.model, chat, requests, said)

    def _conversation(self, chat: ChatRequest) -> tuple[str, list[str]]:
        """(prompt, URLs of its images)."""
        prompt, urls = conversation(chat.messages, self.model.bundle.prompt)
        if len(urls) > self.limits.images:
            raise ApiError(400, f"{len(urls)} images, at most {self.limits.images} are taken", param="messages")
        return prompt, urls

    async def _fetched(self, urls: list[str]) -> dict[str, bytes]:
        """The contents of those that are remote."""
        remote = list(dict.fromkeys(url for url in urls if not url.startswith("data:")))
        if remote and self._fetch is None:
            raise ApiError(400, "remote images are refused; send a data URL", param="messages")
        loop = asyncio.get_running_loop()
        found = await asyncio.gather(*(loop.run_in_executor(self._fetching, self._fetch, url) for url in remote))
        return dict(zip(remote, found, strict=True))

    def _prepare(
        self, chat: ChatRequest, prompt: str, urls: list[str], fetched: dict[str, bytes]
    ) -> tuple[Request, list[JsonGrammar | None]]:
        """(what the choices have in common, a grammar for each)."""
        model, limits = self.model, self.limits
        sampling = Sampling(
            temperature=1.0 if chat.temperature is None else chat.temperature,
            top_p=1.0 if chat.top_p is None else chat.top_p,
        )
        if len(prompt) > LONGEST_TOKEN * model.decoder.capacity:  # which takes long to find out by cutting it up
            message = f"the prompt has {len(prompt)} characters, the context is {model.decoder.capacity} tokens"
            raise ApiError(400, message, param="messages", code="context_length_exceeded")
        try:
            options = Options(limits.output_tokens, sampling, chat.stops)
            pictures = [self._picture(url, fetched, options) for url in urls]
            ids = model.tokenizer.encode_prompt(prompt, [picture.tokens for picture in pictures])
        except UserError as error:
            raise ApiError(400, str(error), param="messages") from error
        room = model.decoder.capacity - len(ids)
        if room < 1:
            message = f"the prompt has {len(ids)} tokens, the context is {model.decoder.capacity}"
            raise ApiError(400, message, param="messages", code="context_length_exceeded")
        limit = min(chat.limit or limits.output_tokens, limits.output_tokens, room)
        request = Request(ids, pictures, limit, options, lambda event: None, ignore_eos=chat.ignore_eos)
        return request, [self._grammar(chat) for _ in range(chat.choices)]

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

    def _picture(self, url: str, fetched: dict[str, bytes], options: Options) -> Picture:
        content = fetched[url] if url in fetched else image_bytes(url, self.limits.image_bytes)
        picture = Picture(self.model, content, options, self.limits.image_pixels, FORMATS)
        picture.condense()
        return picture


class Answering:
    """A request that has been taken. choices: how many answers it wants. stream: whether as `chunks` rather than
    `whole`. Whoever stops waiting for either calls `cancel`, or closes `chunks`."""

    def __init__(self, model: Model, chat: ChatRequest, requests: list[Request], said: asyncio.Queue):
        self.stream, self.choices = bool(chat.stream), len(requests)
        self._model, self._requests, self._said = model, requests, said
        self._with_usage = chat.stream_options is not None and chat.stream_options.include_usage
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model.bundle.name}

    def cancel(self) -> None:
        for request in self._requests:
            request.cancelled = True

    async def whole(self) -> dict[str, Any]:
        """A chat.completion. Raises ApiError where it fails on the way."""
        tokens: list[list[Token]] = [[] for _ in self._requests]
        async for index, token in self._events():
            tokens[index].append(token)
        choices = []
        for index, said in enumerate(tokens):
            message = {"role": "assistant", "content": "".join(token.text for token in said), "refusal": None}
            choice = {"index": index, "message": message, "logprobs": self._logprobs(said)}
            choices.append(choice | {"finish_reason": said[-1].finish_reason})
        usage = self._usage(sum(len(said) for said in tokens))
        return self._head | {"object": "chat.completion", "choices": choices, "usage": usage}

    async def chunks(self, raising: bool = False) -> AsyncIterator[str]:
        """Server-sent events of a chat.completion.chunk each; an error on the way is one of them.

        raising: before the first token it is raised, as ApiError.
        """
        head = self._head | {"object": "chat.completion.chunk"} | ({"usage": None} if self._with_usage else {})

        def chunk(index: int, delta: dict, logprobs: dict | None = None, reason: str | None = None) -> str:
            choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
            return _event(head | {"choices": [choice]})

        count = 0
        try:
            for index in range(len(self._requests)):
                yield chunk(index, {"role": "assistant", "content": ""})
            async for index, token in self._events():
                count += 1
                if token.text or token.logprob:
                    yield chunk(index, {"content": token.text}, self._logprobs([token]))
                if token.finish_reason:
                    yield chunk(index, {}, None, token.finish_reason)
            if self._with_usage:
                yield _event(head | {"choices": [], "usage": self._usage(count)})
        except ApiError as error:
            if raising and not count:
                raise
            yield _event(error.body)
        finally:
            self.cancel()
        yield "data: [DONE]\n\n"

    async def _events(self) -> AsyncIterator[tuple[int, Token]]:
        """Until every choice has ended. However it ends, no request is left behind."""
        left = len(self._requests)
        try:
            while left:
                patience = self._requests[0].deadline + GRACE - time.monotonic()
                try:
                    index, event = await asyncio.wait_for(self._said.get(), patience)
                except TimeoutError as error:
                    raise _api_error(Failed("deadline", "the engine does not answer")) from error
                if isinstance(event, Failed):
                    raise _api_error(event)
                left -= event.finish_reason is not None
                yield index, event
        finally:
            self.cancel()

    def _usage(self, completion: int) -> dict[str, Any]:
        prompt = len(self._requests[0].ids)
        details = {"cached_tokens": self._requests[0].cached_tokens}
        total = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        return total | {"prompt_tokens_details": details}

    def _logprobs(self, tokens: list[Token]) -> dict[str, Any] | None:
        if not any(token.logprob for token in tokens):
            return None

        def named(token_id: int, logprob: float) -> dict[str, Any]:
            content = self._model.tokenizer.token_bytes(token_id)
            return {"token": content.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(content)}

        content = []
        for logprob in (token.logprob for token in tokens):
            top = [named(*pair) for pair in logprob.top]
            content.append(named(logprob.token_id, logprob.logprob) | {"top_logprobs": top})
        return {"content": content, "refusal": None}


def check_model(wanted: str | None, served: str) -> None:
    """Raises ApiError where another model is asked for."""
    if wanted is not None and wanted != served:
        message = f"model {wanted!r} is not served here, {served!r} is"
        raise ApiError(404, message, param="model", code="model_not_found")


def _yield_to_others() -> None:
    """The thread that calls this has the processors after those that encode and decode: an image that comes later is
    not to delay the answers before it."""
    with suppress(AttributeError, OSError):  # of other systems
        os.setpriority(os.PRIO_PROCESS, 0, NICE)


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
def _as_api_errors(engine: Engine) -> Iterator[None]:
    """What an engine says that takes no request."""
    try:
        yield
    except Busy as full:
        if engine.accepting:
            raise busy(str(full)) from full
        headers = {"Retry-After": str(RETRY_AFTER)}
        raise ApiError(503, str(full), "server_error", code="stopping", headers=headers) from full
    except Failed as failed:
        raise _api_error(failed) from failed


def _api_error(failed: Failed) -> ApiError:
    if failed.reason == "request":
        return ApiError(400, str(failed), param="messages")
    status = {"deadline": 504, "stopping": 503, "numbers": 500, "crash": 500}[failed.reason]
    return ApiError(status, str(failed), "server_error", code=failed.reason)


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
