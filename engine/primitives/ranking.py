"""Checks of signals, stable top-k, cosines, and lattices on the token grid.

Every function is deterministic: ties go to the lower index, and integers replace floats where they can.
"""

import torch
from torch import Tensor

from foveate.engine.common import Grid, ImageError, LayerRef
from foveate.engine.vision import VisualInputs


def finite(what: str, values: Tensor) -> Tensor:
    """Return `values` in float32.

    Raises:
        ImageError: a value is NaN or infinite. A ranking would keep arbitrary tokens. One host synchronisation.
    """
    values = values.float()
    if not bool(torch.isfinite(values).all()):
        raise ImageError(f"the picture's {what} are not finite, so its tokens cannot be ranked; send another picture")
    return values


def saliency(inputs: VisualInputs, layer: LayerRef = -1) -> Tensor:
    """[n] float32: how much the encoder attends to each token at a layer.

    CLS attention, or attention received in an encoder without a CLS row. A method asks for `signals.saliency(layer)`.
    """
    return finite("attention weights", inputs.saliency(layer))


def top(scores: Tensor, k: int) -> Tensor:
    """[k] int64, increasing: the k largest of `scores` [n]; ties go to the lower index, unlike in torch.topk."""
    return torch.sort(scores, descending=True, stable=True).indices[:k].sort().values


def norm01(scores: Tensor) -> Tensor:
    """Scale scores to 0..1: (s - min) / (max - min + 1e-6)."""
    low, high = scores.min(), scores.max()
    return (scores - low) / (high - low + 1e-6)


def unit(rows: Tensor) -> Tensor:
    """[n, D] -> float32 [n, D] of length 1, so that products are cosines; a row shorter than 1e-6 is divided by 1e-6.

    Raises:
        ImageError: a number is not finite.
    """
    return torch.nn.functional.normalize(finite("features", rows), dim=-1, eps=1e-6)


def complement(taken: Tensor, n: int) -> Tensor:
    """[n - len(taken)] int64, increasing: the rows of 0..n-1 that are not taken, on the device of `taken`."""
    left = torch.ones(n, dtype=torch.bool, device=taken.device).index_fill(0, taken, False)
    return left.nonzero()[:, 0]


def lattice(grid: Grid, k: int) -> Grid:
    """The coarse grid of at most k cells that covers `grid` most evenly.

    The longer side of a coarse cell, max(rows / h, cols / w), is as short as possible; then h * w is as large as
    possible; then h is as small as possible. Maximising h * w first would give a single row for a prime k.
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
