"""Remote images: from hosts that are named, never from addresses that are not public, within limits."""

import contextlib
import http.server
import socket
import threading
import time

import pytest

from runtime.serve import remote_images as remote
from runtime.serve.protocol import ApiError
from runtime.serve.remote_images import Fetcher, cut, is_public

BODY = b"picture" * 100


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        port = self.server.server_address[1]
        if self.path == "/slow":
            time.sleep(3)
        if self.path == "/dripping":
            with contextlib.suppress(OSError):
                for _ in range(30):
                    self.wfile.write(b"H")
                    time.sleep(0.2)
            return
        if self.path.startswith("/to"):
            self.send_response(302)
            others = {"/to-other": "http://elsewhere.test/", "/to-again": "/to-again", "/to-odd": "http://[x"}
            target = others.get(self.path, "/image?x=1")
            self.send_header("Location", target)
            self.end_headers()
            return
        self.send_response(404 if self.path == "/none" else 200)
        if self.path in ("/short", "/whole"):
            self.send_header("Content-Length", str(len(BODY) + 50 * (self.path == "/short")))
            self.send_header("Connection", "close")
        self.end_headers()
        if self.path == "/host":
            self.wfile.write(self.headers["Host"].encode())
            return
        assert self.headers["Host"] == f"127.0.0.1:{port}"
        try:
            for _ in range(1000 if self.path == "/endless" else 1):
                self.wfile.write(BODY)
        except ConnectionError:  # the other side has seen enough
            pass

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def host():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_address[1]}"
    server.shutdown()


def fetcher(host, **options):
    return Fetcher([host], **{"most_bytes": 10_000, "allowed": lambda address: True} | options)


def fetched(host, path, connected=lambda connection: None, **options):
    return fetcher(host, **options)(f"http://{host}{path}", connected)


def test_who_waits_no_longer_can_cut_the_connection(host):
    begin = time.monotonic()
    with pytest.raises(ApiError, match="cannot be fetched"):
        fetched(host, "/dripping", lambda connection: threading.Timer(0.3, cut, [connection]).start())
    assert time.monotonic() - begin < 2.5


def test_an_image_is_fetched_also_after_a_redirect(host):
    assert fetched(host, "/image") == BODY
    assert fetched(host, "/to") == BODY
    assert fetched(host, "/whole") == BODY


def test_the_scheme_s_own_port_is_not_named(host, monkeypatch):
    assert fetched(host, "/host") == host.encode()
    monkeypatch.setitem(remote.PORTS, "http", int(host.partition(":")[2]))
    assert fetched("127.0.0.1", "/host") == b"127.0.0.1"


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/none", "404"),
        ("/endless", "larger than 10000 bytes"),
        ("/to-other", "host 'elsewhere.test' is not one"),
        ("/to-again", "more than 3 redirects"),
        ("/to-odd", "cannot be fetched"),
        ("/slow", "cannot be fetched"),
        ("/dripping", "cannot be fetched"),
        ("/short", "ends early"),
        ("/\xe9", "cannot be fetched"),
    ],
)
def test_limits_hold(host, path, said):
    begin = time.monotonic()
    with pytest.raises(ApiError, match=said):
        fetched(host, path, seconds=1.0)
    assert time.monotonic() - begin < 2.5, "the limit is for all of it"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("ftp://{host}/image", "neither"),
        ("file:///etc/passwd", "neither"),
        ("http://user@{host}/image", "user's name"),
        ("http://127.0.0.1:1/image", "not one of those"),
        ("http://example.org/image", "not one of those"),
        ("http://[::1/image", "remote image"),
        ("http://{host}0000/image", "remote image"),
    ],
)
def test_other_urls_are_refused(host, url, said):
    with pytest.raises(ApiError, match=said):
        fetcher(host)(url.format(host=host), lambda connection: None)


def test_addresses_that_are_not_public_are_refused(host):
    with pytest.raises(ApiError, match="not public"):
        Fetcher([host], 10_000)(f"http://{host}/image", lambda connection: None)
    private = ["127.0.0.1", "10.1.2.3", "192.168.0.1", "169.254.169.254", "::1", "fd00::1", "fe80::1", "0.0.0.0"]
    disguised = ["::ffff:127.0.0.1", "::ffff:169.254.169.254", "64:ff9b::7f00:1", "2002:7f00:1::", "::127.0.0.1"]
    others = ["224.0.0.1", "ff02::1", "fec0::1"]
    assert not any(is_public(address) for address in [*private, *disguised, *others])
    assert is_public("8.8.8.8")
    assert is_public("2606:4700:4700::1111")


def test_another_address_is_tried_where_one_does_not_answer(host, monkeypatch):
    """Nothing listens at the first one."""
    entries = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in ("127.0.0.2", "127.0.0.1")]
    resolve, first = socket.getaddrinfo, iter([entries])
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **options: next(first, None) or resolve(*a, **options))
    assert fetched(host, "/image") == BODY
    assert next(first, None) is None
