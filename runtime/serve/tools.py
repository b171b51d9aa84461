"""Function calling: what requests say of functions, what the model is told of them, and answers that are calls.

A call is an answer that begins as the template's `call_begin` and goes on with `{"name": ..., "arguments": ...}`, which
a grammar made from the functions' schemas holds it to. There is at most one in an answer.
"""

import json
import re
import uuid
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from runtime.text.grammar import json_rule
from runtime.text.stop import Answer, StopStrings
from runtime.text.template import ToolTemplate
from runtime.text.tokenizer import Tokenizer

MAX_TOOLS = 128
NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
_FREE = r"/[^\x01]*/"  # \x01: no text, see `without_special_texts`
_CALL_HEAD = re.compile(r'\{"name": "([^"]*)", "arguments": ')

Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore")


class Function(_Part):
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None

    @property
    def schema_of(self) -> dict[str, Any]:
        """Of its arguments, which are an object."""
        return NO_PARAMETERS if self.parameters is None else self.parameters | {"type": "object"}


class Tool(_Part):
    type: Literal["function"]
    function: Function


class NamedFunction(_Part):
    name: Name


class NamedTool(_Part):
    type: Literal["function"]
    function: NamedFunction


class CalledFunction(_Part):
    name: Name
    arguments: str


class ToolCall(_Part):
    """As an assistant's message has it."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


ToolChoice = Literal["none", "auto", "required"] | NamedTool


@dataclass(frozen=True)
class CallableTools:
    """The functions that one answer may call. required: it is a call, and no text."""

    functions: tuple[Function, ...]
    required: bool
    template: ToolTemplate

    def grammar(self, schema: dict[str, Any] | None) -> str:
        """The source of an answer's grammar, as `Grammars.of_source` takes it.

        Args:
            schema: what a text must follow, None for any text.

        Raises:
            UserError: as `json_rule`.
        """
        begin = self.template.call_begin.strip()
        calls = [_quoted(f'{{"name": {json.dumps(one.name)}, "arguments": ') for one in self.functions]
        rules = [
            "start: call" if self.required else "start: call | text",
            f'call: BEGIN ({" | ".join(f"call_{index}" for index in range(len(calls)))}) "}}"',
            f"BEGIN: / ?{_escaped(begin)}/",  # many models begin each answer with a space
        ]
        for index, (head, one) in enumerate(zip(calls, self.functions, strict=True)):
            rules += [f"call_{index}: {head} arguments_{index}", f"arguments_{index}: {json_rule(one.schema_of)}"]
        if not self.required and schema is not None:
            rules.append(f"text: {json_rule(schema)}")
        elif not self.required:
            rules += ["text: TEXT", rf"TEXT: {_FREE} & ~/\s*{_escaped(begin)}(.|\n)*/"]
        return "\n".join(rules)


def callable_tools(tools: list[Tool], choice: ToolChoice | None, template: ToolTemplate | None) -> CallableTools | None:
    """The functions that an answer may call; None where there are none, or none may be. template: None for the
    default."""
    if not tools or choice == "none":
        return None
    forced = choice.function.name if isinstance(choice, NamedTool) else None
    functions = tuple(tool.function for tool in tools if forced in (None, tool.function.name))
    return CallableTools(functions, choice not in (None, "auto"), template or ToolTemplate())


def told(tools: list[Tool], choice: ToolChoice | None, template: ToolTemplate | None) -> str:
    """What the model is told of functions: of all, so that a prompt begins alike whichever is forced; "" where none
    may be called."""
    if not tools or choice == "none":
        return ""
    lines = [tool.function.model_dump(exclude_none=True) for tool in tools]
    return (template or ToolTemplate()).told([json.dumps(line, ensure_ascii=False) for line in lines])


class ToolAnswer:
    """An answer that is a text, or a call of a function, with which it ends. As `runtime.text.stop.Answer`.

    Attributes:
        text: what is certain of a text so far.
        call: None where it is none, or as long as its name is not known.
        finish_reason: `tool_calls` after a call, else as `Answer`.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...], tools: CallableTools):
        """stop: strings that end a text; a call may hold them."""
        self._answer, self._stops, self._object = Answer(tokenizer, ()), StopStrings(stop), _ObjectEnd()
        self._begin, self._required = tools.template.call_begin.strip(), tools.required
        self._kind: Literal["unknown", "text", "call"] = "unknown"
        self._held = ""  # as long as its kind, or the name of the function, is not known
        self._sent: int | None = None  # characters of the arguments that `call_deltas` has given; None: no name either
        self.text = ""
        self.call: ToolCall | None = None
        self.finish_reason: str | None = None

    def push(self, token: int, finish_reason: str | None) -> str:
        """As `Answer.push`; the text of a call is not returned but found in `call`."""
        piece = self._answer.push(token, finish_reason)
        self.finish_reason = self._answer.finish_reason
        if self._kind == "unknown":
            piece, self._held = self._held + piece, ""
            start = piece.lstrip()
            if start.startswith(self._begin):
                self._kind, piece = "call", start.removeprefix(self._begin)
            elif self._begin.startswith(start) and (self._required or self.finish_reason is None):
                self._held = piece
                return ""
            else:
                self._kind = "text"
        if self._kind == "call":
            self._push_call(piece)
            return ""
        text, stopped = self._stops.push(piece)
        if stopped:
            self.finish_reason = "stop"
        elif self.finish_reason is not None:
            text += self._stops.flush()
        self.text += text
        return text

    def _push_call(self, piece: str) -> None:
        if self.call is None:
            self._held += piece
            if (match := _CALL_HEAD.match(self._held)) is None:
                return
            piece = self._held[match.end() :]
            function = CalledFunction(name=match[1], arguments="")
            self.call = ToolCall(id=f"call_{uuid.uuid4().hex}", function=function)
        end = self._object.push(piece)
        self.call.function.arguments += piece[:end]
        if end is not None:
            self.finish_reason = "tool_calls"

    def call_deltas(self) -> list[dict[str, Any]]:
        """What came of the call since this was last asked, as OpenAI streams it: its name, then pieces of arguments."""
        if self.call is None:
            return []
        function, deltas = self.call.function, list[dict[str, Any]]()
        if self._sent is None:
            self._sent = 0
            deltas.append({"index": 0, **self.call.model_dump(), "function": {"name": function.name, "arguments": ""}})
        if new := function.arguments[self._sent :]:
            self._sent += len(new)
            deltas.append({"index": 0, "function": {"arguments": new}})
        return deltas


class _ObjectEnd:
    """Finds where a JSON object ends that comes in pieces."""

    def __init__(self):
        self._depth, self._in_string, self._escaped = 0, False, False

    def push(self, text: str) -> int | None:
        """How much of the piece still belongs to the object, None for all of it and perhaps more."""
        for index, char in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped, self._in_string = char == "\\", char != '"'
            elif char == '"':
                self._in_string = True
            elif char in "{}":
                self._depth += 1 if char == "{" else -1
                if self._depth == 0:
                    return index + 1
        return None


def _quoted(text: str) -> str:
    """A text as a Lark grammar has it."""
    return json.dumps(text, ensure_ascii=False)


def _escaped(text: str) -> str:
    """A text as a regular expression between slashes."""
    return "".join(char if char.isalnum() or ord(char) > 127 else rf"\x{ord(char):02x}" for char in text)
