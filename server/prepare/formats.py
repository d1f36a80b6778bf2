"""Formats of pictures, told from the first bytes. The media type that a client states is ignored."""

import re
from collections.abc import Callable

from foveate.configs.config import IMAGE_FORMATS
from foveate.engine.common import ImageError

_Test = Callable[[bytes], bool]
_NAMES = {"png": "PNG", "jpeg": "JPEG", "webp": "WebP", "gif": "GIF", "bmp": "BMP", "tiff": "TIFF"}
assert set(_NAMES) == set(IMAGE_FORMATS), "every format that the settings know has a name"
_BRANDS_AT = 8  # of the first box of an ISO media file


def _starts(*magic: bytes) -> _Test:
    return lambda data: data.startswith(magic)


def _is_webp(data: bytes) -> bool:
    return data[:4] == b"RIFF" and data[8:12] == b"WEBP"


def _is_bmp(data: bytes) -> bool:
    return data[:2] == b"BM" and data[6:10] == b"\0\0\0\0"  # reserved bytes; two letters are too little to go by


def _has_brand(*brands: bytes) -> _Test:
    def test(data: bytes) -> bool:
        size = min(int.from_bytes(data[:4]), 128)
        return data[4:8] == b"ftyp" and any(data[i : i + 4] in brands for i in range(_BRANDS_AT, size, 4))

    return test


def _is_svg(data: bytes) -> bool:
    return re.match(rb"\s*(<\?xml|<!--|<!doctype svg|<svg)", _text(data)) is not None and b"<svg" in _text(data)


def _text(data: bytes) -> bytes:
    return data[:4096].removeprefix(b"\xef\xbb\xbf").lower()


_READ: dict[str, _Test] = {
    "png": _starts(b"\x89PNG\r\n\x1a\n"),
    "jpeg": _starts(b"\xff\xd8\xff"),
    "webp": _is_webp,
    "gif": _starts(b"GIF87a", b"GIF89a"),
    "bmp": _is_bmp,
    "tiff": _starts(b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
}
# What people send besides. Named, so that they know what to convert.
_UNREAD: dict[str, _Test] = {
    "AVIF": _has_brand(b"avif", b"avis"),
    "HEIC": _has_brand(b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"),
    "JPEG XL": _starts(b"\xff\x0a", b"\0\0\0\x0cJXL "),
    "JPEG 2000": _starts(b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51"),
    "SVG": _is_svg,
    "ICO": _starts(b"\0\0\1\0"),
    "PDF": _starts(b"%PDF"),
    "PSD": _starts(b"8BPS"),
    "video": lambda data: data[4:8] == b"ftyp" or data.startswith(b"\x1a\x45\xdf\xa3"),
    "HTML": lambda data: re.match(rb"\s*(<!doctype html|<html)", _text(data)) is not None,
}


def name_of(data: bytes) -> str | None:
    """Return the format that the first bytes show, as in limits.image_formats."""
    return next((name for name, test in _READ.items() if test(data)), None)


def check_format(data: bytes, allowed: tuple[str, ...]) -> str:
    """Return the format of a picture, as in limits.image_formats.

    Raises:
        ImageError: the format is not allowed or not supported. The message names the format and the remedy.
    """
    name = name_of(data)
    if name in allowed:
        return name
    if name is not None:
        raise ImageError(
            f"{_NAMES[name]} pictures are switched off; convert the picture to {_listed(allowed)}, "
            f"or add {name} to limits.image_formats"
        )
    unread = next((kind for kind, test in _UNREAD.items() if test(data)), None)
    if unread is not None:
        raise ImageError(f"{unread} is not supported; send a picture as {_listed(allowed)}")
    raise ImageError(f"not a {_listed(allowed)} picture")


def _listed(allowed: tuple[str, ...]) -> str:
    *most, last = [_NAMES[name] for name in allowed]
    return f"{', '.join(most)} or {last}" if most else last
