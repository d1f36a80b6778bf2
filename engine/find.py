"""Find a method by name: the name is the file's name. There is no list to keep in step."""

import importlib
import pkgutil
from types import ModuleType
from typing import Any

from foveate.configs.errors import ConfigError

_NOT_METHODS = {"base", "budget", "build", "chain", "cut", "inputs", "probe", "schedule", "signals", "transform"}


def names(family: ModuleType) -> list[str]:
    """The methods of a family, e.g. every module of foveate.engine.reduce but what it shares."""
    found = (m.name for m in pkgutil.iter_modules(family.__path__) if not m.ispkg)
    return sorted(name for name in found if name not in _NOT_METHODS and not name.startswith("primitives"))


def find(family: ModuleType, name: str) -> type[Any]:
    """Return the class that module `family`.`name` declares as ``METHOD``.

    Only that one module is imported, so a method may import a heavy or optional package at its top.

    Raises:
        ConfigError: no such module; the message lists those there are.
    """
    if name not in names(family):
        known = ", ".join(names(family))
        raise ConfigError(f"{family.__name__.rpartition('.')[2]}.method: no {name!r}; there are {known}")
    method: type[Any] = importlib.import_module(f"{family.__name__}.{name}").METHOD
    return method
