"""The contract of the pruners: every file of engine/prune/methods is found and tested."""

import dataclasses
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch

import foveate.engine.prune.methods as family
import foveate.engine.reduce.methods as reducers
from foveate.engine.common import Grid, load_method, names
from foveate.engine.prune.base import Kept, Pruner
from foveate.engine.prune.probe import Probe, View
from foveate.engine.prune.schedule import mean_share, scaled

every_method = pytest.mark.parametrize("name", names(family))
SIZES = [[Grid(1, 1), Grid(3, 4)], [Grid(5, 5)], [Grid(2, 3), Grid(1, 1), Grid(4, 4)], [Grid(1, 9)], [Grid(7, 1)]]
TILED = [Grid(4, 6, thumbnail=3, newlines="rows", row_cuts=(0, 2, 4), col_cuts=(0, 3, 6)), Grid(2, 2, newlines="last")]

ODD: list[dict[str, Any]] = [{"left": 0.5, "reduced": True}, {"fill": 1.0}, {"question": 0}]


def check(leaves: Kept, probe: Probe, counts: Sequence[int]) -> None:
    keep, n = leaves.keep, len(probe.visual)
    assert keep.dtype == torch.int64 and keep.shape == (sum(counts),)
    assert (keep.diff() > 0).all() and (keep >= 0).all() and (keep < n).all()
    assert torch.bincount(probe.picture[keep], minlength=len(counts)).tolist() == list(counts)
    if leaves.mix is not None:
        assert leaves.mix.shape == (len(keep), n) and leaves.mix.dtype == torch.float32
        assert torch.isfinite(leaves.mix).all() and torch.isfinite(leaves.mix @ probe.rows[probe.visual]).all()
        torch.testing.assert_close(leaves.mix.sum(1), torch.ones(len(keep)))
        apart = probe.picture[keep][:, None] != probe.picture[None]
        assert not leaves.mix[apart].any(), "pictures do not mix"
        for picture, count in enumerate(counts):
            if count == int((probe.picture == picture).sum()):
                whole = leaves.mix[probe.picture[keep] == picture][:, probe.picture == picture]
                assert torch.equal(whole, torch.eye(count)), "what keeps all stays bit for bit"


def same(one: Kept, other: Kept) -> bool:
    mixes = one.mix is None and other.mix is None
    return torch.equal(one.keep, other.keep) and (mixes or torch.equal(one.mix, other.mix))


def without_question(probe: Probe) -> Probe:
    """The probe cut after the last visual token."""
    stop = int(probe.visual[-1]) + 1

    def views(which: str) -> View:
        view = probe.views(which)
        lse = None if view.lse is None else view.lse[:stop]
        return View(view.q[:stop], view.k[: view.m + stop], view.cos[:stop], view.sin[:stop], view.scale, lse)

    return dataclasses.replace(probe, rows=probe.rows[:stop], views=views, inputs=lambda: probe.inputs()[:stop])


@every_method
def test_it_declares_itself(name: str) -> None:
    method = load_method(family, name)
    assert issubclass(method, Pruner) and method.__dataclass_params__.frozen and method.source.startswith("arXiv:")
    assert name not in names(reducers), "a request names methods of both families in one line"
    for field in dataclasses.fields(method):
        assert isinstance(field.default, bool | int | float | str)


@every_method
def test_points_are_legal_at_every_depth(name: str) -> None:
    for n_layers in range(2, 41):
        points = load_method(family, name)().points(n_layers)
        assert 1 <= len(points) <= 4
        assert all(1 <= point.layer < n_layers for point in points)
        assert all(a.layer < b.layer for a, b in pairwise(points))
        shares = [1.0, *(point.share for point in points)]
        assert all(0 <= b < a for a, b in pairwise(shares)), "at each point something leaves"
        least = points[0].layer / n_layers
        for mean in (least + 0.01, (1 + least) / 2):
            held = mean_share(scaled(points, n_layers, mean), n_layers)
            if shares[-1] > 0:
                assert held == pytest.approx(mean, abs=1e-6)
            assert held <= mean + 1e-6, "what has none from some layer on cannot hold more"


