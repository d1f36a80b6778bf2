"""The bundled models still answer: a small sample of what bench.quality measures in full."""

import base64
import io

from openai import OpenAI
from openai.types.chat import ChatCompletionContentPartParam

from foveate.bundled.scenes import HELD_OUT_SEED, make_scene, questions, render

N_SCENES = 12


def right_share(client: OpenAI, model: str, ratio: float, text_first: bool = False) -> float:
    """Exact match over a few scenes that neither training nor the published tables used."""
    hits: list[bool] = []
    for number in range(N_SCENES):
        scene = make_scene(HELD_OUT_SEED + 7_000_000 + number)
        buffer = io.BytesIO()
        render(scene).save(buffer, "PNG")
        picture = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        for question in questions(scene, seed=number):
            content: list[ChatCompletionContentPartParam] = [
                {"type": "image_url", "image_url": {"url": picture}},
                {"type": "text", "text": question.text},
            ]
            answer = client.chat.completions.create(
                model=model,
                temperature=0,
                messages=[{"role": "user", "content": content[::-1] if text_first else content}],
                extra_headers={"VLM-Visual-Ratio": str(ratio)},
            )
            hits.append(answer.choices[0].message.content == question.answer)
    return sum(hits) / len(hits)


def test_held_out_scenes(client: OpenAI, model: str) -> None:
    full, half = right_share(client, model, 1.0), right_share(client, model, 0.5)
    assert full > 0.85, "the published tables say 96 %"
    assert half > 0.6, "and degrade gracefully"


def test_text_before_the_picture_is_answered_as_well(client: OpenAI, model: str) -> None:
    """OpenAI's documentation puts the text first; so do many clients."""
    assert right_share(client, model, 1.0, text_first=True) > 0.85, "the published tables say 96 %"
    assert right_share(client, model, 0.5, text_first=True) > 0.6, "and degrade gracefully"
