"""Parse a request body: strict JSON, at a cost that its bytes bound.

A C function that parses 64 MB holds Python's global lock all the while, and no other client is served. So the long
data URLs are taken out first and decoded piece by piece; the rest, which `limits.text_mb` bounds, is small. The values
of the rest are counted before any of them becomes an object: `{},` is 3 bytes of text and 72 bytes of memory.
"""

import re
import secrets

import orjson

from foveate.configs.config import LimitsConfig
from foveate.server.common.errors import ApiError

MAX_NAMES = 4096  # of one object
_URL = b'"data:'
_LONG_URL = 64 * 1024  # bytes; a shorter data URL is parsed with the rest
_PIECE = 256 * 1024  # bytes of a string that one call decodes
_WINDOW = 512 * 1024  # bytes that one call searches
_WINDOW_COUNTED = 64 * 1024  # bytes in which one call counts values
_BACKSLASH = ord("\\")
_INSIDE = re.compile(rb'(?:[^"\\]++|\\u[0-9a-fA-F]{4}|\\[^u])*+', re.DOTALL)


def parse(body: bytes | bytearray, limits: LimitsConfig) -> object:
    """Parse standard JSON.

    Raises:
        ApiError: the JSON is broken, nested too deeply, or has NaN, lone surrogates or a key twice in one object; or
            the JSON has more text or more values than the limits allow.
    """
    urls = _Urls(body, limits)
    n_names = _count_names(urls.rest, limits.body_values)
    try:
        tree = orjson.loads(urls.rest)
    except ValueError:
        raise _broken() from None
    holder = [tree]
    if _restore(holder, urls.found) < n_names:
        raise ApiError("the body is no unambiguous JSON: a key stands twice in one object", None, "invalid_json")
    return holder[0]


class _Urls:
    """The long data URLs of a body, and the body with a mark in place of each.

    A quote that opens a string never follows a backslash, and a quote inside a string always does. So `"data:` without
    a backslash before begins a string, or the body is no JSON, with the marks as without them.
    """

    def __init__(self, body: bytes | bytearray, limits: LimitsConfig) -> None:
        self.found: dict[str, str] = {}
        self.rest = bytearray()
        self._body, self._limits = body, limits
        self._mark = secrets.token_hex(16)  # a body cannot contain a mark but by chance
        self._take_out()

    def _take_out(self) -> None:
        body, start, taken = self._body, 0, 0  # `taken`: bytes before this place are in `rest` or `found`
        while (start := _find(body, _URL, start, len(body))) >= 0:
            self._check_rest(len(self.rest) + start - taken)
            if start and body[start - 1] == _BACKSLASH:
                start += 1
                continue
            end = self._end_of_string(start + 1)
            if end - start > _LONG_URL:
                mark = f"{self._mark}{len(self.found)}"
                self.rest += body[taken:start] + f'"{mark}"'.encode()
                self.found[mark] = _decode(body, start + 1, end)
                taken = end + 1
            start = end + 1
        self._check_rest(len(self.rest) + len(body) - taken)
        self.rest += body[taken:]

    def _end_of_string(self, start: int) -> int:
        """Return the place of the closing quote of a string. `start`: behind the opening quote."""
        body = self._body
        end = _find(body, b'"', start, len(body))
        if end < 0:
            raise _broken()
        place = _find(body, b"\\", start, end)
        if place < 0:
            place = end
        while body[place : place + 1] != b'"':
            place = _next(body, place, min(place + _PIECE, len(body)))
            self._check_url(place - start)
        self._check_url(place - start)
        return place

    def _check_rest(self, n_bytes: int) -> None:
        most = self._limits.text_mb
        if n_bytes > most * 1024 * 1024:
            raise ApiError(
                f"the body has more than limits.text_mb {most} MB beside its pictures", None, "too_large", 413
            )

    def _check_url(self, n_bytes: int) -> None:
        most = self._limits.image_mb
        if n_bytes > 2 * most * 1024 * 1024:  # base64 takes 4/3 of the bytes, and its escapes some more
            raise ApiError(f"a picture of the body is larger than limits.image_mb {most}", None, "too_large", 413)


def _broken() -> ApiError:
    return ApiError("the body is not valid JSON", None, "invalid_json")


def _find(body: bytes | bytearray, what: bytes, start: int, end: int) -> int:
    """Like `body.find`, in several calls, so that other threads run in between."""
    while start < end:
        place = body.find(what, start, min(start + _WINDOW + len(what) - 1, end))
        if place >= 0:
            return place
        start += _WINDOW
    return -1


def _next(body: bytes | bytearray, place: int, stop: int) -> int:
    """Return the end of the whole characters and escapes in body[place:stop], at most `stop`."""
    match = _INSIDE.match(body, place, stop)
    assert match is not None, "the pattern matches an empty text"
    if match.end() == place and body[place : place + 1] != b'"':
        raise _broken()
    return match.end()


def _decode(body: bytes | bytearray, start: int, end: int) -> str:
    """Decode the inside of a long string piece by piece, so that other threads run in between."""
    pieces = []
    while start < end:
        stop = min(start + _PIECE, end)
        if body.find(b"\\", start, stop) >= 0:
            stop = _next(body, start, stop)
        try:
            piece = orjson.loads(b'"' + body[start:stop] + b'"')
        except ValueError:
            piece = None
        if not isinstance(piece, str) or not piece.isascii():
            raise ApiError("a data URL of the body holds what is no character of a data URL", None, "invalid_json")
        pieces.append(piece)
        start = stop
    return "".join(pieces)


def _count_names(text: bytearray, most: int) -> int:
    """Count the names of all objects: the colons outside strings. Raises ApiError for more than `most` values."""
    plain = text.replace(b"\\\\", b"").replace(b'\\"', b"")  # what is left of quotes opens or closes a string
    n_names = n_values = inside = 0
    for start in range(0, len(plain), _WINDOW_COUNTED):
        pieces = plain[start : start + _WINDOW_COUNTED].split(b'"')
        outside = b"".join(pieces[inside::2])
        n_names += outside.count(b":")
        n_values += sum(map(outside.count, (b":", b",", b"[", b"{")))
        inside ^= (len(pieces) - 1) & 1
        if n_values > most:
            raise ApiError(f"the body has more than limits.body_values {most} names and values", None, "too_large", 413)
    return n_names


def _restore(holder: list[object], found: dict[str, str]) -> int:
    """Put the data URLs in place of their marks, and count the names of all objects in `holder`.

    Raises:
        ApiError: an object has too many names, each of which would be looked at several times, or a name is a mark.
    """
    n_names = 0
    waiting: list[dict[object, object] | list[object]] = [holder]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            n_names += len(node)
            _check_names(node, found)
            node.update({key: found[value] for key, value in node.items() if isinstance(value, str) and value in found})
            waiting += [value for value in node.values() if isinstance(value, dict | list)]
        else:
            for place, value in enumerate(node):
                if isinstance(value, dict | list):
                    waiting.append(value)
                elif isinstance(value, str) and value in found:
                    node[place] = found[value]
    return n_names


def _check_names(node: dict[object, object], found: dict[str, str]) -> None:
    if len(node) > MAX_NAMES:
        raise ApiError(f"an object of the body has {len(node)} names; there may be {MAX_NAMES}")
    if not found.keys().isdisjoint(node):
        raise ApiError("a name in the body is a long data URL", None, "invalid_json")
