"""OpenAI's chat-completion requests, read and checked, and the prompt that a conversation becomes.

Fields that are not known are ignored, as OpenAI-compatible servers do; of those known to OpenAI, what would change an
answer and is not offered here (tools, penalties, biases, audio) is refused unless it asks for nothing.
"""

import base64
import binascii
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, field_validator, model_validator

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


class ImagePart(_Part):
    type: Literal["image_url"]
    image_url: ImageUrl


class TextPart(_Part):
    type: Literal["text"]
    text: str


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]
Parts = Annotated[list[Part], Field(max_length=MAX_ITEMS, fail_fast=True)]  # one error is enough to say


class Message(_Part):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Parts | None = None

    @property
    def text(self) -> str:
        """Its texts, a line each. What reads as a placeholder for an image is none."""
        parts = [self.content] if isinstance(self.content, str) else [p.text for p in self.parts if p.type == "text"]
        return "\n".join(parts).replace(IMAGE_PLACEHOLDER, IMAGE_PLACEHOLDER.replace(">", " >"))

    @property
    def parts(self) -> list[TextPart | ImagePart]:
        return self.content if isinstance(self.content, list) else []

    @property
    def urls(self) -> list[str]:
        return [part.image_url.url for part in self.parts if part.type == "image_url"]


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
    stop: str | Annotated[list[str], Field(fail_fast=True)] | None = None
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

    @field_validator("stop")
    @classmethod
    def _few_strings(cls, value: str | list[str] | None) -> str | list[str] | None:
        strings = [value] if isinstance(value, str) else value or []
        if len(strings) > MAX_STOP or "" in strings:
            raise ValueError(f"at most {MAX_STOP} strings that are not empty are expected")
        return value

    @field_validator("tools", "functions", "frequency_penalty", "presence_penalty", "logit_bias", "audio")
    @classmethod
    def _not_offered(cls, value: Any) -> Any:
        if value:
            raise ValueError("not offered by this server")
        return value

    @model_validator(mode="after")
    def _top_of_logprobs(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs wants logprobs to be true")
        return self

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

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


def conversation(messages: list[Message], template: PromptTemplate) -> tuple[str, list[str]]:
    """(the prompt up to where the answer begins, with a placeholder for each image; URLs of the images in order).

    System messages are joined; questions that follow one another are one. A message's images come before its text, as
    in training. Raises ApiError where the messages are no conversation that ends with a question.
    """
    told = [message.text for message in messages if message.role in ("system", "developer")]
    system = "\n".join(told) if told else None  # an empty one is not the template's
    turns: list[tuple[str, list[Message]]] = []
    for message in messages:
        if message.role in ("user", "assistant"):
            if message.role == "assistant" and message.urls:
                raise ApiError(400, "an assistant's message has an image", param="messages")
            if turns and turns[-1][0] == message.role:
                turns[-1][1].append(message)
            else:
                turns.append((message.role, [message]))
    if not turns or turns[0][0] != "user" or turns[-1][0] != "user":
        raise ApiError(400, "a conversation begins and ends with a message of the user", param="messages")
    if any(message.urls for message in messages if message.role in ("system", "developer")):
        raise ApiError(400, "a system message has an image", param="messages")
    pieces, urls = list[str](), list[str]()
    for role, said in turns:
        text = "\n".join(message.text for message in said)
        if role == "assistant":
            pieces[-1] = with_answer(pieces[-1], text)
            continue
        images = [url for message in said for url in message.urls]
        urls += images
        if pieces:
            pieces.append(next_turn(template, text, len(images)))
        else:
            pieces.append(first_turn(template, text, len(images), system))
    return "".join(pieces), urls


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
