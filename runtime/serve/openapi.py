"""The API described as OpenAPI 3.1 (https://spec.openapis.org/oas/v3.1.0), and models of what the server answers."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from pydantic.json_schema import models_json_schema

from runtime.serve.protocol import ChatRequest
from runtime.serve.tools import ToolCall

REFERENCE = "#/components/schemas/{model}"


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class PromptTokensDetails(_Answer):
    """cached_tokens: found in a KV cache. image_tokens: visual tokens."""

    cached_tokens: int
    image_tokens: int


class Usage(_Answer):
    """completion_tokens: of all choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(_Answer):
    """bytes: in UTF-8, of which `token` shows what is whole."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """top_logprobs: the most probable first."""

    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(_Answer):
    """One entry for each token."""

    content: list[TokenLogprob]
    refusal: None


class AnswerMessage(_Answer):
    """An answer: a text, or a call of a function."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCall] | None = None


class Choice(_Answer):
    """One answer. finish_reason: `stop` (end of sequence, stop string), `length` or `tool_calls`."""

    index: int
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(_Answer):
    """Answers as a whole. created: Unix time, seconds."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class FunctionDelta(_Answer):
    """name: on the first one of a call."""

    name: str | None = None
    arguments: str


class ToolCallDelta(_Answer):
    """What is new of a call."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class Delta(_Answer):
    """What is new of an answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChunkChoice(_Answer):
    """finish_reason: on the last chunk of a choice."""

    index: int
    delta: Delta
    logprobs: ChoiceLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"] | None


class ChatCompletionChunk(_Answer):
    """One event of a stream. usage: where `stream_options.include_usage` wants it, on the last chunk."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


class ErrorDetails(_Answer):
    """param: the part of the request that is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(_Answer):
    """What went wrong."""

    error: ErrorDetails


class ModelCard(_Answer):
    """The model that is served. created: when the server started, Unix time, seconds."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(_Answer):
    """The one model that is served."""

    object: Literal["list"]
    data: list[ModelCard]


class Status(_Answer):
    """Of the process or the engine."""

    status: Literal["ok", "ready", "stopping", "crashed"]


ANSWERS = (ChatCompletion, ChatCompletionChunk, Error, ModelList, ModelCard, Status)


def document(version: str, has_keys: bool) -> dict[str, Any]:
    """The OpenAPI document.

    Args:
        version: of the server.
        has_keys: whether paths under /v1/ want an API key.
    """
    models = [(ChatRequest, "validation"), *((model, "serialization") for model in ANSWERS)]
    _, schemas = models_json_schema(models, ref_template=REFERENCE)  # pyright: ignore[reportArgumentType]
    model_name = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
    chat = {
        "summary": "Answer a conversation about images",
        "requestBody": {"required": True, "content": _json(ChatRequest)},
        "responses": _responses("The answers, whole or as server-sent events", _json(ChatCompletion) | _stream()),
    }
    any_object = {"application/json": {"schema": {"type": "object"}}}
    events = {"text/event-stream": {"schema": {"type": "string", "description": "OpenAI's `response.*` events"}}}
    responses = {
        "summary": "The same in the form of OpenAI's Responses API; nothing is stored",
        "requestBody": {"required": True, "content": any_object},
        "responses": _responses("The response, whole or as server-sent events", any_object | events),
    }
    components: dict[str, Any] = {"schemas": schemas["$defs"]}
    security: list[dict[str, Any]] = []
    if has_keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        security = [{"key": []}]
    return {
        "openapi": "3.1.0",
        "info": {"title": "ConvLLaVA", "version": version},
        "paths": {
            "/v1/chat/completions": {"post": chat | {"security": security}},
            "/v1/responses": {"post": responses | {"security": security}},
            "/v1/models": {"get": _get("The model", _json(ModelList)) | {"security": security}},
            "/v1/models/{model}": {
                "get": _get("The model", _json(ModelCard)) | {"parameters": [model_name], "security": security}
            },
            "/health": {"get": _get("The process answers", _json(Status))},
            "/ready": {"get": _get("The engine takes requests; 503 where it does not", _json(Status), _json(Status))},
            "/metrics": {"get": _get("For Prometheus", {"text/plain": {"schema": {"type": "string"}}})},
            "/openapi.json": {"get": _get("This document", {"application/json": {"schema": {"type": "object"}}})},
        },
        "components": components,
    }


def _json(model: type[BaseModel]) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": REFERENCE.format(model=model.__name__)}}}


def _stream() -> dict[str, Any]:
    described = "`data:` and a ChatCompletionChunk or an Error each; at last `data: [DONE]`"
    return {"text/event-stream": {"schema": {"type": "string", "description": described}}}


def _get(summary: str, content: dict[str, Any], unavailable: dict[str, Any] | None = None) -> dict[str, Any]:
    responses = _responses(summary, content)
    if unavailable is not None:
        responses["503"] = {"description": "Not now", "content": unavailable}
    return {"summary": summary, "responses": responses}


def _responses(description: str, content: dict[str, Any]) -> dict[str, Any]:
    error = {"description": "An error", "content": _json(Error)}
    return {"200": {"description": description, "content": content}, "default": error}
