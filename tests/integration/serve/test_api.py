"""The server, driven by OpenAI's own client."""

import asyncio
import io
import json
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from types import SimpleNamespace

import jsonschema
import numpy as np
import openai
import pytest
from PIL import Image
from starlette.testclient import TestClient

import runtime
from runtime.serve.app import create_app
from runtime.serve.chat import ChatService
from runtime.serve.limits import Limits
from runtime.serve.metrics import Metrics
from runtime.serve.protocol import ApiError
from runtime.serve.scheduler import Scheduler
from runtime.text.grammar import JsonGrammar
from runtime.types import Options, Sampling
from tests.support.commands import ROOT
from tests.support.served import WAIT, Served, asked, free_port, picture, scheduler_of, slow_down, wait_for

QUESTION = "What is this?"
LONG = {"max_tokens": 3000, "stream": True, "extra_body": {"ignore_eos": True}}
SCHEMA = {
    "type": "object",
    "properties": {"total": {"type": "number"}, "paid": {"type": "boolean"}, "currency": {"enum": ["EUR", "USD"]}},
    "required": ["total", "paid", "currency"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def model(conformance_bundle):
    return runtime.load(conformance_bundle)


@pytest.fixture(scope="module")
def served(model):
    server = Served(model, limits=Limits(image_bytes=200_000, image_pixels=50_000, images=2, body_bytes=1_000_000))
    yield server
    server.close()


def create(server, messages, **options):
    name = server.client().models.list().data[0].id
    return server.client().chat.completions.create(model=name, messages=messages, **{"temperature": 0} | options)


def test_an_answer_is_the_models(served, model):
    image = picture()
    *_, last = model.generate([image], QUESTION, Options(max_new_tokens=12))
    answer = create(served, asked(QUESTION, image), max_tokens=12)
    assert answer.choices[0].message.content == last.result.text
    assert answer.choices[0].finish_reason == last.result.finish_reason
    assert answer.usage.prompt_tokens == last.result.prompt_tokens
    assert answer.usage.completion_tokens == len(last.result.token_ids)
    assert answer.model == model.bundle.name
    again = create(served, asked(QUESTION, image), max_completion_tokens=12)
    assert again.choices[0].message.content == last.result.text
    assert (
        again.usage.prompt_tokens_details.cached_tokens == answer.usage.prompt_tokens - 2
    )  # the last is not fed alone


def test_a_stream_is_the_same_answer_in_pieces(served):
    messages = asked(QUESTION, picture(), picture(1))
    whole = create(served, messages, max_tokens=12)
    chunks = list(create(served, messages, max_tokens=12, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len({c.id for c in chunks}) == 1


def test_a_conversation_goes_on(served):
    """What was computed for its first turn is taken over."""
    image = picture(4)
    first = create(served, asked(QUESTION, image), max_tokens=6)
    history = [*asked(QUESTION, image), {"role": "assistant", "content": first.choices[0].message.content}]
    answer = create(served, [*history, {"role": "user", "content": "And its date?"}], max_tokens=6)
    assert answer.usage.prompt_tokens > first.usage.prompt_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens - 2
    assert answer.choices[0].message.content


def test_choices_are_drawn_from_their_seeds(served):
    options = {"max_tokens": 8, "temperature": 1.5, "top_p": 0.9, "seed": 5, "n": 2}
    one, other = (create(served, asked(QUESTION), **options) for _ in range(2))
    texts = [[choice.message.content for choice in answer.choices] for answer in (one, other)]
    assert texts[0] == texts[1]
    assert texts[0][0] != texts[0][1]
    assert [choice.index for choice in one.choices] == [0, 1]
    second = create(served, asked(QUESTION), **options | {"n": 1, "seed": 6})
    assert second.choices[0].message.content == texts[0][1]


@pytest.mark.parametrize(
    "extra", [{"top_k": 2}, {"min_p": 0.3}, {"repetition_penalty": 1.8}, {"top_k": -1, "min_p": 0.0}], ids=str
)
def test_sampling_is_the_library_s(served, model, extra):
    sampling = Sampling(**{"temperature": 1.5, "seed": 5} | extra | {"top_k": max(extra.get("top_k", 0), 0)})
    *_, last = model.generate([], QUESTION, Options(max_new_tokens=12, sampling=sampling))
    answer = create(served, asked(QUESTION), temperature=1.5, seed=5, max_tokens=12, extra_body=extra)
    assert answer.choices[0].message.content == last.result.text


@pytest.mark.parametrize(
    ("detail", "extra", "resolution", "aspect"),
    [
        ("auto", {}, 256, "pad"),
        ("auto", {"res": 128}, 128, "pad"),
        ("auto", {"res": 192, "aspect": "any"}, 192, "any"),
        ("high", {"aspect": "crop"}, 256, "crop"),
        ("low", {}, 256, "pad"),
    ],
)
def test_a_request_chooses_how_its_images_are_sized(served, model, detail, extra, resolution, aspect):
    page = picture(21, (64, 128))
    options = Options(max_new_tokens=8, resolution=resolution, aspect=aspect)
    *_, last = model.generate([page], QUESTION, options)
    messages = asked(QUESTION, page)
    messages[0]["content"][1]["image_url"]["detail"] = detail
    for _ in range(2):  # encoded, then from the cache
        answer = create(served, messages, max_tokens=8, extra_body={"mm_processor_kwargs": extra})
        assert answer.choices[0].message.content == last.result.text
        assert answer.usage.prompt_tokens_details.to_dict()["image_tokens"] == last.result.visual_tokens


def test_one_image_at_two_sizes_is_two(served, model):
    page = picture(22)
    low = asked(QUESTION, page)[0]["content"][1]
    for resolution in (64, 128, 64):
        extra = {"mm_processor_kwargs": {"res": resolution}}
        answer = create(served, [{"role": "user", "content": [low, low]}], max_tokens=1, extra_body=extra)
        details = answer.usage.prompt_tokens_details.to_dict()
        assert details["image_tokens"] == 2 * (resolution // model.bundle.image.multiple) ** 2


def test_a_resolution_that_is_not_there_is_refused_before_an_image_is_opened(served):
    with pytest.raises(openai.BadRequestError, match="multiples of 64 from 64 to 256") as error:
        create(served, asked(QUESTION, b"no image"), extra_body={"mm_processor_kwargs": {"res": 512}})
    assert error.value.param == "mm_processor_kwargs.res"


@pytest.mark.parametrize("stream", [False, True])
def test_ignored_fields_are_named_in_a_header_and_once_in_the_log(served, caplog, stream):
    raw = served.client().chat.completions.with_raw_response
    body = {"messages": asked(QUESTION), "model": served.model.bundle.name, "max_tokens": 2, "stream": stream}
    assert "x-ignored-fields" not in raw.create(**body).headers
    for _ in range(2):
        assert raw.create(**body, extra_body={f"mood_{stream}": 1}).headers["x-ignored-fields"] == f"mood_{stream}"
    assert [record.message for record in caplog.records if "mood" in record.message] == [
        f"the field 'mood_{stream}' of requests has no effect"
    ]


def test_stop_strings_end_an_answer(served):
    whole = create(served, asked(QUESTION), max_tokens=12).choices[0].message.content
    assert len(whole) > 4
    cut = create(served, asked(QUESTION), max_tokens=12, stop=[whole[3:5]]).choices[0]
    assert (cut.message.content, cut.finish_reason) == (whole[: whole.index(whole[3:5])], "stop")


def test_logprobs_come_with_every_token(served):
    answer = create(served, asked(QUESTION), max_tokens=4, logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    for token in content:
        assert token.logprob <= 0
        assert token.top_logprobs[0].logprob == pytest.approx(token.logprob), "greedy"
        assert len(token.top_logprobs) == 3
        assert bytes(token.bytes).decode("utf-8", "replace") == token.token
    said = b"".join(bytes(token.bytes) for token in content)
    said = said.decode("utf-8", "runtime.text.tokenizer.replace_each_byte")  # as answers are decoded
    assert said.lstrip() == answer.choices[0].message.content.lstrip(), "spaces before words are there"
    streamed = list(create(served, asked(QUESTION), max_tokens=4, logprobs=True, stream=True))
    found = [t.logprob for c in streamed if c.choices[0].logprobs for t in c.choices[0].logprobs.content]
    assert found == pytest.approx([token.logprob for token in content], abs=1e-4)


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_answers_follow_a_schema(served, temperature):
    """Of a model that knows nothing of JSON."""
    wanted = {"type": "json_schema", "json_schema": {"name": "bill", "schema": SCHEMA}}
    answer = create(served, asked(QUESTION), max_tokens=400, response_format=wanted, temperature=temperature, seed=3)
    assert answer.choices[0].finish_reason == "stop"
    found = json.loads(answer.choices[0].message.content)
    assert set(found) == {"total", "paid", "currency"}
    assert isinstance(found["total"], int | float)
    assert isinstance(found["paid"], bool)
    assert found["currency"] in ("EUR", "USD")


@pytest.mark.parametrize(("stop", "expected"), [(None, '"x </s><s>"'), (["/s"], '"x <'), (["</s>"], '"x ')])
def test_no_stop_string_of_the_template_cuts_in_a_schema(served, stop, expected):
    wanted = {"type": "json_schema", "json_schema": {"name": "end", "schema": {"const": "x </s><s>"}}}
    for stream in (False, True):
        answer = create(served, asked(QUESTION), max_tokens=100, response_format=wanted, stop=stop, stream=stream)
        choices = [chunk.choices[0] for chunk in answer] if stream else [answer.choices[0]]
        text = "".join((choice.delta if stream else choice.message).content or "" for choice in choices)
        assert (text, choices[-1].finish_reason) == (expected, "stop")


@pytest.mark.parametrize(
    ("change", "status", "said"),
    [
        ({"messages": asked(QUESTION, b"no image")}, 400, "not an image"),
        ({"messages": asked(QUESTION, picture(size=(250, 250)))}, 400, "pixels"),
        ({"messages": asked(QUESTION, bytes(250_000))}, 413, "larger than 200000 bytes"),
        ({"messages": asked(QUESTION, bytes(900_000))}, 413, "body"),
        ({"messages": asked(QUESTION, *[picture()] * 3)}, 400, "at most 2"),
        # which LiteLLM and LangChain look for
        ({"messages": asked("word " * 5000)}, 400, "This model's maximum context length is 4096 tokens. However, "),
        ({"messages": asked("word " * 5000)}, 400, "exceeds the context window"),
        ({"model": "gpt-4o"}, 404, "not served here"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"temperature": 3}, 400, "temperature"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 5}}}},
            400,
            "schema",
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"enum": ["a"] * 20000}},
                }
            },
            400,
            "a schema of 100010 characters",
        ),
    ],
)
def test_errors_have_openais_shape(served, change, status, said):
    request = {"model": served.client().models.list().data[0].id, "messages": asked(QUESTION)} | change
    with pytest.raises(openai.APIStatusError, match=said) as error:
        served.client().chat.completions.create(**request)
    assert error.value.status_code == status
    assert error.value.body.keys() >= {"message", "type", "param", "code"}