@every_method
@pytest.mark.parametrize("grids", [*SIZES, TILED], ids=len)
def test_exactly_the_counts_of_each_picture(prompts, name: str, grids: list[Grid]) -> None:
    for layer, more in [(1, {}), (3, {"left": 0.5}), *((2, odd) for odd in ODD)]:
        case = prompts.make(7 + layer, layer, grids, **more)
        present = case.present
        wanted = [
            prompts.counts(case, 0),
            [0] * len(grids),
            [0, *present[1:]],
            [min(1, n) for n in present],
            [*present[:-1], present[-1] // 2],
        ]
        for counts in wanted:
            leaves = prompts.leave(name, case, counts)
            check(leaves, case.probe, counts)
        assert same(leaves, prompts.leave(name, case, counts)), "the same decision twice"


@every_method
@pytest.mark.parametrize("lse", [None, 1e4], ids=["equal", "none"])
def test_equal_and_no_attention(prompts, name: str, lse: float | None) -> None:
    """Ties go to the lower index, unless the states, the keys, the place or a draw decide."""
    case = prompts.make(2, 2, [Grid(3, 5), Grid(2, 2)])
    probe, counts = prompts.flat(case, lse), [6, 1]
    leaves = load_method(family, name)().select(probe, counts)
    check(leaves, probe, counts)
    if name not in ("horizon", "feather", "visiondrop2", "sparsevlm", "aim2"):
        assert leaves.keep.tolist() == [*range(6), 15]


@every_method
def test_all_there_is_may_leave_and_one_token_is_enough(prompts, name: str) -> None:
    case = prompts.make(5, 1, [Grid(1, 1)])
    check(prompts.leave(name, case, [0]), case.probe, [0])


@every_method
def test_only_what_reads_the_question_depends_on_it(prompts, name: str) -> None:
    method, changed = load_method(family, name), False
    for seed in range(6):
        one, other = (prompts.draw(seed, layer=2, question=6, other_question=text) for text in (False, True))
        counts = prompts.counts(one, seed)
        first, second = (method().select(case.probe, counts) for case in (one, other))
        changed |= not torch.equal(first.keep, second.keep)
        if not method.question_aware:
            blind = method().select(without_question(one.probe), counts)
            assert torch.equal(blind.keep, first.keep), "the engine does not wait for the question"
            if first.mix is not None:
                torch.testing.assert_close([blind.mix, second.mix], [first.mix] * 2)
    assert changed == method.question_aware


@every_method
def test_only_what_says_so_reads_the_inputs(prompts, name: str) -> None:
    method, asked = load_method(family, name), []
    case = prompts.draw(3, layer=2)
    inputs = case.probe.inputs

    def ask() -> torch.Tensor:
        asked.append(1)
        return inputs()

    method().select(dataclasses.replace(case.probe, inputs=ask), prompts.counts(case, 0))
    assert bool(asked) == method.reads_inputs


@every_method
def test_half_precision_is_no_obstacle(prompts, name: str) -> None:
    case = prompts.make(9, 2, [Grid(4, 4), Grid(3, 3)])

    def views(which: str) -> Any:
        view = case.probe.views(which)
        return dataclasses.replace(view, q=view.q.bfloat16(), k=view.k.bfloat16())

    probe = dataclasses.replace(
        case.probe, rows=case.probe.rows.bfloat16(), views=views, inputs=lambda: case.probe.inputs().bfloat16()
    )
    leaves = load_method(family, name)().select(probe, [5, 4])
    assert torch.bincount(probe.picture[leaves.keep], minlength=2).tolist() == [5, 4]
    assert leaves.mix is None or leaves.mix.dtype == torch.float32


@every_method
def test_nothing_is_decided_by_what_left_before(prompts, name: str) -> None:
    """Dropped tokens change nothing: a prompt without them is the same prompt, except for rules of the first point."""
    method = load_method(family, name)
    case = prompts.make(12, 2, [Grid(4, 5), Grid(3, 3)], left=0.6)
    probe = case.probe
    smaller = dataclasses.replace(probe, entered=[n + 1 for n in case.present])
    assert same(method().select(probe, [4, 2]), method().select(smaller, [4, 2]))
