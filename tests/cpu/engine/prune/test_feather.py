"""FEATHER: scores without rotation, and a grid at the first point."""

from dataclasses import replace

import pytest
import torch

from foveate.configs.errors import ConfigError
from foveate.engine.common import Grid
from foveate.engine.prune.methods.feather import Feather
from foveate.engine.prune.schedule import Point, kept


def scores_of(prompts, case) -> list[float]:
    """The last token's softmax over visual tokens, from queries and keys before RoPE."""
    q, k, _ = prompts.decoder.project(case.layers["before"], case.states["before"], case.positions, rotated=False)
    visual = k[case.m + case.probe.visual]
    heads = [(visual[:, h // 2] @ q[-1, h] * 8**-0.5).softmax(0) for h in range(4)]
    return torch.stack(heads).mean(0).tolist()


@pytest.mark.parametrize("seed", range(20))
def test_at_a_later_point_all_compete(prompts, seed: int) -> None:
    case = prompts.draw(seed, layer=2 + seed % 2, left=0.7)
    if case.present == list(case.probe.entered):
        case.probe = replace(case.probe, entered=[n + 1 for n in case.present])
    counts = prompts.counts(case, seed)
    assert prompts.leave("feather", case, counts).keep.tolist() == prompts.best(case, scores_of(prompts, case), counts)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("stride", [2, 3])
def test_at_the_first_point_the_grid_stays_and_the_best_fill_up(prompts, seed: int, stride: int) -> None:
    grids = [Grid(5 + seed % 3, 6), Grid(4, 7)]
    case = prompts.draw(seed, grids=grids, layer=1)
    scores, expected = scores_of(prompts, case), []
    counts = [grid.n_tokens * 2 // 3 for grid in grids]
    for picture, (grid, count) in enumerate(zip(grids, counts, strict=True)):
        mine = case.mine(picture)
        lattice = [mine[y * grid.cols + x] for y in range(0, grid.rows, stride) for x in range(0, grid.cols, stride)]
        assert len(lattice) <= count // 2
        rest = sorted((v for v in mine if v not in lattice), key=lambda v: (-scores[v], v))
        expected += sorted([*lattice, *rest[: count - len(lattice)]])
    assert prompts.leave("feather", case, counts, stride=stride).keep.tolist() == expected


def test_a_tight_count_makes_the_grid_coarser_and_stride_0_none(prompts) -> None:
    case = prompts.make(2, 1, [Grid(9, 9)])
    plain = prompts.best(case, scores_of(prompts, case), [6])
    for count, stride in ((18, 3), (17, 5), (8, 5), (7, 9), (2, 9)):
        lattice = {9 * y + x for y in range(0, 9, stride) for x in range(0, 9, stride)}
        keep = set(prompts.leave("feather", case, [count]).keep.tolist())
        assert lattice <= keep and len(keep) == count
    assert prompts.leave("feather", case, [6], stride=0).keep.tolist() == plain


def test_a_tiled_picture_has_a_grid_of_its_own_and_one_of_its_thumbnail(prompts) -> None:
    grid = Grid(4, 6, thumbnail=4, newlines="rows", row_cuts=(0, 4), col_cuts=(0, 6))
    case = prompts.make(2, 1, [grid])
    keep = set(prompts.leave("feather", case, [30]).keep.tolist())
    thumbnail = {0, 3, 12, 15}
    whole = {16 + y * 7 + x for y in (0, 3) for x in (0, 3)}  # six cells and a newline in a row
    assert thumbnail | whole <= keep


@pytest.mark.parametrize("seed", range(5))
def test_the_base_of_rope_changes_nothing(prompts, seed: int) -> None:
    """The same states rotated by other angles: other attention, the same kept tokens."""
    case = prompts.draw(seed, layer=2)
    view, counts = case.probe.views("before"), prompts.counts(case, seed)
    q, k, _ = prompts.decoder.project(case.layers["before"], case.states["before"], case.positions * 3.7)
    angles = prompts.decoder.angles(case.positions * 3.7)[case.m :]
    turned = replace(view, q=q[case.m :], k=k, cos=angles.cos(), sin=angles.sin(), lse=None)
    other = replace(case.probe, views=lambda which: turned)
    assert not torch.allclose(other.attention(other.last), case.probe.attention(other.last))
    assert Feather().select(other, counts).keep.tolist() == Feather().select(case.probe, counts).keep.tolist()


def test_the_default_shares_are_the_papers_union() -> None:
    assert Feather().points(32) == (Point(8, 0.378), Point(16, 0.034))
    assert abs(kept(576, 0.378) - (0.3 * 576 + 0.7 * 576 / 9)) < 1 and kept(576, 0.034) == int(217 * 0.09)
    with pytest.raises(ConfigError, match="stride: -1"):
        Feather(stride=-1)
