"""Merging: bipartite matching (P1) and density-peak clusters (P3). Deterministic; scores in float32."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from foveate.engine.primitives.ranking import complement, finite, top, unit
from foveate.engine.vision.inputs import VisualInputs
from foveate.engine.vision.transform import Space, TokenTransform

_ROUNDING = 1e-12  # of a squared distance, in shares of what it is the difference of


class Match(NamedTuple):
    """Each even row's best odd partner."""

    best: Tensor  # [ceil(n / 2)] int64, the partner's row; of equal ones the first
    score: Tensor  # [ceil(n / 2)] float32


def match(metric: Tensor, bias: Tensor | None = None) -> Match:
    """Split rows into even (sources) and odd (destinations) and match by cosine (ToMe, arXiv:2210.09461).

    Args:
        metric: [n, d], n >= 2.
        bias: [n] float32, added to the score of each source: -inf keeps it from merging.
    """
    rows = unit(metric)
    score, best = (rows[::2] @ rows[1::2].T).max(1)
    return Match(2 * best + 1, score if bias is None else score + bias[::2])


def bipartite(metric: Tensor, r: int, bias: Tensor | None = None) -> Tensor:
    """P1: merge the r best-matched even rows into their odd partners.

    Returns:
        [n] int64, the row each row goes into: itself if it is not merged. r is cut to floor(n / 2).
    """
    n = metric.shape[0]
    into = torch.arange(n, device=metric.device)
    r = min(r, n // 2)
    if r <= 0:
        return into
    found = match(metric, bias)
    sources = top(found.score, r)
    return into.index_copy(0, 2 * sources, found.best[sources])


def merge_into(into: Tensor, size: Tensor | None = None, space: Space = "proj") -> TokenTransform:
    """The transform of a merge, anchored at destinations.

    Args:
        into: [n] int64 as `bipartite` returns it; no chains.
        size: [n], what each row stands for and so weighs (`wavg`); None: every row weighs the same (`mean`).
    """
    into = into.cpu()
    anchor, owner = torch.unique(into, return_inverse=True)
    if size is None:
        return TokenTransform.merging(owner, anchor, space=space)
    mass = size.double().cpu()
    total = torch.zeros(len(anchor), dtype=torch.float64).index_add_(0, owner, mass)
    return TokenTransform.merging(owner, anchor, (mass / total[owner]).float(), space)


class Clusters(NamedTuple):
    centres: Tensor  # [c] int64, increasing
    owner: Tensor  # [n] int64, the cluster of each row, 0..c-1


def _distances(rows: Tensor) -> Tensor:
    """[n, C] -> float32 [n, n], Euclidean over sqrt(C), equal rows at 0.

    By a matrix product, in float64 and around the mean, since it subtracts: equal rows leave but rounding.
    """
    wide = rows.double()
    wide = wide - wide.mean(0)
    square = wide.square().sum(1)
    apart = square[:, None] + square
    squared = apart - 2 * wide @ wide.T
    return squared.masked_fill(squared <= _ROUNDING * apart, 0.0).div_(rows.shape[1]).sqrt().float()


def dpc_knn(rows: Tensor, c: int, n_neighbours: int, seed: int = 0) -> Clusters:
    """P3: density peaks. Centres are the c rows densest and farthest from anything denser; others join the nearest.

    Args:
        rows: [n, C] finite; 1 <= c <= n.
        n_neighbours: rows that make a density, the row itself among them; cut to n.
        seed: of the noise below 1e-6 that parts equal densities.
    """
    n = rows.shape[0]
    distance = _distances(rows)
    near = distance.topk(min(n_neighbours, n), largest=False).values
    noise = torch.rand(n, generator=torch.Generator().manual_seed(seed)) * 1e-6
    density = (-near.square().mean(1)).exp() + noise.to(rows.device)
    denser = density[None, :] > density[:, None]
    apart = distance.masked_fill(~denser, torch.inf).amin(1)
    apart = torch.where(torch.isinf(apart), distance.max(), apart)
    centres = top(apart * density, c)
    owner = distance[:, centres].argmin(1)
    return Clusters(centres, owner.index_copy(0, centres, torch.arange(c, device=rows.device)))


def nearest(metric: Tensor, targets: Tensor) -> Tensor:
    """[n] int64: the target (a row number of `targets`, int64) each row is nearest to by cosine; targets their own."""
    rows = unit(metric)
    found = (rows @ rows[targets].T).argmax(1)
    return targets[found].index_copy(0, targets, targets)


def select_and_merge(
    kept: Tensor, targets: Tensor, into: Tensor, weights: Tensor | None = None, space: Space = "proj"
) -> TokenTransform:
    """Rows `kept` as they are; each other row goes into the target `into` names.

    Args:
        kept: int64, increasing; disjoint from `targets`.
        targets: int64, increasing.
        into: [n] int64, a target for every row that is not kept, or -1 to drop it; of kept rows not read.
        weights: [n] float32 of the rows that are merged; None: the plain mean of target and members.
    """
    n = into.shape[0]
    kept, targets, goes_to = kept.cpu(), targets.cpu(), into.cpu().clone()
    goes_to[kept] = kept
    goes_to[targets] = targets
    anchor = torch.cat([kept, targets]).sort().values
    owner = torch.where(goes_to < 0, goes_to, torch.searchsorted(anchor, goes_to.clamp(min=0)))
    if weights is not None:
        weights = weights.cpu().index_fill(0, kept, 1.0)
    assert n == len(owner) and len(complement(anchor, n)) == n - len(anchor), "kept rows and targets are disjoint"
    return TokenTransform.merging(owner, anchor, weights, space)


class Pass(NamedTuple):
    """One round of merging layer by layer: what a method decides from."""

    layer: float  # whose keys are compared, as a share of the depth
    member: Tensor  # [rows, n] float32, 1 where a token is in a row
    keys: Tensor  # [rows, head_dim], sums over a row's tokens: cosines do not see the difference
    n_over: int  # rows more than the budget
    n_layers_left: int  # this one included; 0 and less: the last layer goes on


def evenly(n_layers: int) -> list[float]:
    """So many layers over the whole depth, the last one among them, as shares of it."""
    return [(i + 1) / n_layers for i in range(n_layers)]


def merge_by_layers(
    inputs: VisualInputs, k: int, layers: Sequence[float], decide: Callable[[Pass], tuple[int, Tensor | None]]
) -> TokenTransform:
    """Merge pairs of like keys layer by layer until k rows are left; each the plain mean of its tokens.

    Args:
        decide: how many pairs merge at most in a round (half of the rows and the budget limit it too), and what is
            added to the cosine of a row that would go, [rows], or None.
    """
    n_left, n_passes = inputs.n, 0
    into = torch.arange(n_left, device=inputs.proj.device)
    while n_left > k:
        anchor, slot = torch.unique(into, return_inverse=True)
        member = (slot == torch.arange(n_left, device=slot.device)[:, None]).float()
        layer = layers[min(n_passes, len(layers) - 1)]
        keys = member @ finite("attention keys", inputs.keys(layer))
        most, bias = decide(Pass(layer, member, keys, n_left - k, len(layers) - n_passes))
        r = min(most, n_left - k, n_left // 2)
        into = anchor[bipartite(keys, r, bias)][slot]
        n_left, n_passes = n_left - r, n_passes + 1
    return merge_into(into, space=inputs.space)
