"""Functions of a request, and answers that are calls, from their tokens."""

import json
from types import SimpleNamespace

import pytest

from runtime.serve.protocol import ChatRequest
from runtime.serve.tools import NO_PARAMETERS, Tool, ToolAnswer, callable_tools, told
from runtime.text.template import ToolTemplate

ARGUMENTS = '{"text": "a \\"}\\\\", "more": {"x": [1, {}]}}'
CALL = f'<tool_call>{{"name": "f", "arguments": {ARGUMENTS}}}'


def tools(*names, **function):
    return [Tool.model_validate({"type": "function", "function": {"name": name} | function}) for name in names]


def answer(required=False, stop=()):
    """Of a tokenizer whose tokens are characters."""
    detokenizer = SimpleNamespace(push=chr, flush=lambda: "")
    found = callable_tools(tools("f"), "required" if required else "auto", None)
    return ToolAnswer(SimpleNamespace(detokenizer=lambda: detokenizer), stop, found)


def pushed(answer, text, finish_reason=None):
    """(texts, deltas of a call), until it ends."""
    texts, deltas = [], []
    for index, char in enumerate(text):
        texts.append(answer.push(ord(char), finish_reason if index == len(text) - 1 else None))
        deltas += answer.call_deltas()
        if answer.finish_reason:
            break
    return texts, deltas


def test_which_functions_may_be_called():
    both = tools("f", "g")
    forced = ChatRequest.model_validate({
        "messages": [{"role": "user", "content": "x"}],
        "tools": [tool.model_dump() for tool in both],
        "tool_choice": {"type": "function", "function": {"name": "g"}},
    }).tool_choice  # fmt: skip
    for choice, names, required in (
        (None, ["f", "g"], False),
        ("auto", ["f", "g"], False),
        ("required", ["f", "g"], True),
        (forced, ["g"], True),
    ):
        found = callable_tools(both, choice, None)
        assert ([one.name for one in found.functions], found.required) == (names, required)
        assert told(both, choice, None) == told(both, None, None), "prompts begin alike"
    assert callable_tools([], None, None) is callable_tools(both, "none", None) is None
    assert told(both, "none", None) == told([], "auto", None) == ""


def test_what_the_model_is_told():
    described = tools("f", description="é", parameters={"type": "object"})
    line = '{"name": "f", "description": "é", "parameters": {"type": "object"}}'
    assert told(described, None, ToolTemplate("<{tools}>")) == f"<{line}>"
    assert line in told(described, None, None)


def test_arguments_are_an_object():
    (none,), (empty,) = tools("f"), tools("f", parameters={})
    assert none.function.schema_of == NO_PARAMETERS
    assert empty.function.schema_of == {"type": "object"}


@pytest.mark.parametrize("before", ["", " ", "\n"])
@pytest.mark.parametrize("stop", [(), ("<", "text", "}")])
def test_a_call_is_told_from_its_first_marker_and_ends_with_its_arguments(before, stop):
    found = answer(stop=stop)
    texts, deltas = pushed(found, before + CALL + "</tool_call> and more")
    assert "".join(texts) == found.text == ""
    assert found.finish_reason == "tool_calls"
    assert found.call.function.arguments == ARGUMENTS
    head, *pieces = deltas
    assert head == {"index": 0, "id": found.call.id, "type": "function", "function": {"name": "f", "arguments": ""}}
    assert "".join(piece["function"]["arguments"] for piece in pieces) == ARGUMENTS
    assert all(piece.keys() == {"index", "function"} for piece in pieces)
    assert json.loads(ARGUMENTS)["text"] == 'a "}\\'


@pytest.mark.parametrize("text", ["Hello.", " Hello.", "<tool", "<tool_calls>", "a <tool_call>", "", "<"])
def test_other_answers_are_texts(text):
    found = answer()
    texts, deltas = pushed(found, text + "!", "length")
    assert "".join(texts) == found.text == text + "!"
    assert (found.call, deltas, found.finish_reason) == (None, [], "length")


def test_stop_strings_end_a_text():
    found = answer(stop=("lo",))
    texts, _ = pushed(found, "Hello.")
    assert ("".join(texts), found.finish_reason) == ("Hel", "stop")


@pytest.mark.parametrize("cut", range(1, len(CALL) - 1))
def test_a_call_that_is_cut_is_none_that_is_whole(cut):
    found = answer(required=True)
    texts, deltas = pushed(found, CALL[:cut], "length")
    assert ("".join(texts), found.finish_reason) == ("", "length")
    arguments = "".join(delta["function"]["arguments"] for delta in deltas)
    assert ARGUMENTS.startswith(arguments)
    assert len(arguments) < len(ARGUMENTS)
    assert (found.call is None) == (not deltas)
