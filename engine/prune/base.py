"""The prune family: at a layer of the decoder some visual tokens leave the residual stream, for all deeper layers.

A method is one file with one frozen dataclass, bound to the module's name `METHOD`; its fields are its settings.
`points` gives layers and token counts before anything runs; admission, blocks and accounting rely on these counts.
`select` chooses the tokens of one prompt from a `Probe`. Text is never dropped. A decision is stored and reused after a
preemption.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from foveate.engine.primitives.ranking import top
from foveate.engine.prune.probe import Probe
from foveate.engine.prune.schedule import Point, at_depth, checked, numbers, staged


class Kept(NamedTuple):
    """Visual tokens kept at one point, numbered over all pictures."""

    keep: Tensor  # [k] int64, strictly increasing: of 0..V-1, numbered as `Probe.visual`
    mix: Tensor | None = None  # float32 [k, V]: the kept rows become `mix @ rows[visual]`; None: they stay as they are


@dataclass(frozen=True, kw_only=True)
class Pruner:
    """Base of the family. Deterministic: scores in float32, ties to the lower index, randomness from `probe.seed`."""

    source: ClassVar[str] = ""  # the paper, for GET /v1/vlm/methods
    group: ClassVar[Literal["inside the decoder"]] = "inside the decoder"  # where docs/methods.md lists the method
    question_aware: ClassVar[bool] = True  # reads what follows the pictures: the deeper layers are never shared
    reads_inputs: ClassVar[bool] = False  # wants `Probe.inputs`, the rows that entered the first layer

    compact: bool = False  # kept tokens get new positions in deeper layers (one-axis RoPE); False: they keep theirs

    def points(self, n_layers: int) -> tuple[Point, ...]:
        """Where tokens leave and what share of those that entered stays: layers ascending in [1, n_layers), shares
        never growing. Pure arithmetic of the fields and the depth.

        Raises:
            ConfigError: the fields do not fit this depth.
        """
        raise AssertionError(f"{type(self).__name__} does not say where tokens leave")

    def select(self, probe: Probe, counts: Sequence[int]) -> Kept:
        """Choose the visual tokens that stay at the probe's point.

        Args:
            counts: tokens that stay, per picture; between 0 and what is present, and not all of it everywhere.

        Returns:
            exactly `counts[i]` tokens of picture i.
        """
        raise AssertionError(f"{type(self).__name__} does not say what stays")


@dataclass(frozen=True, kw_only=True)
class Staged(Pruner):
    """Base of methods that prune in stages. A request may set the layers and shares, as two lists of numbers.

    A subclass gives `shares` its default and names the layers that go with it.
    """

    paper: ClassVar[tuple[int, ...]]  # the layers of the paper's decoder
    depth: ClassVar[int]  # which has so many

    layers: str = ""  # layers before which tokens are dropped, as "8,16,24"; empty: the paper's, scaled to the depth
    shares: str  # share of the entering visual tokens that stay at each of `layers`

    def __post_init__(self) -> None:
        checked(self.layers, self.shares, self.paper)

    def points(self, n_layers: int) -> tuple[Point, ...]:
        layers = [int(layer) for layer in numbers("layers", self.layers)]
        paper = [at_depth(layer, self.depth, n_layers) for layer in self.paper]
        return staged(layers or paper, numbers("shares", self.shares), n_layers)


def best(probe: Probe, scores: Tensor, counts: Sequence[int]) -> Tensor:
    """[sum of counts] int64: of each picture its `counts` highest `scores` [n visual], ties to the lower index."""
    parts = []
    for picture, count in enumerate(counts):
        mine = (probe.picture == picture).nonzero()[:, 0]
        parts.append(mine[top(scores[mine], count)])
    return torch.cat(parts)


def as_they_are(keep: Tensor, n: int) -> Tensor:
    """[k, n] float32: the `mix` that changes nothing, to be changed where a kept token takes others in."""
    return torch.nn.functional.one_hot(keep, n).float()
