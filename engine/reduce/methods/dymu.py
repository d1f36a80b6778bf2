"""DyMU: merge tokens whose attention keys are alike beyond a threshold, layer by layer of the encoder.

Source: Wang et al., 2025, arXiv:2504.17040 (released code: MikeWangWZHL/dymu), its dynamic merging.
At each layer every other row is matched with the closest of the rest by the cosine of their keys, and all pairs beyond
the threshold merge, weighted by the tokens in them: plain areas go early, and how many is the picture's own affair.
Departs from it: the count is the budget's, because it is fixed before the picture is encoded. So merging stops once
the budget is met, with the best pairs of that layer; and where thresholds leave more, the last layer goes on merging
its best pairs. It acts after the encoder, on the keys of some of its layers, and takes the mean of its tokens' keys for
a merged row's, where the paper merges inside every block and adds log(size) to attention. The threshold is ours and
one for all layers; the paper's are calibrated per layer on a large set of pictures. Virtual unmerging is left out: it
needs the language model's attention at full length, which the engine does not do. Rows are mixed before the projector
where the encoder gives such rows, after it where it merges patches.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from foveate.configs.errors import ConfigError
from foveate.engine.primitives.merge import Pass, evenly, match, merge_by_layers
from foveate.engine.reduce.base import Group, Reducer
from foveate.engine.vision import signals
from foveate.engine.vision.inputs import VisualInputs
from foveate.engine.vision.signals import ENC, Signal, Tower
from foveate.engine.vision.transform import TokenTransform


@dataclass(frozen=True, kw_only=True)
class DyMU(Reducer):
    """Every source token is in exactly one output row, the plain mean of its tokens."""

    source: ClassVar[str] = "arXiv:2504.17040"
    group: ClassVar[Group] = "select and merge"

    threshold: float = 0.9  # cosine of keys above which two rows merge
    n_layers: int = 4  # whose keys are compared, evenly over the depth, the last one among them

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
