"""OpenAI's Responses API, translated: its requests become those of chat completions, and answers its items and events.

Nothing is stored, as with `store: false`: a conversation is sent anew with each request.
"""

import asyncio
import json
import re
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any, cast

from runtime.model import Model
from runtime.serve.protocol import ApiError, ChatRequest, parsed
from runtime.serve.responses import ChatCall, CompletionStream
from runtime.serve.tools import ToolAnswer
from runtime.serve.types import Failed, Logprob, Request, TokenEvent

LOGPROBS = "message.output_text.logprobs"
HARMLESS_INCLUDE = (LOGPROBS, "reasoning.encrypted_content")
# What only a server that stores or does more can do
NOT_OFFERED = ("previous_response_id", "conversation", "background", "prompt", "context_management", "moderation")
TEXT_PARTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}  # -> key of the text
# Fields whose names or forms differ from those of chat completions
TRANSLATED = {
    *("input", "instructions", "include", "max_output_tokens", "text", "tools", "tool_choice", "reasoning"),
    *("truncation", "stream_options", *NOT_OFFERED),
}
NAMES = {
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning",
}


class ResponsesCall(ChatCall):
    """One request of this API."""

    def __init__(self):
        self._fields: dict[str, Any] = {}
        self._added = 0  # messages before those of the input

    def read(self, body: bytes) -> ChatRequest:
        try:
            fields = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"the body is no JSON: {error}") from error
        if not isinstance(fields, dict):
            raise ApiError(400, "a JSON object is expected")
        self._fields = cast(dict[str, Any], fields)
        for name in NOT_OFFERED:
            if self._fields.get(name):
                message = f"{name} is not offered by this server, which stores nothing: send the whole conversation"
                raise ApiError(400, message, param=name, code="unsupported_parameter")
        if self._fields.get("truncation") not in (None, "disabled"):
            raise ApiError(400, "truncation is not offered by this server", param="truncation")
        return parsed(json.dumps(self._translated()).encode())

    def _translated(self) -> dict[str, Any]:
        fields = self._fields
        chat = {name: value for name, value in fields.items() if name not in TRANSLATED}
        instructions, given = fields.get("instructions"), fields.get("input")
        messages: list[Any] = [] if instructions is None else [{"role": "system", "content": instructions}]
        self._added = len(messages)
        if isinstance(given, str):
            messages.append({"role": "user", "content": given})
        elif isinstance(given, list) and given:
            messages += [_message(item) for item in cast(list[Any], given)]
        else:
            raise ApiError(400, "input: a text or a list of items is expected", param="input")
        chat |= {"messages": messages, "n": 1, "max_completion_tokens": fields.get("max_output_tokens")}
        text = _object(fields, "text")
        form = _object(text, "format")
        if form.get("type") == "json_schema":
            form = {"type": "json_schema", "json_schema": form}
        chat |= {"response_format": form or None, "verbosity": text.get("verbosity")}
        chat["reasoning_effort"] = _object(fields, "reasoning").get("effort")
        chat["tools"] = fields.get("tools")
        if isinstance(chat["tools"], list):
            chat["tools"] = [_nested(tool) for tool in cast(list[Any], chat["tools"])]
        chat["tool_choice"] = _nested(fields.get("tool_choice"))
        include: Any = fields.get("include") or []
        listed = cast(list[Any], include) if isinstance(include, list) else [None]
        if fields.get("top_logprobs") or LOGPROBS in listed:
            chat["logprobs"] = True
        if any(one not in HARMLESS_INCLUDE for one in listed):
            chat["include"] = include  # to be named as ignored
        return chat

    def stream(
        self, model: Model, chat: ChatRequest, requests: list[Request], events: asyncio.Queue[Any]
    ) -> "ResponseStream":
        return ResponseStream(model, chat, requests, events, self._echo(chat))

    def _echo(self, chat: ChatRequest) -> dict[str, Any]:
        """What a response says of its request."""
        fields, text = self._fields, _object(self._fields, "text")
        return {
            "instructions": fields.get("instructions"),
            "max_output_tokens": chat.limit,
            "metadata": fields.get("metadata") or {},
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": chat.sampling.temperature,
            "text": text | {"format": text.get("format") or {"type": "text"}},
            "tool_choice": fields.get("tool_choice") or "auto",
            "tools": fields.get("tools") or [],
            "top_logprobs": chat.top_logprobs or 0,
            "top_p": chat.sampling.top_p,
            "truncation": "disabled",
        }

    def rename(self, error: ApiError) -> None:
        if error.param is not None:
            old, error.param = error.param, self._renamed(error.param)
            if str(error).startswith(old):
                error.args = (error.param + str(error).removeprefix(old),)

    def _renamed(self, param: str) -> str:
        if match := re.match(r"messages(?:\.(\d+))?", param):
            is_list = isinstance(self._fields.get("input"), list)
            number = f".{int(match[1]) - self._added}" if match[1] and is_list else ""
            own = match[1] and int(match[1]) < self._added
            return "instructions" if own else f"input{number}{param[match.end() :] if is_list else ''}"
        name, dot, rest = param.partition(".")
        return NAMES.get(name, name) + dot + rest


