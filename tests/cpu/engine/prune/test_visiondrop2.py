"""VisionDrop in the decoder: dominant tokens, targets and members, written out plainly."""

import pytest
import torch

from foveate.configs.errors import ConfigError
from foveate.engine.common import Grid
from foveate.engine.prune.methods.visiondrop2 import VisionDrop2
from foveate.engine.prune.schedule import Point, kept


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("ratio", [1 / 7, 0.5, 0.0])
@pytest.mark.parametrize("compat", [False, True])
def test_it_is_the_paper_step_by_step(prompts, seed: int, ratio: float, compat: bool) -> None:
    case = prompts.draw(seed, left=0.9)
    probe, seen = case.probe, case.seen("this").mean(0)
    k = prompts.decoder.project(case.layers["this"], case.states["this"], case.positions)[1]
    keys, states = k[case.m + probe.visual].mean(1), probe.rows[probe.visual]
    counts, expected, rows = prompts.counts(case, seed), [], []
    for picture, count in enumerate(counts):
        mine = case.mine(picture)
        if not count:
            continue
        scores = {v: sum(seen[int(probe.visual[u]), v].item() for u in mine) for v in mine}
        c = min(round(count * ratio), count - 1) if count < len(mine) else 0
        dominant = sorted(mine, key=lambda v: (-scores[v], v))[: count - c]
        left = [v for v in mine if v not in dominant]
        targets = left[:: max(1, len(left) // c)][:c] if c else []
        members: dict[int, list[int]] = {t: [] for t in targets}
        for v in left if targets else []:
            if v not in targets:
                alike = {t: torch.cosine_similarity(keys[v], keys[t], 0).item() for t in targets}
                members[max(targets, key=lambda t: alike[t])].append(v)
        for v in sorted([*dominant, *targets]):
            joined = states[members.get(v, [])]
            row = states[v]
            if len(joined):
                row = row + joined.mean(0) if compat else torch.cat([row[None], joined]).mean(0)
            expected.append(v)
            rows.append(row)
    leaves = prompts.leave("visiondrop2", case, counts, contextual_ratio=ratio, compat=compat)
    assert leaves.keep.tolist() == expected
    if rows:
        torch.testing.assert_close(leaves.mix @ states, torch.stack(rows))


@pytest.mark.parametrize("seed", range(10))
def test_a_picture_does_not_care_what_follows_it(prompts, seed: int) -> None:
    """Neither the question nor, by our choice, a later picture changes the kept tokens."""
    alone = prompts.make(seed, 1, [Grid(4, 5)], question=2)
    both = prompts.make(seed, 1, [Grid(4, 5), Grid(3, 3)], question=2)
    assert alone.m == both.m and not torch.equal(alone.probe.rows[-1], both.probe.rows[-1])
    first, second = prompts.leave("visiondrop2", alone, [8]), prompts.leave("visiondrop2", both, [8, 3])
    assert first.keep.tolist() == second.keep[:8].tolist()
    torch.testing.assert_close(first.mix, second.mix[:8, :20])


def test_the_released_counts() -> None:
    points = VisionDrop2().points(32)
    assert [point.layer for point in points] == [8, 16, 24]
    assert [kept(48, point.share) for point in points] == [35, 26, 19]
    assert [round(n * VisionDrop2().contextual_ratio) for n in (35, 26, 19)] == [5, 4, 3]
    assert VisionDrop2(layers="2", shares="0.1").points(4) == (Point(2, 0.1),)
    with pytest.raises(ConfigError, match="contextual_ratio: 1.0"):
        VisionDrop2(contextual_ratio=1.0)
