"""What the loader asks of a family, beyond what the engine asks of a model, and what all families do alike."""

from abc import abstractmethod

import torch
from torch import Tensor

from foveate.engine.geometry.base import CheckpointGeometry
from foveate.engine.images.preprocess import ImageProcessor
from foveate.engine.models.base import Attention, Model, Rotary
from foveate.engine.models.parts.decoder import Decoder
from foveate.engine.models.parts.layers import Linear, multiply

HEAD = "lm_head.weight"
EMBEDDING = "language_model.embed_tokens.weight"


class Family(Model):
    """A model that can be loaded. A family's file binds its subclass to the module's name `FAMILY`.

    A subclass adds its tower. Its weights are uninitialised until the loader fills them.

    Args:
        geometry: of the same family.
        device: where constant tables go.
    """

    geometry: CheckpointGeometry

    def __init__(self, geometry: CheckpointGeometry, device: torch.device) -> None:
        super().__init__()
        self.geometry, decoder = geometry, geometry.decoder
        self.language_model = Decoder(decoder, device)
        # A tied head is no parameter of its own, so there is nothing that could come untied.
        self.lm_head = None if geometry.tied else Linear(decoder.hidden_size, decoder.vocab_size, bias=False)

    @property
    def processor(self) -> ImageProcessor:
        return self.geometry.processor

    @abstractmethod
    def rename(self, name: str) -> str | None:
        """A checkpoint's tensor name, in any of its spellings, as this module calls it; None: known not to be used."""

    def embed(self, token_ids: Tensor) -> Tensor:
        rows: Tensor = self.language_model.embed_tokens(token_ids)
        return rows

    def rotary(self, positions: Tensor) -> Rotary:
        return self.language_model.rotary(positions)

    def run(
        self, rows: Tensor, rotary: Rotary, attention: Attention, layers: range, wanted: Tensor | None = None
    ) -> Tensor:
        return self.language_model.run(rows, rotary, attention, layers, wanted)

    def project(self, layer: int, rows: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        return self.language_model.project(layer, rows, rotary)

    def logits(self, rows: Tensor) -> Tensor:
        head = self.language_model.embed_tokens if self.lm_head is None else self.lm_head
        return multiply(self.language_model.norm(rows), head.weight).float()
