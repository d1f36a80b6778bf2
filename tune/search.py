"""The search algorithms, independent of the measurements: bisection over levels, G-Search, the fit of a P-Sigmoid.

A point holds if its agreement is high enough. The bisections test only whether a point holds and return only points
that held. So noise costs tokens, but never agreement on the searched pairs.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

from foveate.engine.prune.methods.psigmoid import PSigmoid

LEVELS = 32  # shares are multiples of 1 / LEVELS


def least(most: int, holds: Callable[[int], bool], low: int = 0) -> int:
    """Find the least level in [low, most] that holds, by bisection. If nothing else holds, return `most` untested."""
    while low < most:
        middle = (low + most) // 2
        if holds(middle):
            most = middle
        else:
            low = middle + 1
    return most


def searched_layers(n_layers: int, every: int) -> list[int]:
    """Return the layers before which tokens may be dropped."""
    return list(range(1, n_layers, every))


def gsearch(n_layers: int, every: int, holds: Callable[[Sequence[float]], bool]) -> list[float]:
    """Search a schedule layer by layer. At each layer, find the least share for this layer and all deeper layers.

    Source: Zhao et al., 2024, arXiv:2412.00556. Under monotonicity (more tokens, and tokens kept for more layers, never
    harm), no layer of the result could keep fewer tokens.

    Args:
        every: the share may change only at every `every`-th layer, to limit the search in deep decoders.
        holds: whether a table (a share per layer) keeps the agreement.

    Returns:
        [n_layers] share per layer; 1 everywhere if nothing held.
    """
    table, level = [1.0] * n_layers, LEVELS
    for layer in searched_layers(n_layers, every):
        tails = [with_tail(table, layer, k / LEVELS) for k in range(level + 1)]
        level = least(level, partial(_at, tails, holds))
        table = tails[level]
        if level == 0:
            break
    return table


def _at(tables: Sequence[Sequence[float]], holds: Callable[[Sequence[float]], bool], level: int) -> bool:
    return holds(tables[level])


def with_tail(table: Sequence[float], layer: int, share: float) -> list[float]:
    """Return the table with `share` from `layer` on."""
    return [*table[:layer], *([share] * (len(table) - layer))]


def horizon(n_layers: int, holds: Callable[[Sequence[float]], bool]) -> int:
    """Find the first layer from which no visual token is needed; `n_layers` if the last layer needs visual tokens.

    Source: the information horizon of Wang et al., 2025, arXiv:2512.07580.
    """
    full = [1.0] * n_layers
    return least(n_layers, lambda layer: holds(with_tail(full, layer, 0.0)), low=1)


def fit_sigmoid(table: Sequence[float]) -> PSigmoid:
    """Fit a P-Sigmoid with the table's mean to the table: least squares over layers.

    The fit searches a grid, then finer grids around the best point. Ties go to the least steep sigmoid.
    """
    mean = round(max(sum(table) / len(table), 1 / len(table)), 4)

    def away(alpha: float, beta: float) -> float:
        own = PSigmoid(alpha=alpha, beta=beta, mean=mean).table(len(table))
        return sum((a - b) ** 2 for a, b in zip(own, table, strict=True))

    alpha, beta, half = 25.0, 0.5, 1.0
    for _ in range(14):
        alphas = [min(100.0, max(0.0, round(alpha + 25 * half * i / 5, 4))) for i in range(-5, 6)]
        betas = [min(1.0, max(0.0, round(beta + 0.5 * half * i / 5, 4))) for i in range(-5, 6)]
        _, alpha, beta = min((away(a, b), a, b) for a in alphas for b in betas)
        half *= 0.6
    return PSigmoid(alpha=alpha, beta=beta, mean=mean)


def table_text(table: Sequence[float]) -> str:
    """Format a table for the `keep` field of G-Search."""
    assert all(b <= a for a, b in pairwise(table)), "shares never grow with depth"
    return ",".join(f"{share:g}" for share in table)