def test_several_images_stay_between_their_texts(served, model):
    pages = [picture(11), picture(12)]
    *_, last = model.generate(pages, "Is\n<image>\nlike\n<image>\n?", Options(max_new_tokens=8))
    images = asked("", *pages)[0]["content"][1:]
    is_, like, end = ({"type": "text", "text": text} for text in ("Is", "like", "?"))
    answer = create(served, [{"role": "user", "content": [is_, images[0], like, images[1], end]}], max_tokens=8)
    assert answer.usage.prompt_tokens == last.result.prompt_tokens
    assert answer.choices[0].message.content == last.result.text


@pytest.mark.parametrize("wrong", [b"no image", bytes(250_000)])
def test_an_error_names_the_image_that_is_wrong(served, wrong):
    with pytest.raises(openai.APIStatusError) as error:
        create(served, [*asked(QUESTION, picture()), *asked(QUESTION, wrong)])
    assert error.value.body["param"] == "messages.1.content.1.image_url"


def test_remote_images_are_refused(served):
    part = {"type": "image_url", "image_url": {"url": "http://example.org/a.png"}}
    with pytest.raises(openai.BadRequestError, match="remote images are refused"):
        create(served, [{"role": "user", "content": [part]}])


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"messages": 5}', b"1" * 5000])
def test_bodies_that_are_no_requests_are_told_so(served, body):
    request = urllib.request.Request(f"http://127.0.0.1:{served.port}/v1/chat/completions", body, method="POST")
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request, timeout=WAIT)
    assert error.value.code == 400
    assert json.loads(error.value.read())["error"]["type"] == "invalid_request_error"


