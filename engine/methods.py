"""Build a method from its name and settings; list all methods for GET /v1/vlm/methods."""

import dataclasses
import difflib
import math
import sys
import typing
from collections.abc import Mapping
from itertools import pairwise
from types import ModuleType
from typing import Any

import foveate.engine.prune.methods as prune_family
import foveate.engine.reduce.methods as family
from foveate.configs.errors import ConfigError
from foveate.engine.common import (
    FieldInfo,
    MethodInfo,
    Stage,
    Tower,
    Value,
    VisualBudget,
    is_share,
    label,
    load_method,
    misplaced,
    names,
    setting,
    states_share,
)
from foveate.engine.prune.base import Pruner
from foveate.engine.reduce import split as split_family
from foveate.engine.reduce.base import Chain, Reducer, Split


def _type_name(hint: object) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(f'"{word}"' for word in typing.get_args(hint))
    assert isinstance(hint, type), "a method's field is a bool, int, float, str or a Literal of words"
    return hint.__name__


def fields_of(method: type[Any]) -> list[FieldInfo]:
    hints = typing.get_type_hints(method)
    return [
        FieldInfo(name=field.name, type=_type_name(hints[field.name]), default=typing.cast(Value, field.default))
        for field in dataclasses.fields(method)
    ]


def _checked(key: str, field: FieldInfo, value: Value) -> Value:
    """The value as the field holds it. Raises ConfigError: the field cannot hold it."""
    held = setting(field, value)
    if held is None and isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key}: {value} is not a finite number")
    if held is None:
        raise ConfigError(f"{key}: {value!r} is not {field.type}; the default is {field.default!r}")
    return held


def build_method(family: ModuleType, name: str, params: Mapping[str, Value]) -> Any:
    """Return a family's method `name` with `params` over its defaults.

    Raises:
        ConfigError: no such method or field, or a value of the wrong type or out of range. The message is one line:
            "reduce.visionzip.compat: 3 is not bool; the default is False".
    """
    where = label(family)
    if name not in names(family):
        known = ", ".join(names(family))
        raise ConfigError(f"{where}.method: no {name!r}{_nearest(name, names(family))}; there are {known}")
    method = load_method(family, name)
    legal = {field.name: field for field in fields_of(method)}
    checked: dict[str, Value] = {}
    for key, value in params.items():
        if key not in legal:
            known = f"its fields are {', '.join(legal)}" if legal else "it has no fields"
            raise ConfigError(f"{where}.{name}.{key}: no such field{_nearest(key, list(legal))}; {known}")
        checked[key] = _checked(f"{where}.{name}.{key}", legal[key], value)
    try:
        return method(**checked)
    except ConfigError as error:
        raise ConfigError(f"{where}.{name}.{error}") from None


def build_reducer(name: str, params: Mapping[str, Value]) -> Reducer:
    """Return a reducer. Raises ConfigError as `build_method`."""
    reducer: Reducer = build_method(family, name, params)
    return reducer


def build_pruner(stage: Stage) -> Pruner:
    """Return a method that prunes inside the decoder. Raises ConfigError as `build_method`."""
    pruner: Pruner = build_method(prune_family, stage.method, stage.params)
    return pruner


def build(visual: VisualBudget) -> Reducer:
    """Return the reducer or the composition a request asks for.

    Raises:
        ConfigError: as `build_reducer`; or a composition's stages are out of order, or a share is not in (0, 1].
    """
    if not visual.stages:
        return build_reducer(visual.method, visual.params)
    stages = tuple(build_reducer(stage.method, stage.params) for stage in visual.stages)
    infos = [_reducer_info(said.method, type(stage)) for said, stage in zip(visual.stages, stages, strict=True)]
    for before, after in pairwise(infos):
        if misplaced(before, after):
            raise ConfigError(
                f"reduce.{visual.method}: {after.name} needs what the stage before it no longer leaves; put it first"
            )
    for i, said in enumerate(visual.stages):
        if said.keep is not None and not is_share(said.keep):
            raise ConfigError(f"reduce.{said.method}.keep: {said.keep} is not in (0, 1]")
        if said.keep is not None and not states_share(i, len(stages)):
            raise ConfigError(f"reduce.{said.method}.keep: the last stage keeps what the budget allows")
    return Chain(stages=stages, keeps=tuple(stage.keep for stage in visual.stages))


def build_split(name: str) -> Split:
    """Return a way to share one budget. Raises ConfigError: unknown name; the message lists all names."""
    found: Split = load_method(split_family, name)()
    return found


def splits() -> list[str]:
    """Every way to share one budget, by name."""
    return names(split_family)


def _nearest(word: str, legal: list[str]) -> str:
    found = difflib.get_close_matches(word, legal, n=1)
    return f", did you mean {found[0]!r}" if found else ""


def describe() -> list[MethodInfo]:
    """Every reducer, then every pruner, by name. Imports all methods."""
    reducers = [_reducer_info(name, load_method(family, name)) for name in names(family)]
    inside = {"signals_cls": [], "signals_no_cls": [], "stage": "decoder"}
    return reducers + [_info(name, load_method(prune_family, name), **inside) for name in names(prune_family)]


def _info(name: str, method: type[Reducer] | type[Pruner], **more: Any) -> MethodInfo:
    docstring = sys.modules[method.__module__].__doc__
    assert docstring, "a method's file says in its first line what the method does"
    return MethodInfo(
        name=name,
        summary=docstring.splitlines()[0],
        source=method.source,
        fields=fields_of(method),
        question_aware=method.question_aware,
        shared=not method.question_aware,
        **more,
    )


def _reducer_info(name: str, method: type[Reducer]) -> MethodInfo:
    return _info(
        name,
        method,
        signals_cls=_signals(method, Tower(has_cls=True, depth=23)),
        signals_no_cls=_signals(method, Tower(has_cls=False, depth=32, merges=True)),
        fits=method.fits,
        stage=method.stage,
        first_only=method.whole_grid,
        restores=method.restores,
    )


def _signals(method: type[Reducer], tower: Tower) -> list[str]:
    """Signals that the method reads with default settings, on a tower of the given kind and depth."""
    if (method.fits == "cls" and not tower.has_cls) or (method.fits == "no_cls" and tower.has_cls):
        return []
    return sorted(str(signal) for signal in method().wanted(tower))
