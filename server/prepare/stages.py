"""Parse VLM-Visual-Method and vlm.visual.method: one stage `name;key=value`, or several stages joined by `+`.

In a composition, each stage but the last may state `keep=0.5`: the share of its input tokens that the stage keeps. For
the last stage before a method inside the decoder, `keep` is the share of the offered tokens that enter the decoder.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from foveate.engine.common import FieldInfo, MethodInfo, Stage, is_share, misplaced, setting, states_share
from foveate.server.common.errors import invalid_vlm, printable
from foveate.server.common.header_fields import Bare, parse

_STAGE = re.compile(r'(?:[^+"]|"(?:[^"\\]|\\.)*")+')
MAX_STAGES = 4


@dataclass(frozen=True, slots=True)
class MethodChoice:
    """The reduction method of a request."""

    name: str  # name of the reducer, or names joined by "+"
    params: dict[str, Bare] = field(default_factory=dict)
    stages: list[Stage] = field(default_factory=list)  # stages of a composition of reducers
    question_aware: bool = False  # whether a reducer reads the question
    prune: Stage | None = None  # the method inside the decoder
    enter: float | None = None  # share of the offered tokens that enter the decoder


def read_method(where: str, text: str, methods: Sequence[MethodInfo]) -> MethodChoice:
    """Parse and check a method. Raises ApiError `invalid_vlm_parameter`, naming the legal values."""
    texts = _STAGE.findall(text)
    if "+".join(texts) != text or not texts:
        raise invalid_vlm(where, "expected name;key=value, or several joined by +")
    if len(texts) > MAX_STAGES:
        raise invalid_vlm(where, f"{len(texts)} stages; there may be {MAX_STAGES}")
    read = [_stage(where, part, methods, states_share(i, len(texts))) for i, part in enumerate(texts)]
    for (before, _), (after, _) in pairwise(read):
        _check_order(where, before, after)
    prune, enter = None, None
    if read[-1][0].stage == "decoder":
        prune = read.pop()[1]
        if read:
            info, stage = read.pop()
            read.append((info, Stage(method=stage.method, params=stage.params)))
            enter = stage.keep
    method = _reducers(read)
    return replace(method, prune=prune, enter=enter)


def _reducers(read: Sequence[tuple[MethodInfo, Stage]]) -> MethodChoice:
    stages = [stage for _, stage in read]
    aware = any(info.question_aware for info, _ in read)
    match stages:
        case []:
            return MethodChoice("none")
        case [stage]:
            return MethodChoice(stage.method, stage.params, [], aware)
    return MethodChoice("+".join(stage.method for stage in stages), {}, stages, aware)


def _stage(where: str, text: str, methods: Sequence[MethodInfo], may_keep: bool) -> tuple[MethodInfo, Stage]:
    try:
        item = parse(text)
    except ValueError as error:
        raise invalid_vlm(where, str(error)) from None
    info = next((method for method in methods if method.name == item.value), None)
    if info is None:
        known = ", ".join(method.name for method in methods)
        raise invalid_vlm(where, f"no method {printable(str(item.value))!r}; there are {known}")
    params = dict(item.params)
    keep = _keep(where, info.name, params.pop("keep")) if may_keep and "keep" in params else None
    fields = {field.name: field for field in info.fields}
    checked = {key: _setting(where, info, fields.get(key), key, value) for key, value in params.items()}
    return info, Stage(method=info.name, params=checked, keep=keep)


def _keep(where: str, method: str, value: Bare) -> float:
    if not is_share(value):
        raise invalid_vlm(where, f"{method};keep: expected a number above 0 and up to 1")
    return float(value)


def _check_order(where: str, before: MethodInfo, after: MethodInfo) -> None:
    """Check the order of two stages. The engine checks the case "left", which depends on the methods' settings."""
    match misplaced(before, after):
        case "order":
            raise invalid_vlm(where, f"{after.name} acts on {after.stage}, so it comes before {before.name}")
        case "decoder":
            raise invalid_vlm(where, f"{before.name} and {after.name} both act inside the decoder; one can")
        case "grid":
            raise invalid_vlm(where, f"{after.name} needs the whole picture, so it cannot come after {before.name}")


def _setting(where: str, method: MethodInfo, field: FieldInfo | None, key: str, value: Bare) -> Bare:
    if field is None:
        legal = ", ".join(f"{f.name} ({f.type})" for f in method.fields)
        raise invalid_vlm(
            where,
            f"{method.name} has no setting {printable(key)!r}; "
            + (f"its settings are {legal}" if legal else "it has none")
            + "; GET /v1/vlm/methods lists them",
        )
    held = setting(field, value)
    if held is None:
        raise invalid_vlm(where, f"{method.name};{printable(key)}: expected {field.type}")
    return held