def test_who_disconnects_frees_the_slot(served, monkeypatch):
    slow_down(monkeypatch, served.scheduler)
    before = cancelled(served)
    stream = create(served, asked(QUESTION), **LONG)
    next(iter(stream))
    wait_for(lambda: served.scheduler.running == 1)
    stream.close()
    wait_for(lambda: served.scheduler.running == 0)
    assert cancelled(served) == before + 1, "it had not come to its end"
    impatient = served.client().with_options(timeout=3)
    with pytest.raises(openai.APITimeoutError):
        name = served.client().models.list().data[0].id
        impatient.chat.completions.create(
            model=name, messages=asked(QUESTION), temperature=0, **LONG | {"stream": False}
        )
    wait_for(lambda: served.scheduler.running == 0)
    assert cancelled(served) == before + 2


def test_a_body_is_let_go_when_its_request_is_prepared(served, monkeypatch):
    slow_down(monkeypatch, served.scheduler)
    bodies, begin = [], served.service.begin

    async def kept(body, *others):
        completion = await begin(body, *others)
        bodies.append(body)
        return completion

    monkeypatch.setattr(served.service, "begin", kept)
    waiting = threading.Thread(
        target=create, args=(served, asked(QUESTION)), kwargs=LONG | {"stream": False, "max_tokens": 100}
    )
    waiting.start()
    wait_for(lambda: served.scheduler.running == 1)
    body = bodies.pop()
    wait_for(lambda: sys.getrefcount(body) == 2)  # here, and the argument of the call
    assert served.scheduler.running == 1
    waiting.join(WAIT)


