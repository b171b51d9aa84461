"""OpenAI's chat-completion requests, read and checked, and the prompt that a conversation becomes."""

import base64
import binascii
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, cast

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from runtime.text.template import IMAGE_PLACEHOLDER, PromptTemplate, first_turn, next_turn, with_answer
from runtime.types import Sampling

RETRY_AFTER = 2  # seconds
MAX_STOP, MAX_CHOICES, MAX_TOP_LOGPROBS = 4, 8, 20
MAX_ITEMS = 4096  # messages of a conversation, parts of a message


class ApiError(Exception):
    """An answer in OpenAI's error shape. kind: its `type`."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.kind, self.param, self.code, self.headers = status, kind, param, code, headers

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


def busy(message: str) -> ApiError:
    """For a client that may come again in RETRY_AFTER seconds."""
    return ApiError(429, message, "rate_limit_error", code="queue_full", headers={"Retry-After": str(RETRY_AFTER)})


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore")


class ImageUrl(_Part):
    url: str
    detail: str | None = None


class ImagePart(_Part):
    type: Literal["image_url"]
    image_url: ImageUrl


class TextPart(_Part):
    type: Literal["text"]
    text: str

    @property
    def escaped(self) -> str:
        """What reads as a placeholder for an image is none."""
        return self.text.replace(IMAGE_PLACEHOLDER, IMAGE_PLACEHOLDER.replace(">", " >"))


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(BaseModel):
    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Part], Field(max_length=MAX_ITEMS, fail_fast=True)] = []  # one error is enough to say

    @field_validator("content", mode="before")
    @classmethod
    def _as_parts(cls, value: Any) -> Any:
        if isinstance(value, str):
            return [{"type": "text", "text": value}]
        if value is not None and not isinstance(value, list):
            raise ValueError("expected a text or a list of parts")
        return cast(list[Any], value or [])


class StreamOptions(_Part):
    include_usage: StrictBool = False


class JsonSchema(_Part):
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")


class ResponseFormat(_Part):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> "ResponseFormat":
        if self.type == "json_schema" and (self.json_schema is None or self.json_schema.schema_ is None):
            raise ValueError("a json_schema with a schema is expected")
        return self

    @property
    def schema_of(self) -> dict[str, Any] | None:
        """What an answer must follow; None: nothing."""
        if self.type == "text":
            return None
        return self.json_schema.schema_ if self.json_schema and self.type == "json_schema" else {"type": "object"}


class ChatRequest(_Part):
    """A body of POST /v1/chat/completions. max_tokens and max_completion_tokens are the same; the latter counts."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)
    model: str | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    seed: int | None = None
    stop: Annotated[list[str], Field(max_length=MAX_STOP, fail_fast=True)] = []
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    logprobs: StrictBool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    ignore_eos: StrictBool = False  # not OpenAI's, but what load generators send
    # known and not offered
    tools: Any = None
    functions: Any = None
    frequency_penalty: Any = None
    presence_penalty: Any = None
    logit_bias: Any = None
    audio: Any = None

    @field_validator("stop", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        return [] if value is None else [value] if isinstance(value, str) else value

    @field_validator("stop")
    @classmethod
    def _not_empty(cls, value: list[str]) -> list[str]:
        if "" in value:
            raise ValueError("strings that are not empty are expected")
        return value

    @field_validator("top_logprobs")
    @classmethod
    def _with_logprobs(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value and not info.data.get("logprobs"):
            raise ValueError("top_logprobs wants logprobs to be true")
        return value

    @field_validator("tools", "functions", "frequency_penalty", "presence_penalty", "logit_bias", "audio")
    @classmethod
    def _not_offered(cls, value: Any) -> Any:
        if value:
            raise ValueError("not offered by this server")
        return value

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def sampling(self) -> Sampling:
        """How tokens are chosen; without its seed, which differs between choices."""
        return Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
        )

    @property
    def choices(self) -> int:
        return self.n or 1


def parsed(body: bytes) -> ChatRequest:
    """A request from its JSON. Raises ApiError, which names the part that is wrong."""
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        raise _error_of(error) from error


def _error_of(error: ValidationError) -> ApiError:
    """The first mistake, without the names that pydantic gives to the members of unions."""
    first = error.errors(include_url=False)[0]
    path, message = list(first["loc"]), first["msg"].removeprefix("Value error, ")
    if path[:1] == ["messages"] and path[2:3] == ["content"]:
        del path[4:5]  # the kind of part
    if first["type"].startswith("union_tag"):
        path.append("type")
        message = "expected 'text' or 'image_url'"
    found: object = first.get("ctx", {}).get("tag", first["input"])
    if first["type"] in ("literal_error", "union_tag_invalid") and isinstance(found, str):
        message += f", found {found[:40]!r}"
    param = ".".join(map(str, path)) or None
    return ApiError(400, f"{param}: {message}" if param else message, param=param)


def conversation(messages: list[Message], template: PromptTemplate) -> tuple[str, list[tuple[str, str]]]:
    """The prompt of a conversation, as `first_turn` and `next_turn` write it.

    - System messages are joined. Messages of one role that follow one another are one; parts are lines.
    - Images stay between the texts. An only image comes first, as in training.
    - An assistant's message that comes first answers an empty question. After an assistant's message that comes last an
      empty question follows: its answer is a new message.

    Returns:
        The prompt up to where the answer begins, with a placeholder for each image, and (URL, path in the request) of
        each image in order.

    Raises:
        ApiError: no message of the user or the assistant, or an image in another message than the user's.
    """
    system: list[str] = []
    turns: list[tuple[str, list[TextPart | ImagePart]]] = []
    images: list[tuple[str, str]] = []
    for number, message in enumerate(messages):
        for index, part in enumerate(message.content):
            if part.type == "image_url":
                path = f"messages.{number}.content.{index}.image_url"
                if message.role != "user":
                    raise ApiError(400, f"{path}: images belong to messages of the user", param=path)
                images.append((part.image_url.url, path))
        if message.role in ("system", "developer"):
            system.append(_text(message.content))
        elif turns and turns[-1][0] == message.role:
            turns[-1][1].extend(message.content)
        else:
            turns.append((message.role, list(message.content)))
    if not turns:
        raise ApiError(400, "messages: expected a message of the user, found only system messages", param="messages")
    if turns[0][0] == "assistant":
        turns.insert(0, ("user", []))
    if turns[-1][0] == "assistant":
        turns.append(("user", []))
    pieces: list[str] = []
    for role, parts in turns:
        if role == "assistant":
            pieces[-1] = with_answer(pieces[-1], _text(parts))
        elif pieces:
            pieces.append(next_turn(template, *_question(parts)))
        else:  # an empty system text is not the template's
            pieces.append(first_turn(template, *_question(parts), "\n".join(system) if system else None))
    return "".join(pieces), images


def _question(parts: list[TextPart | ImagePart]) -> tuple[str, int]:
    """(text, number of images), with placeholders where the images do not all come first."""
    at = [index for index, part in enumerate(parts) if part.type == "image_url"]
    in_place = len(at) > 1 and at[-1] >= len(at)
    return _text(parts, in_place), len(at)


def _text(parts: list[TextPart | ImagePart], placeholders: bool = False) -> str:
    """A line for each text, and for each image where placeholders are wanted."""
    return "\n".join(
        part.escaped if part.type == "text" else IMAGE_PLACEHOLDER
        for part in parts
        if placeholders or part.type == "text"
    )


def image_bytes(url: str, most: int) -> bytes:
    """What a data URL holds. Raises ApiError for one that is no base64, or larger than `most`."""
    head, comma, text = url.partition(",")
    if not comma or not re.fullmatch(r"data:[\w.+-]+/[\w.+-]+(;[\w.=+-]+)*;base64", head):
        raise _bad_image("a data URL of an image reads data:image/...;base64,...")
    if len(text) > 4 * (most + 3) / 3:
        raise too_large(most)
    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise _bad_image(f"an image's data URL is not base64: {error}") from error
    if len(content) > most:
        raise too_large(most)
    return content


def too_large(most: int) -> ApiError:
    return ApiError(413, f"an image is larger than {most} bytes", param="messages", code="image_too_large")


def _bad_image(message: str) -> ApiError:
    return ApiError(400, message, param="messages", code="invalid_image_url")