class ResponseStream(CompletionStream):
    """As `CompletionStream`, in the form of this API: one answer, and `choices` events before its first token."""

    def __init__(
        self,
        model: Model,
        chat: ChatRequest,
        requests: list[Request],
        events: asyncio.Queue[tuple[int, TokenEvent | Failed]],
        echo: dict[str, Any],
    ):
        """echo: what the response says of its request."""
        super().__init__(model, chat, requests, events)
        self.choices = 2
        self._echo, self._id, self._created = echo, uuid.uuid4().hex, int(time.time())
        self._name, self._number = model.bundle.name, 0

    async def whole(self) -> dict[str, Any]:
        """A response. Raises ApiError where it fails on the way."""
        logprobs = [delta.logprob async for delta in self._deltas() if delta.logprob]
        return await asyncio.to_thread(self._finished, logprobs)

    async def chunks(self, raising: bool = False) -> AsyncIterator[str]:
        """Server-sent events of a response; an error on the way is `response.failed`.

        Args:
            raising: before the first token an error is raised, as ApiError.
        """
        item: dict[str, Any] | None = None
        logprobs: list[Logprob] = []
        try:
            for kind in ("response.created", "response.in_progress"):
                yield self._event(kind, response=self._response("in_progress"))
            async for delta in self._deltas():
                logprobs += [delta.logprob] if delta.logprob else []
                if item is None and (delta.text or delta.calls):
                    item = self._items([], "in_progress")[0]
                    for event in self._opened(item):
                        yield event
                place: dict[str, Any] = {"output_index": 0, "item_id": item["id"]} if item else {}
                if delta.text:
                    found = self._named([delta.logprob] if delta.logprob else [])
                    yield self._event(
                        "response.output_text.delta", **place, content_index=0, delta=delta.text, logprobs=found
                    )
                for call in delta.calls:
                    if arguments := call["function"]["arguments"]:
                        yield self._event("response.function_call_arguments.delta", **place, delta=arguments)
            response = await asyncio.to_thread(self._finished, logprobs)
            if item is None:
                for event in self._opened(self._items([], "in_progress")[0]):
                    yield event
            for event in self._closed(response["output"][0]):
                yield event
            yield self._event(f"response.{response['status']}", response=response)
        except ApiError as error:
            if raising and not self._tokens:
                raise
            failed = {"code": "server_error", "message": str(error)}
            yield self._event("response.failed", response=self._response("failed") | {"error": failed})
        finally:
            self.cancel()

    def _opened(self, item: dict[str, Any]) -> Iterator[str]:
        """Events of an item that begins."""
        is_call = item["type"] == "function_call"
        empty: dict[str, Any] = item | ({"arguments": ""} if is_call else {"content": []})
        yield self._event("response.output_item.added", output_index=0, item=empty)
        if not is_call:
            part: dict[str, Any] = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            yield self._event(
                "response.content_part.added", output_index=0, item_id=item["id"], content_index=0, part=part
            )

    def _closed(self, item: dict[str, Any]) -> Iterator[str]:
        """Events of an item that has ended."""
        place = {"output_index": 0, "item_id": item["id"]}
        if item["type"] == "function_call":
            call = {"name": item["name"], "arguments": item["arguments"]}
            yield self._event("response.function_call_arguments.done", **place, **call)
        else:
            part = item["content"][0]
            text = {"text": part["text"], "logprobs": part["logprobs"]}
            yield self._event("response.output_text.done", **place, content_index=0, **text)
            yield self._event("response.content_part.done", **place, content_index=0, part=part)
        yield self._event("response.output_item.done", output_index=0, item=item)

    def _finished(self, logprobs: list[Logprob]) -> dict[str, Any]:
        cut = self._answers[0].finish_reason == "length"
        status = "incomplete" if cut else "completed"
        usage = self._usage()
        counts = {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cache_write_tokens": 0, **usage["prompt_tokens_details"]},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        }
        return self._response(status) | {
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "completed_at": None if cut else int(time.time()),
            "output": self._items(logprobs, status),
            "usage": counts,
        }

    def _response(self, status: str) -> dict[str, Any]:
        """Without an answer."""
        head = {"id": f"resp_{self._id}", "object": "response", "created_at": self._created, "status": status}
        nothing: dict[str, Any] = {"error": None, "incomplete_details": None, "output": [], "usage": None}
        return {**head, "model": self._name, "background": False, **nothing, **self._echo}

    def _items(self, logprobs: list[Logprob], status: str) -> list[dict[str, Any]]:
        """The answer so far."""
        answer = self._answers[0]
        if isinstance(answer, ToolAnswer) and answer.call is not None:
            call = {"call_id": answer.call.id, **answer.call.function.model_dump()}
            return [{"type": "function_call", "id": f"fc_{self._id}", **call, "status": status}]
        text = {"text": answer.text, "annotations": [], "logprobs": self._named(logprobs)}
        message = {"type": "message", "id": f"msg_{self._id}", "role": "assistant", "status": status}
        return [message | {"content": [{"type": "output_text", **text}]}]

    def _named(self, logprobs: list[Logprob]) -> list[Any]:
        named = self._logprobs(logprobs)
        return named["content"] if named else []

    def _event(self, kind: str, **content: Any) -> str:
        self._number += 1
        data = {"type": kind, "sequence_number": self._number - 1, **content}
        return f"event: {kind}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n"


def _message(item: Any) -> Any:
    """The message of a chat that an item of the input is; what is none of them is left for its error."""
    if not isinstance(item, dict):
        return item
    item = cast(dict[str, Any], item)
    kind = item.get("type", "message")
    if kind == "message":
        content = item.get("content")
        parts = [_part(part) for part in cast(list[Any], content)] if isinstance(content, list) else content
        return {"role": item.get("role"), "content": parts}
    if kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        return {"role": "assistant", "tool_calls": [{"id": item.get("call_id"), "function": function}]}
    if kind == "function_call_output":
        output = item.get("output")
        parts = [_part(part) for part in cast(list[Any], output)] if isinstance(output, list) else output
        return {"role": "tool", "tool_call_id": item.get("call_id"), "content": parts}
    return {"role": f"an item of type {str(kind)[:40]}"}


def _part(part: Any) -> Any:
    if not isinstance(part, dict):
        return part
    part = cast(dict[str, Any], part)
    kind = part.get("type")
    if isinstance(kind, str) and kind in TEXT_PARTS:
        return {"type": "text", "text": part.get(TEXT_PARTS[kind])}
    if kind == "input_image":
        image = {"url": part.get("image_url"), "detail": part.get("detail")}
        return {"type": "image_url", "image_url": image}
    return part


def _nested(tool: Any) -> Any:
    """A function, which chat completions put into an object of its own."""
    if isinstance(tool, dict) and cast(dict[str, Any], tool).get("type") == "function":
        return {"type": "function", "function": cast(dict[str, Any], tool)}
    return cast(Any, tool)


def _object(fields: dict[str, Any], name: str) -> dict[str, Any]:
    """Raises ApiError for what is neither an object nor nothing."""
    value = fields.get(name)
    if value is not None and not isinstance(value, dict):
        raise ApiError(400, f"{name}: an object is expected", param=name)
    return cast(dict[str, Any], value or {})
