"""Check API keys and identify the caller."""

import hmac
import re
from collections.abc import Awaitable, Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from foveate.server.common.caller import Caller
from foveate.server.common.errors import ApiError
from foveate.server.transport.errors import response_of

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


class Gate:
    """ASGI middleware: checks the key and stores the caller in `scope["state"]["caller"]`.

    If the server has keys, every path except /health/ needs a key. The response repeats X-Request-Id unchanged.
    """

    def __init__(self, app: ASGIApp, api_keys: tuple[str, ...]) -> None:
        self._app = app
        self._keys = [key.encode() for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        answer = _with_request_id(send, headers.get("x-request-id", ""))
        key = _bearer(headers) if self._keys else b""
        if self._keys and not scope["path"].startswith("/health/") and not self._knows(key):
            response = response_of(ApiError("missing or wrong API key", None, "invalid_api_key", 401))
            response.headers["www-authenticate"] = "Bearer"
            return await response(scope, receive, answer)
        scope.setdefault("state", {})["caller"] = Caller(key)
        return await self._app(scope, receive, answer)

    def _knows(self, key: bytes) -> bool:
        # Compare every key in constant time, so that the duration reveals nothing.
        return sum(hmac.compare_digest(key, known) for known in self._keys) > 0


def _bearer(headers: Headers) -> bytes:
    """Return the key of the Authorization header. Empty without the header."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip().encode() if scheme.lower() == "bearer" else b""


def _with_request_id(send: Send, request_id: str) -> Callable[[Message], Awaitable[None]]:
    if not _REQUEST_ID.fullmatch(request_id):
        return send

    async def tagged(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message)["x-request-id"] = request_id
        await send(message)

    return tagged
