"""Which hosts and origins a request may name, against pages of other sites that reach a server on this machine.

A page may post to http://127.0.0.1:8000 from anywhere, and read the answer too where its own name resolves to this
machine in the meantime (DNS rebinding). Browsers tell both: the Host header has the page's name, Origin its origin.
"""

import ipaddress
import re
from collections.abc import Collection
from urllib.parse import urlsplit

from fastapi import Request

from runtime.serve.protocol import ApiError


def is_loopback(host: str) -> bool:
    """Whether it is `localhost` or an address that only this machine reaches."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def is_host(name: str) -> bool:
    """Whether a setting names a host: no scheme, port or path."""
    return re.fullmatch(r"[\w.-]+|[\da-fA-F:.]+", name) is not None


def is_origin(name: str) -> bool:
    """Whether a setting names an origin as browsers send it: a scheme, a host in lower case and perhaps a port."""
    return re.fullmatch(r"https?://([a-z\d.-]+|\[[\da-f:.]+\])(:\d+)?", name) is not None


class OriginCheck:
    """Call it with a request.

    Hosts are checked where `allowed_hosts` has any, and without keys on connections to a loopback address. Host must
    then be one of them or this machine; Origin, where there is one, likewise or one of `cors_origins`.

    Args:
        allowed_hosts: names without ports.
        cors_origins: scheme, host and port, as browsers send them.
        has_keys: whether clients must send a key, which pages of other sites do not know.

    Raises:
        ApiError: 421 for another Host, 403 for another Origin.
    """

    def __init__(self, allowed_hosts: Collection[str], cors_origins: Collection[str], has_keys: bool):
        self._hosts = {host.lower().rstrip(".") for host in allowed_hosts}
        self._origins, self._has_keys = set(cors_origins), has_keys

    def __call__(self, request: Request) -> None:
        address: str = (request.scope.get("server") or ("", None))[0]
        if not self._hosts and (self._has_keys or not is_loopback(address)):
            return
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        if not self._is_allowed(f"//{host}"):
            message = f"the Host header is {host!r}, expected localhost or a name given by --allowed-host"
            raise ApiError(421, message, code="host_not_allowed")
        if origin is not None and origin not in self._origins and not self._is_allowed(origin):
            message = f"the Origin header is {origin!r}, expected this server's page or one given by --cors-origin"
            raise ApiError(403, message, code="origin_not_allowed")

    def _is_allowed(self, url: str) -> bool:
        try:
            host = (urlsplit(url).hostname or "").rstrip(".")
        except ValueError:
            return False
        return host in self._hosts or is_loopback(host)