def test_writing_a_long_answer_holds_nobody_up(served, monkeypatch):
    """Log-probabilities of many tokens are megabytes of JSON."""
    threads = []
    named = served.model.tokenizer.token_bytes
    monkeypatch.setattr(
        served.model.tokenizer, "token_bytes", lambda token: threads.append(threading.current_thread()) or named(token)
    )
    answer = create(served, asked(QUESTION), max_tokens=5, logprobs=True, top_logprobs=3)
    assert len(answer.choices[0].logprobs.content) == len(threads) / 4
    assert served._thread not in threads


def cancelled(served) -> float:
    """Requests whose clients left."""
    lines = [line for line in served.get("/metrics")[1].splitlines() if 'finish="cancelled"' in line]
    return float(lines[0].rsplit(" ", 1)[1]) if lines else 0.0


def test_metrics_and_health(served):
    create(served, asked("Count.", picture(7)), max_tokens=3)
    create(served, asked("And again.", picture(7)), max_tokens=3)
    status, text = served.get("/metrics")
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert status == 200
    assert float(values["convllava_time_to_first_token_seconds_count"]) >= 2
    assert float(values['convllava_image_cache_total{result="hit"}']) >= 1
    assert float(values['convllava_image_cache_total{result="miss"}']) >= 1
    assert float(values['convllava_tokens_total{kind="generated"}']) >= 6
    assert float(values["convllava_inter_token_seconds_count"]) >= 4
    assert float(values["convllava_batch_occupancy_count"]) >= 4
    assert (float(values["convllava_queue_depth"]), float(values["convllava_running"])) == (0, 0)
    assert float(values["convllava_request_seconds_count"]) >= 2
    assert float(values["convllava_preparing"]) == 0
    assert float(values["process_resident_memory_bytes"]) > 1 << 20
    assert {"process_cpu_seconds_total", "process_start_time_seconds", "process_open_fds"} <= values.keys()
    (build,) = (name for name in values if name.startswith("convllava_build_info{"))
    assert f'model="{served.model.bundle.name}"' in build and 'version="' in build
    assert served.get("/health") == (200, '{"status":"ok"}')
    assert served.get("/ready") == (200, '{"status":"ready"}')
    assert served.get("/nothing")[0] == 404


def test_refused_requests_are_counted_by_their_status(model):
    server = Served(model, api_keys=("key",), limits=Limits(body_bytes=100_000))
    url, key = f"{server.url}/v1/chat/completions", {"Authorization": "Bearer key"}
    for body, headers, status in (
        (b"{", key, 400),
        (b"{}", {}, 401),
        (b'{"messages": [{"role": "user", "content": "x"}], "model": "other"}', key, 404),
        (bytes(101_000), key, 413),
    ):
        request = urllib.request.Request(url, body, headers | {"x-request-id": f"id-{status}"}, method="POST")
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(request, timeout=WAIT)
        assert (error.value.code, error.value.headers["x-request-id"]) == (status, f"id-{status}")
    text = server.get("/metrics")[1]
    for status in (400, 401, 404, 413):
        assert f'convllava_requests_total{{code="{status}",finish="rejected"}} 1.0' in text
    server.close()


