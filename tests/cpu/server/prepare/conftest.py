"""Pictures chunk by chunk."""

import io
import struct
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from PIL import Image as Pillow

Chunk = tuple[bytes, bytes]


def chunk(name: bytes, body: bytes, checksum: int | None = None) -> bytes:
    checksum = zlib.crc32(name + body) if checksum is None else checksum
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", checksum)


@pytest.fixture(scope="session")
def png_chunk() -> Callable[..., bytes]:
    return chunk


@pytest.fixture(scope="session")
def make_png() -> Callable[..., bytes]:
    """A PNG of plain rows, with more chunks before its pixels."""

    def make(width: int, height: int, bits: int, kind: int, rows: bytes, more: Sequence[bytes] = ()) -> bytes:
        header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
        n = len(rows) // height
        lines = b"".join(b"\0" + rows[i * n : (i + 1) * n] for i in range(height))
        parts = [chunk(b"IHDR", header), *more, chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b"")]
        return b"\x89PNG\r\n\x1a\n" + b"".join(parts)

    return make


@pytest.fixture(scope="session")
def encode() -> Callable[..., bytes]:
    """A picture as a file."""

    def save(picture: Pillow.Image, kind: str, **options: Any) -> bytes:
        buffer = io.BytesIO()
        picture.save(buffer, kind, **options)
        return buffer.getvalue()

    return save


@pytest.fixture(scope="session")
def photo() -> Callable[[int, int], Pillow.Image]:
    """A picture with shapes of all sizes, as photographs have."""

    def make(width: int, height: int) -> Pillow.Image:
        planes = []
        for plane in range(3):
            whole = Pillow.new("L", (width, height))
            for octave in range(1, 8):
                coarse = Pillow.effect_noise((max(2, width >> (9 - octave)), max(2, height >> (9 - octave))), 60)
                turned = coarse.transpose(Pillow.Transpose(plane))
                whole = Pillow.blend(whole, turned.resize((width, height), Pillow.Resampling.BICUBIC), 1 / octave)
            planes.append(whole)
        return Pillow.merge("RGB", planes)

    return make
