"""AIM's second stage: the walk, step by step over the full graph."""

import pytest
import torch

from foveate.configs.errors import ConfigError
from foveate.engine.common import Grid
from foveate.engine.prune.methods.aim2 import AIM2
from foveate.engine.prune.schedule import Point, table_of


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("steps", "temperature", "damping"), [(5, 0.1, 0.0), (2, 1.0, 0.3), (1, 1.0, 0.0)])
def test_it_keeps_where_the_walk_ends(prompts, seed: int, steps: int, temperature: float, damping: float) -> None:
    case = prompts.draw(seed, left=0.7)
    a = prompts.decoder.attention(case.layers["before"], case.states["before"], case.positions, temperature)
    n_heads, n = a.shape[:2]
    walk = torch.full((n_heads, n), 1 / n)  # over all tokens, earlier tokens included
    for _ in range(steps):
        walk = torch.stack([(1 - damping) * walk[h] @ a[h] + damping / n for h in range(n_heads)])
    importance = (walk.square().sum(0) / n_heads).sqrt()[case.m + case.probe.visual]
    counts = prompts.counts(case, seed)
    fields = {"steps": steps, "temperature": temperature, "damping": damping}
    kept = prompts.leave("aim2", case, counts, **fields).keep.tolist()
    expected = prompts.best(case, importance.tolist(), counts)
    near = sorted(set(kept) ^ set(expected))  # a walk may visit two tokens equally often, up to rounding
    assert len(kept) == len(expected) and (not near or importance[near].std() < 1e-6 * importance.max())


@pytest.mark.parametrize("seed", range(20))
def test_one_plain_step_is_the_column_mean_of_attention(prompts, seed: int) -> None:
    case = prompts.draw(seed)
    columns = case.full("before").sum(1)[:, case.m + case.probe.visual]  # rows before a picture do not see it
    scores = columns.square().mean(0).sqrt()
    counts = prompts.counts(case, seed)
    kept = prompts.leave("aim2", case, counts, steps=1, temperature=1.0).keep.tolist()
    assert kept == prompts.best(case, scores.tolist(), counts)


def test_the_released_schedule_and_its_join() -> None:
    whole = AIM2(max_points=8).points(28)
    assert [p.layer for p in whole] == [*range(15, 23)]
    assert [p.share for p in whole] == pytest.approx([0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0.0])
    few = AIM2().points(28)
    assert [p.layer for p in few] == [16, 18, 20, 22] and few[-1] == Point(22, 0.0)
    assert sum(table_of(few, 28)) == pytest.approx(sum(table_of(whole, 28)))
    assert AIM2().points(4) == (Point(3, 0.0),) and AIM2().points(2) == (Point(1, 0.0),)


def test_steps_are_nested(prompts) -> None:
    case = prompts.make(6, 2, [Grid(5, 5)])
    sets = [set(prompts.leave("aim2", case, [count]).keep.tolist()) for count in range(1, 25)]
    assert all(a < b for a, b in zip(sets, sets[1:], strict=False))


def test_what_it_refuses() -> None:
    for fields in ({"start": 0.8, "end": 0.7}, {"max_points": 0}, {"temperature": 0.0}, {"steps": 0}, {"damping": 2.0}):
        with pytest.raises(ConfigError, match=f"{next(iter(fields))}: "):
            AIM2(**fields)
