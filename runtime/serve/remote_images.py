"""Images from other hosts: only from those that are named, never from private addresses, and within limits.

A name is resolved once, every address that it has must be a public one, and the connection goes to that very address,
so that a name cannot point elsewhere between the check and the use.
"""

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from urllib.parse import SplitResult, urljoin, urlsplit

from runtime.serve.protocol import ApiError, too_large

# The bytes at a URL; the other argument is told of each connection, which whoever waits no longer may `cut`
Fetch = Callable[[str, Callable[[socket.socket], None]], bytes]
PORTS = {"http": 80, "https": 443}
REDIRECTS = (301, 302, 303, 307, 308)
NAT64 = ipaddress.ip_network("64:ff9b::/96")


def is_public(address: str) -> bool:
    """Whether it is a globally routable unicast address, and no IPv6 form of an IPv4 address that is not."""
    found = ipaddress.ip_address(address)
    if found.version == 6:
        if found.ipv4_mapped:
            return is_public(str(found.ipv4_mapped))
        if found in NAT64 or found.sixtofour or found.teredo or found.is_site_local or found.packed[:12] == bytes(12):
            return False
    return found.is_global and not found.is_multicast


class Fetcher:
    """A `Fetch`.

    hosts: that may be asked, also after a redirect; `name` on the scheme's own port, or `name:port`. most_bytes: of an
    image. seconds: for all of it. redirects: that are followed. allowed: of an address that a name resolves to.
    Raises ApiError for what is not allowed, too large, too slow or not there.
    """

    def __init__(
        self,
        hosts: Collection[str],
        most_bytes: int,
        seconds: float = 10.0,
        redirects: int = 3,
        allowed: Callable[[str], bool] = is_public,
    ):
        self._hosts = {host.lower() for host in hosts}
        self._most_bytes, self._seconds, self._redirects, self._allowed = most_bytes, seconds, redirects, allowed

    def __call__(self, url: str, connected: Callable[[socket.socket], None]) -> bytes:
        end = time.monotonic() + self._seconds
        try:
            for _ in range(self._redirects + 1):
                found = self._get(self._checked(url), end, connected)
                if isinstance(found, bytes):
                    return found
                url = urljoin(url, found)
        except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: of a URL that none can ask for
            raise _refused(f"it cannot be fetched: {error}") from error
        raise _refused(f"more than {self._redirects} redirects")

    def _checked(self, url: str) -> SplitResult:
        try:
            parts = urlsplit(url)
            host, port = (parts.hostname or "").lower(), parts.port
        except ValueError as error:
            raise _refused(str(error)) from error
        if parts.scheme not in PORTS or not host:
            raise _refused("neither a data URL nor http(s)")
        if parts.username is not None:
            raise _refused("it has a user's name in it")
        usual = port in (None, PORTS[parts.scheme])
        if not ((usual and host in self._hosts) or f"{host}:{port or PORTS[parts.scheme]}" in self._hosts):
            raise _refused(f"host {host!r} is not one of those that may be asked")
        return parts

    def _get(self, parts: SplitResult, end: float, connected: Callable[[socket.socket], None]) -> bytes | str:
        """The content, or where it redirects to."""
        host, port = parts.hostname or "", parts.port or PORTS[parts.scheme]
        sock = self._connect(host, port, end)
        if parts.scheme == "https":
            context = ssl.create_default_context()
            sock = context.wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False)
        connected(sock)
        watch = threading.Timer(_left(end), cut, [sock])  # a timeout of the socket is for each piece alone
        watch.daemon = True
        watch.start()
        connection = http.client.HTTPConnection(host, port)
        connection.default_port = PORTS[parts.scheme]  # which the header Host does not name
        connection.sock = sock
        try:
            if isinstance(sock, ssl.SSLSocket):
                sock.do_handshake()
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("GET", target, headers={"Accept": "image/*", "User-Agent": "convllava-deploy"})
            answer = connection.getresponse()
            if answer.status in REDIRECTS and (location := answer.getheader("Location")):
                return location
            if answer.status != 200:
                raise _refused(f"the answer is {answer.status} {answer.reason}")
            content = answer.read(self._most_bytes + 1)
            if len(content) > self._most_bytes:
                raise too_large(self._most_bytes)
            if answer.length or time.monotonic() > end:
                raise OSError("it ends early")
            return content
        finally:
            watch.cancel()
            connection.close()

    def _connect(self, host: str, port: int, end: float) -> socket.socket:
        """To the first of its addresses that answers."""
        found = [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
        if not all(self._allowed(address) for address in found):
            raise _refused(f"host {host} has an address that is not public")
        for address in found[:-1]:
            with suppress(OSError):
                return socket.create_connection((address, port), timeout=_left(end) / 2)
        return socket.create_connection((found[-1], port), timeout=_left(end))


def cut(sock: socket.socket) -> None:
    """Whoever waits for it waits no longer."""
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def _left(end: float) -> float:
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError("it takes too long")
    return left


def _refused(why: str) -> ApiError:
    return ApiError(400, f"remote image: {why}", param="messages", code="invalid_image_url")
