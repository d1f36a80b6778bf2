"""The bytes of a picture out of a data URL, or out of base64 alone, as clients really write them.

Base64 may come without padding, in the URL-safe alphabet, with white space or with %-escapes. The media type and the
other parameters of a data URL are ignored: the bytes decide the format. A piece of a megabyte is decoded at a time,
so that a long URL neither keeps the interpreter lock nor fills the memory.
"""

import base64
import binascii
import re
from collections.abc import Iterable, Iterator
from urllib.parse import unquote_to_bytes

from foveate.engine.common import ImageError
from foveate.server.prepare.formats import name_of

_HEAD_CHARS = 4096  # of a data URL before its comma
_HEAD = re.compile(r'data:((?:[^,"]|"[^"]*")*),', re.IGNORECASE)  # a comma may stand in a quoted parameter
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)
_PIECE_CHARS = 1024 * 1024
_URL_SAFE = bytes.maketrans(b"-_", b"+/")
_WHITE = b" \t\r\n\v\f"
_EXPECTED = "expected a data URL (data:image/png;base64,...)"


def is_inline(url: str) -> bool:
    """Return whether a URL holds the picture itself: a data URL, or base64 without a scheme."""
    start = url[:_HEAD_CHARS].lstrip()
    return start[:5].lower() == "data:" or _SCHEME.match(start) is None


def unpack(url: str, most_bytes: int) -> bytes:
    """Return the bytes of a data URL or of base64 alone.

    Raises:
        ImageError: the URL is neither, its base64 is broken, or it holds more than `most_bytes`.
    """
    url = url.strip()
    if url[:5].lower() != "data:":
        if not _is_picture(url[:128]):
            raise ImageError(f"{_EXPECTED}, an http(s) URL, or the base64 of a picture")
        return _joined(_from_base64(_unescaped(url, 0)), most_bytes)
    head = _HEAD.match(url[:_HEAD_CHARS])
    if head is None:
        raise ImageError(f"not a data URL: the comma before the data is missing; {_EXPECTED}")
    pieces = _unescaped(url, head.end())
    marked = any(part.strip().lower() == "base64" for part in head[1].split(";"))
    # Some clients forget ";base64", and no picture begins with letters that are the base64 of a picture.
    if marked or _is_picture(url[head.end() : head.end() + 128]):
        pieces = _from_base64(pieces)
    return _joined(pieces, most_bytes)


def _is_picture(start: str) -> bool:
    """Return whether text begins with the base64 of a picture of a known format."""
    try:
        first = b"".join(_from_base64(_unescaped(start.strip(), 0), is_cut=True))
    except ImageError:
        return False
    return name_of(first) is not None


def _unescaped(text: str, start: int) -> Iterator[bytes]:
    """Yield the text from `start` on without %-escapes, in pieces."""
    while start < len(text):
        stop = start + _PIECE_CHARS
        escape = text.find("%", stop - 2, stop)  # an escape of three characters must not be cut in two
        stop = stop if escape <= start else escape
        yield unquote_to_bytes(text[start:stop])
        start = stop


def _from_base64(pieces: Iterable[bytes], is_cut: bool = False) -> Iterator[bytes]:
    """Decode pieces of base64. `is_cut`: ignore up to three characters at the end that make no whole byte group."""
    rest, has_ended = b"", False
    for piece in pieces:
        own, padding, after = piece.translate(_URL_SAFE, _WHITE).partition(b"=")
        if (has_ended and own) or after.strip(b"="):
            raise _broken()
        has_ended |= bool(padding)
        rest += own
        whole = len(rest) // 4 * 4
        yield _decoded(rest[:whole])
        rest = rest[whole:]
    if rest and not is_cut:
        yield _decoded(rest + b"=" * (4 - len(rest)))


def _decoded(text: bytes) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        raise _broken() from None


def _broken() -> ImageError:
    return ImageError("the base64 of the data URL is broken")


def _joined(pieces: Iterable[bytes], most_bytes: int) -> bytes:
    whole = bytearray()
    for piece in pieces:
        whole += piece
        if len(whole) > most_bytes:
            raise ImageError(f"the picture is larger than limits.image_mb {most_bytes // 2**20}")
    return bytes(whole)
