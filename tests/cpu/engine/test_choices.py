"""Choices of one request end one by one."""

from collections.abc import Callable

import msgspec

from foveate.engine.common import Delta, Generate, SamplingParams
from foveate.engine.engine import Engine, Event

MakeEngine = Callable[..., Engine]
Run = Callable[[Engine], list[Event]]
SEEDED = SamplingParams(seed=5, max_tokens=12, ignore_eos=True)


def ends(events: list[Event]) -> dict[int, str]:
    return {e.choice: e.finish for e in events if isinstance(e, Delta) and e.finish}


def tokens(events: list[Event], choice: int) -> list[int]:
    return [token for e in events if isinstance(e, Delta) and e.choice == choice for token in e.token_ids]


def test_one_choice_ends_early_and_the_others_go_on(make_engine: MakeEngine, run: Run) -> None:
    engine = make_engine()
    whole = Generate(id="a", prompt_ids=list(range(9)), sampling=SEEDED, n=3)
    engine.add(whole)
    expected = run(engine)
    engine.add(msgspec.structs.replace(whole, id="b"))
    events = [event for _ in range(5) for event in engine.step()]
    engine.abort("b", 1)
    events += run(engine)
    assert ends(events) == {0: "length", 1: "abort", 2: "length"}
    assert all(tokens(events, choice) == tokens(expected, choice) for choice in (0, 2))
    cut = tokens(events, 1)
    assert 0 < len(cut) < 12 and cut == tokens(expected, 1)[: len(cut)]


def test_the_first_choice_may_end_before_it_answers(make_engine: MakeEngine, run: Run) -> None:
    engine = make_engine(chunk_tokens=4)
    engine.add(Generate(id="a", prompt_ids=list(range(20)), sampling=SEEDED, n=3))
    events = engine.step()
    engine.abort("a", 0)
    events += run(engine)
    assert ends(events) == {0: "abort", 1: "length", 2: "length"}
