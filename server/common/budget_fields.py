"""The table of budget fields: one row declares one field, and everything else about the field follows.

From a row follow: the header and the key in the body, the checks of both, the JSON schema in /openapi.json, how levels
(header, body, server default) merge, the clamp by the server, the figure in VLM-Resolved, the names that are known (for
VLM-Warning and VLM-Strict), and the row in docs/usage.md. A new field is a new row here and nothing else; the engine
learns of the field by a member of its `VisualBudget`.
"""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, FiniteFloat

from foveate.configs.config import BudgetConfig
from foveate.server.common.errors import invalid_vlm
from foveate.server.common.header_fields import Bare, parse, unquoted
from foveate.server.common.numbers import integer, share

MAX_COUNT = 1_000_000  # of visual tokens: far above any context
MAX_HEADER_CHARS = 1024
MAX_NAME_CHARS = 64  # of an unknown name; the rest says nothing about the field that it means
_SYNONYMS = {
    **dict.fromkeys(("budget", "count"), "tokens"),
    **dict.fromkeys(("keep", "share", "percent", "fraction"), "ratio"),
    **dict.fromkeys(("reducer", "algorithm"), "method"),
    "image": "per_image",
}
FieldValue = bool | int | float | str
Headers = Sequence[tuple[str, str]]  # names in lower case with values, in the order received


@dataclass(frozen=True, slots=True)
class Count:
    """An integer from 1 to `MAX_COUNT`, or one of some words."""

    words: tuple[str, ...] = ()

    @property
    def annotation(self) -> Any:
        number: Any = Annotated[int, Field(ge=1, le=MAX_COUNT)]
        return Annotated[number | Literal[self.words] if self.words else number, BeforeValidator(integer)]

    @property
    def legal(self) -> str:
        return " or ".join(["a count", *(f"`{word}`" for word in self.words)]) if self.words else "a count"

    def read(self, where: str, value: Bare) -> FieldValue:
        if isinstance(value, str) and value in self.words:
            return value
        count = integer(value)
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MAX_COUNT:
            also = f", {' or '.join(self.words)}" if self.words else ""
            raise invalid_vlm(where, f"expected an integer from 1 to {MAX_COUNT}{also}")
        return count


@dataclass(frozen=True, slots=True)
class Ratio:
    """A number above 0 and up to 1, or a percentage."""

    annotation: Any = Annotated[FiniteFloat, Field(gt=0, le=1), BeforeValidator(share)]
    legal: str = "above 0, up to 1, or `25%`"

    def read(self, where: str, value: Bare) -> FieldValue:
        ratio = share(value)
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio <= 1:
            raise invalid_vlm(where, "expected a number above 0 and up to 1, or a percentage such as 25%")
        return float(ratio)


@dataclass(frozen=True, slots=True)
class Flag:
    """`?1` or `?0` in a header, true or false in the body."""

    annotation: Any = bool
    legal: str = "`?1` or `?0`; in the body true or false"

    def read(self, where: str, value: Bare) -> FieldValue:
        if not isinstance(value, bool):
            raise invalid_vlm(where, "expected ?1 or ?0")
        return value


@dataclass(frozen=True, slots=True)
class Word:
    """One of some words; in a header `?0` asks for nothing."""

    words: tuple[str, ...]

    @property
    def annotation(self) -> Any:
        return Literal[self.words]

    @property
    def legal(self) -> str:
        return " or ".join(f"`{word}`" for word in self.words)

    def read(self, where: str, value: Bare) -> FieldValue:
        if value is False:
            return ""
        if value not in self.words:
            raise invalid_vlm(where, f"expected {' or '.join(self.words)} or ?0")
        return value


@dataclass(frozen=True, slots=True)
class Text:
    """A text whose meaning is checked later; `verbatim`: the header holds the text itself, not one RFC 8941 item."""

    legal: str
    example: str
    max_chars: int
    description: str
    verbatim: bool = False

    @property
    def annotation(self) -> Any:
        return Annotated[str, Field(max_length=self.max_chars, description=self.description)]

    def read(self, where: str, value: Bare) -> FieldValue:
        if not isinstance(value, str):
            raise invalid_vlm(where, f"expected {self.example}")
        return value


FieldKind = Count | Ratio | Flag | Word | Text


