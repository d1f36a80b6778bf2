"""URLs that hold a picture, as clients write them: what is meant is clear, so the picture is read."""

import base64
import io
import textwrap
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Pillow

from foveate.engine.common import ImageError
from foveate.server.prepare import unpack as module
from foveate.server.prepare.unpack import is_inline, unpack

MOST = 2**20


def png() -> bytes:
    buffer = io.BytesIO()
    Pillow.effect_noise((17, 9), 90).save(buffer, "PNG")
    return buffer.getvalue()


PNG = png()
BASE64 = base64.b64encode(PNG).decode()
URL_SAFE = base64.urlsafe_b64encode(PNG).decode()
assert "+" in BASE64 and "/" in BASE64 and PNG[-1:] != b"=", "the alphabets differ on this picture"


@pytest.mark.parametrize(
    "head",
    ["data:image/png;base64", "data:;base64", "data:base64", "data:application/octet-stream;base64", "data:",
     "data:image/*;base64", "DATA:IMAGE/PNG;BASE64", "data:image/svg+xml;base64", "data:text/plain;charset=utf8;base64",
     "data:image/png; base64", "data:image/png;charset=utf-8;name=a b.png;base64", "data:image/png;base64;x=1",
     'data:image/png;name="a,b;c.png";base64', "data:image/png", " \ndata:image/png;base64"],
)  # fmt: skip
def test_the_head_of_a_data_url_decides_nothing(head: str) -> None:
    assert is_inline(f"{head},{BASE64}") and unpack(f"{head},{BASE64}", MOST) == PNG


@pytest.mark.parametrize(
    "text",
    [BASE64, BASE64.rstrip("="), BASE64.rstrip("=") + "====", URL_SAFE, URL_SAFE.rstrip("="), quote(BASE64, safe=""),
     BASE64.replace("=", "%3D"), BASE64.replace("+", "%2b"), "\r\n".join(textwrap.wrap(BASE64, 76)) + "\r\n",
     " ".join(BASE64), "\t" + BASE64 + "\n", quote("\n".join(textwrap.wrap(BASE64, 60)))],
)  # fmt: skip
def test_base64_as_it_comes(text: str) -> None:
    assert unpack(f"data:image/png;base64,{text}", MOST) == PNG
    assert is_inline(text) and unpack(text, MOST) == PNG, "alone too"


def test_data_without_base64_is_percent_encoded() -> None:
    assert unpack("data:image/png," + quote(PNG), MOST) == PNG


@pytest.mark.parametrize("piece", [4, 5, 6, 7, 64])
@pytest.mark.parametrize("text", [BASE64, quote(URL_SAFE, safe=""), " %20\n".join(textwrap.wrap(BASE64, 3))])
def test_pieces_of_any_length_make_the_same(monkeypatch: pytest.MonkeyPatch, piece: int, text: str) -> None:
    monkeypatch.setattr(module, "_PIECE_CHARS", piece)
    assert unpack(f"data:;base64,{text}", MOST) == PNG


@given(data=st.binary(max_size=60), cut=st.integers(0, 3), breaks=st.integers(1, 20), safe=st.booleans())
def test_any_bytes_come_back(data: bytes, cut: int, breaks: int, safe: bool) -> None:
    text = (base64.urlsafe_b64encode if safe else base64.b64encode)(data).decode()
    text = text[: len(text) - min(cut, text.count("="))]
    lines = "\n".join(text[i : i + breaks] for i in range(0, len(text), breaks))
    assert unpack(f"data:;base64,{lines}", MOST) == data


@pytest.mark.parametrize(
    ("url", "word"),
    [
        (f"data:image/png;base64,{BASE64[:40]}!{BASE64[40:]}", "base64 of the data URL is broken"),
        (f"data:image/png;base64,{BASE64[:40]}é", "base64 of the data URL is broken"),
        (f"data:image/png;base64,{BASE64[:41]}", "base64 of the data URL is broken"),
        (f"data:image/png;base64,{BASE64[:40]}=={BASE64[:40]}", "base64 of the data URL is broken"),
        (f"data:image/png;base64{BASE64}", "comma"),
        ("data:" + "x" * 100_000 + ",AAAA", "comma"),
        ('data:image/png;name="' + '"a' * 2000, "comma"),
        ("AAAA", "expected a data URL"),
        ("", "expected a data URL"),
    ],
)
def test_what_is_broken_is_refused(url: str, word: str) -> None:
    with pytest.raises(ImageError, match=word):
        unpack(url, MOST)


def test_other_schemes_are_not_inline() -> None:
    assert not any(map(is_inline, ("https://a.example/x.png", "HTTP://a.example", " https://a.example", "file:///x")))


def test_the_bytes_are_bounded_not_the_characters() -> None:
    assert len(unpack("data:;base64," + "AAA\n" * 1_000_000, 3 * 2**20)) == 2_250_000
    for head in ("data:;base64,", "data:,"):
        with pytest.raises(ImageError, match="larger than limits.image_mb 1"):
            unpack(head + "A" * 3_000_000, MOST)
