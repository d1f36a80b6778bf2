"""From a Hugging Face directory to the geometry of its model. Reads JSON alone."""

import importlib
from collections.abc import Callable
from pathlib import Path

import foveate.engine.geometry as folder
from foveate.engine.common.errors import ModelError
from foveate.engine.common.find import names
from foveate.engine.common.section import Section
from foveate.engine.geometry.base import Checkpoint, CheckpointGeometry
from foveate.engine.images.preprocess import ImageProcessor

_NOT_FAMILIES = {"base", "config", "load"}


def families() -> list[str]:
    """The model types there are: the file names beside this one."""
    return [name for name in names(folder) if name not in _NOT_FAMILIES]


def load_geometry(path: Path) -> CheckpointGeometry:
    """Read the family that `config.json` names.

    Raises:
        ModelError: a file is missing or broken, or the family or a setting is not supported; each is named.
        ConfigError: the image processor's settings are not supported.
    """
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
