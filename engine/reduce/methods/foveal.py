"""Foveal: keep attended tokens that differ from the tokens kept before; the fewer are kept, the more difference counts.

Source: ours, measured in docs/quality.md; the greedy product of worth and distance is ZOO-Prune's (Kim et al., 2025,
arXiv:2509.24837), with attention received in the place of sensitivity.
The most attended token is kept first. Each next token has the largest product of two factors: its attention, to a
power, and its cosine distance to the nearest kept token. The power grows with the share of tokens kept. With many
tokens, everything attended to finds a place, so attention decides. With few tokens, two tokens on one object are one
too many. Rows are compared as the last layer of the tower leaves them: there, neighbours on one object are more alike
than behind the projector.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.configs.errors import ConfigError
from foveate.engine.common import Signal, Tower, signals
from foveate.engine.primitives.greedy import greedy
from foveate.engine.primitives.ranking import finite, unit
from foveate.engine.reduce.base import Group, Reducer
from foveate.engine.vision import VisualInputs

_LEAST = 1e-6  # least attention, as a share of the largest; no token is worth nothing
_SAME = 1e-4  # cosine distance below which rows are equal, and attention alone decides


@dataclass(frozen=True, kw_only=True)
class Foveal(Reducer):
    """Needs no text, so one result serves every question."""

    source: ClassVar[str] = ""
    group: ClassVar[Group] = "attended and unlike"

    sharpness: float = 6.0  # power of attention per share kept: 1.5 at a quarter; 0: distance alone

    def __post_init__(self) -> None:
        if not 0.0 <= self.sharpness <= 100.0:
            raise ConfigError(f"sharpness: {self.sharpness} is not in [0, 100]")

    def needs(self, tower: Tower) -> frozenset[Signal]:
        return frozenset({signals.recv(), signals.hidden()})

    def select(self, inputs: VisualInputs, k: int) -> Tensor:
        """Cost: n^2 * C multiply-adds once, then k passes over n numbers; n^2 floats of memory."""
        rows, attention = unit(inputs.hidden()), finite("attention weights", inputs.recv())
        similarity = rows @ rows.T
        relative = (attention / attention.max().clamp(min=torch.finfo(torch.float32).tiny)).clamp(min=_LEAST)
        worth = relative.log() * (self.sharpness * k / inputs.n)  # logarithms: a power may be too small for float32
        nearest = torch.full_like(worth, -1.0)  # the largest cosine with a kept token

        def after(pick: Tensor) -> Tensor:
            nonlocal nearest
            nearest = torch.maximum(nearest, similarity.index_select(0, pick)[0])
            return worth + (1 - nearest).clamp(min=_SAME).log()

        return greedy(worth, after, torch.empty(0, dtype=torch.int64, device=rows.device), k).sort().values


METHOD = Foveal
