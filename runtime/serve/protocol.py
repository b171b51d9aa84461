"""OpenAI's chat-completion requests, read and checked, and the prompt that a conversation becomes."""

import base64
import binascii
import json
import re
import string
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple, cast

import numpy as np
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

from runtime.serve.tools import MAX_TOOLS, NamedTool, Tool, ToolCall, ToolChoice
from runtime.text.template import IMAGE_PLACEHOLDER, PromptTemplate, ToolTemplate, first_turn, next_turn, with_answer
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


def busy(message: str, retry_after: int | None = None) -> ApiError:
    """For a client that may come again in so many seconds, RETRY_AFTER where that is not known."""
    headers = {"Retry-After": str(retry_after or RETRY_AFTER)}
    return ApiError(429, message, "rate_limit_error", code="queue_full", headers=headers)


# Fields of OpenAI, vLLM and others that would change an answer and are not offered: the values that ask for nothing
NOT_OFFERED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("frequency_penalty", "presence_penalty", "min_tokens", "mirostat"), (0,)),
    **dict.fromkeys(("best_of", "length_penalty", "typical_p"), (1,)),
    **dict.fromkeys(("skip_special_tokens", "add_generation_prompt"), (True,)),
    **dict.fromkeys(("use_beam_search", "include_stop_str_in_output", "continue_final_message", "echo"), (False,)),
    **dict.fromkeys(("add_special_tokens", "early_stopping", "return_token_ids", "no_stop_trim", "prefix"), (False,)),
    **dict.fromkeys(("functions", "stop_token_ids", "bad_words", "logits_processors", "documents"), ([],)),
    "allowed_token_ids": ([],),
    **dict.fromkeys(("logit_bias", "chat_template_kwargs", "structured_outputs"), ({},)),
    **dict.fromkeys(("chat_template", "guided_regex", "guided_grammar", "regex", "ebnf", "grammar", "suffix"), ("",)),
    **dict.fromkeys(("guided_json", "guided_choice", "structural_tag", "json_schema", "truncate_prompt_tokens"), ()),
    **dict.fromkeys(("audio", "prediction", "web_search_options", "prompt_logprobs", "kv_transfer_params"), ()),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
}
# That change no answer
HARMLESS = {
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
    *("prompt_cache_retention", "request_id", "priority", "cache_salt", "spaces_between_special_tokens"),
    *("guided_decoding_backend", "name", "refusal", "annotations"),
}
IMAGE_DETAILS = (None, "auto", "low", "high")
_URL_SAFE = bytes.maketrans(b"-_", b"+/")
_HEX_DIGITS = np.array([int(chr(code), 16) if chr(code) in string.hexdigits else -1 for code in range(256)], np.int16)
_DATA_HEAD = re.compile(r"data:\s*[\w.+-]+/[\w.+-]+\s*(;[^;]*)*;\s*base64\s*", re.IGNORECASE)
MAX_DATA_HEAD_CHARS = 256
MAX_UUID_CHARS = 256
MAX_NAMED_FIELDS, MAX_FIELD_CHARS = 16, 64  # of a header
MAX_PARAM_CHARS = 200  # of an error


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore")


def escaped(text: str) -> str:
    """What reads as a placeholder for an image is none."""
    return text.replace(IMAGE_PLACEHOLDER, IMAGE_PLACEHOLDER.replace(">", " >"))


class ImageUrl(_Part):
    url: str
    detail: str | None = None


class _NamedPart(_Part):
    """uuid: a name by which later requests find what this one sends; where it sends nothing, one did before."""

    uuid: str | None = Field(default=None, min_length=1, max_length=MAX_UUID_CHARS)

    @field_validator("image_url", "image_embeds", check_fields=False)
    @classmethod
    def _or_named(cls, value: Any, info: ValidationInfo) -> Any:
        if value is None and info.data.get("uuid") is None:
            raise ValueError("expected an image, or the uuid of one that was sent before")
        return value


class ImagePart(_NamedPart):
    type: Literal["image_url"]
    image_url: ImageUrl | None = Field(default=None, validate_default=True)


