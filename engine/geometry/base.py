"""A model without its weights: what the engine must know to plan for it, its counts, grids and positions.

Plain arithmetic, no tensor. A family is one file beside this one that subclasses `CheckpointGeometry` and binds the
subclass to the name `FAMILY`; the module with the weights (engine/models) is built from it.
"""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import foveate.engine.geometry as folder
from foveate.engine.common import Grid, ModelError, Section, Size, Tower, names
from foveate.engine.geometry.config import DecoderConfig
from foveate.engine.geometry.refusals import check_files
from foveate.engine.images.preprocess import ImageProcessor

_NOT_FAMILIES = {"base", "config", "refusals"}
Positions = tuple[Sequence[int], ...]  # of the tokens of one segment, by axis


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The counts of a model."""

    family: str  # the file's name: "llava", "qwen2_vl"
    n_layers: int  # of the decoder
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    max_context: int
    image_token_id: int
    eos_ids: tuple[int, ...]  # from generation_config.json, else config.json
    n_pos_axes: int  # 1: RoPE, 3: M-RoPE
    tower: Tower  # what reducers may ask of the vision tower
    row_layers: tuple[int, ...] = (0,)  # decoder layers that visual rows enter, ascending; 0: in place of embeddings


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The settings of a Hugging Face directory."""

    config: Section  # config.json
    processor: ImageProcessor
    eos_ids: tuple[int, ...]  # of generation_config.json; empty: the config says

    @property
    def text(self) -> Section:
        """The decoder's settings: `text_config`, or the whole config where it is flat, as Qwen publishes it."""
        return self.config.section("text_config") if "text_config" in self.config else self.config

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding; old files say so in the text config."""
        return any(part.flag("tie_word_embeddings", False) for part in (self.config, self.text))


class Geometry(ABC):
    """One model without its weights."""

    spec: ModelSpec
    can_cut: bool = False  # whether the tower can leave out rows of pictures of one tile without newlines

    @abstractmethod
    def grid(self, height: int, width: int, original: Size | None = None) -> Grid:
        """Visual tokens of an image, newlines included.

        Args:
            height, width: its *prepared* size in pixels; of tiles, one above the other, together.
            original: (height, width) before it was cut into tiles; None if it was not.

        Raises:
            ImageError: no such picture comes from the image processor, or none of it would be seen.
        """

    @abstractmethod
    def n_patches(self, height: int, width: int) -> int:
        """Rows the tower reads for that image: the unit of the encode budget."""

    @abstractmethod
    def lay_out(self, segments: Sequence[int | Grid]) -> tuple[list[Positions], int]:
        """Positions of a prompt given as runs of text (a count) and images (a grid), unpruned.

        Returns:
            the positions of each segment, `spec.n_pos_axes` axes of as many as it has tokens; and the position of the
            next (generated) token, which text continues from on every axis.
        """


class CheckpointGeometry(Geometry):
    """The geometry of a checkpoint. Built from its settings; ModelError where they ask for what we do not do."""

    family: ClassVar[str]  # the file's name, which is the config's model_type

    def __init__(self, checkpoint: Checkpoint, decoder: DecoderConfig, image_token_id: int, tower: Tower) -> None:
        self.processor = checkpoint.processor
        self.decoder = decoder
        self.tied = checkpoint.tied
        self.spec = ModelSpec(
            family=self.family,
            n_layers=decoder.n_layers,
            n_heads=decoder.n_heads,
            n_kv_heads=decoder.n_kv_heads,
            head_dim=decoder.head_dim,
            hidden_size=decoder.hidden_size,
            vocab_size=decoder.vocab_size,
            max_context=decoder.max_context,
            image_token_id=image_token_id,
            eos_ids=checkpoint.eos_ids or checkpoint.config.integers("eos_token_id", decoder.eos_ids),
            n_pos_axes=3 if decoder.mrope else 1,
            tower=tower,
        )


def families() -> list[str]:
    """The model types there are: the file names beside this one."""
    return [name for name in names(folder) if name not in _NOT_FAMILIES]


def load_geometry(path: Path) -> CheckpointGeometry:
    """Read the family that the `config.json` of a Hugging Face directory names.

    Raises:
        ModelError: a file is missing or broken, the weights are quantized, or the family or a setting is not supported;
            each is named.
        ConfigError: the image processor's settings are not supported.
    """
    check_files(path, ModelError)
    config = Section.read(path / "config.json", ModelError)
    kind = config.text("model_type", "")
    if kind not in families():
        raise ModelError(f"{config.where}: model_type {kind!r} is not supported; there are {', '.join(families())}")
    family: Callable[[Checkpoint], CheckpointGeometry]
    family = importlib.import_module(f"{folder.__name__}.{kind}").FAMILY
    return family(Checkpoint(config, ImageProcessor.load(path), _eos_ids(path)))


def _eos_ids(path: Path) -> tuple[int, ...]:
    file = path / "generation_config.json"
    return Section.read(file, ModelError).integers("eos_token_id", ()) if file.is_file() else ()
