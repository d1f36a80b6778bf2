"""FastV against the rows of attention built in full."""

import pytest

from foveate.configs.errors import ConfigError
from foveate.engine.common import Grid
from foveate.engine.prune.methods.fastv import FastV
from foveate.engine.prune.schedule import Point


@pytest.mark.parametrize("seed", range(20))
def test_it_keeps_what_the_last_token_attends_to_in_the_layer_before(prompts, seed: int) -> None:
    case = prompts.draw(seed, left=0.7)
    counts, row = prompts.counts(case, seed), case.seen("before")[:, -1]
    scores = [sum(row[h, v].item() for h in range(len(row))) / len(row) for v in range(row.shape[1])]
    assert prompts.leave("fastv", case, counts).keep.tolist() == prompts.best(case, scores, counts)


def test_where_and_how_many() -> None:
    assert FastV().points(32) == (Point(2, 0.5),) and FastV().points(2) == (Point(1, 0.5),)
    assert FastV(k=3, r=0.75).points(24) == (Point(3, 0.25),)
    assert FastV(r=0.0).points(4) == (), "what drops nothing is no point"
    assert FastV(r=1.0).points(4) == (Point(1, 0.0),) and FastV(k=2, r=1.0).points(4) == (Point(2, 0.0),)


def test_a_smaller_count_keeps_a_subset(prompts) -> None:
    case = prompts.make(6, 2, [Grid(5, 5)])
    sets = [set(prompts.leave("fastv", case, [count]).keep.tolist()) for count in range(1, 25)]
    assert all(a < b for a, b in zip(sets, sets[1:], strict=False))


def test_what_it_refuses() -> None:
    for fields, message in (({"k": -1}, "k: -1"), ({"r": 1.5}, "r: 1.5"), ({"r": -0.1}, "share that leaves")):
        with pytest.raises(ConfigError, match=message):
            FastV(**fields)
    with pytest.raises(ConfigError, match=r"layers: 30 is not in 1..23"):
        FastV(k=30).points(24)