class EmbedsPart(_NamedPart):
    """image_embeds: in base64, as `runtime.serve.embeds` reads them."""

    type: Literal["image_embeds"]
    image_embeds: str | None = Field(default=None, validate_default=True)


class TextPart(_Part):
    type: Literal["text"]
    text: str

    @property
    def escaped(self) -> str:
        return escaped(self.text)


Part = Annotated[TextPart | ImagePart | EmbedsPart, Field(discriminator="type")]


class Message(BaseModel):
    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[list[Part], Field(max_length=MAX_ITEMS, fail_fast=True)] = []  # one error is enough to say
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_call_id: str | None = None

    @field_validator("content", mode="before", json_schema_input_type=str | list[Part] | None)
    @classmethod
    def _as_parts(cls, value: Any) -> Any:
        if isinstance(value, str):
            return [{"type": "text", "text": value}]
        if value is not None and not isinstance(value, list):
            raise ValueError("expected a text or a list of parts")
        return cast(list[Any], value or [])

    @field_validator("tool_calls")
    @classmethod
    def _of_assistant(cls, value: list[ToolCall] | None, info: ValidationInfo) -> list[ToolCall] | None:
        if value and info.data.get("role") != "assistant":
            raise ValueError("calls belong to messages of the assistant")
        return value


class ProcessorOptions(BaseModel):
    """How all images of a request are sized, whatever their detail. res: pixels."""

    model_config = ConfigDict(extra="forbid")

    res: int | None = None
    aspect: str | None = None


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


class ChatRequest(BaseModel):
    """A body of POST /v1/chat/completions. max_tokens and max_completion_tokens are the same; the latter counts."""

    model_config = ConfigDict(extra="allow")

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
    # as vLLM has them; the penalty is for tokens of the answer
    top_k: int | None = Field(default=None, ge=-1)
    min_p: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False)
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=100, allow_inf_nan=False)
    ignore_eos: StrictBool = False
    mm_processor_kwargs: ProcessorOptions | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] = []
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: StrictBool | None = None

    @field_validator("stop", mode="before", json_schema_input_type=str | list[str] | None)
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        return [] if value is None else [value] if isinstance(value, str) else value

    @field_validator("stop")
    @classmethod
    def _not_empty(cls, value: list[str]) -> list[str]:
        if "" in value:
            raise ValueError("strings that are not empty are expected")
        return value

    @field_validator("tools", mode="before")
    @classmethod
    def _none_as_empty(cls, value: Any) -> Any:
        return [] if value is None else value

    @field_validator("tool_choice")
    @classmethod
    def _with_tools(cls, value: ToolChoice | None, info: ValidationInfo) -> ToolChoice | None:
        tools: list[Tool] = info.data.get("tools") or []
        if value == "required" and not tools:
            raise ValueError("'required' wants tools")
        if isinstance(value, NamedTool) and value.function.name not in {tool.function.name for tool in tools}:
            raise ValueError(f"there is no function {value.function.name!r} among the tools")
        return value

    @field_validator("top_logprobs")
    @classmethod
    def _with_logprobs(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value and not info.data.get("logprobs"):
            raise ValueError("top_logprobs wants logprobs to be true")
        return value

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def sampling(self) -> Sampling:
        """How tokens are chosen; without its seed, which differs between choices."""
        return Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=max(self.top_k or 0, 0),
            top_p=1.0 if self.top_p is None else self.top_p,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            min_p=self.min_p or 0.0,
        )

    @property
    def processor(self) -> ProcessorOptions:
        return self.mm_processor_kwargs or ProcessorOptions()

    @property
    def others(self) -> Iterator[tuple[str, str, Any]]:
        """(path, name, value) of the fields that it and its messages have besides those above."""
        for name, value in (self.model_extra or {}).items():
            yield name, name, value
        for number, message in enumerate(self.messages):
            for name, value in (message.model_extra or {}).items():
                yield f"messages.{number}.{name}", name, value

    @property
    def ignored(self) -> list[str]:
        """Paths of what has no effect and is not known to have none."""
        found = [path for path, name, _ in self.others if name not in NOT_OFFERED and name not in HARMLESS]
        if self.tools and self.parallel_tool_calls:
            found.append("parallel_tool_calls")  # an answer has one call at most
        details = IMAGE_DETAILS if self.processor.res is None else (None, "auto")
        for number, message in enumerate(self.messages):
            for index, part in enumerate(message.content):
                if part.type == "image_url" and part.image_url and part.image_url.detail not in details:
                    found.append(f"messages.{number}.content.{index}.image_url.detail")
        return found

    @property
    def choices(self) -> int:
        return self.n or 1


