"""SparseVLM: raters, the pull of RoPE, and clusters, written out plainly."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from foveate.engine.common import Grid
from foveate.engine.primitives.merge import dpc_knn
from foveate.engine.prune.methods.sparsevlm import SparseVLM
from foveate.engine.prune.schedule import kept


def raters(case) -> list[int]:
    x, visual = case.probe.inputs(), case.probe.visual.tolist()
    words = range(visual[-1] + 1, case.probe.n)
    score = dict.fromkeys(words, 0.0)
    for v in visual:
        for t, share in zip(words, (x[words[0] :] @ x[v]).softmax(0).tolist(), strict=True):
            score[t] += share / len(visual)
    found = [t for t in words if score[t] > sum(score.values()) / len(score)]
    return found or list(words)


def pull(prompts, case, t: int, v: int) -> float:
    """The score of two vectors of ones rotated to their positions, as a share of the score at one position."""
    ones = torch.ones(2, 1, 8)
    turned = prompts.decoder.rotate(ones, case.positions[[case.m + t, case.m + v]])[:, 0]
    return float(turned[0] @ turned[1]) / 8


@pytest.mark.parametrize("seed", range(20))
def test_v2_divides_by_the_pull_and_takes_half_of_the_heads(prompts, seed: int) -> None:
    case = prompts.draw(seed, left=0.8)
    votes, seen = raters(case), case.seen("before")
    n_heads, n = len(seen), len(case.probe.visual)
    per_head = torch.zeros(n_heads, n)
    for v in range(n):
        for t in votes:
            weight = max(0.05, pull(prompts, case, t, int(case.probe.visual[v])))
            per_head[:, v] += seen[:, t, v] / weight / len(votes)
    heads = sorted(range(n_heads), key=lambda h: (-float(per_head[h].sum()), h))[: (n_heads + 1) // 2]
    scores = sum(per_head[h] for h in heads)
    counts = prompts.counts(case, seed)
    assert prompts.leave("sparsevlm", case, counts).keep.tolist() == prompts.best(case, scores.tolist(), counts)


@pytest.mark.parametrize("seed", range(20))
def test_v1_keeps_the_best_and_the_means_of_clusters_of_the_next(prompts, seed: int) -> None:
    case = prompts.draw(seed, grids=[Grid(7, 8), Grid(3, 4)], layer=1 + seed % 3)
    states, seen = case.probe.rows[case.probe.visual], case.seen("before").mean(0)
    votes = raters(case)
    scores = [sum(seen[t, v].item() for t in votes) for v in range(len(states))]
    counts, rows = [5 + seed, 6], {}
    for picture, count in enumerate(counts):
        ranked = sorted(case.mine(picture), key=lambda v: (-scores[v], v))
        n = len(ranked)
        c = next(c for c in range(1, count) if int((int(0.3 * (n - count + c)) + 1) / 10) + 1 <= c)  # the paper's c
        plain, gone = ranked[: count - c], ranked[count - c :]
        pool = sorted(gone[: int(0.3 * len(gone)) + 1])
        found = dpc_knn(states[pool], c, c)
        rows |= {v: states[v] for v in plain}
        sizes = torch.bincount(found.owner)
        assert int(sizes.sum()) == len(pool)
        for cluster, centre in enumerate(found.centres.tolist()):
            rows[pool[centre]] = states[pool][found.owner == cluster].mean(0)
    leaves = prompts.leave("sparsevlm", case, counts, version="v1")
    assert leaves.keep.tolist() == sorted(rows)
    torch.testing.assert_close(leaves.mix @ states, torch.stack([rows[v] for v in sorted(rows)]))
    assert (leaves.mix.count_nonzero(1) > 1).any()


@pytest.mark.parametrize("seed", range(20))
def test_raters_do_not_depend_on_the_order_of_the_visual_tokens(prompts, seed: int) -> None:
    case = prompts.draw(seed, grids=[Grid(4, 4)], question=6)
    probe, x = case.probe, case.probe.inputs()
    shuffled = x.clone()
    shuffled[probe.visual] = x[probe.visual][torch.randperm(16, generator=torch.Generator().manual_seed(seed))]
    found: Tensor = SparseVLM().raters(probe)
    assert found.tolist() == raters(case)
    assert torch.equal(SparseVLM().raters(replace(probe, inputs=lambda: shuffled)), found)
    assert 0 < len(found) < 6


def test_words_that_are_all_alike_all_vote(prompts) -> None:
    probe = prompts.make(1, 1, [Grid(3, 3)], question=4, fill=1.0).probe
    assert torch.equal(SparseVLM().raters(probe), probe.question)


def test_the_papers_counts() -> None:
    points = SparseVLM().points(32)
    assert [point.layer for point in points] == [3, 7, 16]
    assert [kept(576, point.share) for point in points] == [300, 200, 118]