@dataclass(frozen=True, kw_only=True, slots=True)
class BudgetField:
    """One field of a budget.

    Attributes:
        header: its HTTP header.
        path: of the body, "vlm.visual.<key>" or "vlm.<key>".
        kind: type and bounds.
        meaning: for the documentation.
        amount_of: amounts of one thing limit each other: the server's default amounts hold only for a request that
            states none, and the word `full` of a higher level cancels these amounts of a lower level.
        clamped_by: the setting of the section `budget` that bounds the field; 0 there: no bound.
        is_option: read from its header only where the body does not state the field.
        resolved_as: its name in VLM-Resolved; None: the engine reports what became of the field.
        reported: where the answer tells of the field, for the documentation.
    """

    header: str
    path: str
    kind: FieldKind
    meaning: str
    amount_of: str | None = None
    clamped_by: str | None = None
    is_option: bool = False
    resolved_as: str | None = None
    reported: str = ""

    @property
    def key(self) -> str:
        return self.path.rpartition(".")[2]

    @property
    def section(self) -> str:
        """The object of the body that holds the field."""
        return self.path.rpartition(".")[0]


FIELDS: list[BudgetField] = [
    BudgetField(
        header="VLM-Visual-Tokens",
        path="vlm.visual.tokens",
        kind=Count(("auto", "full")),
        meaning="visual tokens of all images together. `auto` (the default) compresses further if the prompt and an "
        "answer would not fit the context; `full` never does, and refuses a prompt that does not fit",
        amount_of="visual",
        clamped_by="max_tokens",
        reported="`vis` in VLM-Resolved, `usage.vlm.visual.kept`",
    ),
    BudgetField(
        header="VLM-Visual-Tokens-Per-Image",
        path="vlm.visual.per_image",
        kind=Count(),
        meaning="cap of each image",
        amount_of="visual",
        reported="`usage.vlm.visual.per_image`",
    ),
    BudgetField(
        header="VLM-Visual-Ratio",
        path="vlm.visual.ratio",
        kind=Ratio(),
        meaning="share of the tokens that the images offer",
        amount_of="visual",
        reported="`vis` in VLM-Resolved, `usage.vlm.visual.kept` of `offered`",
    ),
    BudgetField(
        header="VLM-Visual-Floor",
        path="vlm.visual.floor",
        kind=Count(),
        meaning="least number of visual tokens of all images together",
        clamped_by="max_tokens",
        resolved_as="floor",
        reported="`floor` in VLM-Resolved",
    ),
    BudgetField(
        header="VLM-Visual-Method",
        path="vlm.visual.method",
        kind=Text(
            "a method of [methods.md](methods.md), with parameters, or several joined by `+`",
            "name;key=value",
            1024,
            "name;key=value, or several joined by +",
            verbatim=True,
        ),
        meaning="who chooses the tokens: `hiprune;alpha=0.2`, `pixelprune+foveal`",
        reported="`method` in VLM-Resolved, `usage.vlm.visual.method`",
    ),
    BudgetField(
        header="VLM-Visual-Split",
        path="vlm.visual.split",
        kind=Text(
            "`area`, `uniform`, `information` or `thumbnail`",
            "a word such as area or uniform",
            64,
            "how images, or tiles, share the budget",
        ),
        meaning="how several images share the budget, or the tiles of one if the method takes each tile by itself",
        reported="`usage.vlm.visual.per_image`",
    ),
    BudgetField(
        header="VLM-Strict",
        path="vlm.strict",
        kind=Flag(),
        is_option=True,
        meaning="refuse every unknown `VLM-*` header, and amounts above the server's cap, instead of warning or "
        "clamping",
        reported="a 400 in place of VLM-Warning",
    ),
    BudgetField(
        header="VLM-Explain",
        path="vlm.explain",
        kind=Word(("kept_map",)),
        is_option=True,
        meaning="add to each image the map of the tokens that survived",
        reported="`kept_map` in `usage.vlm.visual.per_image`",
    ),
]


@dataclass(frozen=True, slots=True)
class Stated:
    """A value and the name under which the client stated it: a header or a path of the body."""

    value: FieldValue
    where: str


