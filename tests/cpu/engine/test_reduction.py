"""Reduction through the engine: whose results are shared, what is explained, how a budget is split."""

from collections.abc import Callable
from typing import Any

import pytest

from foveate.engine.common import Accepted, Delta, Failed, Generate, Image, SamplingParams, Stage, VisualBudget
from foveate.engine.engine import Engine, Event

IMAGE_ID = 256
Make, Run, Picture = Callable[..., Engine], Callable[[Engine], list[Event]], Callable[..., Image]


def request(name: str, images: list[Image], visual: VisualBudget, **more: Any) -> Generate:
    ids = [token for i in range(len(images)) for token in (i + 1, IMAGE_ID)] + [7, 8]
    sampling = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    return Generate(id=name, prompt_ids=ids, images=images, visual=visual, sampling=sampling, **more)


def last(events: list[Event]) -> Delta:
    failed = [event for event in events if isinstance(event, Failed)]
    assert not failed, failed
    return next(event for event in events if isinstance(event, Delta) and event.finish)


def answer(engine: Engine, run: Run, message: Generate) -> Delta:
    engine.add(message)
    return last(run(engine))


def cached(delta: Delta) -> int:
    assert delta.usage is not None
    return delta.usage.cached_tokens


def test_a_question_aware_result_is_shared_only_with_the_same_question(
    make_engine: Make, run: Run, picture: Picture
) -> None:
    engine, visual = make_engine(), VisualBudget(tokens=8, method="cdpruner")

    def ask(name: str, ids: list[int]) -> Delta:
        return answer(engine, run, request(name, [picture(1)], visual, question_ids=ids))

    assert cached(ask("a", [10, 11])) == 0
    assert cached(ask("b", [10, 11])) == 8, "the same question about the same picture"
    assert cached(ask("c", [10, 12])) == 0
    assert cached(ask("d", [])) == 0
    blind = VisualBudget(tokens=8, method="divprune")
    for name, ids, found in (("e", [10], 0), ("f", [11], 8)):
        assert cached(answer(engine, run, request(name, [picture(1)], blind, question_ids=ids))) == found


def test_an_explained_request_says_what_survived_and_is_always_reduced(
    make_engine: Make, run: Run, picture: Picture
) -> None:
    engine, visual = make_engine(), VisualBudget(tokens=9, method="uniform")
    images = [picture(1, 4, 4), picture(2, 2, 4)]
    plain = answer(engine, run, request("a", images, visual))
    assert plain.usage is not None and plain.usage.kept == []
    for name in ("b", "c"):
        told = answer(engine, run, request(name, images, visual, explain="kept_map"))
        assert told.usage is not None and told.usage.cached_tokens == 0
        assert [len(kept) for kept in told.usage.kept] == [6, 3]
        assert all(kept == sorted(set(kept)) and kept[-1] < 16 for kept in told.usage.kept)
    whole = answer(engine, run, request("d", images, VisualBudget(), explain="kept_map"))
    assert whole.usage is not None and whole.usage.kept == [list(range(16)), list(range(8))]


@pytest.mark.parametrize("names", ["divprune+cdpruner", "pool+visionzip", "hiprune+random"])
def test_compositions_run(make_engine: Make, run: Run, picture: Picture, names: str) -> None:
    engine = make_engine()
    stages = [Stage(method=name) for name in names.split("+")]
    visual = VisualBudget(tokens=6, method=names, stages=stages)
    events = []
    for name in ("a", "b"):
        engine.add(request(name, [picture(3, 4, 6)], visual))
        events.append(run(engine))
    accepted = events[0][0]
    assert isinstance(accepted, Accepted) and accepted.visual.kept == 6 and accepted.visual.method == names
    assert cached(last(events[1])) == 8, "whole blocks of four of 1 + 6 + 2 tokens"


def test_one_budget_is_shared_as_the_request_says(make_engine: Make, run: Run, picture: Picture) -> None:
    engine, images = make_engine(), [picture(1, 4, 4), picture(2, 8, 4)]
    for split, expected in (("area", [4, 8]), ("uniform", [6, 6])):
        engine.add(request(split, images, VisualBudget(tokens=12, method="uniform", split=split)))
        accepted = run(engine)[0]
        assert isinstance(accepted, Accepted)
        assert [image.kept for image in accepted.visual.per_image] == expected
    engine.add(request("x", images, VisualBudget(tokens=12, split="nosuch")))
    (failed,) = run(engine)
    assert isinstance(failed, Failed) and failed.param == "vlm.visual.split" and "there are area" in failed.message


def test_a_layer_that_is_not_there_is_refused_before_anything_is_encoded(
    make_engine: Make, run: Run, picture: Picture, model: Any
) -> None:
    engine = make_engine()
    visual = VisualBudget(tokens=4, method="hiprune", params={"object_layer": 1.5})
    engine.add(request("a", [picture(1)], visual))
    (failed,) = run(engine)
    assert isinstance(failed, Failed) and failed.code == "invalid_vlm_parameter" and "object_layer" in failed.message
    assert model.encoded == []
