"""Requests of the Responses API become those of chat completions, and errors come back in its own words."""

import json

import pytest

from runtime.serve.protocol import ApiError, ChatRequest
from runtime.serve.responses_api import ResponsesCall

URL = "data:image/png;base64,AAAA"
FUNCTION = {"name": "f", "description": "d", "parameters": {"type": "object"}}


def read(**fields) -> ChatRequest:
    return ResponsesCall().read(json.dumps(fields).encode())


def chat(**fields) -> ChatRequest:
    return ChatRequest.model_validate(fields)


def test_a_request_is_one_of_chat_completions():
    parts = [{"type": "input_text", "text": "What?"}, {"type": "input_image", "image_url": URL, "detail": "high"}]
    found = read(
        instructions="Be brief.",
        input=[
            {"role": "user", "content": parts},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "A."}], "id": "m"},
            {
                "type": "function_call",
                "call_id": "c",
                "name": "f",
                "arguments": "{}",
                "id": "fc",
                "status": "completed",
            },
            {"type": "function_call_output", "call_id": "c", "output": "7"},
            {"role": "user", "content": "And?"},
        ],
        tools=[{"type": "function", "strict": True, **FUNCTION}],
        tool_choice={"type": "function", "name": "f"},
        text={"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}}},
        include=["message.output_text.logprobs"],
        top_logprobs=2,
        max_output_tokens=7,
        temperature=0.5,
        top_p=0.9,
        seed=3,
        stream=True,
        store=False,
        metadata={"a": "b"},
        truncation="disabled",
        reasoning={"effort": None},
    )
    image = {"type": "image_url", "image_url": {"url": URL, "detail": "high"}}
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    expected = chat(
        messages=[
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "What?"}, image]},
            {"role": "assistant", "content": "A."},
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c", "content": "7"},
            {"role": "user", "content": "And?"},
        ],
        tools=[{"type": "function", "function": FUNCTION}],
        tool_choice={"type": "function", "function": {"name": "f"}},
        response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}},
        logprobs=True,
        top_logprobs=2,
        max_completion_tokens=7,
        temperature=0.5,
        top_p=0.9,
        seed=3,
        stream=True,
        n=1,
    )
    names = set(ChatRequest.model_fields)
    assert found.model_dump(include=names) == expected.model_dump(include=names)
    assert found.ignored == []


def test_a_text_is_a_question():
    assert read(input="Hello").messages == chat(messages=[{"role": "user", "content": "Hello"}]).messages


def test_what_has_no_effect_is_named():
    assert read(input="x", mood="good", include=["file_search_call.results"]).ignored == ["mood", "include"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("previous_response_id", "resp_1"),
        ("conversation", "conv_1"),
        ("background", True),
        ("prompt", {"id": "p"}),
        ("truncation", "auto"),
        ("frequency_penalty", 1),
    ],
)
def test_what_is_not_offered_is_refused_by_name(field, value):
    with pytest.raises(ApiError, match=f"^{field} is not offered") as error:
        read(input="x", **{field: value})
    assert (error.value.status, error.value.param) == (400, field)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "input"),
        ({"input": 5}, "input"),
        ({"input": []}, "input"),
        ({"input": ["x"]}, "input.0"),
        ({"input": [{"role": "user", "content": "x"}, {"type": "item_reference", "id": "x"}]}, "input.1.role"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input.0.content.0.type"),
        ({"input": [{"role": "user", "content": [{"type": ["x"]}]}]}, "input.0.content.0.type"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input.0.tool_calls.0.id"),
        ({"input": "x", "instructions": 5}, "instructions"),
        ({"input": "x", "max_output_tokens": 0}, "max_output_tokens"),
        ({"input": "x", "text": 5}, "text"),
        ({"input": "x", "text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"input": "x", "tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"input": "x", "tool_choice": "required"}, "tool_choice"),
    ],
)
@pytest.mark.parametrize("instructions", [{}, {"instructions": "Be brief."}])
def test_errors_name_the_part_that_is_wrong(fields, param, instructions):
    call = ResponsesCall()
    with pytest.raises(ApiError) as error:
        call.read(json.dumps(instructions | fields).encode())
    call.rename(error.value)
    assert (error.value.status, error.value.param) == (400, param)
    assert str(error.value).startswith(param)


@pytest.mark.parametrize("body", [b"", b"[]", b"\xff", b"[" * 100_000])
def test_bodies_that_are_no_requests_are_told_so(body):
    with pytest.raises(ApiError) as error:
        ResponsesCall().read(body)
    assert error.value.status == 400
