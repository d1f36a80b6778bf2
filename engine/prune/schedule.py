"""Where visual tokens leave the decoder, as arithmetic: points, their scaling to a budget, the mean over layers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from foveate.configs.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Point:
    """Before `layer` runs, `share` of the visual tokens that entered the decoder are left; 0: none are."""

    layer: int
    share: float


def kept(n: int, share: float) -> int:
    """Tokens left of n at a share: rounded down, as published, but never to nothing unless the share is 0."""
    return 0 if share <= 0 else min(n, max(1, int(share * n + 1e-6)))


def at_depth(layer: int, of: int, n_layers: int) -> int:
    """A paper's layer in a decoder of another depth, inside [1, n_layers)."""
    return min(max(1, round(layer * n_layers / of)), n_layers - 1)


def numbers(key: str, text: str) -> list[float]:
    """Read a field such as "8,16,24".

    Raises:
        ConfigError: one is no number.
    """
    try:
        return [float(part) for part in text.split(",")] if text else []
    except ValueError:
        raise ConfigError(f"{key}: {text!r} is not numbers joined by commas") from None


def staged(layers: Sequence[int], shares: Sequence[float], n_layers: int) -> tuple[Point, ...]:
    """Points from layers and shares, one share per layer.

    Scaling to a shallow decoder may put several points at one layer: the last point holds. A point where no token
    leaves is omitted.

    Raises:
        ConfigError: the lists differ in length, layers do not ascend or are not there, shares grow or leave [0, 1].
    """
    if len(layers) != len(shares):
        raise ConfigError(f"layers: {len(layers)} of them for {len(shares)} shares")
    points: dict[int, Point] = {}
    last = Point(1, 1.0)
    for layer, share in zip(layers, shares, strict=True):
        if not 1 <= layer < n_layers:
            raise ConfigError(f"layers: {layer} is not in 1..{n_layers - 1}; this decoder has {n_layers} layers")
        if layer < last.layer or share > last.share or share < 0:
            raise ConfigError(f"shares: {share:g} at layer {layer} after {last.share:g}; layers ascend, shares fall")
        last = Point(layer, share)
        points[layer] = last
    stays = [1.0, *(point.share for point in points.values())]
    return tuple(point for point, before in zip(points.values(), stays, strict=False) if point.share < before)


def checked(layers: str, shares: str, paper: Sequence[int]) -> None:
    """Check a request's layers (empty: the `paper`'s) and shares, without a decoder depth.

    Raises:
        ConfigError: layers or shares are malformed, out of order or out of range, or their counts differ.
    """
    where, stay = numbers("layers", layers) or paper, numbers("shares", shares)
    if any(not (layer >= 1 and float(layer).is_integer()) for layer in where) or any(
        b <= a for a, b in pairwise(where)
    ):
        raise ConfigError(f"layers: {layers!r} are not whole numbers from 1 that ascend; the first layer is 0")
    if not all(0 <= share <= 1 for share in stay) or any(b > a for a, b in pairwise(stay)):
        raise ConfigError(
            f"shares: {shares!r} are not between 0 and 1 and falling; each is of what entered the decoder"
        )
    if len(where) != len(stay):
        raise ConfigError(f"shares: {len(stay)} of them for {len(where)} layers; set both, as many of each")


def of_table(table: Sequence[float], most: int, *, exact_mean: bool) -> tuple[Point, ...]:
    """At most `most` points for what each layer should hold: falls of less than a tenth are joined where it takes that,
    then larger ones.

    Args:
        table: a share per layer, 1 for the first, never growing.
        exact_mean: layers hold the table's mean, each run its own mean times one factor; else none holds less than its
            share in the table.
    """
    starts, step = _falls(table, 1e-6), min(0.1, (1 - table[-1]) / most)
    while len(starts) > most:
        starts, step = _falls(table, step - 1e-6), step * 1.05
    if not starts:
        return ()
    ends = [*starts[1:], len(table)]
    runs = [table[start:end] for start, end in zip(starts, ends, strict=True)]
    shares = [sum(run) / len(run) if exact_mean else run[0] for run in runs]
    points = tuple(Point(start, share) for start, share in zip(starts, shares, strict=True))
    mean = max(sum(table) / len(table), starts[0] / len(table))
    return scaled(points, len(table), mean) if exact_mean else points


def _falls(table: Sequence[float], step: float) -> list[int]:
    """Layers where the share falls by at least `step` since the last such layer."""
    starts, held = [], 1.0
    for layer, share in enumerate(table[1:], 1):
        if held - share >= step:
            starts.append(layer)
            held = share
    return starts


def mean_share(points: Sequence[Point], n_layers: int) -> float:
    """Mean over layers of the share of entering visual tokens that a layer holds."""
    total, share, start = 0.0, 1.0, 0
    for point in points:
        total, share, start = total + share * (point.layer - start), point.share, point.layer
    return (total + share * (n_layers - start)) / n_layers


def scaled(points: Sequence[Point], n_layers: int, mean: float) -> tuple[Point, ...]:
    """The schedule with all shares scaled by one factor, at most 1 each, so that layers hold `mean` on average.

    Raises:
        ConfigError: the layers before the first point already hold more than `mean`.
    """
    if not points or mean >= 1:
        return ()
    least = points[0].layer / n_layers
    if mean < least - 1e-9:
        raise ConfigError(
            f"a mean of {mean:.3g} of the visual tokens is below the {least:.3g} that the layers before the first "
            f"point, layer {points[0].layer} of {n_layers}, hold alone; reduce before the decoder too, as in a+b"
        )
    low, high = 0.0, 1.0 / max(1e-9, min((p.share for p in points if p.share > 0), default=1.0))

    def at(factor: float) -> tuple[Point, ...]:
        return tuple(replace(p, share=min(1.0, p.share * factor)) for p in points)

    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_share(at(middle), n_layers) < mean else (low, middle)
    return tuple(p for p in at((low + high) / 2) if p.share < 1.0)


def table_of(points: Sequence[Point], n_layers: int) -> list[float]:
    """The share each layer holds."""
    shares = [1.0]
    for layer in range(1, n_layers):
        shares.append(next((point.share for point in reversed(points) if point.layer <= layer), 1.0))
    return shares
