"""DyMU: merge tokens whose attention keys are more similar than a threshold, layer by layer of the encoder.

Source: Wang et al., 2025, arXiv:2504.17040 (released code: MikeWangWZHL/dymu), its dynamic merging.
At each layer, the method matches every other row with the most similar of the remaining rows, by the cosine of their
keys. All pairs above the threshold merge, weighted by the tokens in each row. Plain areas merge early, and the number
of merges depends on the picture.
Departs from the paper: the budget sets the count, because the count is fixed before the picture is encoded. So merging
stops once the budget is met, with the best pairs of that layer. If the thresholds leave more rows, the last layer
merges more of its best pairs. The method acts after the encoder, on the keys of some of its layers, and takes the mean
of its tokens' keys as the key of a merged row. The paper merges inside every block and adds log(size) to attention. The
threshold is ours and is the same for all layers; the paper calibrates its thresholds per layer on a large set of
pictures. Virtual unmerging is left out: unmerging needs the language model's attention at full length, which the engine
does not compute. Even and odd rows count from the first patch; the released code counts from the CLS row, so its
sources are the destinations here. Rows are mixed before the projector, or after the projector if the encoder merges
patches.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from foveate.configs.errors import ConfigError
from foveate.engine.common import ENC, Signal, Tower, signals
from foveate.engine.primitives.merge import Pass, evenly, match, merge_by_layers
from foveate.engine.reduce.base import Group, Reducer
from foveate.engine.vision import TokenTransform, VisualInputs


@dataclass(frozen=True, kw_only=True)
class DyMU(Reducer):
    """Every source token is in exactly one output row, the plain mean of its tokens."""

    source: ClassVar[str] = "arXiv:2504.17040"
    group: ClassVar[Group] = "select and merge"

    threshold: float = 0.9  # cosine of keys above which two rows merge
    n_layers: int = 4  # layers whose keys are compared: evenly over the depth, the last layer included

    def __post_init__(self) -> None:
        if not -1.0 <= self.threshold <= 1.0:
            raise ConfigError(f"threshold: {self.threshold} is not in [-1, 1]")
        if not 1 <= self.n_layers <= 64:
            raise ConfigError(f"n_layers: {self.n_layers} is not in 1..64")

    def needs(self, tower: Tower) -> frozenset[Signal]:
        return frozenset({ENC, *(signals.keys(layer) for layer in evenly(self.n_layers))})

    def transform(self, inputs: VisualInputs, k: int) -> TokenTransform:
        def decide(now: Pass) -> tuple[int, Tensor | None]:
            if now.n_layers_left <= 0:
                return now.n_over, None
            return int((match(now.keys).score > self.threshold).sum()), None

        return merge_by_layers(inputs, k, evenly(self.n_layers), decide)


METHOD = DyMU
