"""PyramidDrop against the rows of attention built in full."""

import pytest

from foveate.configs.errors import ConfigError
from foveate.engine.prune.methods.pyramiddrop import PyramidDrop
from foveate.engine.prune.schedule import Point, kept


@pytest.mark.parametrize("seed", range(20))
def test_it_keeps_what_the_last_token_attends_to_in_the_layer_to_come(prompts, seed: int) -> None:
    case = prompts.draw(seed, left=0.7)
    counts, row = prompts.counts(case, seed), case.seen("this")[:, -1]
    assert prompts.leave("pyramiddrop", case, counts).keep.tolist() == prompts.best(case, row.mean(0).tolist(), counts)


def test_shares_are_of_what_entered_and_layers_of_the_depth() -> None:
    assert PyramidDrop().points(32) == (Point(8, 0.5), Point(16, 0.25), Point(24, 0.125))
    assert PyramidDrop().points(4) == (Point(1, 0.5), Point(2, 0.25), Point(3, 0.125))
    assert PyramidDrop().points(2) == (Point(1, 0.125),)
    assert [kept(576, point.share) for point in PyramidDrop().points(32)] == [288, 144, 72]
    own = PyramidDrop(layers="2,5", shares="0.9,0.1")
    assert own.points(6) == (Point(2, 0.9), Point(5, 0.1))
    with pytest.raises(ConfigError, match=r"5 is not in 1..4"):
        own.points(5)
    with pytest.raises(ConfigError, match="3 of them for 2 layers"):
        PyramidDrop(layers="2,5")
