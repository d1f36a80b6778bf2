"""Greedy selection: farthest points, coverage, determinantal point processes, and unions of quotas.

A greedy function returns its picks in the order of picking, so the first j picks are the answer for j. Ties go to the
lower index. A taken item is masked: on a blank picture all other items are as good, and rounding may make a taken item
better.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.engine.common import Grid

_TAKEN = -torch.inf
_EXHAUSTED = 1e-5  # a determinant's gain below this share of the first gain is rounding


def greedy(gain: Tensor, after: Callable[[Tensor], Tensor], taken: Tensor, k: int) -> Tensor:
    """Pick the item of largest gain, k times.

    Args:
        gain: [n] the gain of each item before the first pick; not changed.
        after: from a pick, [1] int64, to the gains [n] after the pick.
        taken: int64 items that are taken already; they are never picked.
        k: number of picks; at most n minus the taken items.

    Returns:
        [k] int64.
    """
    free = torch.zeros(gain.shape, device=gain.device, dtype=torch.float32).index_fill(0, taken, _TAKEN)
    picks = []
    for _ in range(k):
        pick = (gain + free).argmax(0, keepdim=True)  # the first of equal gains; stays on the device
        picks.append(pick)
        free = free.index_fill(0, pick, _TAKEN)
        if len(picks) < k:
            gain = after(pick)
    return torch.cat(picks) if picks else taken.new_empty(0)


def farthest(nearest: Tensor, distance_from: Callable[[Tensor], Tensor], taken: Tensor, k: int) -> Tensor:
    """Farthest-point selection (greedy max-min): pick the item farthest from the taken ones, k times (Gonzalez, 1985).

    Args:
        nearest: [n] distance of each item to its nearest taken item; not changed.
        distance_from: from an item, [1] int64, to the distances [n] of all items to the item.
        taken: int64 items that are taken already; they are never picked.
        k: number of picks; at most n minus the taken items.
    """

    def after(pick: Tensor) -> Tensor:
        nonlocal nearest
        nearest = torch.minimum(nearest, distance_from(pick))
        return nearest

    return greedy(nearest, after, taken, k)


def coverage(worth: Tensor, k: int, bonus: Tensor | None = None) -> Tensor:
    """Facility location: maximise sum over rows of max over kept columns of `worth`, plus the kept columns' `bonus`.

    After a pick, only the rows that the pick covers better change the gains. The fewer such rows, the cheaper the step.

    Args:
        worth: [rows, n] float32, at least 0. Without rows, picks follow `bonus`, or the index.
        bonus: [n] float32.
    """
    best = worth.new_zeros(worth.shape[0])
    gain = worth.sum(0, dtype=torch.float64)  # float64, because many small changes add up
    if bonus is not None:
        gain = gain + bonus

    def after(pick: Tensor) -> Tensor:
        nonlocal best, gain
        column = worth.index_select(1, pick)[:, 0]
        better = (column > best).nonzero()[:, 0]
        rows, old, new = worth[better], best[better, None], column[better, None]
        lost = (rows - old).clamp(min=0) - (rows - new).clamp(min=0)
        gain = gain - lost.sum(0, dtype=torch.float64)
        best = torch.maximum(best, column)
        return gain

    return greedy(gain, after, torch.empty(0, dtype=torch.int64, device=worth.device), k)


def determinantal(similarity: Tensor, quality: Tensor, k: int) -> Tensor:
    """Greedy MAP of the determinantal point process with kernel diag(q) S diag(q) (Chen et al., arXiv:1709.05135).

    Once the kernel has no rank left, the best items by quality follow, because an order by gain would be rounding.

    Args:
        similarity: [n, n] float32, positive semidefinite with a unit diagonal.
        quality: [n] float32, at least 0.
    """
    n = quality.shape[0]
    left = quality.square() * similarity.diagonal()
    floor = left.max() * _EXHAUSTED
    basis = similarity.new_zeros(k, n)
    picks: list[Tensor] = []
    free = similarity.new_zeros(n)
    for i in range(k):
        # Gains above the floor rank by determinant. All others rank by quality, far below them.
        gain = torch.where(left > floor, left, quality - quality.max() - 1)
        pick = (gain + free).argmax(0, keepdim=True)
        picks.append(pick)
        free = free.index_fill(0, pick, _TAKEN)
        column = quality * similarity.index_select(1, pick)[:, 0] * quality[pick]
        rest = column - basis[:i].T @ basis[:i, pick][:, 0] if i else column
        scale = left[pick]
        basis[i] = torch.where(scale > floor, rest / scale.clamp(min=1e-30).sqrt(), 0.0)
        left = left - basis[i].square()
    return torch.cat(picks) if picks else torch.empty(0, dtype=torch.int64, device=quality.device)


@dataclass(frozen=True, slots=True)
class Quota:
    """Part of a union: the `n` best rows by `scores` that no earlier part has, and the rows that `spread` adds."""

    scores: Tensor  # [n] float32
    n: int
    spread: Callable[[Tensor], Tensor] | None = None  # kept rows -> more rows


def quota_union(parts: Sequence[Quota], k: int) -> Tensor:
    """[k] int64, increasing: the union of the parts, each without rows of earlier parts. The last fills up to k.

    A part that would go beyond k is cut: first the rows from its `spread`, the worst by its own scores first.
    """
    taken = torch.zeros(parts[0].scores.shape, dtype=torch.bool, device=parts[0].scores.device)
    for number, part in enumerate(parts):
        room = k - int(taken.sum())
        n = room if number == len(parts) - 1 else min(part.n, room)
        order = torch.sort(part.scores.masked_fill(taken, _TAKEN), descending=True, stable=True).indices
        chosen = order[:n]
        taken = taken.index_fill(0, chosen, True)
        if part.spread is not None and room > n:
            more = torch.zeros_like(taken).index_fill(0, part.spread(chosen), True) & ~taken
            order = torch.sort(part.scores.masked_fill(~more, _TAKEN), descending=True, stable=True).indices
            taken = taken.index_fill(0, order[: min(int(more.sum()), room - n)], True)
    return taken.nonzero()[:, 0]


def neighbours(grid: Grid, rows: Tensor) -> Tensor:
    """int64: the cells of the grid above, below, left and right of the cells `rows`; with repetitions."""
    y, x = rows // grid.cols, rows % grid.cols
    found = [rows[y > 0] - grid.cols, rows[y < grid.rows - 1] + grid.cols, rows[x > 0] - 1, rows[x < grid.cols - 1] + 1]
    return torch.cat(found)
