"""Hosts, origins, keys, methods and headers of requests, on an app without a model."""

import pytest
from fastapi import Request
from fastapi.testclient import TestClient

from runtime.errors import UserError
from runtime.serve.__main__ import read_keys
from runtime.serve.app import add_page, event_stream, new_app
from runtime.serve.origins import is_loopback
from runtime.serve.settings import Settings

LOCAL, REMOTE = "127.0.0.1", "10.0.0.7"
NAMES = ("localhost", "localhost:8000", "127.0.0.1:8000", "127.0.0.2", "[::1]:8000", "LOCALHOST", "localhost.")
OTHERS = ("evil.test", "evil.test:8000", "localhost.evil.test", "127.0.0.1.evil.test", "evil.test#localhost")
OTHERS += ("localhost@evil.test", "10.0.0.7", "0.0.0.0", "[::1", "[::2]", "")


def client(keys=(), hosts=(), origins=(), server=LOCAL) -> TestClient:
    """Of a server whose connections arrive at the address `server`."""
    app = new_app(keys, hosts, origins)

    @app.get("/v1/models")
    async def models():
        return {"data": []}

    @app.post("/v1/chat/completions")
    async def chat(request: Request):
        async def events():
            yield "data: [DONE]\n\n"

        return event_stream(events(), {})

    add_page(app)

    async def arrives(scope, receive, send):
        await app(scope | {"server": (server, 8000)}, receive, send)

    return TestClient(arrives)


def ask(client: TestClient, method: str = "POST", path: str = "/v1/chat/completions", **headers: str):
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    return client.request(method, path, headers={"Host": "localhost:8000"} | sent)


@pytest.mark.parametrize("path", ["/v1/models", "/health", "/", "/page.js"])
@pytest.mark.parametrize("server", [LOCAL, "::1", "::ffff:127.0.0.1"])
def test_on_this_machine_without_keys_it_answers_to_this_machine_s_names(server, path):
    local = client(server=server)
    for name in NAMES:
        assert ask(local, "GET", path, Host=name).status_code == 200, name
    for name in OTHERS:
        answer = ask(local, "GET", path, Host=name)
        assert (answer.status_code, answer.json()["error"]["code"]) == (421, "host_not_allowed"), name
        assert "--allowed-host" in answer.json()["error"]["message"]


@pytest.mark.parametrize("origin", ["http://localhost:8000", "http://127.0.0.1:3000", "https://[::1]"])
def test_pages_of_this_machine_may_ask(origin):
    assert ask(client(), Origin=origin).status_code == 200


@pytest.mark.parametrize(
    "origin", ["https://evil.test", "http://localhost.evil.test", "null", "", "file://", "http://["]
)
@pytest.mark.parametrize("content_type", ["text/plain", "application/json", "application/x-www-form-urlencoded"])
def test_pages_of_others_may_not(origin, content_type):
    answer = ask(client(), Origin=origin, Content_Type=content_type)
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "origin_not_allowed")


def test_another_program_may_send_any_content_type():
    for content_type in ("text/plain", "application/x-www-form-urlencoded"):
        assert ask(client(), Content_Type=content_type).status_code == 200


def test_with_keys_or_from_elsewhere_any_host_will_do():
    with_key = client(keys=("k",))
    assert ask(with_key, Host="evil.test", Origin="https://evil.test", Authorization="Bearer k").status_code == 200
    assert ask(with_key, Host="evil.test", Origin="https://evil.test").status_code == 401
    assert ask(client(server=REMOTE), Host="evil.test").status_code == 200


@pytest.mark.parametrize(("keys", "server"), [((), LOCAL), ((), REMOTE), (("k",), LOCAL), (("k",), REMOTE)])
def test_named_hosts_are_allowed_and_no_others(keys, server):
    named = client(keys, ("Chat.Example.com",), server=server)
    for host in ("chat.example.com", "chat.example.com:443", "chat.example.com.", "localhost:8000"):
        origin = "https://chat.example.com"
        assert ask(named, Host=host, Origin=origin, Authorization="Bearer k").status_code == 200
    for host in ("example.com", "evil.test", "xchat.example.com"):
        assert ask(named, Host=host, Authorization="Bearer k").status_code == 421


