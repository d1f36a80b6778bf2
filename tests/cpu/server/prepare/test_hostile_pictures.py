"""Files made to cost memory or time: a file costs what its bytes and limits.image_pixels allow, and no more."""

import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as Pillow

SIDE = 64
N_BYTES = 8 * 2**20  # of a hostile file
SECONDS = 6.0  # a file takes less than a tenth of it on an idle machine

# Reads each file in a process of its own and prints the most memory it took, in MB, the seconds, and what came of it.
MEASURE = """
import resource, sys, time
from foveate.configs.config import IMAGE_FORMATS, LimitsConfig
from foveate.engine.common import ImageError
from foveate.server.prepare.decode import decode
encoded = open(sys.argv[1], "rb").read()
limits = LimitsConfig(image_pixels=1_000_000, image_formats=IMAGE_FORMATS)
before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
try:
    picture = decode(encoded, limits)
    outcome = f"{picture.width}x{picture.height}"
except ImageError as error:
    outcome = str(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, time.monotonic() - started, outcome)
"""


def directory(data: bytes, n_entries: int) -> bytes:
    """EXIF whose every entry points at all of `data`, with an orientation at the end."""
    entries = b"".join(struct.pack("<HHII", 0x1000 + i, 7, len(data), 8) for i in range(n_entries))
    turned = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", n_entries + 1) + entries + turned


def segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def tiff_of(strips: int) -> bytes:
    values = {256: 1, 257: strips, 258: 8, 259: 1, 262: 1, 273: 200, 278: 1}
    entries = [struct.pack("<HHII", tag, 4, strips if tag == 273 else 1, value) for tag, value in values.items()]
    start = b"II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(entries)
    return start.ljust(200, b"\0") + bytes(4 * strips)


class Kit:
    """A small sound file of each format, and how to lade it."""

    def __init__(self, make_png: Any, png_chunk: Any, encode: Any) -> None:
        picture = Pillow.new("RGB", (SIDE, SIDE), (9, 99, 199))
        self.picture, self.chunk, self._make_png, self._encode = picture, png_chunk, make_png, encode
        self.bomb = zlib.compress(bytes(200 * 2**20), 9)  # 200 kB
        self.gif, self.tiff = encode(picture, "GIF"), encode(picture, "TIFF")

    def png(self, *more: bytes, pixels: bytes | None = None) -> bytes:
        """With chunks before the pixels, or with others in their place."""
        encoded: bytes = self._make_png(SIDE, SIDE, 8, 2, bytes(3 * SIDE * SIDE), more)
        at = encoded.index(b"IDAT") - 4
        return encoded if pixels is None else encoded[:at] + pixels + encoded[at:]

    def text(self, start: bytes, name: bytes = b"zTXt") -> bytes:
        chunk: bytes = self.chunk(name, start + self.bomb)
        return chunk

    def jpeg(self, before: bytes = b"", *, edge: int = SIDE, scans: int = 0, **options: Any) -> bytes:
        """With bytes after its first marker, another size in its header, and its last scan repeated."""
        encoded: bytes = self._encode(self.picture, "JPEG", **options)
        encoded = encoded.replace(struct.pack(">HH", SIDE, SIDE), struct.pack(">HH", edge, edge), 1)
        last = encoded.rindex(b"\xff\xda")
        return encoded[:2] + before + encoded[2:-2] + encoded[last:-2] * scans + encoded[-2:]

    def webp(self, exif: bytes) -> bytes:
        encoded: bytes = self._encode(self.picture, "WEBP", lossless=True, exif=b"Exif\0\0" + exif)
        return encoded


