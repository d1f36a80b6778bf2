"""Picture formats: files and data URLs as clients send them, asked over HTTP."""

import base64
import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import quote

import httpx
from PIL import Image, ImageOps, PngImagePlugin

from bench.scenes import Item


@dataclass(frozen=True)
class Format:
    """What the server made of one form of the picture."""

    name: str
    status: int
    said: str
    right: bool


def _encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def _chunk(kind: bytes, data: bytes, wrong_crc: bool = False) -> bytes:
    crc = zlib.crc32(kind + data) ^ wrong_crc
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)


def _with_chunk(png: bytes, chunk: bytes) -> bytes:
    return png[:33] + chunk + png[33:]  # behind IHDR


def _turned(picture: Image.Image) -> bytes:
    """A JPEG that a viewer turns upright by its EXIF."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return _encoded(picture.rotate(90, expand=True), "JPEG", quality=95, exif=exif)


def _keyed(grey: Image.Image) -> bytes:
    """A PNG of 16 bits that declares one level transparent, which no pixel has."""
    png = _encoded(grey.convert("I;16").point(lambda v: v * 257), "PNG")
    return _with_chunk(png, _chunk(b"tRNS", struct.pack(">H", 1)))


def _text(picture: Image.Image, *, international: bool = False) -> bytes:
    info = PngImagePlugin.PngInfo()
    (info.add_itxt if international else info.add_text)("note", "n" * 3_000_000, zip=True)
    return _encoded(picture, "PNG", pnginfo=info)


def files(picture: Image.Image) -> dict[str, bytes]:
    """Name -> bytes of a file that shows `picture`."""
    png = _encoded(picture, "PNG")
    alpha = picture.convert("RGBA")
    large = picture.resize((8160, 6120), Image.Resampling.NEAREST)
    grey = ImageOps.grayscale(picture)
    profile = zlib.compress(bytes(2_000_000))
    return {
        "PNG, RGB": png,
        "PNG, RGBA": _encoded(alpha, "PNG"),
        "PNG, palette": _encoded(picture.quantize(256), "PNG"),
        "PNG, grey": _encoded(grey, "PNG"),
        "PNG, 16-bit grey": _encoded(grey.convert("I;16").point(lambda v: v * 257), "PNG"),
        "PNG, ICC profile of 2 MB": _with_chunk(png, _chunk(b"iCCP", b"p\0\0" + profile)),
        "PNG, zTXt of 3 MB": _text(picture),
        "PNG, iTXt of 3 MB": _text(picture, international=True),
        "PNG, 16-bit grey with a transparent level": _keyed(grey),
        "PNG, wrong CRC of an ancillary chunk": _with_chunk(png, _chunk(b"tEXt", b"a\0b", wrong_crc=True)),
        "PNG, animated": _encoded(picture, "PNG", save_all=True, append_images=[ImageOps.invert(picture)]),
        "JPEG": _encoded(picture, "JPEG", quality=95),
        "JPEG, CMYK": _encoded(picture.convert("CMYK"), "JPEG", quality=95),
        "JPEG, progressive": _encoded(picture, "JPEG", quality=95, progressive=True),
        "JPEG, turned by EXIF": _turned(picture),
        "JPEG, 50 megapixels": _encoded(large, "JPEG", quality=90),
        "WebP": _encoded(picture, "WEBP", quality=95),
        "WebP, lossless with alpha": _encoded(alpha, "WEBP", lossless=True),
        "GIF": _encoded(picture.quantize(256), "GIF"),
        "GIF, animated": _encoded(picture, "GIF", save_all=True, append_images=[ImageOps.invert(picture)]),
        "BMP": _encoded(picture, "BMP"),
        "TIFF": _encoded(picture, "TIFF"),
        "PNG, cut off": png[: len(png) // 2],
        "no picture": b"<html>not found</html>",
    }


def urls(png: bytes) -> dict[str, str]:
    """Name -> data URL of the PNG, as clients write it."""
    plain = base64.b64encode(png).decode()
    lines = "\n".join(plain[i : i + 76] for i in range(0, len(plain), 76))
    return {
        "without padding": "data:image/png;base64," + plain.rstrip("="),
        "with line breaks": "data:image/png;base64," + lines,
        "url-safe alphabet": "data:image/png;base64," + base64.urlsafe_b64encode(png).decode(),
        "%-escapes": "data:image/png;base64," + quote(plain, safe=""),
        "without a media type": "data:;base64," + plain,
        "application/octet-stream": "data:application/octet-stream;base64," + plain,
        "image/*": "data:image/*;base64," + plain,
        "wrong media type": "data:image/jpeg;base64," + plain,
        "with parameters": "data:image/png;name=a.png;base64," + plain,
        "base64 alone": plain,
        "upper case": "DATA:IMAGE/PNG;BASE64," + plain,
    }


def try_all(url: str, model: str, item: Item, picture: Image.Image) -> Iterator[Format]:
    """Ask `item` with every file and data URL."""
    found = {f"data URL, {name}": text for name, text in urls(_encoded(picture, "PNG")).items()}
    for name, data in files(picture).items():
        found[name] = "data:application/octet-stream;base64," + base64.b64encode(data).decode()
    with httpx.Client(timeout=60.0, trust_env=False) as client:
        for name, image_url in found.items():
            content = [
                {"type": "image_url", "image_url": {"url": image_url}},
                {"type": "text", "text": item.question.text},
            ]
            body = {"model": model, "messages": [{"role": "user", "content": content}]}
            yield _read(name, client.post(f"{url}/v1/chat/completions", json=body), item)


def _read(name: str, reply: httpx.Response, item: Item) -> Format:
    if reply.status_code != 200:
        return Format(name, reply.status_code, reply.json()["error"]["message"], False)
    said = reply.json()["choices"][0]["message"]["content"]
    return Format(name, 200, said, said.strip() == item.question.answer)
