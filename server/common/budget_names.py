"""Names that clients give to budget fields by mistake, and the fields that they probably mean."""

import difflib
import re
from collections.abc import Mapping

from foveate.server.common.budget_fields import FIELDS, Headers

MAX_NAME_CHARS = 64  # of an unknown name; the rest says nothing about the field that it means
_SYNONYMS = {
    **dict.fromkeys(("budget", "count"), "tokens"),
    **dict.fromkeys(("keep", "share", "percent", "fraction"), "ratio"),
    **dict.fromkeys(("reducer", "algorithm"), "method"),
    "image": "per_image",
}


def unknown_headers(headers: Headers) -> list[str]:
    """Names that speak of a budget and that no field has, in the order received."""
    known = {each.header.lower() for each in FIELDS}
    return [name for name, _ in headers if name not in known and is_budget_name(name)]


def is_budget_name(name: str) -> bool:
    """Whether a name that no field has can only mean a budget: `vlm_tokens`, `visual`, `VLM-Visual-Tokens`."""
    return not {"vlm", "visual"}.isdisjoint(_words(name))


def is_visual_name(name: str) -> bool:
    """Whether a name speaks of visual tokens."""
    return "visual" in _words(name)


def body_names() -> dict[str, str]:
    """The paths of the fields in the body, by the names that stand for them."""
    names = {_plain(each.header): each.path for each in FIELDS} | {each.key: each.path for each in FIELDS}
    return names | {word: names[key] for word, key in _SYNONYMS.items()}


def header_names() -> dict[str, str]:
    """The headers of the fields, by the names that stand for them."""
    headers = {each.path: each.header for each in FIELDS}
    return {name: headers[path] for name, path in body_names().items()}


def nearest(name: str, among: Mapping[str, str]) -> str | None:
    """Return the full name of the field that `name` probably means; None: none is near.

    Args:
        among: full names by short names in snake case.
    """
    plain = _plain(name)
    close = difflib.get_close_matches(plain, among, 1, 0.8)
    for word in reversed(plain.split("_")):  # "max_tokens", "image_tokens", "keep_ratio"
        close += difflib.get_close_matches(word, among, 1, 0.8)
    return among[close[0]] if close else None


def did_you_mean(name: str, among: Mapping[str, str]) -> str:
    """Return the end of an error about an unknown name: the nearest name, or all of them."""
    near = nearest(name, among)
    return f"there are {', '.join(dict.fromkeys(among.values()))}" if near is None else f"did you mean {near}?"


def _words(name: str) -> list[str]:
    """Split VLM-Visual-Tokens, vlm.visual.tokens and visualTokens into words in lower case."""
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name[:MAX_NAME_CHARS])]


def _plain(name: str) -> str:
    return "_".join(word for word in _words(name) if word not in ("vlm", "visual", "x"))
