"""Request bodies with a size limit and strict JSON."""

import asyncio
import json

import orjson
from fastapi import Request

from foveate.server.common.errors import ApiError

_PARSE_IN_THREAD = 1024 * 1024


class ApiRequest(Request):
    """Reads a body of at most `limit_mb` and parses JSON strictly."""

    def __init__(self, request: Request, limit_mb: int) -> None:
        super().__init__(request.scope, request.receive)
        self._limit_mb = limit_mb
        self._whole: bytes | None = None
        self._parsed: object = None

    async def body(self) -> bytes:
        """Return the body. Raises ApiError 413 as soon as the body exceeds the limit."""
        if self._whole is None:
            declared = self.headers.get("content-length", "0")
            limit = self._limit_mb * 1024 * 1024
            too_large = ApiError(f"the body is larger than limits.body_mb {self._limit_mb}", None, "too_large", 413)
            if declared.isdecimal() and int(declared[:20]) > limit:
                raise too_large
            body = bytearray()
            async for chunk in self.stream():
                body += chunk
                if len(body) > limit:
                    raise too_large
            self._whole = bytes(body)
        return self._whole

    async def load(self) -> None:
        """Read and parse the body before FastAPI, whose errors would hide the cause."""
        body = await self.body()
        kind = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError("send the body with Content-Type: application/json", None, "unsupported_media_type", 415)
        self._parsed = await asyncio.to_thread(parse, body) if len(body) > _PARSE_IN_THREAD else parse(body)

    async def json(self) -> object:
        return self._parsed


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ApiError("the body is no unambiguous JSON: a key stands twice in one object", None, "invalid_json")
    return found


def parse(body: bytes) -> object:
    """Parse standard JSON.

    Raises:
        ApiError: the JSON is broken, nested too deeply, or has NaN, lone surrogates or duplicate keys.
    """
    try:
        orjson.loads(body)  # strict about everything except duplicate keys
        return json.loads(body, object_pairs_hook=_unique)
    except (ValueError, RecursionError):
        raise ApiError("the body is not valid JSON", None, "invalid_json") from None