# What makes the file, and what comes of it: its size, or a word of the error.
HOSTILE: dict[str, tuple[Callable[[Kit], bytes], str]] = {
    "PNG: 200 MB in a profile": (lambda kit: kit.png(kit.text(b"p\0\0", b"iCCP")), "64x64"),
    "PNG: 40 texts of 200 MB": (lambda kit: kit.png(*[kit.text(b"%d\0\0" % i) for i in range(40)]), "64x64"),
    "PNG: 40 XMP of 200 MB": (
        lambda kit: kit.png(*[kit.text(b"XML:com.adobe.xmp\0\1\0\0\0", b"iTXt")] * 40), "64x64",
    ),
    "PNG: 40 EXIF of 200 MB": (lambda kit: kit.png(*[kit.text(b"Raw profile type exif\0\0")] * 40), "64x64"),
    "PNG: 200 MB of pixels": (
        lambda kit: kit.png(pixels=kit.chunk(b"IDAT", zlib.compress(bytes(SIDE * (3 * SIDE + 1)) * 16_000))), "64x64",
    ),
    "PNG: many tiny chunks": (lambda kit: kit.png(kit.chunk(b"prVt", b"") * (N_BYTES // 12)), "64x64"),
    "PNG: many chunks without pixels": (
        lambda kit: kit.png(pixels=kit.chunk(b"IDAT", b"") * (N_BYTES // 12)), "64x64",
    ),
    "PNG: a chunk of 2 GB": (lambda kit: kit.png(pixels=b"\x7f\xff\xff\xffprVt"), "broken"),
    "PNG: EXIF of many large entries": (
        lambda kit: kit.png(kit.chunk(b"eXIf", directory(bytes(2**20), 60_000))), "64x64",
    ),
    "JPEG: many EXIF": (lambda kit: kit.jpeg(segment(0xE1, b"Exif\0\0" + bytes(90)) * (N_BYTES // 100)), "64x64"),
    "JPEG: many profiles": (
        lambda kit: kit.jpeg(segment(0xE2, b"ICC_PROFILE\0\1\1" + bytes(9)) * (N_BYTES // 27)), "64x64",
    ),
    "JPEG: EXIF of many entries": (
        lambda kit: kit.jpeg(segment(0xE1, b"Exif\0\0" + directory(bytes(2000), 5000))), "64x64",
    ),
    "JPEG: padding": (lambda kit: kit.jpeg(b"\xff" * N_BYTES), "64x64"),
    "JPEG: rubbish": (lambda kit: kit.jpeg(b"\xff\0" * (N_BYTES // 2)), "64x64"),
    "JPEG: many scans": (lambda kit: kit.jpeg(edge=2000, scans=100_000, progressive=True), "scans"),
    "JPEG: progressive, large": (lambda kit: kit.jpeg(edge=4000, progressive=True), "progressive"),
    "JPEG: hollow, large": (lambda kit: kit.jpeg(edge=7500), "938x938"),
    "JPEG: a header of 4 billion pixels": (lambda kit: kit.jpeg(edge=65_500), "limits.jpeg_pixels"),
    "WebP: EXIF of many large entries": (lambda kit: kit.webp(directory(bytes(2**20), 60_000)), "64x64"),
    "GIF: many comments": (
        lambda kit: kit.gif.replace(b"\x2c\0\0", b"\x21\xfe" + b"\1a" * (N_BYTES // 8) + b"\0\x2c\0\0", 1), "64x64",
    ),
    "GIF: a canvas of 4 billion pixels": (lambda kit: kit.gif[:6] + b"\xff" * 4 + kit.gif[10:], "limits.image_pixels"),
    "GIF: a frame of 4 billion pixels": (
        lambda kit: kit.gif.replace(b"\x2c\0\0\0\0@\0@\0", b"\x2c\0\0\0\0" + b"\xff" * 4, 1), "limits.image_pixels",
    ),
    "TIFF: millions of strips": (lambda _: tiff_of(2_000_000), "strips"),
    "TIFF: a directory in its own header": (lambda kit: kit.tiff[:4] + struct.pack("<I", 4) + kit.tiff[8:], "broken"),
}  # fmt: skip


@pytest.fixture(scope="module")
def kit(make_png: Any, png_chunk: Any, encode: Any) -> Kit:
    return Kit(make_png, png_chunk, encode)


@pytest.mark.parametrize("name", HOSTILE)
def test_no_file_costs_more_than_its_bytes_and_pixels(kit: Kit, tmp_path: Path, name: str) -> None:
    make, outcome = HOSTILE[name]
    path = tmp_path / "hostile"
    path.write_bytes(make(kit))
    command = [sys.executable, "-c", MEASURE, str(path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    megabytes, seconds, told = result.stdout.strip().split(" ", 2)
    assert outcome in told
    assert float(megabytes) < 20 + 3 * path.stat().st_size / 2**20 + 8, "20 bytes a pixel, copies of the file, slack"
    assert float(seconds) < SECONDS
