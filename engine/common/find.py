"""Find a method by name: the name is the file's name. There is no list to keep in step."""

import importlib
import pkgutil
from types import ModuleType
from typing import Any

from foveate.configs.errors import ConfigError


def names(family: ModuleType) -> list[str]:
    """The methods of a family: every module of its folder, e.g. of foveate.engine.reduce.methods."""
    return sorted(module.name for module in pkgutil.iter_modules(family.__path__))


def label(family: ModuleType) -> str:
    """The name of a family in messages: "reduce" for engine.reduce.methods, "split" for engine.reduce.split."""
    return family.__name__.removesuffix(".methods").rpartition(".")[2]


def load_method(family: ModuleType, name: str) -> type[Any]:
    """Return the class that module `family`.`name` declares as ``METHOD``.

    Only that one module is imported, so a method may import a heavy or optional package at its top.

    Raises:
        ConfigError: no such module; the message lists those there are.
    """
    if name not in names(family):
        known = ", ".join(names(family))
        raise ConfigError(f"{label(family)}.method: no {name!r}; there are {known}")
    method: type[Any] = importlib.import_module(f"{family.__name__}.{name}").METHOD
    return method
