"""Parse the part of RFC 8941 (structured header fields) that VLM-* headers use: one item with parameters.

Differences from the RFC: a decimal may have any number of digits (a ratio of 0.1111 is common), a number may be a
percentage, and parameter values may be bare words.
"""

import re
from dataclasses import dataclass, field

Bare = bool | int | float | str

_KEY = r"[a-z*][a-z0-9_.*-]*"
_WORD = re.compile(r"[A-Za-z*][A-Za-z0-9_.*:/-]*")
_INTEGER = re.compile(r"-?[0-9]{1,15}")
_DECIMAL = re.compile(r"-?[0-9]{1,12}\.[0-9]{1,15}")
_PERCENT = re.compile(r"[0-9]{1,12}(\.[0-9]{1,15})?%")
_QUOTED = re.compile(r'"((?:[\x20-\x21\x23-\x5b\x5d-\x7e]|\\["\\])*)"')
_PARAMETER = re.compile(rf' *; *({_KEY})(?:=("(?:[^"\\]|\\.)*"|[^;" ]+))?')


@dataclass(frozen=True, slots=True)
class Item:
    value: Bare
    params: dict[str, Bare] = field(default_factory=dict)


def bare(text: str) -> Bare:
    """Parse one value: 12, 0.25, 25%, ?1, word or "quoted". Raises ValueError."""
    if text in ("?0", "?1"):
        return text == "?1"
    if _INTEGER.fullmatch(text):
        return int(text)
    if _DECIMAL.fullmatch(text):
        return float(text)
    if _PERCENT.fullmatch(text):
        return float(text[:-1]) / 100
    if _WORD.fullmatch(text):
        return text
    if _QUOTED.fullmatch(text):
        return unquoted(text)
    raise ValueError("expected an integer, a decimal, ?0, ?1, a word or a quoted string")


def unquoted(text: str) -> str:
    """Return the inside of a quoted string, and any other text as it is."""
    quoted = _QUOTED.fullmatch(text.strip(" "))
    return text if quoted is None else re.sub(r"\\(.)", r"\1", quoted[1])


def parse(text: str) -> Item:
    """Parse `value` or `value;key=value;flag`. Raises ValueError."""
    head, semicolon, _ = text.strip(" ").partition(";")
    value = bare(head.strip(" "))
    params: dict[str, Bare] = {}
    rest = text.strip(" ")[len(head) :] if semicolon else ""
    while rest:
        match = _PARAMETER.match(rest)
        if match is None:
            raise ValueError("expected parameters as ;key=value")
        if match[1] in params:
            raise ValueError(f"parameter {match[1]} is given twice")
        params[match[1]] = True if match[2] is None else bare(match[2])
        rest = rest[match.end() :]
    return Item(value, params)
