"""The forms of the weights as a user sets them: named in /metrics, and pictures answered as without."""

import re
from collections.abc import Callable

import httpx
import pytest

from foveate.bundled.scenes import HELD_OUT_SEED, make_scene, questions
from foveate.kernels.cpu.levels import level
from foveate.server.launch import launched

NATIVE = "bf16" if level() in ("avx512_bf16", "amx") else "int16"  # what bfloat16 means here
pytestmark = pytest.mark.skipif(level() == "reference", reason="the CPU kernels were not built")


@pytest.mark.parametrize(
    ("settings", "held"),
    [
        (("model.weights=int16",), "int16"),
        (("model.dtype=bfloat16",), NATIVE),
        (("model.dtype=bfloat16", "model.weights=int8"), "int8"),
    ],
)
def test_pictures_are_read_with_any_weights(
    settings: tuple[str, ...], held: str, picture: Callable[[int], str]
) -> None:
    with launched("tiny-llava", *(word for setting in settings for word in ("--set", setting))) as server:
        labels = re.search(r"foveate_model_info\{(.*)\} 1", httpx.get(f"{server.url}/metrics").text)
        assert labels is not None and f'weights="{held}"' in labels[1]
        right = [
            _answer(server.url, question.text, picture(number)) == question.answer
            for number in range(6)
            for question in questions(make_scene(HELD_OUT_SEED + 5_000_000 + number), seed=0)
            if question.kind != "describe"
        ]
    assert len(right) > 24 and sum(right) >= 0.9 * len(right)


def _answer(server: str, question: str, url: str) -> str:
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    request = {"model": "tiny-llava", "messages": [{"role": "user", "content": parts}], "temperature": 0}
    reply = httpx.post(f"{server}/v1/chat/completions", json=request | {"max_tokens": 12}, timeout=60.0)
    assert reply.status_code == 200, reply.text
    text: str = reply.json()["choices"][0]["message"]["content"]
    return text
