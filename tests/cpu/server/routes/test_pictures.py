"""Pictures as clients send them, through the route."""

import base64
import io
from typing import Any

import pytest
from PIL import Image


def encoded(kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    Image.effect_noise((40, 30), 90).convert("RGB").save(buffer, kind, **options)
    return base64.b64encode(buffer.getvalue()).decode()


PNG = encoded("PNG")
HEIC = base64.b64encode(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(50)).decode()


@pytest.mark.parametrize(
    "url",
    [f"data:image/gif;base64,{encoded('GIF')}", f"data:;base64,{encoded('WEBP')}".rstrip("="), encoded("JPEG"),
     f"data:application/octet-stream;base64,{PNG[:70]}\r\n{PNG[70:]}"],
)  # fmt: skip
def test_a_sound_picture_is_answered(api: Any, image_part: Any, url: str) -> None:
    message = {"role": "user", "content": [image_part(url), {"type": "text", "text": "What is it?"}]}
    reply = api.chat(messages=[message])
    assert reply.status_code == 200, reply.text
    (request,) = api.client.requests
    assert len(request.images) == 1


@pytest.mark.parametrize(
    ("url", "word"),
    [(f"data:image/tiff;base64,{encoded('TIFF')}", "TIFF pictures are switched off"),
     (f"data:image/heic;base64,{HEIC}", "HEIC is not supported"),
     (f"data:image/jpeg;base64,{encoded('JPEG')[:400]}", "broken or cut off"), ("picture.jpg", "expected a data URL")],
)  # fmt: skip
def test_a_refused_picture_is_named_by_its_path(api: Any, image_part: Any, to_url: Any, url: str, word: str) -> None:
    good = to_url(Image.new("RGB", (40, 30)))
    message = {"role": "user", "content": [image_part(good), image_part(url), {"type": "text", "text": "What is it?"}]}
    reply = api.chat(messages=[message])
    error = reply.json()["error"]
    assert (reply.status_code, error["code"]) == (400, "invalid_image") and word in error["message"]
    assert error["param"] == "messages[0].content[1].image_url.url" and error["message"].startswith(error["param"])
    assert not api.client.requests
