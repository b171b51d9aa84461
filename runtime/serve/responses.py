"""From the scheduler's events to what OpenAI's clients read: text, finish reasons, usage, server-sent events."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from runtime.model import Model
from runtime.serve.protocol import ApiError, ChatRequest, ignored_header, parsed
from runtime.serve.request_record import current_record
from runtime.serve.tools import ToolAnswer, callable_tools
from runtime.serve.types import FAILURE_STATUS, Failed, Logprob, Request, TokenEvent
from runtime.text.stop import Answer

SCHEDULER_GRACE_S = 30  # how long past its deadline to wait for an unresponsive scheduler


@dataclass(frozen=True)
class _Delta:
    """What one token adds to choice `index`."""

    index: int
    text: str
    logprob: Logprob | None
    finish_reason: str | None
    calls: list[dict[str, Any]]  # pieces of a call, as OpenAI streams them


class CompletionStream:
    """A request that has been taken, as `chunks` or `whole`. Whoever stops waiting for either calls `cancel`, or closes
    `chunks`.

    Attributes:
        stream: whether the client wants `chunks`.
        choices: how many answers it wants.
        headers: of the response.
    """

    def __init__(
        self,
        model: Model,
        chat: ChatRequest,
        requests: list[Request],
        events: asyncio.Queue[tuple[int, TokenEvent | Failed]],
    ):
        """
        Args:
            model: whose tokenizer and stop strings apply.
            chat: what the client asked for.
            requests: one for each choice, submitted.
            events: (index of the choice, event) from the scheduler.
        """
        self.stream, self.choices, self.headers = bool(chat.stream), len(requests), ignored_header(chat.ignored)
        self._model, self._requests, self._events = model, requests, events
        # A grammar ends by itself, and its texts may hold what ends another answer
        has_grammar = chat.response_format is not None and chat.response_format.schema_of is not None
        stop = (*(() if has_grammar else model.bundle.prompt.stop), *chat.stop)
        tools = callable_tools(chat.tools, chat.tool_choice, model.bundle.prompt.tools)

        def answer() -> Answer | ToolAnswer:
            return ToolAnswer(model.tokenizer, stop, tools) if tools else Answer(model.tokenizer, stop)

        self._answers = [answer() for _ in requests]
        self._with_usage = chat.stream_options is not None and chat.stream_options.include_usage
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model.bundle.name}
        self._every_token = chat.ignore_eos
        self._tokens = 0  # of all choices
        self._record = current_record()
        self._record.prompt_tokens = len(requests[0].token_ids)
        self._record.image_tokens = sum(token < 0 for token in requests[0].token_ids)

    def cancel(self) -> None:
        for request in self._requests:
            request.end()

    async def whole(self) -> dict[str, Any]:
        """A chat.completion. Raises ApiError where it fails on the way."""
        logprobs: list[list[Logprob]] = [[] for _ in self._requests]
        async for delta in self._deltas():
            if delta.logprob:
                logprobs[delta.index].append(delta.logprob)
        return await asyncio.to_thread(self._completion, logprobs)  # log-probabilities of many tokens take seconds

    def _completion(self, logprobs: list[list[Logprob]]) -> dict[str, Any]:
        choices: list[dict[str, Any]] = []
        for index, answer in enumerate(self._answers):
            message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
            if isinstance(answer, ToolAnswer) and answer.call is not None:
                message |= {"content": None, "tool_calls": [answer.call.model_dump()]}
            choice = {"index": index, "message": message, "logprobs": self._logprobs(logprobs[index])}
            choices.append(choice | {"finish_reason": answer.finish_reason})
        return self._head | {"object": "chat.completion", "choices": choices, "usage": self._usage()}

    async def chunks(self, raising: bool = False) -> AsyncIterator[str]:
        """Server-sent events of a chat.completion.chunk each; an error on the way is one of them.

        Args:
            raising: before the first token an error is raised, as ApiError.
        """
        head = self._head | {"object": "chat.completion.chunk"} | ({"usage": None} if self._with_usage else {})

        def chunk(index: int, delta: dict[str, Any], logprobs: Any = None, reason: str | None = None) -> str:
            choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
            return _event(head | {"choices": [choice]})

        try:
            for index in range(len(self._requests)):
                yield chunk(index, {"role": "assistant", "content": ""})
            async for delta in self._deltas():
                # Who ignores the end of sequence measures: a chunk for each token, also where its text is not there yet
                if delta.text or delta.logprob or self._every_token:
                    logprobs = self._logprobs([delta.logprob] if delta.logprob else [])
                    yield chunk(delta.index, {"content": delta.text}, logprobs)
                for call in delta.calls:
                    yield chunk(delta.index, {"tool_calls": [call]})
                if delta.finish_reason:
                    yield chunk(delta.index, {}, None, delta.finish_reason)
            if self._with_usage:
                yield _event(head | {"choices": [], "usage": self._usage()})
        except ApiError as error:
            if raising and not self._tokens:
                raise
            yield _event(error.body)
        finally:
            self.cancel()
        yield "data: [DONE]\n\n"

    async def _deltas(self) -> AsyncIterator[_Delta]:
        """Until every choice has ended. However it ends, no request is left behind."""
        try:
            while any(answer.finish_reason is None for answer in self._answers):
                patience = self._requests[0].deadline + SCHEDULER_GRACE_S - time.monotonic()
                try:
                    index, event = await asyncio.wait_for(self._events.get(), patience)
                except TimeoutError as error:
                    raise api_error(Failed("deadline", "the engine does not answer")) from error
                answer = self._answers[index]
                if answer.finish_reason is not None:  # a token that came after a stop string
                    continue
                if isinstance(event, Failed):
                    self._record.reason = event.reason
                    raise api_error(event)
                self._note_token()
                text = answer.push(event.token_id, event.finish_reason)
                if answer.finish_reason is not None:
                    self._requests[index].end("stop")
                    self._record.reason = answer.finish_reason
                calls = answer.call_deltas() if isinstance(answer, ToolAnswer) else []
                yield _Delta(index, text, event.logprob, answer.finish_reason, calls)
        finally:
            self.cancel()

    def _note_token(self) -> None:
        self._tokens += 1
        record = self._record
        record.completion_tokens = self._tokens
        if record.ttft_s is None:
            record.ttft_s = time.monotonic() - record.arrived
            record.cached_tokens = self._requests[0].cached_tokens

    def _usage(self) -> dict[str, Any]:
        prompt = len(self._requests[0].token_ids)
        total = {"prompt_tokens": prompt, "completion_tokens": self._tokens, "total_tokens": prompt + self._tokens}
        details = {"cached_tokens": self._requests[0].cached_tokens, "image_tokens": self._record.image_tokens}
        return total | {"prompt_tokens_details": details}

    def _logprobs(self, logprobs: list[Logprob]) -> dict[str, Any] | None:
        if not logprobs:
            return None

        def named(token_id: int, logprob: float) -> dict[str, Any]:
            content = self._model.tokenizer.token_bytes(token_id)
            return {"token": content.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(content)}

        content: list[dict[str, Any]] = []
        for logprob in logprobs:
            top = [named(*pair) for pair in logprob.top]
            content.append(named(logprob.token_id, logprob.logprob) | {"top_logprobs": top})
        return {"content": content, "refusal": None}


class ChatCall:
    """One request of the chat-completions API: how it is read, answered and refused."""

    def read(self, body: bytes) -> ChatRequest:
        """Raises ApiError as `parsed`."""
        return parsed(body)

    def stream(
        self,
        model: Model,
        chat: ChatRequest,
        requests: list[Request],
        events: asyncio.Queue[tuple[int, TokenEvent | Failed]],
    ) -> CompletionStream:
        """As `CompletionStream`."""
        return CompletionStream(model, chat, requests, events)

    def rename(self, error: ApiError) -> None:
        """Put an error into the words of this API."""


def api_error(failed: Failed) -> ApiError:
    """What the client is told of a request that failed."""
    status = FAILURE_STATUS[failed.reason]
    if failed.reason == "request":
        return ApiError(status, str(failed), param=failed.param)
    return ApiError(status, str(failed), "server_error", code=failed.reason)


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