@dataclass(frozen=True, slots=True)
class BudgetLevel:
    """What one level (header, body, or both merged) states, by the paths of the fields."""

    stated: Mapping[str, Stated] = field(default_factory=dict)

    def value(self, path: str) -> FieldValue | None:
        found = self.stated.get(path)
        return None if found is None else found.value

    def count(self, path: str) -> int | None:
        """A number; None where nothing or a word is stated."""
        value = self.value(path)
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    def ratio(self, path: str) -> float | None:
        value = self.value(path)
        return float(value) if isinstance(value, float | int) else None

    def text(self, path: str) -> str | None:
        value = self.value(path)
        return value if isinstance(value, str) else None

    def states_amount(self, of: str) -> bool:
        return any(each.amount_of == of and each.path in self.stated for each in FIELDS)

    def without(self, *paths: str) -> "BudgetLevel":
        return BudgetLevel({path: stated for path, stated in self.stated.items() if path not in paths})


def sections() -> list[str]:
    """The objects of the body that hold fields: "vlm", then "vlm.visual" and the like in the order of the table."""
    return sorted(dict.fromkeys(each.section for each in FIELDS), key=lambda section: section.count("."))


def body_annotations(section: str) -> dict[str, Any]:
    """Types of the fields of one object of the body, for its pydantic model: each may be null."""
    return {each.key: (each.kind.annotation | None, None) for each in FIELDS if each.section == section}


def header_level(headers: Headers, paths: Iterable[str] | None = None) -> BudgetLevel:
    """What the headers state.

    Args:
        paths: of the fields to read; None: all.

    Raises:
        ApiError: `invalid_vlm_parameter`, naming the header.
    """
    stated = {}
    # Of several wrong headers the first is named: the verbatim ones come first, then the order of the table.
    for each in sorted(FIELDS, key=lambda each: not _is_verbatim(each)):
        wanted = paths is None or each.path in paths
        texts = [text for name, text in headers if name == each.header.lower()] if wanted else []
        if texts:
            stated[each.path] = Stated(_header_value(each, texts), each.header)
    return BudgetLevel(stated)


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


def merge(above: BudgetLevel, below: BudgetLevel) -> BudgetLevel:
    """The higher level wins field by field.

    `full` of a higher level cancels the amounts of a lower level; `full` of a lower level yields to a higher amount.
    """
    for of in {each.amount_of for each in FIELDS if each.amount_of is not None}:
        amounts = [each.path for each in FIELDS if each.amount_of == of]
        if any(above.value(path) == "full" for path in amounts):
            below = below.without(*(path for path in amounts if above.value(path) != "full"))
        if above.states_amount(of):
            below = below.without(*(path for path in amounts if below.value(path) == "full"))
    return BudgetLevel({**below.stated, **above.stated})


def clamp(level: BudgetLevel, config: BudgetConfig) -> BudgetLevel:
    """What is stated, at most what the server's settings allow."""
    bounded = {each.path: Stated(most, level.stated[each.path].where) for each, most in over_cap(level, config)}
    return BudgetLevel({**level.stated, **bounded})


def over_cap(level: BudgetLevel, config: BudgetConfig) -> list[tuple[BudgetField, int]]:
    """The fields whose stated amount is more than the server's cap, with the cap."""
    caps = [(each, getattr(config, each.clamped_by)) for each in FIELDS if each.clamped_by is not None]
    return [(each, most) for each, most in caps if most and (level.count(each.path) or 0) > most]


def resolved_figures(level: BudgetLevel) -> Iterator[str]:
    """`name=value` for VLM-Resolved, of the fields that name themselves there."""
    for each in FIELDS:
        value = level.value(each.path)
        if each.resolved_as is not None and value is not None:
            yield f"{each.resolved_as}={value}"


def markdown() -> str:
    """The table of the documentation."""
    rows = ["| header | in the body | value | meaning | reported |", "|---|---|---|---|---|"]
    for each in FIELDS:
        rows.append(f"| `{each.header}` | `{each.path}` | {each.kind.legal} | {each.meaning} | {each.reported} |")
    return "\n".join(rows) + "\n"


def _is_verbatim(each: BudgetField) -> bool:
    return isinstance(each.kind, Text) and each.kind.verbatim


def _header_value(each: BudgetField, texts: Sequence[str]) -> FieldValue:
    if len(texts) > 1:
        raise invalid_vlm(each.header, "given more than once")
    (text,) = texts
    if len(text) > MAX_HEADER_CHARS:
        raise invalid_vlm(each.header, f"longer than {MAX_HEADER_CHARS} characters")
    if _is_verbatim(each):
        return unquoted(text)
    try:
        item = parse(text)
    except ValueError as error:
        raise invalid_vlm(each.header, str(error)) from None
    if item.params:
        raise invalid_vlm(each.header, "takes no parameters")
    return each.kind.read(each.header, item.value)