def parsed(body: bytes) -> ChatRequest:
    """A request from its JSON. Raises ApiError, which names the part that is wrong or not offered."""
    try:
        chat = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        raise _error_of(error) from error
    for path, name, value in chat.others:
        if name in NOT_OFFERED and value is not None and value not in NOT_OFFERED[name]:
            raise ApiError(400, f"{path} is not offered by this server", param=path, code="unsupported_parameter")
    return chat


def ignored_header(fields: list[str]) -> dict[str, str]:
    """The header that tells a client which fields of its request have no effect."""
    names = [re.sub(r"[^\w.-]", "?", name[:MAX_FIELD_CHARS], flags=re.ASCII) for name in fields[:MAX_NAMED_FIELDS]]
    return {"x-ignored-fields": ", ".join(names)} if names else {}


def _error_of(error: ValidationError) -> ApiError:
    """The first mistake, without the names that pydantic gives to the members of unions."""
    first = error.errors(include_url=False)[0]
    path, message = list(first["loc"]), first["msg"].removeprefix("Value error, ")
    if path[:1] == ["messages"] and path[2:3] == ["content"]:
        del path[4:5]  # the kind of part
    if path[:1] == ["tool_choice"]:
        del path[1:2]
    if first["type"].startswith("union_tag"):
        path.append("type")
        message = "expected 'text', 'image_url' or 'image_embeds'"
    found: object = first.get("ctx", {}).get("tag", first["input"])
    if first["type"] in ("literal_error", "union_tag_invalid") and isinstance(found, str):
        message += f", found {found[:40]!r}"
    param = re.sub(r"\s", "?", ".".join(map(str, path))[:MAX_PARAM_CHARS]) or None  # a key may be anything
    return ApiError(400, f"{param}: {message}" if param else message, param=param)


class ImageReference(NamedTuple):
    """An image of a request. url: or embeddings in base64; None where it is named alone. path: where it is there, for
    errors."""

    url: str | None
    path: str
    detail: str | None
    uuid: str | None
    is_embeds: bool


def conversation(
    messages: list[Message], template: PromptTemplate, tools: str = ""
) -> tuple[str, list[ImageReference]]:
    """The prompt of a conversation, as `first_turn` and `next_turn` write it.

    - What the model is told of functions (`tools`) follows the system text. Calls are part of the assistant's text,
      what functions return is part of the user's.
    - System messages are joined. Messages of one role that follow one another are one; parts are lines.
    - Images stay between the texts. An only image comes first, as in training.
    - An assistant's message that comes first answers an empty question. After an assistant's message that comes last an
      empty question follows: its answer is a new message.

    Returns:
        The prompt up to where the answer begins, with a placeholder for each image, and the images in order.

    Raises:
        ApiError: no message of the user or the assistant, or an image in another message than the user's.
    """
    system: list[str] = []
    turns: list[tuple[str, list[Part]]] = []
    images: list[ImageReference] = []
    for number, message in enumerate(messages):
        for index, part in enumerate(message.content):
            if part.type != "text":
                path = f"messages.{number}.content.{index}.{part.type}"
                if message.role != "user":
                    raise ApiError(400, f"{path}: images belong to messages of the user", param=path)
                images.append(_reference(part, path))
        if message.role in ("system", "developer"):
            system.append(_text(message.content))
            continue
        role, parts = _spoken(message, template.tools or ToolTemplate())
        if turns and turns[-1][0] == role:
            turns[-1][1].extend(parts)
        else:
            turns.append((role, parts))
    if not turns:
        raise ApiError(400, "messages: expected a message of the user, found only system messages", param="messages")
    if turns[0][0] == "assistant":
        turns.insert(0, ("user", []))
    if turns[-1][0] == "assistant":
        turns.append(("user", []))
    opening = "\n".join(system) if system else None  # an empty system text is not the template's
    if tools:
        opening = (template.system if opening is None else opening) + escaped(tools)
    pieces: list[str] = []
    for role, parts in turns:
        if role == "assistant":
            pieces[-1] = with_answer(pieces[-1], _text(parts))
        elif pieces:
            pieces.append(next_turn(template, *_question(parts)))
        else:
            pieces.append(first_turn(template, *_question(parts), opening))
    return "".join(pieces), images


