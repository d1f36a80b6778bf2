"""Merging: bipartite matching and density-peak clusters. Deterministic; scores in float32."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from foveate.engine.primitives.ranking import complement, finite, top, unit
from foveate.engine.vision import Space, TokenTransform, VisualInputs

_ROUNDING = 1e-12  # squared distances below this share of the squared norms are rounding


class Match(NamedTuple):
    """The best odd partner of each even row."""

    best: Tensor  # [ceil(n / 2)] int64, the partner's row; ties go to the first
    score: Tensor  # [ceil(n / 2)] float32


def match(metric: Tensor, bias: Tensor | None = None) -> Match:
    """Match each even row (source) with an odd row (destination) by cosine (ToMe, arXiv:2210.09461).

    Args:
        metric: [n, d], n >= 2.
        bias: [n] float32, added to the score of each source: -inf keeps the source from merging.
    """
    rows = unit(metric)
    score, best = (rows[::2] @ rows[1::2].T).max(1)
    return Match(2 * best + 1, score if bias is None else score + bias[::2])


def bipartite(metric: Tensor, r: int, bias: Tensor | None = None) -> Tensor:
    """Bipartite soft matching (ToMe): merge the r best-matched even rows into their odd partners.

    Returns:
        [n] int64, the row that each row merges into; a row that stays has itself. r is at most floor(n / 2).
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
    """The transform of a merge. Each output row has its destination as anchor.

    Args:
        into: [n] int64 as `bipartite` returns it; no chains.
        size: [n], the weight of each row, such as the tokens that it stands for; None: every row weighs the same.
    """
    into = into.cpu()
    anchor, owner = torch.unique(into, return_inverse=True)
    if size is None:
        return TokenTransform.merging(owner, anchor, space=space)
    mass = size.double().cpu()
    total = torch.zeros(len(anchor), dtype=torch.float64).index_add_(0, owner, mass)
    return TokenTransform.merging(owner, anchor, (mass / total[owner]).float(), space)


class Clusters(NamedTuple):
    centres: Tensor  # [c] int64, increasing: the rows that are centres
    owner: Tensor  # [n] int64, the cluster of each row, in 0..c-1


def _distances(rows: Tensor) -> Tensor:
    """Euclidean distances of rows [n, C], divided by sqrt(C): float32 [n, n]. Equal rows have distance 0.

    A matrix product gives the distances as differences of large numbers. So the product is in float64 and around the
    mean, and a difference that is only rounding becomes 0.
    """
    wide = rows.double()
    wide = wide - wide.mean(0)
    square = wide.square().sum(1)
    apart = square[:, None] + square
    squared = apart - 2 * wide @ wide.T
    return squared.masked_fill(squared <= _ROUNDING * apart, 0.0).div_(rows.shape[1]).sqrt().float()


def dpc_knn(rows: Tensor, c: int, n_neighbours: int, seed: int = 0) -> Clusters:
    """Density-peak clusters (DPC-KNN). Centres are the c rows densest and farthest from denser rows; others join them.

    Args:
        rows: [n, C] finite; 1 <= c <= n.
        n_neighbours: rows that a density counts, the row itself included; at most n.
        seed: of the noise below 1e-6 that separates equal densities.
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
    """[n] int64: the row of `targets` (row numbers, int64) nearest to each row by cosine. A target has itself."""
    rows = unit(metric)
    found = (rows @ rows[targets].T).argmax(1)
    return targets[found].index_copy(0, targets, targets)


def select_and_merge(
    kept: Tensor, targets: Tensor, into: Tensor, weights: Tensor | None = None, space: Space = "proj"
) -> TokenTransform:
    """Keep the rows `kept` as they are; merge each other row into the target that `into` names.

    Args:
        kept: int64, increasing; disjoint from `targets`.
        targets: int64, increasing.
        into: [n] int64, the target of each row that is not kept, or -1 to drop the row; not read for kept rows.
        weights: [n] float32, the weights of the rows that merge; None: the plain mean of target and members.
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
    """One round of merging layer by layer, as a method sees it when it decides."""

    layer: float  # the layer whose keys are compared, as a share of the depth
    member: Tensor  # [rows, n] float32, 1 if the token is in the row
    keys: Tensor  # [rows, head_dim], sums over a row's tokens; the cosines are those of the means
    n_over: int  # number of rows above the budget
    n_layers_left: int  # this layer included; 0 or less: the last layer is used again


def evenly(n_layers: int) -> list[float]:
    """`n_layers` layers, evenly over the depth, as shares of the depth; the last layer is one of them."""
    return [(i + 1) / n_layers for i in range(n_layers)]


def merge_by_layers(
    inputs: VisualInputs, k: int, layers: Sequence[float], decide: Callable[[Pass], tuple[int, Tensor | None]]
) -> TokenTransform:
    """Merge pairs of similar keys layer by layer until k rows are left. Each row is the plain mean of its tokens.

    Args:
        decide: returns the largest number of pairs to merge in a round (half of the rows and the budget are limits
            too), and a bias [rows] on the cosine of a row that would merge away, or None.
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
