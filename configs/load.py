"""Load settings from a YAML file or preset, the environment and `--set`. Loading is strict; every error is one line.

Later sources win: defaults < file < environment < `--set`. Environment variables are named FOVEATE__SECTION__KEY, with
two underscores, because Kubernetes injects FOVEATE_SERVER_PORT=tcp://... into pods for a service `foveate-server`.
"""

import difflib
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml

from foveate.configs.config import Config
from foveate.configs.describe import Setting, describe_settings, sections
from foveate.configs.errors import ConfigError

PRESETS = Path(__file__).parent / "presets"
ENVIRONMENT = "FOVEATE__"
_BLANKS = " \t\r\n"  # as YAML has them; other white space may be part of a text


def load(
    file: str | Path | None = None, sets: Sequence[str] = (), environment: Mapping[str, str] | None = None
) -> Config:
    """Build the settings.

    Args:
        file: path of a YAML file with sections and keys, or the name of a preset (`preset_names`).
        sets: each item is "section.key=value". For a repeated key, the last item wins.
        environment: usually `os.environ`. Only names that begin with FOVEATE__ are read.

    Raises:
        ConfigError: a key is unknown, a value has the wrong type or is out of range, or a file is unreadable.
    """
    known = {s.key: s for s in describe_settings()}
    values = {} if file is None else _from_file(file, known)
    for name, text in sorted((environment or {}).items()):
        if name.startswith(ENVIRONMENT):
            key = name.removeprefix(ENVIRONMENT).lower().replace("__", ".")
            values[key] = _parse(_setting(key, known), text)
    for item in sets:
        key, equals, text = item.partition("=")
        if not equals:
            raise ConfigError(f"--set {_show(item)}: there is no '='; write --set section.key=value")
        values[key.strip()] = _parse(_setting(key.strip(), known), text)
    return _build(values)


def preset_names() -> list[str]:
    return sorted(p.stem for p in PRESETS.glob("*.yaml"))


def nearest(name: str, names: Sequence[str]) -> str:
    """Return '; did you mean X?' for the closest of `names`, or '' if no name is close."""
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def _build(values: Mapping[str, object]) -> Config:
    built = {}
    for name, section in sections().items():
        prefix = f"{name}."
        built[name] = section(**{k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)})
    return Config(**built)


def _setting(key: str, known: Mapping[str, Setting]) -> Setting:
    if key in known:
        return known[key]
    same_tail = [k for k in known if k.partition(".")[2] == key.rpartition(".")[2]]
    hint = f"; did you mean {same_tail[0]}?" if same_tail else nearest(key, list(known))
    raise ConfigError(f"{_show(key)}: no such setting{hint or '; `foveate config` lists them all'}")


def _from_file(file: str | Path, known: Mapping[str, Setting]) -> dict[str, object]:
    path = Path(file)
    if not path.is_file() and str(file) in preset_names():
        path = PRESETS / f"{file}.yaml"
    values: dict[str, object] = {}
    for section, content in _mapping(_read(path), path, "sections").items():
        if section not in sections():
            hint = nearest(str(section), list(sections())) or f"; there are {', '.join(sections())}"
            raise ConfigError(f"{path}: {_show(section)}: no such section{hint}")
        for name, value in _mapping(content, path, f"settings under {section}").items():
            setting = _setting(f"{section}.{name}", known)
            values[setting.key] = _check(setting, value)
    return values


def _read(path: Path) -> object:
    try:
        content: object = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        if path.exists():
            raise ConfigError(f"--config {path}: cannot be read: {error}") from error
        presets = preset_names()
        hint = nearest(str(path), presets)
        raise ConfigError(f"--config {path}: no such file, nor a preset ({', '.join(presets)}){hint}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}, column {mark.column + 1}:" if mark else ""
        problem = getattr(error, "problem", None) or "is not text"
        raise ConfigError(f"--config {path}:{where} not YAML: {problem}") from error
    return content


def _mapping(content: object, path: Path, of: str) -> dict[Any, object]:
    if content is None:  # an empty file, or a section whose lines are all commented out
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path}: {_show(content)} stands where {of} are expected, as 'name: value'")
    return content


def _parse(setting: Setting, text: str) -> object:
    """Parse a value from the text of `--set` or the environment."""
    text = text.strip()
    if setting.kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if setting.kind in (int, float):
        try:
            return _check(setting, setting.kind(text))
        except ValueError as error:
            if isinstance(error, ConfigError):
                raise
            raise _wrong(setting, text) from error
    return _check(setting, text)


def _check(setting: Setting, value: object) -> object:
    """Check a value that YAML has already typed. Return the value in the type of the field."""
    kind = setting.kind
    if get_origin(kind) is Literal:
        if value in get_args(kind):
            return value
        raise _wrong(setting, value, nearest(str(value), get_args(kind)))
    if get_origin(kind) is tuple:
        items = _items(setting, value) if isinstance(value, str) else value
        if isinstance(items, list):
            for number, item in enumerate(items):
                if not isinstance(item, str):
                    raise _wrong(setting, value, f"; item {number} is {_show(item)}: put quotes around a text")
            return tuple(items)
    elif kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        if math.isfinite(value):
            return float(value)
    elif kind is int and isinstance(value, int) and not isinstance(value, bool):
        if abs(value) < 2**63:  # the message to the engine cannot carry more
            return value
    elif kind in (bool, str) and isinstance(value, kind):
        return value
    raise _wrong(setting, value)


def _items(setting: Setting, text: str) -> Sequence[object]:
    """Read a list from one text: `a, b`, or the form that `render` and JSON write, `[a, "b"]`.

    Quotes keep commas, brackets and outer blanks in an item. Without quotes each item is the text between two commas,
    and empty items count for nothing. Raises ConfigError if quotes or brackets do not match.
    """
    bare = re.fullmatch(r"\[([^\[\]{}'\"]*)\]", text)
    if bare or not re.search(r"(^|,)\s*['\"\[]", text):  # YAML would read * and # of a bare text as its own signs
        items = [item.strip(_BLANKS) for item in (bare[1] if bare else text).split(",")]
        return [item for item in items if item]
    listed = text if text.startswith("[") else f"[{text}]"
    for read in (json.loads, _texts_of_yaml):  # JSON first: YAML does not join the two escapes of a surrogate pair
        try:
            found = read(listed)
        except (ValueError, yaml.YAMLError, RecursionError):
            continue
        if isinstance(found, list) and (read is _texts_of_yaml or all(isinstance(item, str) for item in found)):
            return found
    raise _wrong(setting, text, '; write ["a", "b"]')


def _texts_of_yaml(text: str) -> object:
    """Read YAML with every scalar as text, because 12, no and 2026-11-21 are texts on a command line."""
    content: object = yaml.load(text, Loader=yaml.BaseLoader)
    return content


def _wrong(setting: Setting, value: object, hint: str = "") -> ConfigError:
    return ConfigError(f"{setting.key}: {_show(value)} is not {setting.legal}{hint}")


def _show(value: object) -> str:
    """Format a value for a one-line error."""
    text = str(value) if isinstance(value, str) and value.isprintable() and value.strip() else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
