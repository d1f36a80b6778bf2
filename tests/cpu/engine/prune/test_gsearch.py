"""G-Search: no layer holds less than its share in the table."""

import pytest

from foveate.configs.errors import ConfigError
from foveate.engine.prune.methods.gsearch import GSearch
from foveate.engine.prune.schedule import Point, table_of


@pytest.mark.parametrize("seed", range(20))
def test_it_ranks_by_the_last_token_in_the_layer_before(prompts, seed: int) -> None:
    case = prompts.draw(seed, left=0.8)
    counts, row = prompts.counts(case, seed), case.seen("before")[:, -1].mean(0)
    assert prompts.leave("gsearch", case, counts).keep.tolist() == prompts.best(case, row.tolist(), counts)


def test_a_table_of_few_falls_is_exact() -> None:
    assert GSearch(keep="1,1,0.5,0.25").points(4) == (Point(2, 0.5), Point(3, 0.25))
    assert GSearch(keep="1,1,1,1").points(4) == ()
    assert GSearch(keep="1,0").points(2) == (Point(1, 0.0),)


def test_a_table_of_many_falls_is_never_undercut() -> None:
    table = [1.0, 0.98, 0.8, 0.79, 0.6, 0.55, 0.4, 0.1, 0.05, 0.01]
    gsearch = GSearch(keep=",".join(map(str, table)))
    points = gsearch.points(10)
    assert len(points) == 4
    assert all(held >= share for held, share in zip(table_of(points, 10), table, strict=True))
    assert len(GSearch(keep=gsearch.keep, max_points=9).points(10)) == 9
    assert len(GSearch(keep=gsearch.keep, max_points=1).points(10)) == 1


def test_without_a_table_shares_fall_in_a_straight_line() -> None:
    assert table_of(GSearch(max_points=100).points(10), 10) == pytest.approx([1 - i / 10 for i in range(10)])


@pytest.mark.parametrize("keep", ["0.5,0.2", "1,0.2,0.3", "1,-0.5", "1,nan", "1,2", "1,a"])
def test_a_table_that_is_none_is_refused(keep: str) -> None:
    with pytest.raises(ConfigError, match="keep: "):
        GSearch(keep=keep)


def test_a_table_is_of_one_depth() -> None:
    with pytest.raises(ConfigError, match="2 shares for a decoder of 24 layers"):
        GSearch(keep="1,0.5").points(24)
    with pytest.raises(ConfigError, match="max_points: 0"):
        GSearch(max_points=0)
