"""Check API keys and origins, and identify the caller."""

import hmac
import ipaddress

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from foveate.configs.config import ServerConfig
from foveate.server.common.caller import Caller
from foveate.server.common.errors import ApiError
from foveate.server.transport.cors import allowed
from foveate.server.transport.errors import response_of

OPEN_PATHS = frozenset({"/health", "/health/live", "/health/ready", "/ping", "/version"})


class Gate:
    """ASGI middleware: checks the key and stores the caller in `scope["state"]["caller"]`.

    If the server has keys, every path except `OPEN_PATHS` needs a key. A server without keys that listens on this
    machine alone refuses pages of origins outside `server.cors_origins`: such a page may have got here by a host name
    that it pointed at this machine (DNS rebinding), where the browser's own check does not apply.
    """

    def __init__(self, app: ASGIApp, settings: ServerConfig) -> None:
        self._app = app
        self._keys = [key.encode() for key in settings.api_keys]
        self._pages = None if self._keys or not _is_local(settings.host) else allowed(settings.cors_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        key = _bearer(headers) if self._keys else b""
        refusal = None if scope["path"] in OPEN_PATHS else self._refusal(headers, key)
        state = scope.setdefault("state", {})
        if refusal is not None:
            state["error"] = refusal
            return await response_of(refusal)(scope, receive, send)
        state["caller"] = Caller(key)
        return await self._app(scope, receive, send)

    def _refusal(self, headers: Headers, key: bytes) -> ApiError | None:
        if self._keys and not self._knows(key):
            return ApiError("missing or wrong API key", None, "invalid_api_key", 401)
        origin = headers.get("origin")
        if self._pages is not None and origin is not None and not self._pages.fullmatch(origin):
            shown = "".join(char if char.isprintable() else "?" for char in origin[:100])
            why = f"pages of {shown} may not use this server; add the origin to server.cors_origins, or set API keys"
            return ApiError(why, None, "origin_not_allowed", 403)
        return None

    def _knows(self, key: bytes) -> bool:
        # Compare every key in constant time, so that the duration reveals nothing.
        return sum(hmac.compare_digest(key, known) for known in self._keys) > 0


def _is_local(host: str) -> bool:
    """Return whether only this machine reaches a server that listens on `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _bearer(headers: Headers) -> bytes:
    """Return the key of the Authorization header, as the client's bytes. Empty without the header."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip(" \t").encode("latin-1") if scheme.lower() == "bearer" else b""
