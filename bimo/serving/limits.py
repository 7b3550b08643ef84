"""Who may come in and how many: the key, the Host header, the number of requests at once.

`Guard` is plain ASGI, in front of everything but the observer: a refused request costs no parsing. What needs no key
is listed, so that a route added later is closed until someone opens it.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from bimo.errors import CapacityError, UsageError
from bimo.serving.errors import ApiError, error_response

__all__ = ["LOOPBACK_HOSTS", "Admission", "Guard", "check_bind", "is_loopback"]

LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]"})
OPEN_PATHS = frozenset({"/", "/health", "/version", "/openapi.json", "/favicon.ico"})
OPEN_PREFIXES = ("/static/",)  # the page asks its user for the key


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server bound to `host`."""
    return host in ("localhost", "::1") or (host.startswith("127.") and host.replace(".", "").isdecimal())


def check_bind(host: str, api_key: str | None) -> None:
    """Refuse to be reachable by others without a key; UsageError."""
    if not is_loopback(host) and not api_key:
        raise UsageError(
            f"binding {host} lets other machines use this server, which needs a key: give --api-key (or set "
            "BIMO_API_KEY), or bind 127.0.0.1",
            param="host",
        )
    if api_key is not None and (not api_key.isascii() or not api_key.isprintable() or " " in api_key or not api_key):
        raise UsageError("a key must be printable ASCII without spaces, as it travels in a header", param="api_key")


class Guard:
    """Answers 421 to a Host header that is not ours and 401 to a missing or wrong key.

    The host check stops DNS rebinding: a foreign page whose name was made to point at 127.0.0.1 reaches the port, but
    its requests still carry the foreign name.
    """

    def __init__(self, app: ASGIApp, *, api_key: str | None, allowed_hosts: Iterable[str] | None) -> None:
        self._app = app
        self._key = None if api_key is None else _digest(api_key.encode())
        self._hosts = None if allowed_hosts is None else {host.lower() for host in allowed_hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (refusal := self._refusal(scope["path"], Headers(scope=scope))):
            await error_response(refusal)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _refusal(self, path: str, headers: Headers) -> ApiError | None:
        host = headers.get("host", "").lower()
        if self._hosts is not None and host and _without_port(host) not in self._hosts:
            names = ", ".join(sorted(self._hosts))
            return ApiError(421, f"this server answers to {names} only, not to the host {host[:80]!r}",
                            code="host_not_allowed")  # fmt: skip
        if self._key is None or path in OPEN_PATHS or path.startswith(OPEN_PREFIXES):
            return None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        # digests have one length, so the comparison tells nothing about the key's
        if scheme.lower() == "bearer" and hmac.compare_digest(_digest(given.strip().encode()), self._key):
            return None
        problem = "wrong key" if given else "no key"
        return ApiError(401, f"{problem}: send the header Authorization: Bearer followed by the server's key",
                        code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})  # fmt: skip


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).digest()


def _without_port(host: str) -> str:
    if host.startswith("["):  # IPv6
        return host.partition("]")[0] + "]"
    return host.partition(":")[0]


class Admission:
    """How many sequences may be inside at once, running and waiting together. Used on the event loop only."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.inside = 0

    def enter(self, width: int) -> None:
        """Take `width` places, or raise CapacityError. A request wider than the limit enters when it is alone."""
        self.check(width)
        self.inside += width

    def check(self, width: int) -> None:
        """CapacityError when there is no room for `width` more (for any at all, with 0)."""
        if self.inside and self.inside + max(width, 1) > self.limit:
            raise CapacityError(
                f"the queue is full: {self.inside} of {self.limit} places are taken; try again in a moment"
            )

    def leave(self, width: int) -> None:
        """Give the places back."""
        self.inside -= width
        assert self.inside >= 0
