"""Function calling as OpenAI's client and those that build on it ask for it, of a model that knows nothing of it."""

import json

import openai
import pytest

import runtime
from tests.support.served import Served, asked

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a place.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"$ref": "#/$defs/Days"}},
            "required": ["city", "days"],
            "additionalProperties": False,
            "$defs": {"Days": {"enum": [1, 2]}},
        },
        "strict": True,
    },
}
NOW = {"type": "function", "function": {"name": "now"}}
FORCED = {"type": "function", "function": {"name": "get_weather"}}


@pytest.fixture(scope="module")
def served(conformance_bundle):
    server = Served(runtime.load(conformance_bundle))
    yield server
    server.close()


def create(server, messages, **options):
    name = server.client().models.list().data[0].id
    options = {"temperature": 0, "max_tokens": 200} | options
    return server.client().chat.completions.create(model=name, messages=messages, **options)


def check_weather(call):
    assert (call.type, call.function.name) == ("function", "get_weather")
    found = json.loads(call.function.arguments)
    assert found.keys() == {"city", "days"}
    assert found["city"] in ("Rome", "Oslo")
    assert found["days"] in (1, 2)


@pytest.mark.parametrize(
    "options",
    [
        {"tool_choice": FORCED, "parallel_tool_calls": False},  # LangChain, instructor
        {"tool_choice": "required"},  # pydantic-ai
        {"tool_choice": "required", "response_format": {"type": "json_object"}},
    ],
)
def test_a_call_is_answered_as_openai_does(served, options):
    choice = create(served, asked("What is the weather?"), tools=[WEATHER], **options).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    (call,) = choice.message.tool_calls
    check_weather(call)
    assert call.id.startswith("call_")


def test_a_call_is_streamed_in_pieces(served):
    options = {"tools": [NOW, WEATHER], "tool_choice": FORCED, "n": 2, "temperature": 1.2, "seed": 1}
    whole = create(served, asked("Weather?"), **options)
    arguments, names, reasons = ["", ""], ["", ""], ["", ""]
    for chunk in create(served, asked("Weather?"), stream=True, **options):
        (choice,) = chunk.choices
        assert not choice.delta.content
        for call in choice.delta.tool_calls or []:
            assert call.index == 0
            assert (call.id is None) == (call.function.name is None)
            names[choice.index] += call.function.name or ""
            arguments[choice.index] += call.function.arguments
        reasons[choice.index] = choice.finish_reason
    assert names == ["get_weather"] * 2
    assert reasons == ["tool_calls"] * 2
    assert arguments == [choice.message.tool_calls[0].function.arguments for choice in whole.choices]


def test_the_client_s_own_stream_helper_reads_it(served):
    name = served.client().models.list().data[0].id
    with served.client().chat.completions.stream(
        model=name, messages=asked("Weather?"), tools=[WEATHER], tool_choice="required", max_tokens=200
    ) as stream:
        events = {event.type for event in stream}
        check_weather(stream.get_final_completion().choices[0].message.tool_calls[0])
    assert "tool_calls.function.arguments.done" in events


def test_a_conversation_with_calls_goes_on(served):
    """With the same functions the prompt begins as before."""
    messages = asked("What is the weather?")
    first = create(served, messages, tools=[WEATHER], tool_choice="required")
    message = first.choices[0].message
    messages += [message.model_dump(exclude_none=True)]
    messages += [{"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "12 degrees", "name": "x"}]
    again = create(served, messages, tools=[WEATHER], tool_choice="auto", max_tokens=5)
    assert again.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens - 2
    assert again.choices[0].finish_reason == "length"
    plain = create(served, messages, tools=[WEATHER], tool_choice="none", max_tokens=5)
    assert plain.choices[0].message.content
    assert plain.choices[0].message.tool_calls is None
    assert plain.usage.prompt_tokens == create(served, messages, max_tokens=5).usage.prompt_tokens


def test_a_text_is_streamed_as_without_tools(served):
    options = {"tools": [WEATHER], "max_tokens": 12, "logprobs": True}
    whole = create(served, asked("Hello"), **options).choices[0]
    chunks = [chunk.choices[0] for chunk in create(served, asked("Hello"), stream=True, **options)]
    assert whole.message.tool_calls is None
    assert "".join(chunk.delta.content or "" for chunk in chunks) == whole.message.content != ""
    assert sum(len(chunk.logprobs.content) for chunk in chunks if chunk.logprobs) == len(whole.logprobs.content)


def test_a_call_that_is_cut_says_so(served):
    choice = create(served, asked("Weather?"), tools=[WEATHER], tool_choice="required", max_tokens=2).choices[0]
    assert choice.finish_reason == "length"


def test_several_calls_at_once_are_named_as_ignored(served):
    raw = served.client().chat.completions.with_raw_response
    body = {"messages": asked("Hi"), "model": served.model.bundle.name, "max_tokens": 1, "tools": [NOW]}
    assert raw.create(**body, parallel_tool_calls=True).headers["x-ignored-fields"] == "parallel_tool_calls"
    assert "x-ignored-fields" not in raw.create(**body, parallel_tool_calls=False).headers


@pytest.mark.parametrize(
    ("parameters", "said"),
    [({"type": 5}, "schema"), ({"multipleOf": 999_983}, "multipleOf"), ({"enum": ["a"] * 20_000}, "context")],
)
def test_schemas_that_cannot_be_followed_are_told_so(served, parameters, said):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": parameters}}}}
    with pytest.raises(openai.BadRequestError, match=said) as error:
        create(served, asked("Hi"), tools=[tool])
    assert error.value.body["param"] == ("messages" if said == "context" else "tools")
