"""Numerics: Sinkhorn, largest remainder, windowed cosine, DCT, adaptive pooling, connected components."""

from collections.abc import Sequence

import torch
from torch import Tensor

from foveate.engine.common import Grid
from foveate.engine.primitives.ranking import unit


def sinkhorn(cost: Tensor, u: Tensor, v: Tensor, eps: float, n_steps: int = 100) -> Tensor:
    """Sinkhorn: the entropic transport plan [n, m] whose rows sum to about u and whose columns sum to exactly v.

    Args:
        cost: [n, m] float32.
        u, v: [n] and [m] marginals of equal sum.
        eps: regularisation. The least cost is subtracted first, against underflow; the plan stays the same.
    """
    kernel = torch.exp((cost.min() - cost) / eps)
    r, c = torch.ones_like(u), torch.ones_like(v)
    for _ in range(n_steps):
        before = r
        r = u / (kernel @ c).clamp(min=1e-30)
        c = v / (kernel.T @ r).clamp(min=1e-30)
        if bool((r - before).abs().mean() < 1e-2 * r.abs().mean()):
            break
    return r[:, None] * kernel * c


def largest_remainder(weights: Sequence[float], total: int, caps: Sequence[int]) -> list[int]:
    """Largest remainder: share `total` by weight, no share above its cap.

    The others share what a cap cuts off, again by weight. A weight of zero gets a share only once all others are full.
    Ties go to the earlier entry. total <= sum of caps.
    """
    assert 0 <= total <= sum(caps), "the caps leave room for the total"
    shares = [0] * len(weights)
    free, left = list(range(len(weights))), total
    while left:
        heavy = [i for i in free if weights[i] > 0] or free
        scale = sum(weights[i] for i in heavy)
        exact = {i: left * (weights[i] / scale if scale > 0 else 1 / len(heavy)) for i in heavy}
        if over := [i for i in heavy if exact[i] >= caps[i]]:  # these are full; the others share again
            shares = [caps[i] if i in over else n for i, n in enumerate(shares)]
            free = [i for i in free if i not in over]
            left = total - sum(shares)
            continue
        floors = {i: int(exact[i]) for i in heavy}
        by_remainder = sorted(heavy, key=lambda i: (floors[i] - exact[i], i))
        for place, i in enumerate(by_remainder):
            shares[i] = floors[i] + (place < left - sum(floors.values()))
        left = 0
    return shares


def window_cosine(rows: Tensor, grid: Grid, side: int) -> Tensor:
    """Windowed cosine: the mean cosine of different rows in each side x side window.

    Windows do not overlap and start at the upper left; cells beyond the last whole window are left out. side >= 2.

    Returns:
        [grid.rows // side, grid.cols // side] float32.
    """
    down, across = grid.rows // side, grid.cols // side
    cut = unit(rows).view(grid.rows, grid.cols, -1)[: down * side, : across * side]
    windows = cut.reshape(down, side, across, side, -1).permute(0, 2, 1, 3, 4).flatten(2, 3)
    n = side * side
    same = windows.square().sum((2, 3))  # below n if rows are zero
    out: Tensor = (windows.sum(2).square().sum(2) - same) / (n * (n - 1))
    return out


def dct(n: int) -> Tensor:
    """[n, n] float64: the orthonormal DCT-II. Its transpose is its inverse (DCT-III)."""
    k, i = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    basis: Tensor = torch.cos(torch.pi * k * (2 * i + 1) / (2 * n)) * (2 / n) ** 0.5
    basis[0] /= 2**0.5
    return basis


def low_pass(n: int, m: int) -> Tensor:
    """[m, n] float64: keep the m lowest DCT frequencies of n places, transformed back onto m places; not rescaled."""
    return dct(m).T @ dct(n)[:m]


def pool_blocks(n: int, m: int) -> tuple[Tensor, Tensor]:
    """Adaptive pooling: the blocks and cells of all pairs of a block and one of its cells, for m blocks of n cells.

    Block i spans floor(i n / m) to ceil((i + 1) n / m). If m does not divide n, neighbouring blocks share a cell.

    Returns:
        two int64 vectors of equal length, by block, then by cell.
    """
    block, cell = torch.arange(m)[:, None], torch.arange(n)
    pairs = torch.nonzero((cell >= block * n // m) & (cell * m < (block + 1) * n))
    return pairs[:, 0], pairs[:, 1]


def components(right: Tensor, down: Tensor) -> Tensor:
    """Label the 4-connected components of a grid by the least cell index in each component.

    Args:
        right: [H, W - 1] bool, whether a cell is connected with the cell on its right.
        down: [H - 1, W] bool, whether a cell is connected with the cell below.

    Returns:
        [H * W] int64, the label of each cell.
    """
    height, width = right.shape[0], down.shape[1]
    index = torch.arange(height * width, device=right.device).view(height, width)
    a = torch.cat([index[:, :-1][right], index[:-1][down]])
    b = torch.cat([index[:, 1:][right], index[1:][down]])
    label = index.flatten()
    while True:
        low = torch.minimum(label[a], label[b])
        new = label.scatter_reduce(0, label[a], low, "amin").scatter_reduce(0, label[b], low, "amin")
        new = new[new]
        if torch.equal(new, label):
            return label
        label = new
