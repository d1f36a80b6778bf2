"""The search itself, apart from what is measured: bisection over levels, G-Search, the fit of a P-Sigmoid.

Each asks one question, whether a point holds (agreement is high enough), and returns only points that did hold, so
noise costs tokens but never agreement on the pairs that were searched on.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

from foveate.engine.prune.methods.psigmoid import PSigmoid

LEVELS = 32  # shares are multiples of 1 / LEVELS


def least(most: int, holds: Callable[[int], bool], low: int = 0) -> int:
    """The least level in [low, most] that holds, by bisection; `most` holds, or is what there is if nothing does."""
    while low < most:
        middle = (low + most) // 2
        if holds(middle):
            most = middle
        else:
            low = middle + 1
    return most


def searched_layers(n_layers: int, every: int) -> list[int]:
    """Layers before which tokens may leave."""
    return list(range(1, n_layers, every))


def gsearch(n_layers: int, every: int, holds: Callable[[Sequence[float]], bool]) -> list[float]:
    """Layer by layer, from the first that may lose any, the least share with which all deeper layers hold the same.

    Source: Zhao et al., 2024, arXiv:2412.00556. Under monotonicity (more tokens, and tokens kept for longer, never
    harm) no layer of the result could hold less.

    Args:
        every: only at every so many layers may the share change, for decoders too deep to ask about each.
        holds: whether a table, a share per layer, keeps the agreement.

    Returns:
        a table; 1 throughout if nothing held.
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
    """The table with `share` from a layer on."""
    return [*table[:layer], *([share] * (len(table) - layer))]


def horizon(n_layers: int, holds: Callable[[Sequence[float]], bool]) -> int:
    """The first layer from which on no visual token is needed; `n_layers` if the last one needs some.

    Source: the information horizon of Wang et al., 2025, arXiv:2512.07580.
    """
    full = [1.0] * n_layers
    return least(n_layers, lambda layer: holds(with_tail(full, layer, 0.0)), low=1)


def fit_sigmoid(table: Sequence[float]) -> PSigmoid:
    """The P-Sigmoid closest to a table, in squares summed over layers, among those with the table's mean.

    On a grid, then on finer ones around the best so far; of equals the least steep wins.
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
    """As a field of G-Search holds it."""
    assert all(b <= a for a, b in pairwise(table)), "shares never grow with depth"
    return ",".join(f"{share:g}" for share in table)
