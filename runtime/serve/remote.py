"""Images from other hosts: only from those that are named, never from private addresses, and within limits.

A name is resolved once, every address that it has must be a public one, and the connection goes to that very address,
so that a name cannot point elsewhere between the check and the use.
"""

import http.client
import ipaddress
import socket
import ssl
import time
from collections.abc import Callable, Collection
from urllib.parse import SplitResult, urljoin, urlsplit

from runtime.serve.protocol import ApiError, too_large

PORTS = {"http": 80, "https": 443}
REDIRECTS = (301, 302, 303, 307, 308)
PIECE = 1 << 16


def is_public(address: str) -> bool:
    found = ipaddress.ip_address(address)
    mapped = getattr(found, "ipv4_mapped", None)  # an IPv4 address in an IPv6 one's clothes
    return (mapped or found).is_global


class Fetcher:
    """Call it with a URL; returns the bytes.

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

    def __call__(self, url: str) -> bytes:
        end = time.monotonic() + self._seconds
        try:
            for _ in range(self._redirects + 1):
                found = self._get(self._checked(url), end)
                if isinstance(found, bytes):
                    return found
                url = urljoin(url, found)
        except (OSError, http.client.HTTPException) as error:
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
            raise _refused(f"host {host} is not one of those that may be asked")
        return parts

    def _get(self, parts: SplitResult, end: float) -> bytes | str:
        """The content, or where it redirects to."""
        host, port = parts.hostname, parts.port or PORTS[parts.scheme]
        sock = socket.create_connection((self._address(host, port), port), timeout=_left(end))
        if parts.scheme == "https":
            sock = ssl.create_default_context().wrap_socket(sock, server_hostname=host)
        connection = http.client.HTTPConnection(host, port)
        connection.sock = sock
        try:
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("GET", target, headers={"Accept": "image/*", "User-Agent": "convllava-deploy"})
            sock.settimeout(_left(end))
            answer = connection.getresponse()
            if answer.status in REDIRECTS and (location := answer.getheader("Location")):
                return location
            if answer.status != 200:
                raise _refused(f"the answer is {answer.status} {answer.reason}")
            content = bytearray()
            while True:
                sock.settimeout(_left(end))
                piece = answer.read1(PIECE)
                if not piece:
                    return bytes(content)
                content += piece
                if len(content) > self._most_bytes:
                    raise too_large(self._most_bytes)
        finally:
            connection.close()

    def _address(self, host: str, port: int) -> str:
        found = {entry[4][0] for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
        if not all(self._allowed(address) for address in found):
            raise _refused(f"host {host} has an address that is not public")
        return sorted(found)[0]


def _left(end: float) -> float:
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError("it takes too long")
    return left


def _refused(why: str) -> ApiError:
    return ApiError(400, f"remote image: {why}", param="messages", code="invalid_image_url")
