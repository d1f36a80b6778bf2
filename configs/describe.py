"""Describe the settings for users: key, type, default and the comment beside the field."""

import ast
import dataclasses
import inspect
import types
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from foveate.configs.config import Config


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting that `--set`, a file or the environment can change."""

    key: str  # "cache.block_tokens"
    kind: Any  # the field's annotation: int, float, bool, str, tuple[str, ...] or a Literal of strings
    default: object
    comment: str  # the field's comment in config.py; empty if the name is clear

    @property
    def legal(self) -> str:
        """Return the legal values in words."""
        if get_origin(self.kind) is Literal:
            return "one of " + ", ".join(get_args(self.kind))
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        return names.get(self.kind, "a list of texts, separated by commas")


def sections() -> dict[str, type[Any]]:
    """Return the sections of a `Config` by name, in order."""
    hints = get_type_hints(Config)
    return {f.name: hints[f.name] for f in dataclasses.fields(Config)}


def describe_settings() -> list[Setting]:
    """Return every setting in the order of config.py."""
    settings = []
    for name, section in sections().items():
        hints, comments = get_type_hints(section), field_comments(section)
        for f in dataclasses.fields(section):
            comment = comments.get(f.name, "")
            settings.append(Setting(key=f"{name}.{f.name}", kind=hints[f.name], default=f.default, comment=comment))
    return settings


def render(config: Config) -> str:
    """Render `config` as YAML with each setting's comment. `load` of this YAML returns an equal `Config`."""
    lines: list[str] = []
    section = ""
    for setting in describe_settings():
        name, _, key = setting.key.partition(".")
        if name != section:
            doc = (inspect.getdoc(sections()[name]) or "").splitlines()[0]
            lines += ["", f"# {doc}", f"{name}:"]
            section = name
        line = f"  {key}: {_scalar(getattr(getattr(config, name), key))}"
        note = setting.comment
        if get_origin(setting.kind) is Literal:
            note = f"{setting.legal}; {note}" if note else setting.legal
        lines.append(f"{line}  # {note}" if note else line)
    return "\n".join(lines[1:]) + "\n"


def _scalar(value: object) -> str:
    plain = list(value) if isinstance(value, tuple) else value

    def dumped(style: str | None) -> str:
        text: str = yaml.safe_dump(plain, default_style=style, default_flow_style=True, width=2**31, allow_unicode=True)
        return text.removesuffix("\n").removesuffix("\n...")

    # A line break inside single quotes would spread over lines; double quotes escape the break.
    return text if len((text := dumped(None)).splitlines()) == 1 else dumped('"')


def field_comments(section: type[Any] | types.ModuleType) -> dict[str, str]:
    """Return the comment at the end of each field's line, from the source of `section`."""
    source = inspect.getsource(section)
    lines = source.splitlines()
    found = {}
    for node in ast.parse(source).body[0].body:  # type: ignore[attr-defined]
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.end_lineno is not None:
            rest = lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode().strip()
            found[node.target.id] = rest.removeprefix("#").strip()
    return found