def _reference(part: ImagePart | EmbedsPart, path: str) -> ImageReference:
    if part.type == "image_embeds":
        return ImageReference(part.image_embeds, path, None, part.uuid, True)
    image = part.image_url
    return ImageReference(image.url if image else None, path, image.detail if image else None, part.uuid, False)


def _spoken(message: Message, template: ToolTemplate) -> tuple[str, list[Part]]:
    """(user or assistant, what that one says)."""
    if message.role == "tool":
        return "user", [TextPart(type="text", text=template.result(_text(message.content)))]
    calls = [call.function for call in message.tool_calls or []]
    texts = [template.call(json.dumps(call.name), call.arguments or "{}") for call in calls]
    return message.role, [*message.content, *(TextPart(type="text", text=text) for text in texts)]


def _question(parts: list[Part]) -> tuple[str, int]:
    """(text, number of images), with placeholders where the images do not all come first."""
    at = [index for index, part in enumerate(parts) if part.type != "text"]
    in_place = len(at) > 1 and at[-1] >= len(at)
    return _text(parts, in_place), len(at)


def _text(parts: list[Part], placeholders: bool = False) -> str:
    """A line for each text, and for each image where placeholders are wanted."""
    return "\n".join(
        part.escaped if part.type == "text" else IMAGE_PLACEHOLDER
        for part in parts
        if placeholders or part.type == "text"
    )


def image_bytes(url: str, most: int) -> bytes:
    """What a data URL holds, read as browsers do (https://fetch.spec.whatwg.org/#data-urls); URL-safe base64 too.

    Raises ApiError for one that is no base64, or larger than `most`.
    """
    head, comma, text = url.strip().partition(",")
    if not comma or len(head) > MAX_DATA_HEAD_CHARS or not _DATA_HEAD.fullmatch(head):
        raise _bad_image("a data URL of an image reads data:image/...;base64,...")
    try:
        content = text.partition("#")[0].encode("ascii")
    except UnicodeEncodeError as error:
        raise _bad_image("an image's data URL is not base64: a character that is not ASCII") from error
    content = _percent_decoded(content).translate(_URL_SAFE, b" \t\n\f\r")
    if len(content) % 4 == 0:
        content = content[:-2] + content[-2:].rstrip(b"=")
    if len(content) > 4 * (most + 3) / 3:
        raise too_large(most)
    if b"=" in content:
        raise _bad_image("an image's data URL is not base64: padding that does not fit")
    try:
        content = base64.b64decode(content + b"=" * (-len(content) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise _bad_image(f"an image's data URL is not base64: {error}") from error
    if len(content) > most:
        raise too_large(most)
    return content


def _percent_decoded(text: bytes) -> bytes:
    """As urllib's `unquote_to_bytes`, in numpy: a body may have millions of escapes."""
    if b"%" not in text:
        return text
    codes = np.frombuffer(text, np.uint8)
    at = np.flatnonzero(codes[:-2] == ord("%"))
    high, low = _HEX_DIGITS[codes[at + 1]], _HEX_DIGITS[codes[at + 2]]
    escapes = (high >= 0) & (low >= 0)
    at = at[escapes]
    decoded, kept = codes.copy(), np.ones(len(codes), bool)
    decoded[at] = 16 * high[escapes] + low[escapes]
    kept[at + 1] = kept[at + 2] = False
    return decoded[kept].tobytes()


def too_large(most: int) -> ApiError:
    return ApiError(413, f"an image is larger than {most} bytes", param="messages", code="image_too_large")


def _bad_image(message: str) -> ApiError:
    return ApiError(400, message, param="messages", code="invalid_image_url")
