"""Requests are prepared within limits, and none waits for what it does not need."""

import asyncio
import io
import json
import threading
import time

import openai
import pytest
from PIL import Image

import runtime
from runtime.serve import chat, images
from runtime.serve.chat import ChatService
from runtime.serve.limits import Limits
from runtime.serve.protocol import ApiError
from tests.support.served import Served, asked, picture, scheduler_of, wait_for

WAIT = 60  # seconds, that a test waits for what must come


@pytest.fixture(scope="module")
def model(conformance_bundle):
    return runtime.load(conformance_bundle)


@pytest.fixture
def served(model):
    server = Served(model, slots=2, queue_size=8)
    yield server
    server.close()


@pytest.fixture
def slow_image(monkeypatch):
    """Opening this file takes for ever."""
    monkeypatch.setattr(images, "IMAGE_JOB", "tests.support.jobs:slow_image")
    monkeypatch.setattr(chat, "IMAGE_CPU_SECONDS", 3)
    return b"spin"


def create(server, messages, **options):
    client = server.client()
    name = client.models.list().data[0].id
    return client.chat.completions.create(model=name, messages=messages, temperature=0, max_tokens=4, **options)


def begun(server):
    return server.service._opening


def test_texts_and_seen_images_pass_by_an_image_that_is_slow_to_open(slow_image, model):
    server = Served(model, slots=2, queue_size=8)
    page = picture(5)
    expected = create(server, asked("What is it?", page)).choices[0].message.content

    def ask():
        with pytest.raises(openai.APIError):
            create(server, asked("What?", slow_image))

    hung = threading.Thread(target=ask)
    hung.start()
    wait_for(lambda: begun(server) == 1)
    assert create(server, asked("Count.")).choices[0].message.content
    assert create(server, asked("What is it?", page)).choices[0].message.content == expected
    assert begun(server) == 1, "it is still being opened"
    server.close()
    hung.join(WAIT)


@pytest.mark.parametrize("way", ["disconnect", "deadline"])
def test_an_image_that_is_slow_to_open_ends_with_its_request(slow_image, model, way, monkeypatch):
    monkeypatch.setattr(chat, "IMAGE_CPU_SECONDS", 1000)
    server = Served(model, limits=Limits(seconds=8 if way == "deadline" else 300))
    if way == "deadline":
        with pytest.raises(openai.APIStatusError) as error:
            create(server, asked("What?", slow_image))
        assert (error.value.status_code, error.value.body["code"]) == (504, "deadline")
    else:
        name = server.client().models.list().data[0].id
        with pytest.raises(openai.APITimeoutError):
            server.client().with_options(timeout=0.5).chat.completions.create(
                model=name, messages=asked("?", slow_image)
            )
    wait_for(lambda: begun(server) == 0)
    assert create(server, asked("What is it?", picture(6))).choices[0].message.content  # the only process is free again
    server.close()


def test_an_image_that_takes_too_long_is_the_request_s_fault(slow_image, model):
    server = Served(model)
    with pytest.raises(openai.BadRequestError, match="takes too much processor time"):
        create(server, asked("What?", slow_image))
    assert create(server, asked("What is it?", picture(6))).choices[0].message.content
    server.close()


def test_the_same_picture_in_another_file_is_encoded_once(served, model):
    pixels = Image.open(io.BytesIO(picture(7)))
    files = []
    for form, options in (("PNG", {}), ("PNG", {"compress_level": 1}), ("BMP", {})):
        file = io.BytesIO()
        pixels.save(file, form, **options)
        files.append(file.getvalue())
    answers = {create(served, asked("What is it?", file)).choices[0].message.content for file in [*files, *files]}
    assert len(answers) == 1
    assert "convllava_encode_seconds_count 1.0" in served.get("/metrics")[1]


def test_images_that_wait_are_limited(model, monkeypatch):
    monkeypatch.setattr(chat, "MAX_WAITING_PIXEL_BYTES", 2 * 3 * model.bundle.image.resolution**2)
    scheduler = scheduler_of(model, 2, 8)
    service = ChatService(model, scheduler)

    def body(*images):
        return json.dumps({"messages": asked("What?", *images), "max_tokens": 1}).encode()

    with pytest.raises(ApiError, match="2 images are waiting") as error:
        asyncio.run(service.begin(body(*(picture(seed) for seed in (80, 81, 82)))))
    assert error.value.status == 429
    assert asyncio.run(service.begin(body(picture(80), picture(81), picture(80)))).choices == 1, "one of them twice"
    scheduler.stop(WAIT)
    service.close()


@pytest.mark.parametrize("filler", ["0,", "{},", "[[],[]],", '{"a":1},'])
def test_a_body_of_a_million_items_is_refused_before_it_is_parsed(served, filler):
    body = b'{"messages": [{"role": "user", "content": "x"}], "more": [' + filler.encode() * (1 << 19) + b"0]}"
    with pytest.raises(ApiError, match="items"):
        asyncio.run(served.service.begin(body))


def test_a_remote_image_is_not_waited_for_by_a_client_that_has_left(model):
    connection = threading.Event()
    cut = threading.Event()

    class Socket:
        def shutdown(self, how):
            cut.set()

    def fetch(url, connected):
        connected(Socket())
        connection.set()
        assert cut.wait(WAIT)
        raise ApiError(400, "cut")

    server = Served(model, fetch=fetch)
    messages = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://host/image"}}]}]
    name = server.client().models.list().data[0].id
    with pytest.raises(openai.APITimeoutError):
        server.client().with_options(timeout=3).chat.completions.create(model=name, messages=messages)
    assert connection.is_set()
    assert cut.wait(WAIT)
    server.close()


EXPLOSIVE = [
    {"type": "integer", "multipleOf": 10000019},
    {"type": "array", "items": {"type": "integer", "multipleOf": 999983}},
    {"allOf": [{"type": "integer", "multipleOf": 997}, {"type": "integer", "multipleOf": 991}]},
]


@pytest.mark.parametrize("explosive", EXPLOSIVE)
def test_a_schema_that_explodes_is_refused_and_others_are_served_meanwhile(served, explosive):
    schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": explosive}}
    failed = []

    def ask():
        try:
            create(served, asked("Count."), response_format=schema)
        except openai.APIStatusError as error:
            failed.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    while thread.is_alive():
        assert create(served, asked("Count.")).choices[0].message.content
        time.sleep(0.01)
    assert (failed[0].status_code, failed[0].body["param"]) == (400, "response_format")
    assert served.get("/ready")[0] == 200


@pytest.mark.parametrize("way", ["stop", "crash"])
def test_who_is_being_prepared_is_told_that_the_engine_ends(slow_image, model, way, monkeypatch):
    monkeypatch.setattr(chat, "IMAGE_CPU_SECONDS", 1000)
    server = Served(model, slots=2, queue_size=8)
    errors = []

    def ask():
        try:
            create(server, asked("What?", slow_image))
        except openai.APIStatusError as error:
            errors.append((error.status_code, error.body["code"]))

    waiting = [threading.Thread(target=ask) for _ in range(2)]
    for thread in waiting:
        thread.start()
    wait_for(lambda: begun(server) == 2)
    if way == "stop":
        server.scheduler.stop(WAIT)
    else:
        server.scheduler.crashed = RuntimeError("broken")
    for thread in waiting:
        thread.join(WAIT)
    assert errors == [(503, "stopping") if way == "stop" else (500, "crash")] * 2
    server.close()
