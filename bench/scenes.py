"""Held-out pictures and questions as the benches send them."""

import base64
import io
from dataclasses import dataclass

from foveate.bundled.scenes import HELD_OUT_SEED, Question, Scene, make_scene, questions, render

MODELS = ("tiny-llava", "tiny-qwen2-vl")  # the bundled models


@dataclass(frozen=True)
class Item:
    """One question about one picture."""

    scene: Scene
    image_url: str  # data URL
    question: Question
    text_first: bool = False  # whether the question stands before the picture, as in OpenAI's documentation


def data_url(scene: Scene) -> str:
    """The rendered scene as a PNG data URL."""
    buffer = io.BytesIO()
    render(scene).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def held_out(n_scenes: int, first: int = 0, kinds: tuple[str, ...] = ()) -> list[Item]:
    """One question of each kind about each of `n_scenes` scenes that training never saw, by scene."""
    items = []
    for seed in range(HELD_OUT_SEED + first, HELD_OUT_SEED + first + n_scenes):
        scene = make_scene(seed)
        url = data_url(scene)
        items += [Item(scene, url, q) for q in questions(scene, seed=0) if not kinds or q.kind in kinds]
    return items


def body(model: str, item: Item, max_tokens: int, method: str, ratio: float) -> dict[str, object]:
    """The greedy chat request that asks `item` within a visual budget."""
    content = [
        {"type": "image_url", "image_url": {"url": item.image_url}},
        {"type": "text", "text": item.question.text},
    ]
    content = content[::-1] if item.text_first else content
    stated = f"oracle;scene={item.scene.seed}" if method == "oracle" else method
    stated = stated.replace("{enter}", f"{min(1.0, 1.5 * ratio):g}")
    visual = {"method": stated, "ratio": ratio}
    return {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": max_tokens,
        "vlm": {"visual": visual, "strict": True},  # a key the server does not know would be a wrong table
    }