def test_cors_is_for_named_origins():
    origin, other = "https://app.example.com", "https://evil.test"
    named = client(origins=(origin,))
    preflight = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "authorization,x-stainless"}
    allowed = ask(named, "OPTIONS", Origin=origin, **preflight)
    assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, origin)
    assert "x-stainless" in allowed.headers["access-control-allow-headers"]
    assert ask(named, Origin=origin).headers["access-control-allow-origin"] == origin
    assert "access-control-allow-origin" not in ask(named, "OPTIONS", Origin=other, **preflight).headers
    assert ask(named, Origin=other).status_code == 403
    assert "access-control-allow-origin" not in ask(client(), Origin="http://localhost:3000").headers


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/", "/page.css"])
def test_head_is_get_without_a_body(path):
    local = client()
    head, get = ask(local, "HEAD", path), ask(local, "GET", path)
    assert head.status_code == get.status_code == 200
    assert head.headers["content-length"] == get.headers["content-length"] == str(len(get.content))
    assert ask(local, "HEAD").status_code == 405


@pytest.mark.parametrize("encoding", ["gzip", "GZIP", "br", "deflate, gzip", "zstd"])
def test_compressed_bodies_are_refused_by_name(encoding):
    answer = ask(client(), Content_Encoding=encoding)
    assert answer.status_code == 415
    assert encoding in answer.json()["error"]["message"]
    assert ask(client(), Content_Encoding="identity").status_code == 200


def test_a_missing_key_is_asked_for():
    answer = ask(client(keys=("k",)))
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")


def test_streams_pass_proxies_at_once():
    headers = ask(client()).headers
    assert headers["content-type"].startswith("text/event-stream")
    assert (headers["cache-control"], headers["x-accel-buffering"]) == ("no-cache", "no")


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.8.9.1", "::1", "::ffff:127.0.0.1"])
def test_loopback_hosts(host):
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "::ffff:10.0.0.7", "10.0.0.7", "localhost.test", ""])
def test_other_hosts(host):
    assert not is_loopback(host)


@pytest.mark.parametrize("content", [
    b"\xef\xbb\xbffirst\r\nsecond\r\n",
    b"first\n\xef\xbb\xbfsecond",
    b"\n first \n\n\tsecond",
    "\ufefffirst\u2028second".encode(),
])  # fmt: skip
def test_keys_come_without_byte_order_marks_and_spaces(tmp_path, content):
    file = tmp_path / "keys.txt"
    file.write_bytes(content)
    assert read_keys(file) == ("first", "second")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_keys_in_another_encoding_are_refused(tmp_path, encoding):
    file = tmp_path / "keys.txt"
    file.write_text("first\nsecond\n", encoding=encoding)
    with pytest.raises(UserError, match=r"keys\.txt: .*UTF-8 is expected"):
        read_keys(file)


def test_a_file_of_marks_has_no_key(tmp_path):
    file = tmp_path / "keys.txt"
    file.write_bytes(b"\xef\xbb\xbf\n \n")
    with pytest.raises(UserError, match="no key in it"):
        read_keys(file)


@pytest.mark.parametrize("wrong", [
    {"allowed_host": "https://example.com"}, {"allowed_host": "example.com:443"}, {"allowed_host": "a b"},
    {"allowed_host": "example.com/x"}, {"allowed_host": "*"},
    {"cors_origin": "example.com"}, {"cors_origin": "https://example.com/"}, {"cors_origin": "*"},
    {"cors_origin": "https://Example.com"}, {"cors_origin": "http://localhost:3000,null"},
])  # fmt: skip
def test_settings_that_would_never_match_are_refused(wrong):
    (name,) = wrong
    with pytest.raises(UserError, match=f"^--{name.replace('_', '-')}: "):
        Settings.of(**wrong)


def test_settings_of_hosts_and_origins():
    Settings.of(allowed_host="example.com,::1,10.0.0.7", cors_origin="https://example.com,http://[::1]:3000")
