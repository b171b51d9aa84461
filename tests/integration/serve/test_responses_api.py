"""The Responses API, driven by OpenAI's own client: the same answers as chat completions."""

import base64
import json

import openai
import pytest
from openai.types import responses

import runtime
from tests.support.served import Served, asked, picture

TOOL = {
    "type": "function",
    "name": "f",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"a": {"enum": [1, 2]}},
        "required": ["a"],
        "additionalProperties": False,
    },
}
SCHEMA = {"type": "json_schema", "name": "n", "schema": TOOL["parameters"], "strict": True}


@pytest.fixture(scope="module")
def served(conformance_bundle):
    server = Served(runtime.load(conformance_bundle))
    yield server
    server.close()


def respond(server, **options):
    options = {"model": server.model.bundle.name, "temperature": 0, "max_output_tokens": 12} | options
    options |= {"extra_body": {"ignore_eos": options.pop("ignore_eos", False)}}
    return server.client().responses.create(**options)


def question(text, *images):
    urls = [f"data:image/png;base64,{base64.b64encode(image).decode()}" for image in images]
    parts = [{"type": "input_image", "image_url": url, "detail": "auto"} for url in urls]
    return [{"role": "user", "content": [{"type": "input_text", "text": text}, *parts]}]


def chat(server, messages):
    name = server.model.bundle.name
    return server.client().chat.completions.create(
        model=name, messages=messages, temperature=0, max_tokens=12, extra_body={"ignore_eos": True}
    )


def test_an_answer_is_that_of_chat_completions(served):
    page = picture(5)
    expected = chat(served, [{"role": "system", "content": "Be brief."}, *asked("What is this?", page)])
    found = respond(
        served, instructions="Be brief.", input=question("What is this?", page), store=False, ignore_eos=True
    )
    assert found.output_text == expected.choices[0].message.content != ""
    assert (found.usage.input_tokens, found.usage.output_tokens) == (expected.usage.prompt_tokens, 12)
    assert found.usage.input_tokens_details.cached_tokens > 0
    assert (found.status, found.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert (found.object, found.instructions, found.error) == ("response", "Be brief.", None)


def test_a_stream_is_the_same_answer_in_events(served):
    given = {"input": question("What is this?", picture(5)), "include": ["message.output_text.logprobs"]}
    given["ignore_eos"] = True
    whole = respond(served, **given)
    events = list(respond(served, **given, stream=True))
    kinds = [event.type for event in events]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    first = ["created", "in_progress", "output_item.added", "content_part.added"]
    last = ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    assert kinds[:4] == [f"response.{kind}" for kind in first]
    assert kinds[-4:] == [f"response.{kind}" for kind in last]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert "".join(event.delta for event in events[4:-4]) == events[-4].text == whole.output_text
    final = events[-1].response
    assert isinstance(events[-1], responses.ResponseIncompleteEvent)
    assert final.output_text == whole.output_text
    assert final.usage.output_tokens == len(final.output[0].content[0].logprobs) == 12
    assert len({event.item_id for event in events[3:-2]}) == 1


def test_a_schema_is_followed(served):
    found = respond(served, input="Count.", text={"format": SCHEMA}, max_output_tokens=100)
    assert json.loads(found.output_text)["a"] in (1, 2)
    assert (found.status, found.incomplete_details) == ("completed", None)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "f"}])
def test_a_function_is_called_and_the_conversation_goes_on(served, choice):
    given = {"tools": [TOOL], "max_output_tokens": 200}
    found = respond(served, input="Call it.", tool_choice=choice, **given)
    (call,) = found.output
    assert (call.type, call.name, call.status) == ("function_call", "f", "completed")
    assert json.loads(call.arguments)["a"] in (1, 2)
    events = list(respond(served, input="Call it.", tool_choice=choice, stream=True, **given))
    kinds = [event.type for event in events]
    deltas = [event for event in events if event.type == "response.function_call_arguments.delta"]
    assert "".join(event.delta for event in deltas) == call.arguments
    done = next(event for event in events if event.type == "response.function_call_arguments.done")
    assert (done.name, done.arguments) == ("f", call.arguments)
    assert kinds[-2:] == ["response.output_item.done", "response.completed"]
    history = [*question("Call it."), call.model_dump(exclude_none=True)]
    history += [{"type": "function_call_output", "call_id": call.call_id, "output": "7"}]
    assert respond(served, input=history, tools=[TOOL], tool_choice="none").output_text


def test_the_client_s_own_stream_helper_reads_it(served):
    with served.client().responses.stream(
        model=served.model.bundle.name, input="What?", temperature=0, max_output_tokens=100, text={"format": SCHEMA}
    ) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        assert stream.get_final_response().output_text == text != ""


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("change", "status", "said"),
    [
        ({"previous_response_id": "resp_1"}, 400, "stores nothing"),
        ({"model": "gpt-5"}, 404, "not served here"),
        ({"input": question("What?", b"no image")}, 400, "input.0.content.1.image_url|not an image"),
        ({"max_output_tokens": 0}, 400, "max_output_tokens"),
    ],
)
def test_errors_have_openais_shape(served, change, status, said, stream):
    with pytest.raises(openai.APIStatusError, match=said) as error:
        respond(served, **{"input": "x"} | change, stream=stream)
    assert error.value.status_code == status


def test_an_error_on_the_way_is_a_failed_response(served, monkeypatch):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(served.scheduler._slots, "step", fail)
    events = list(respond(served, input="What is this?", stream=True, ignore_eos=True))
    assert events[-1].type == "response.failed"
    assert events[-1].response.error.code == "server_error"
    with pytest.raises(openai.InternalServerError):
        respond(served, input="What is this?", ignore_eos=True)
