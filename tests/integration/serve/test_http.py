"""HTTP as uvicorn speaks it: connections that stay, clients that leave behind middleware, options of the command."""

import http.client
import json
import socket

import openai
import pytest

import runtime
from tests.support.commands import assert_one_line_error, run_main
from tests.support.served import WAIT, Served, asked, slow_down, wait_for

ORIGIN = "https://app.example.com"


@pytest.fixture(scope="module")
def served(conformance_bundle):
    server = Served(runtime.load(conformance_bundle), cors_origins=(ORIGIN,))
    yield server
    server.close()


def test_a_connection_goes_on_after_head_and_after_refusals(served):
    """A body where none is expected would be read as the next answer."""
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=WAIT)
    for method, path, headers, status in (
        ("HEAD", "/health", {}, 200),
        ("HEAD", "/v1/models", {}, 200),
        ("HEAD", "/", {}, 200),
        ("HEAD", "/none", {}, 404),
        ("HEAD", "/health", {"Host": "evil.test"}, 421),
        ("GET", "/health", {"Host": "evil.test"}, 421),
        ("GET", "/health", {"Origin": ORIGIN}, 200),
        ("GET", "/health", {}, 200),
    ):
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        body = answer.read()
        assert (answer.status, bool(body)) == (status, method == "GET"), (method, path)
        assert int(answer.headers["Content-Length"]) > 0
    connection.close()


def test_the_body_of_a_page_of_another_site_is_not_read(served):
    """Refused once the headers are there, long before a body of 50 MB could come."""
    with socket.create_connection(("127.0.0.1", served.port), timeout=WAIT) as sock:
        lines = ("POST /v1/chat/completions HTTP/1.1", f"Host: 127.0.0.1:{served.port}", "Origin: https://evil.test")
        sock.sendall("\r\n".join((*lines, "Content-Type: text/plain", "Content-Length: 50000000", "", "")).encode())
        assert sock.recv(1 << 16).startswith(b"HTTP/1.1 403 ")


def test_streams_are_not_to_be_kept_or_held_back(served):
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=WAIT)
    body = json.dumps({"messages": asked("What?"), "max_tokens": 1, "stream": True})
    connection.request("POST", "/v1/chat/completions", body, {"Origin": ORIGIN})
    answer = connection.getresponse()
    assert (answer.headers["Cache-Control"], answer.headers["X-Accel-Buffering"]) == ("no-cache", "no")
    assert answer.headers["Access-Control-Allow-Origin"] == ORIGIN
    assert answer.read().endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_is_noticed_behind_middleware(served, monkeypatch, stream):
    slow_down(monkeypatch, served.scheduler)
    before = cancelled(served)
    impatient = openai.OpenAI(
        base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=3, default_headers={"Origin": ORIGIN}
    )
    options = {"max_tokens": 3000, "stream": stream, "extra_body": {"ignore_eos": True}}
    name = impatient.models.list().data[0].id
    if stream:
        answer = impatient.chat.completions.create(model=name, messages=asked("What?"), **options)
        next(iter(answer))
        wait_for(lambda: served.scheduler.running == 1)
        answer.close()
    else:
        with pytest.raises(openai.APITimeoutError):
            impatient.chat.completions.create(model=name, messages=asked("What?"), **options)
    wait_for(lambda: served.scheduler.running == 0)
    assert cancelled(served) == before + 1, "3,000 tokens were not all decoded"


@pytest.mark.parametrize("stream", [True, False])
def test_who_closes_half_of_the_connection_has_left(served, monkeypatch, stream):
    slow_down(monkeypatch, served.scheduler)
    before = cancelled(served)
    options = {"max_tokens": 3000, "stream": stream, "ignore_eos": True}
    body = json.dumps({"messages": asked("What?"), **options}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", served.port), timeout=WAIT) as connection:
        connection.sendall(head.encode() + body)
        wait_for(lambda: served.scheduler.running == 1)
        connection.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    assert b"[DONE]" not in answer
    wait_for(lambda: served.scheduler.running == 0)
    assert cancelled(served) == before + 1, "3,000 tokens were not all decoded"


def cancelled(served) -> float:
    """Requests whose clients left."""
    lines = [line for line in served.get("/metrics")[1].splitlines() if 'finish="cancelled"' in line]
    return float(lines[0].rsplit(" ", 1)[1]) if lines else 0.0


@pytest.mark.parametrize(("option", "value"), [
    ("--allowed-host", "https://example.com"),
    ("--allowed-host", "example.com:443"),
    ("--cors-origin", "*"),
    ("--cors-origin", "example.com"),
])  # fmt: skip
def test_options_that_would_never_match_are_one_line(conformance_bundle, option, value):
    arguments = ("--bundle", conformance_bundle, option, "example.com" if "host" in option else ORIGIN, value)
    assert_one_line_error(run_main("runtime.serve", "--check", *arguments), option, value)


def test_options_may_be_given_again(conformance_bundle):
    arguments = ("--allowed-host", "a.test", "b.test", "--allowed-host", "c.test", "--cors-origin", ORIGIN)
    done = run_main("runtime.serve", "--check", "--bundle", conformance_bundle, *arguments)
    assert done.returncode == 0, done.stderr
