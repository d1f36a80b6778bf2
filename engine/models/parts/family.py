"""What the loader asks of a family, beyond what the engine asks of a model, and what all families do alike."""

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.engine.common.section import Section
from foveate.engine.images.preprocess import ImageProcessor
from foveate.engine.models.base import Attention, Model, ModelSpec, Rotary
from foveate.engine.models.parts.decoder import Decoder, DecoderConfig
from foveate.engine.models.parts.matrix import Linear, multiply
from foveate.engine.vision.signals import Tower

HEAD = "lm_head.weight"
EMBEDDING = "language_model.embed_tokens.weight"


@dataclass(frozen=True, slots=True)
class Source:
    """What a model is built from, before any tensor is read."""

    config: Section  # config.json
    processor: ImageProcessor
    eos_ids: tuple[int, ...]  # of generation_config.json; empty: the config says
    device: torch.device  # where constant tables go

    @property
    def text(self) -> Section:
        """The decoder's settings: `text_config`, or the whole config where it is flat, as Qwen publishes it."""
        return self.config.section("text_config") if "text_config" in self.config else self.config

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding; old files say so in the text config."""
        return any(part.flag("tie_word_embeddings", False) for part in (self.config, self.text))


class Family(Model):
    """A model that can be loaded. A family's file binds its subclass to the module's name `FAMILY`.

    A subclass adds its tower. Its weights are uninitialised until the loader fills them; it raises ModelError where the
    config asks for something it does not do, naming the key and the value.
    """

    def __init__(self, source: Source, decoder: DecoderConfig) -> None:
        super().__init__()
        self.processor = source.processor
        self.language_model = Decoder(decoder, source.text, source.device)
        # A tied head is no parameter of its own, so there is nothing that could come untied.
        self.lm_head = None if source.tied else Linear(decoder.hidden_size, decoder.vocab_size, bias=False)

    @abstractmethod
    def rename(self, name: str) -> str | None:
        """A checkpoint's tensor name, in any of its spellings, as this module calls it; None: known not to be used."""

    def _spec(self, family: str, source: Source, image_token_id: int, tower: Tower) -> ModelSpec:
        decoder = self.language_model.config
        return ModelSpec(
            family=family,
            n_layers=decoder.n_layers,
            n_heads=decoder.n_heads,
            n_kv_heads=decoder.n_kv_heads,
            head_dim=decoder.head_dim,
            hidden_size=decoder.hidden_size,
            vocab_size=decoder.vocab_size,
            max_context=decoder.max_context,
            image_token_id=image_token_id,
            eos_ids=source.eos_ids or source.config.integers("eos_token_id", decoder.eos_ids),
            n_pos_axes=3 if decoder.mrope else 1,
            tower=tower,
        )

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