def test_a_request_has_an_id_and_a_line_in_the_log(served, caplog):
    caplog.set_level("INFO", "convllava.serve.requests")
    image = picture(31)
    raw = served.client().chat.completions.with_raw_response
    body = {"messages": asked(QUESTION, image), "model": served.model.bundle.name, "max_tokens": 3, "temperature": 0}
    body["extra_body"] = {"ignore_eos": True}
    answer = raw.create(**body, extra_headers={"x-request-id": "mine"})
    assert answer.headers["x-request-id"] == "mine" == answer.parse()._request_id
    assert list(raw.create(**body, stream=True).parse())
    with pytest.raises(openai.BadRequestError):
        raw.create(**body | {"max_tokens": 0})
    wait_for(lambda: sum(record.name.endswith(".requests") for record in caplog.records) == 3)
    whole, stream, refused = (record.fields for record in caplog.records if record.name.endswith(".requests"))
    usage = answer.parse().usage
    assert whole["request_id"] == "mine" and stream["request_id"].startswith("req_")
    for line in (whole, stream):
        assert (line["status"], line["reason"], line["completion_tokens"]) == (200, "length", 3)
        assert (line["prompt_tokens"], line["image_tokens"]) == (usage.prompt_tokens, 16)
        assert 0 < line["ttft_s"] <= line["duration_s"]
    assert (whole["cached_tokens"], stream["cached_tokens"]) == (
        usage.prompt_tokens_details.cached_tokens,
        usage.prompt_tokens - 2,
    )
    assert (refused["status"], refused["reason"], refused["completion_tokens"]) == (400, "invalid_request_error", None)


def test_a_bug_has_the_requests_id(model, monkeypatch):
    scheduler = scheduler_of(model, 1, 1)
    service = ChatService(model, scheduler)

    async def begin(body):
        raise KeyError("a bug")

    monkeypatch.setattr(service, "begin", begin)
    client = TestClient(create_app(service, Metrics()), raise_server_exceptions=False)
    answer = client.post("/v1/chat/completions", content=b"{}", headers={"x-request-id": "mine"})
    assert (answer.status_code, answer.headers["x-request-id"]) == (500, "mine")
    scheduler.stop(0)


def test_a_chunk_for_each_token_where_the_end_is_ignored(served):
    count = 40
    stream = create(served, asked(QUESTION), max_tokens=count, stream=True, extra_body={"ignore_eos": True})
    contents = [chunk.choices[0].delta.content for chunk in stream]
    role, *tokens, end = contents
    assert (role, end, len(tokens)) == ("", None, count)
    assert "" in tokens, "some tokens make no text, else this would test nothing"


def test_openapi_describes_what_is_answered(served, model):
    description = json.loads(served.get("/openapi.json")[1])
    paths = {route.path for route in create_app(served.service, Metrics()).routes} - {"/", "/{name}"}
    assert {path.replace(":path", "") for path in paths} == description["paths"].keys()

    def validate(name, answer):
        jsonschema.validate(answer, description | {"$ref": f"#/components/schemas/{name}"})

    body = {"messages": asked(QUESTION, picture()), "max_tokens": 4, "logprobs": True, "top_logprobs": 2, "n": 2}
    raw = served.client().chat.completions.with_raw_response
    options = {"model": model.bundle.name, **body}
    validate("ChatCompletion", json.loads(raw.create(**options).http_response.content))
    stream = raw.create(**options, stream=True, stream_options={"include_usage": True}).http_response.read().decode()
    events = [event.removeprefix("data: ") for event in stream.split("\n\n") if event]
    assert events.pop() == "[DONE]" and len(events) > 4
    for event in events:
        validate("ChatCompletionChunk", json.loads(event))
    for name, path in (
        ("ModelList", "/v1/models"),
        ("ModelCard", f"/v1/models/{model.bundle.name}"),
        ("Error", "/v1/models/other"),
        ("Status", "/health"),
        ("Status", "/ready"),
    ):
        validate(name, json.loads(served.get(path)[1]))
    assert served.get("/docs")[0] == 404


def test_a_page_about_the_api_where_it_is_asked_for(model):
    scheduler = scheduler_of(model, 1, 1)
    client = TestClient(create_app(ChatService(model, scheduler), Metrics(), docs=True), base_url="http://localhost")
    assert "openapi.json" in client.get("/docs").text
    scheduler.stop(0)


def test_a_full_queue_is_429_with_retry_after(model, monkeypatch):
    server = Served(model, slots=1, queue_size=1)
    slow_down(monkeypatch, server.scheduler)
    running = create(server, asked(QUESTION), **LONG)
    next(iter(running))
    wait_for(lambda: server.scheduler.running == 1)
    waiting = create(server, asked(QUESTION), max_tokens=3, stream=True)
    wait_for(lambda: server.scheduler.waiting == 1)
    with pytest.raises(openai.RateLimitError) as error:
        create(server, asked(QUESTION, b"no image, but that is not looked at"), max_tokens=3)
    assert int(error.value.response.headers["retry-after"]) > 0
    running.close()
    assert "".join(c.choices[0].delta.content or "" for c in waiting)
    server.close()


