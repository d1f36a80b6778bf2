"""How much of the context is left for the answer, for any number of pictures."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from foveate.engine.common import Accepted, Failed, Generate, Image, SamplingParams, VisualBudget
from foveate.engine.engine import Engine

IMAGE_ID, RESERVE = 256, 256
MakeEngine = Callable[..., Engine]
MakePicture = Callable[..., Image]
Ask = Callable[..., Accepted | Failed]


@pytest.fixture
def ask(make_engine: MakeEngine, model: Any, picture: MakePicture, monkeypatch: pytest.MonkeyPatch) -> Ask:
    """What the engine says to a prompt of `n_text` tokens and `n` pictures of 144 tokens, in a context of 2,048."""
    monkeypatch.setattr(model.geometry, "spec", replace(model.geometry.spec, max_context=2048))
    engine = make_engine(cache={"memory_mb": 17})
    pictures = [picture(i, 12, 12) for i in range(40)]

    def send(n: int, n_text: int = 26, sampling: dict[str, int] | None = None, **visual: Any) -> Accepted | Failed:
        engine.add(
            Generate(
                id="a", prompt_ids=[*[IMAGE_ID] * n, *[7] * n_text], images=pictures[:n],
                sampling=SamplingParams(**(sampling or {})), visual=VisualBudget(**visual),
            )
        )  # fmt: skip
        [event] = engine.take_events()
        engine.abort("a")
        engine.take_events()
        assert isinstance(event, Accepted | Failed)
        return event

    return send


def left(events: Sequence[Accepted | Failed]) -> list[int]:
    """Tokens for the answer."""
    return [2048 - event.prompt_tokens if isinstance(event, Accepted) else -1 for event in events]


@pytest.mark.parametrize("stated", [{}, {"max_tokens": 80}, {"max_tokens": 1}, {"max_tokens": 32768}])
@pytest.mark.parametrize("visual", [{}, {"ratio": 0.9}, {"tokens": 2000}, {"per_image": 140}, {"split": "uniform"}])
def test_auto_leaves_room_for_the_answer(ask: Ask, stated: dict[str, int], visual: dict[str, Any]) -> None:
    rooms = left([ask(n, sampling=stated, **visual) for n in range(1, 40)])
    wanted = min(RESERVE, stated.get("max_tokens", RESERVE))
    assert min(rooms) == max(wanted, 2048 - 26 - visual.get("tokens", 2048)), "no less, and no more once compressed"
    assert rooms == sorted(rooms, reverse=True), "more pictures never leave more room"
    assert rooms[0] >= 2048 - 26 - 144, "one picture is not touched"


@pytest.mark.parametrize("n_text", [26, 1000, 1700, 1790, 1800, 1900, 2000, 2030])
def test_a_long_text_leaves_the_pictures_a_share(ask: Ask, n_text: int) -> None:
    """A prompt that fits is never compressed to the floor for the sake of the answer."""
    event = ask(1, n_text=n_text)
    assert isinstance(event, Accepted)
    beside_text = 2048 - n_text
    assert event.visual.kept >= min(144, beside_text // 4)
    assert 2048 - event.prompt_tokens >= min(RESERVE, beside_text - beside_text // 4)


@pytest.mark.parametrize("visual", [{"fit": False}, {"method": "none"}])
def test_what_may_not_be_compressed_leaves_what_there_is(ask: Ask, visual: dict[str, Any]) -> None:
    kept, refused = ask(14, **visual), ask(15, **visual)
    assert isinstance(kept, Accepted) and 2048 - kept.prompt_tokens == 6
    assert isinstance(refused, Failed) and refused.code == "context_length_exceeded"


def test_the_floor_comes_before_the_answer(ask: Ask) -> None:
    event = ask(14, floor=2000)
    assert isinstance(event, Accepted) and event.visual.kept == 2000


def test_min_tokens_is_a_promise(ask: Ask) -> None:
    """Room is made for it, and a request whose prompt leaves too little is refused by its name."""
    assert left([ask(14, sampling={"min_tokens": n}) for n in (700, 1900)]) == [700, 1900]
    for event in (ask(14, sampling={"min_tokens": 700}, fit=False), ask(0, sampling={"min_tokens": 2040})):
        assert isinstance(event, Failed) and event.param == "min_tokens" and event.message.count("min_tokens: ") == 1
    assert left([ask(0, sampling={"min_tokens": 2022})]) == [2022]
