"""Request bodies: read up to a limit, parsed and validated without blocking other clients."""

import asyncio
from collections.abc import Callable

from fastapi import Request

from foveate.configs.config import LimitsConfig
from foveate.server.common.errors import ApiError
from foveate.server.transport.strict_json import parse

_IN_THREAD = 16 * 1024  # bytes: a larger body takes milliseconds to parse and validate
_READ = b"read"


class ApiRequest(Request):
    """Reads a body within the limits, parses it strictly and validates it.

    Args:
        validate: turns parsed JSON into the route's object. Called in a worker thread for a large body.
    """

    def __init__(self, request: Request, limits: LimitsConfig, validate: Callable[[object], object]) -> None:
        super().__init__(request.scope, request.receive)
        self._limits = limits
        self._validate = validate
        self._validated: object = None

    async def load(self) -> None:
        """Read, parse and validate the body before FastAPI, whose errors would hide the cause.

        Raises:
            ApiError: the body is too large, of another type, no JSON, or beyond a limit.
            RequestValidationError: a field of the body is wrong.
        """
        body = await self._read()
        kind = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError("send the body with Content-Type: application/json", None, "unsupported_media_type", 415)
        if self.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
            raise ApiError("send the body without Content-Encoding", None, "unsupported_media_type", 415)
        if len(body) > _IN_THREAD:
            self._validated = await asyncio.to_thread(self._parse, body)
        else:
            self._validated = self._parse(body)

    async def body(self) -> bytes:
        """FastAPI only asks whether there is a body. The bytes themselves are gone, since they may be many."""
        return _READ

    async def json(self) -> object:
        return self._validated

    def _parse(self, body: bytearray) -> object:
        return self._validate(parse(body, self._limits))

    async def _read(self) -> bytearray:
        """Return the body. Raises ApiError 413 as soon as the body exceeds the limit."""
        declared = self.headers.get("content-length", "0")
        limit_mb = self._limits.body_mb
        limit = limit_mb * 1024 * 1024
        too_large = ApiError(f"the body is larger than limits.body_mb {limit_mb}", None, "too_large", 413)
        if declared.isdecimal() and int(declared[:20]) > limit:
            raise too_large
        body = bytearray()
        async for chunk in self.stream():
            body += chunk
            if len(body) > limit:
                raise too_large
        return body
