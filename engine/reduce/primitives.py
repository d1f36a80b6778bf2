"""What several reducers share: stable top-k, farthest points, and lattices on the token grid.

All of it is deterministic: ties go to the lower index, and what can be integer arithmetic is.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from foveate.engine.errors import ImageError
from foveate.engine.grid import Grid
from foveate.engine.reduce.base import VisualInputs

_TAKEN = -1.0  # below every distance


def finite(what: str, values: Tensor) -> Tensor:
    """Return `values` in float32.

    Raises:
        ImageError: one is NaN or infinite; ranking it would keep arbitrary tokens. One host synchronisation.
    """
    values = values.float()
    if not bool(torch.isfinite(values).all()):
        raise ImageError(f"the picture's {what} are not finite, so its tokens cannot be ranked; send another picture")
    return values


def saliency(inputs: VisualInputs) -> Tensor:
    """[M] float32: how much the encoder attends to each token; CLS attention, else attention received."""
    scores = inputs.received if inputs.cls_attention is None else inputs.cls_attention
    assert scores is not None, "a saliency method asks for cls_attention or received before the encoder runs"
    return finite("attention weights", scores)


def top(scores: Tensor, k: int) -> Tensor:
    """[k] int64, increasing: the k largest of `scores` [n]; ties go to the lower index (torch.topk promises none)."""
    return torch.sort(scores, descending=True, stable=True).indices[:k].sort().values


def farthest(nearest: Tensor, distance_from: Callable[[Tensor], Tensor], taken: Tensor, k: int) -> Tensor:
    """Greedy max-min: k times the item farthest from the taken ones (Gonzalez, 1985).

    Args:
        nearest: [n] distance of each item to its nearest taken item; not changed. No distance may be below -0.5.
        distance_from: item [1] int64 -> [n] distances to it.
        taken: int64 items that are taken already and never returned.
        k: how many more; at most n minus the taken.

    Returns:
        [k] int64 in the order of picking, so the first j of them are the answer for j.
    """
    nearest = nearest.index_fill(0, taken, _TAKEN)
    picks = []
    for _ in range(k):
        pick = nearest.argmax(0, keepdim=True)  # first of equal ones; stays on the device
        picks.append(pick)
        # Masked, not left at distance 0: on a blank wall the others are at 0 too, and rounding may put them below.
        nearest = torch.minimum(nearest, distance_from(pick)).index_fill(0, pick, _TAKEN)
    return torch.cat(picks) if picks else taken.new_empty(0)


def lattice(grid: Grid, k: int) -> Grid:
    """The coarse grid of at most k cells that covers `grid` most evenly.

    The longer side of a coarse cell, max(rows / h, cols / w), is as short as can be; then h * w is as large as can
    be; then h is small. Maximising h * w first would answer a prime k with a single row.
    """
    shapes = [Grid(h, min(grid.cols, k // h)) for h in range(1, min(grid.rows, k) + 1)]
    return min(shapes, key=lambda s: (max(grid.rows / s.rows, grid.cols / s.cols), -s.n_tokens, s.rows))


def centres(n: int, m: int) -> Tensor:
    """[m] int64, strictly increasing: floor((i + 1/2) n / m), the middles of m equal parts of 0..n-1, m <= n."""
    return (2 * torch.arange(m) + 1) * n // (2 * m)


def lattice_cells(grid: Grid, coarse: Grid) -> Tensor:
    """[coarse.n_tokens] int64, strictly increasing: the cell of `grid` in the middle of each coarse cell."""
    rows, cols = centres(grid.rows, coarse.rows), centres(grid.cols, coarse.cols)
    return (rows[:, None] * grid.cols + cols).flatten()
