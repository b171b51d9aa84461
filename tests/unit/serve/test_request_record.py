"""IDs of requests, and what is counted and logged of them."""

import asyncio
import json
import logging
import re
import sys

import pytest

from runtime.serve.metrics import Metrics
from runtime.serve.request_record import JsonFormatter, RequestMonitor, current_record

CHAT = "/v1/chat/completions"


def answered(app, path=CHAT, method="POST", headers=(), metrics=None):
    """Messages that the app sends behind the monitor."""
    sent = []

    async def send(message):
        sent.append(message)

    async def run():
        scope = {"type": "http", "method": method, "path": path, "headers": list(headers)}
        await RequestMonitor(app, metrics)(scope, None, send)

    asyncio.run(run())
    return sent


def app_of(status=200, note=lambda record: None):
    async def app(scope, receive, send):
        note(current_record())
        await send({"type": "http.response.start", "status": status, "headers": [(b"a", b"b")]})
        await send({"type": "http.response.body", "body": b""})

    return app


def id_of(sent):
    return dict(sent[0]["headers"])[b"x-request-id"].decode()


@pytest.fixture
def lines(caplog):
    """What is logged of requests."""
    caplog.set_level(logging.INFO, "convllava.serve.requests")
    return lambda: [record.fields for record in caplog.records if record.name == "convllava.serve.requests"]


@pytest.mark.parametrize("path", [CHAT, "/health"])
def test_a_given_id_comes_back_beside_the_other_headers(path):
    sent = answered(app_of(), path, headers=[(b"x-request-id", b"a-1_2.3:4/5+6=")])
    assert sent[0]["headers"] == [(b"a", b"b"), (b"x-request-id", b"a-1_2.3:4/5+6=")]
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [(b"a\r\nset-cookie: x", "aset-cookie:x"), (b'\xff"id" {}', "id"), (b"n" * 10_000, "n" * 128)],
)
def test_a_given_id_is_bounded_and_cleaned(given, expected):
    assert id_of(answered(app_of(), headers=[(b"x-request-id", given)])) == expected


@pytest.mark.parametrize("headers", [[], [(b"x-request-id", b"")], [(b"x-request-id", b"\n ?")]])
def test_others_get_one_of_their_own(headers):
    one, other = (id_of(answered(app_of(), headers=headers)) for _ in range(2))
    assert re.fullmatch("req_[0-9a-f]{32}", one)
    assert one != other


def test_a_request_is_one_line_without_content(lines):
    def note(record):
        record.queued, record.reason, record.ttft_s = True, "stop", 0.5
        record.prompt_tokens, record.image_tokens, record.cached_tokens, record.completion_tokens = 9, 4, 7, 3

    request_id = id_of(answered(app_of(note=note)))
    (line,) = lines()
    assert 0 <= line.pop("duration_s") < 60
    assert line == {
        "request_id": request_id, "path": CHAT, "status": 200, "reason": "stop", "ttft_s": 0.5, "prompt_tokens": 9,
        "image_tokens": 4, "cached_tokens": 7, "completion_tokens": 3,
    }  # fmt: skip


def test_looking_is_not_logged_or_counted(lines):
    metrics = Metrics()
    answered(app_of(), "/v1/models", "GET", metrics=metrics)
    answered(app_of(404), "/none", "POST", metrics=metrics)
    assert not lines()
    assert b"convllava_requests_total{" not in metrics.text()


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 421, 429, 503])
def test_what_is_refused_is_counted_by_its_status(status, lines):
    metrics = Metrics()
    answered(app_of(status, lambda record: setattr(record, "reason", "why")), metrics=metrics)
    assert f'requests_total{{code="{status}",finish="rejected"}} 1.0'.encode() in metrics.text()
    assert b"convllava_request_seconds_count 0.0" in metrics.text()
    assert [(line["status"], line["reason"]) for line in lines()] == [(status, "why")]


def test_who_has_left_is_cancelled(lines):
    metrics = Metrics()
    answered(app_of(499), metrics=metrics)  # while it was prepared
    answered(app_of(200, lambda record: setattr(record, "queued", True)), metrics=metrics)  # in the middle of a stream
    assert b'requests_total{code="499",finish="cancelled"} 1.0' in metrics.text(), "the scheduler counts the other"
    assert b"convllava_request_seconds_count 1.0" in metrics.text()
    assert [line["reason"] for line in lines()] == ["cancelled"] * 2


def test_a_bug_is_a_500(lines):
    async def app(scope, receive, send):
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        answered(app)
    assert lines()[0]["status"] == 500


def test_a_line_of_json_for_each_record():
    try:
        raise ValueError("a\nb")
    except ValueError:
        record = logging.LogRecord("convllava.serve", logging.ERROR, "", 0, "%s\n\u2028x", ("a",), sys.exc_info())
    record.fields = {"status": 200}
    text = JsonFormatter().format(record)
    line = json.loads(text)
    assert len(text.splitlines()) == 1
    assert (line["level"], line["logger"], line["message"]) == ("error", "convllava.serve", "a\n\u2028x")
    assert line["status"] == 200 and line["exception"].endswith("ValueError: a\nb")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]{12}\+00:00", line["time"])


def test_nothing_is_noted_outside_of_a_request():
    assert current_record() is not current_record()
