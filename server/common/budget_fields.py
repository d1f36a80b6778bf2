"""The table of budget fields: one row declares one field, and everything else about the field follows.

From a row follow: the header and the key in the body, the checks of both, the JSON schema in /openapi.json, how levels
(header, body, server default) merge, the clamp by the server, the figure in VLM-Resolved, the known names (for
VLM-Warning, VLM-Strict and the refusals in `budget_names`), and the row in docs/usage.md. A new field is a new row here
and nothing else; the engine learns of the field by a member of its `VisualBudget`. `budget_kinds` holds the kinds.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from foveate.configs.config import BudgetConfig
from foveate.server.common.budget_kinds import Count, FieldKind, FieldValue, Flag, Ratio, Text, Word
from foveate.server.common.errors import invalid_vlm
from foveate.server.common.header_fields import parse, unquoted

MAX_HEADER_CHARS = 1024
Headers = Sequence[tuple[str, str]]  # names in lower case with values, in the order received


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