def test_a_schema_that_grows_too_large_is_an_error_and_no_broken_json(served, monkeypatch):
    """llguidance gives up in the middle of the answer, and would allow its end alone."""
    asked_for = []

    def is_error(matcher):
        asked_for.append(matcher)
        return len(asked_for) > 4

    matcher = SimpleNamespace(
        compute_bitmask=lambda: b"\xff" * 64,
        consume_token=lambda token: None,
        is_error=lambda: is_error(None),
        get_error=lambda: "too many expressions\nconstructed",
    )
    monkeypatch.setattr(served.model.grammars, "of_source", lambda source: JsonGrammar(matcher))
    wanted = {"type": "json_schema", "json_schema": {"name": "long", "schema": {"type": "string"}}}
    with pytest.raises(openai.BadRequestError, match="a JSON schema: too many expressions") as error:
        create(served, asked(QUESTION), response_format=wanted, max_tokens=400, extra_body={"ignore_eos": True})
    assert error.value.body["param"] == "response_format"
    assert len(asked_for) == 5
    assert served.get("/ready")[0] == 200


def test_logits_that_are_no_numbers_fail_their_request_alone(served, monkeypatch):
    monkeypatch.setattr(served.scheduler._slots, "logits", lambda count: np.full((count, 512), np.nan, np.float32))
    for options in ({"temperature": 1}, {"logprobs": True}):
        with pytest.raises(openai.InternalServerError, match="NaN or Inf logits"):
            create(served, asked(QUESTION), max_tokens=5, **options)
    monkeypatch.undo()
    assert create(served, asked(QUESTION), max_tokens=3).usage.completion_tokens == 3
    assert served.get("/ready")[0] == 200


def test_a_crash_keeps_its_first_cause(model):
    scheduler = scheduler_of(model, 1, 1)
    try:
        for cause in (KeyError("first"), ValueError("a consequence")):

            def work(cause=cause):
                raise cause

            scheduler._guarded(work)
        assert scheduler.crashed.args == ("first",)
    finally:
        scheduler.stop(0)


def test_a_client_that_leaves_while_it_sends_is_no_bug(model):
    scheduler, sent = scheduler_of(model, 1, 1), []
    app = create_app(ChatService(model, scheduler), Metrics())
    pieces = [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": [], "query_string": b""}

    async def run():
        async def receive():
            return pieces.pop(0)

        async def send(message):
            sent.append(message)

        await app(scope, receive, send)

    try:
        asyncio.run(run())
    finally:
        scheduler.stop(0)
    assert sent[0]["status"] == 499


def test_another_method_is_refused_with_those_that_are_allowed(served):
    request = urllib.request.Request(f"{served.url}/ready", data=b"", method="POST")
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request, timeout=WAIT)
    assert (error.value.code, error.value.headers["Allow"]) == (405, "GET")


@pytest.mark.parametrize("form", ["ICO", "PPM"])
def test_images_in_other_formats_are_refused_before_they_are_decoded(served, form):
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, form)
    with pytest.raises(openai.BadRequestError, match="expected PNG, JPEG, WEBP, GIF, BMP, TIFF, AVIF"):
        create(served, asked(QUESTION, file.getvalue()), max_tokens=1)


def test_a_token_without_an_embedding_is_the_request_s_fault(served, model, monkeypatch):
    monkeypatch.setattr(model.tokenizer, "_embedding_rows", 300)
    with pytest.raises(openai.BadRequestError, match="the model's embedding has 300 rows"):
        create(served, asked("\n".join(map(chr, range(33, 1000)))), max_tokens=3)
    assert served.get("/ready")[0] == 200


def test_keys_are_wanted_behind_a_prefix(model):
    """As Ray Serve sets one with --route-prefix."""
    scheduler = scheduler_of(model, 1, 1)
    app = create_app(ChatService(model, scheduler), Metrics(), api_keys=("first-key",))
    client = TestClient(app, root_path="/llm")
    assert client.get("/llm/v1/models").status_code == 401
    assert client.post("/llm/v1/chat/completions", content=b"{}").status_code == 401
    assert client.get("/llm/v1/models", headers={"Authorization": "Bearer first-key"}).status_code == 200
    assert client.get("/llm/health").status_code == 200
    scheduler.stop(0)


