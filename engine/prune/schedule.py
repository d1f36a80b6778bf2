"""Where visual tokens leave the decoder, as arithmetic: points, their scaling to a budget, the mean over layers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from foveate.configs.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Point:
    """Before `layer` runs, `share` of the visual tokens that entered the decoder are left; 0: none are."""

    layer: int
    share: float


def kept(n: int, share: float) -> int:
    """Tokens left of n at a share: rounded down, as published, but never to nothing unless the share is 0."""
    return 0 if share <= 0 else max(1, min(n, int(share * n + 1e-6)))


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
    """Points from layers and shares given side by side; of several at one layer, as a shallow decoder makes of a deep
    one's, the last holds.

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
        last = points[layer] = Point(layer, share)
    return tuple(points.values())


def mean_share(points: Sequence[Point], n_layers: int) -> float:
    """Of the visual tokens that entered, what a layer holds on average."""
    total, share, start = 0.0, 1.0, 0
    for point in points:
        total, share, start = total + share * (point.layer - start), point.share, point.layer
    return (total + share * (n_layers - start)) / n_layers


def scaled(points: Sequence[Point], n_layers: int, mean: float) -> tuple[Point, ...]:
    """The same schedule with all shares times one factor, up to 1, so that layers hold `mean` on average.

    Raises:
        ConfigError: the layers before the first point alone hold more.
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
