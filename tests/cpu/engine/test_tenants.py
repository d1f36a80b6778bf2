"""Tenants: hits tell each one what itself has sent, and nothing of the others."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from foveate.engine.common import Delta, Failed, Generate, Image, SamplingParams, Stage, VisualBudget
from foveate.engine.engine import Engine, Event

IMAGE_ID = 256
Run = Callable[[Engine], list[Event]]
Seen = dict[str, tuple[int, int]]  # encoder hits and cached tokens by request
BUDGETS = (
    VisualBudget(),
    VisualBudget(tokens=5, method="uniform"),
    VisualBudget(tokens=7, method="divprune"),
    VisualBudget(tokens=12, method="none", prune=Stage(method="fastv", params={"k": 1})),
)


@dataclass(frozen=True)
class Sent:
    """One request: whose, about which of two pictures, at which budget, and whether together with the one before."""

    salt: bytes
    picture: int
    budget: int
    explain: bool
    joins: bool


SENT = st.builds(
    Sent,
    salt=st.sampled_from([b"", b"a", b"b"]),
    picture=st.integers(0, 1),
    budget=st.integers(0, len(BUDGETS) - 1),
    explain=st.sampled_from([False, False, False, True]),
    joins=st.booleans(),
)


def ask(id: str, sent: Sent, image: Image) -> Generate:
    return Generate(
        id=id,
        prompt_ids=[1, 2, 3, IMAGE_ID, *range(10, 22)],
        images=[image],
        visual=BUDGETS[sent.budget],
        sampling=SamplingParams(temperature=0.0, max_tokens=2),
        salt=sent.salt,
        explain="kept_map" if sent.explain else "",
    )


def seen(engine: Engine, run: Run, sent: list[Sent], whose: set[bytes], images: list[Image]) -> Seen:
    """What the requests of some tenants are told, sent in order, groups together."""
    found: Seen = {}
    for number, one in enumerate(sent):
        if not one.joins:
            found |= told(run(engine))
        if one.salt in whose:
            engine.add(ask(str(number), one, images[one.picture]))
    return found | told(run(engine))


def told(events: list[Event]) -> Seen:
    assert not any(isinstance(event, Failed) for event in events), events
    ends = [event for event in events if isinstance(event, Delta) and event.usage is not None]
    return {end.id: (end.usage.encoder_hits, end.usage.cached_tokens) for end in ends if end.usage is not None}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sent=st.lists(SENT, min_size=2, max_size=8))
def test_a_tenant_sees_what_it_would_see_alone(
    sent: list[Sent], make_engine: Callable[..., Engine], run: Run, picture: Callable[..., Image]
) -> None:
    images = [picture(1), picture(2)]
    salts = {one.salt for one in sent}
    together = seen(make_engine(), run, sent, salts, images)
    alone: Seen = {}
    for salt in salts:
        alone |= seen(make_engine(), run, sent, {salt}, images)
    assert together == alone


@pytest.mark.parametrize("in_one_step", [True, False])
def test_a_picture_of_two_tenants_is_encoded_for_each(
    make_engine: Callable[..., Engine], run: Run, picture: Callable[..., Image], model: Any, in_one_step: bool
) -> None:
    engine = make_engine(cache={"prefix_sharing": False})
    events: list[Event] = []
    for i, salt in enumerate((b"a", b"b", b"a")):
        engine.add(ask(str(i), Sent(salt, 0, i, False, False), picture(1)))
        events += [] if in_one_step else run(engine)
    assert told(events + run(engine)) == {"0": (0, 0), "1": (0, 0), "2": (1, 0)}
    assert sum(model.encoded) == 2


def test_a_namespace_of_prefixes_alone_shares_features(
    make_engine: Callable[..., Engine], run: Run, picture: Callable[..., Image], model: Any
) -> None:
    """As `foveate tune` asks: every budget on prefixes of its own, each picture encoded once."""
    engine = make_engine()
    for i, own in enumerate((b"one", b"two")):
        engine.add(
            Generate(id=str(i), prompt_ids=[IMAGE_ID, *range(9)], images=[picture(1)], prefix_salt=own,
                     sampling=SamplingParams(temperature=0.0, max_tokens=2))
        )  # fmt: skip
        assert told(run(engine)) == {str(i): (i, 0)}
    assert sum(model.encoded) == 1