def test_more_answers_than_there_is_ever_room_for_are_no_queue(served):
    with pytest.raises(openai.BadRequestError, match="n is 7, this server has room for 6"):
        create(served, asked(QUESTION), n=7, max_tokens=3)


def test_a_prompt_that_cannot_fit_is_told_before_it_is_cut_into_tokens(served, monkeypatch):
    def encode(*_):
        raise AssertionError("was cut into tokens")

    monkeypatch.setattr(served.model.tokenizer, "encode_prompt", encode)
    monkeypatch.setattr("runtime.serve.chat.MAX_TOKEN_CHARS", 16)  # else it would be larger than bodies may be here
    with pytest.raises(openai.BadRequestError, match="characters, which exceeds the context") as error:
        create(served, asked("x" * (16 * served.model.decoder.capacity)), max_tokens=3)
    assert error.value.code == "context_length_exceeded"


def test_keys_are_wanted_where_there_are_any(model):
    server = Served(model, api_keys=("first-key", "second-key"))
    for key in ("first-key", "second-key"):
        assert server.client(key).models.list().data[0].id == model.bundle.name
    for key in ("first-ke", "other", "ключ"):
        request = urllib.request.Request(
            f"http://127.0.0.1:{server.port}/v1/models",
            headers={"Authorization": f"Bearer {key}".encode().decode("latin1")},
        )
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(request, timeout=WAIT)
        assert error.value.code == 401
    assert server.get("/v1/models")[0] == 401
    assert server.get("/health")[0] == 200
    server.close()


def break_decoder(monkeypatch, scheduler, crash):
    """From the second token on, for a request alone and for all of them together."""
    monkeypatch.setattr(scheduler._slots, "step", crash)
    for slot in range(len(scheduler._slots)):
        monkeypatch.setattr(scheduler._slots[slot], "forward", crash)


def test_a_crash_turns_ready_red_and_fails_requests(model, monkeypatch):
    server = Served(model)

    def crash(*_):
        raise MemoryError("no more")

    break_decoder(monkeypatch, server.scheduler, crash)
    with pytest.raises(openai.InternalServerError, match="crashed"):
        create(server, asked(QUESTION), max_tokens=5)
    assert server.get("/ready") == (503, '{"status":"crashed"}')
    with pytest.raises(openai.InternalServerError, match="crashed"):
        create(server, asked(QUESTION), max_tokens=5)
    streamed = []
    with pytest.raises(openai.APIError, match="crashed"):
        streamed += list(create(server, asked(QUESTION), max_tokens=5, stream=True))
    server.close()


def test_a_crash_before_the_first_token_is_raised_where_another_engine_could_begin_anew(model, monkeypatch):
    def crash(*_):
        raise MemoryError("no more")

    crash.batches = False  # as of an encoder

    async def pieces(break_at: Callable[[Scheduler], None]) -> list[str]:
        scheduler = scheduler_of(model, 2, 4)
        service = ChatService(model, scheduler)
        break_at(scheduler)
        body = {"messages": asked(QUESTION, picture(99)), "max_tokens": 8, "stream": True, "temperature": 0}
        body["ignore_eos"] = True
        try:
            completion = await service.begin(json.dumps(body).encode())
            return [piece async for piece in completion.chunks(raising=True)]
        finally:
            scheduler.stop(0)
            service.close()

    with monkeypatch.context() as patch, pytest.raises(ApiError, match="crashed") as error:
        asyncio.run(pieces(lambda scheduler: patch.setattr(scheduler._vision, "_encoder", crash)))
    assert error.value.code == "crash"
    *_, last, done = asyncio.run(pieces(lambda scheduler: break_decoder(monkeypatch, scheduler, crash)))
    assert "crashed" in last, "a token has been sent, and the status before it"
    assert done == "data: [DONE]\n\n"


def test_a_deadline_is_told(model, monkeypatch):
    server = Served(model, limits=Limits(seconds=1.0))
    slow_down(monkeypatch, server.scheduler)
    with pytest.raises(openai.APIStatusError) as error:
        create(server, asked(QUESTION), **LONG | {"stream": False})
    assert (error.value.status_code, error.value.body["code"]) == (504, "deadline")
    server.close()


class Process:
    """`python -m runtime.serve` as a user starts it."""

    def __init__(self, *arguments):
        self.port = free_port()
        command = [sys.executable, "-m", "runtime.serve", "--port", str(self.port), *map(str, arguments)]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def ready(self):
        assert self.process.poll() is None, self.process.stderr.read()
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{self.port}/ready", timeout=WAIT).status == 200
        except urllib.error.URLError:
            return False


def test_sigterm_finishes_what_runs_and_takes_no_more(conformance_bundle):
    server = Process("--bundle", conformance_bundle)
    wait_for(server.ready)
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0, timeout=WAIT)
    name = client.models.list().data[0].id
    stream = client.chat.completions.create(
        model=name,
        messages=asked(QUESTION),
        temperature=0,
        max_tokens=300,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    chunks = [next(iter(stream))]
    server.process.send_signal(signal.SIGTERM)
    chunks += list(stream)
    assert chunks[-1].usage.completion_tokens == 300
    assert server.process.wait(WAIT) in (0, -signal.SIGTERM)
    with pytest.raises(openai.APIConnectionError):
        client.models.list()


@pytest.mark.parametrize("begin", [b"GET /" + b"a" * 100, b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Long: "])
def test_headers_without_end_are_cut_off(conformance_bundle, begin):
    server = Process("--bundle", conformance_bundle)
    wait_for(server.ready)
    for more in (b"a" * 1000, b"a\r\nX-Next: " * 100):
        with socket.create_connection(("127.0.0.1", server.port), timeout=WAIT) as client:
            client.sendall(begin)
            with pytest.raises(OSError):
                for _ in range(50_000):
                    client.sendall(more)
    assert server.ready()
    server.process.terminate()
    server.process.communicate(timeout=WAIT)


def test_sigterm_tells_those_that_take_too_long(conformance_bundle):
    server = Process("--bundle", conformance_bundle, "--stop-timeout", 0.1)
    wait_for(server.ready)
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0, timeout=WAIT)
    name = client.models.list().data[0].id
    stream = client.chat.completions.create(model=name, messages=asked(QUESTION), temperature=0, **LONG)
    next(iter(stream))
    server.process.send_signal(signal.SIGTERM)
    with pytest.raises(openai.APIError, match="the server stops"):
        list(stream)
    assert server.process.wait(WAIT) in (0, -signal.SIGTERM)


def test_the_log_in_json_has_a_line_a_request(conformance_bundle):
    server = Process("--bundle", conformance_bundle, "--log-format", "json", "--res", 128)
    wait_for(server.ready)
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0, timeout=WAIT)
    name = client.models.list().data[0].id
    client.chat.completions.create(model=name, messages=asked("secret?", picture()), temperature=0, max_tokens=2)
    server.process.send_signal(signal.SIGTERM)
    _, said = server.process.communicate(timeout=WAIT)
    lines = [json.loads(line) for line in said.splitlines()]
    (request,) = (line for line in lines if line["logger"] == "convllava.serve.requests")
    assert (request["status"], request["image_tokens"], request["completion_tokens"]) == (200, 4, 2)
    assert any("128 pixels" in line["message"] for line in lines)
    assert "secret" not in said


def test_check_says_what_would_be_served(conformance_bundle):
    server = Process("--bundle", conformance_bundle, "--check", "--max-batch", 3)
    said, _ = server.process.communicate(timeout=WAIT)
    assert server.process.returncode == 0
    assert "onnxruntime cpu fp32" in said
    assert "3 slots" in said


def test_a_port_in_use_is_one_line(conformance_bundle):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        server = Process("--bundle", conformance_bundle, "--port", port)
        _, error = server.process.communicate(timeout=WAIT)
    assert server.process.returncode == 2
    assert error == f"error: --host 127.0.0.1 --port {port}: Address already in use\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--host", "0.0.0.0"), "--api-key-file"),
        (("--bundle", "nowhere"), "nowhere"),
        (("--api-key-file", "nowhere"), "--api-key-file nowhere"),
        (("--decoder", "tensorrt"), "--decoder auto"),
        (("--max-batch", 0), "--max-batch: Input should be greater than 0, found 0"),
        (("--timeout", "nan"), "--timeout: Input should be"),
        (("--threads", 1_000_000), "--threads: Input should be"),
        (("--port", 70_000), "--port is 70000"),
        (("--stop-timeout", "inf"), "--stop-timeout is inf"),
        (("--stop-timeout", "nan"), "--stop-timeout is nan"),
    ],
)
def test_mistakes_are_one_line(arguments, said):
    server = Process(*arguments)
    _, error = server.process.communicate(timeout=WAIT)
    assert server.process.returncode == 2
    assert said in error
    assert len(error.splitlines()) == 1
