"""The visual budget of a request, resolved: per image > body > header > server default, then the server's cap.

Precedence is per field, with two rules for amounts (tokens, per_image, ratio), which limit each other: the server's
default amounts hold only for a request that states none, and `full` cancels every amount of a lower level.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from msgspec import structs
from starlette.datastructures import Headers

from foveate.configs.config import BudgetConfig
from foveate.engine.common.messages import MethodInfo, VisualBudget
from foveate.server.checks import printable
from foveate.server.errors import invalid_vlm
from foveate.server.header_fields import Bare, Item, parse
from foveate.server.protocol import MAX_COUNT, ImagePart, VlmFields
from foveate.server.stages import Method, read_method

MAX_HEADER_CHARS = 1024
TOKENS, PER_IMAGE = "VLM-Visual-Tokens", "VLM-Visual-Tokens-Per-Image"
RATIO, FLOOR, METHOD, STRICT = "VLM-Visual-Ratio", "VLM-Visual-Floor", "VLM-Visual-Method", "VLM-Strict"
SPLIT, EXPLAIN = "VLM-Visual-Split", "VLM-Explain"
_KNOWN = {name.lower() for name in (TOKENS, PER_IMAGE, RATIO, FLOOR, METHOD, STRICT, SPLIT, EXPLAIN)}
Word = Literal["auto", "full"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """What one level (header or body) says; None where it says nothing."""

    tokens: int | Word | None = None
    per_image: int | None = None
    ratio: float | None = None
    floor: int | None = None
    method: str | None = None
    split: str | None = None

    @property
    def states_amount(self) -> bool:
        return self.tokens is not None or self.per_image is not None or self.ratio is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageCap:
    """What one image may keep, of itself; None: all it offers."""

    tokens: int | None = None
    ratio: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    visual: VisualBudget
    caps: list[ImageCap]
    warnings: list[str]  # for the VLM-Warning header
    reads_question: bool = False  # whether the method wants to know what is asked
    explain: str = ""  # "kept_map": the answer says which tokens survived


def resolve(
    headers: Headers,
    body: VlmFields | None,
    images: Sequence[ImagePart],
    config: BudgetConfig,
    methods: Sequence[MethodInfo],
) -> Resolved:
    """The budget of one request.

    Raises:
        ApiError: `invalid_vlm_parameter`, naming the header or the body's path, and what is legal.
    """
    warnings = [f"unknown header {printable(name)}" for name in headers if name.startswith("vlm-")]
    warnings = [warning for warning in warnings if warning.removeprefix("unknown header ") not in _KNOWN]
    strict = _strict(headers, body)
    if strict and warnings:
        raise invalid_vlm(warnings[0].removeprefix("unknown header "), "no such header")
    above, below = _body_level(body), _header_level(headers)
    merged = _merge(above, below)
    own = [_own_cap(image, config) for image in images]
    visual = _amounts(merged, own, config)
    method = _method(above.method, below.method, config.method, methods)
    if strict and config.max_tokens:
        _check_clamp(above, below, config.max_tokens)
    visual = _clamp(visual, config.max_tokens)
    visual, caps = _distribute(visual, own)
    return Resolved(
        visual=structs.replace(
            visual,
            method=method.name,
            params=method.params,
            stages=method.stages,
            prune=method.prune,
            enter=method.enter,
            split=above.split or below.split or "area",
        ),
        caps=caps,
        warnings=warnings,
        reads_question=method.question_aware,
        explain=_explain(headers, body),
    )


def _explain(headers: Headers, body: VlmFields | None) -> str:
    if body is not None and body.explain is not None:
        return body.explain
    item = _header(headers, EXPLAIN)
    if item is None or item.value is False:
        return ""
    if item.value != "kept_map":
        raise invalid_vlm(EXPLAIN, "expected kept_map or ?0")
    return "kept_map"


def _strict(headers: Headers, body: VlmFields | None) -> bool:
    if body is not None and body.strict is not None:
        return body.strict
    item = _header(headers, STRICT)
    if item is None:
        return False
    if not isinstance(item.value, bool):
        raise invalid_vlm(STRICT, "expected ?1 or ?0")
    return item.value


def _body_level(body: VlmFields | None) -> Level:
    if body is None or body.visual is None:
        return Level()
    fields = body.visual
    return Level(
        tokens=fields.tokens,
        per_image=fields.per_image,
        ratio=fields.ratio,
        floor=fields.floor,
        method=fields.method,
        split=fields.split,
    )


def _header_level(headers: Headers) -> Level:
    method = _header_text(headers, METHOD)
    return Level(
        tokens=_tokens(headers),
        per_image=_count(headers, PER_IMAGE),
        ratio=_ratio(headers),
        floor=_count(headers, FLOOR),
        method=method,
        split=_split(headers),
    )


def _split(headers: Headers) -> str | None:
    item = _header(headers, SPLIT)
    if item is None:
        return None
    if not isinstance(item.value, str):
        raise invalid_vlm(SPLIT, "expected a word such as area or uniform")
    return item.value


def _header_text(headers: Headers, name: str) -> str | None:
    values = headers.getlist(name)
    if not values:
        return None
    if len(values) > 1:
        raise invalid_vlm(name, "given more than once")
    if len(values[0]) > MAX_HEADER_CHARS:
        raise invalid_vlm(name, f"longer than {MAX_HEADER_CHARS} characters")
    return values[0]


def _header(headers: Headers, name: str) -> Item | None:
    text = _header_text(headers, name)
    if text is None:
        return None
    try:
        item = parse(text)
    except ValueError as error:
        raise invalid_vlm(name, str(error)) from None
    if item.params:
        raise invalid_vlm(name, "takes no parameters")
    return item


def _in_range(name: str, value: Bare, also: str = "") -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_COUNT:
        raise invalid_vlm(name, f"expected an integer from 1 to {MAX_COUNT}{also}")
    return value


def _count(headers: Headers, name: str) -> int | None:
    item = _header(headers, name)
    return None if item is None else _in_range(name, item.value)


def _tokens(headers: Headers) -> int | Word | None:
    item = _header(headers, TOKENS)
    if item is None:
        return None
    match item.value:
        case "auto":
            return "auto"
        case "full":
            return "full"
    return _in_range(TOKENS, item.value, ", auto or full")


def _ratio(headers: Headers) -> float | None:
    item = _header(headers, RATIO)
    if item is None:
        return None
    value = item.value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise invalid_vlm(RATIO, "expected a number above 0 and up to 1")
    return float(value)


def _merge(above: Level, below: Level) -> Level:
    if above.tokens == "full":
        below = replace(below, per_image=None, ratio=None)
    if below.tokens == "full" and above.states_amount:
        below = replace(below, tokens=None)
    return Level(
        tokens=below.tokens if above.tokens is None else above.tokens,
        per_image=below.per_image if above.per_image is None else above.per_image,
        ratio=below.ratio if above.ratio is None else above.ratio,
        floor=below.floor if above.floor is None else above.floor,
    )


def _own_cap(image: ImagePart, config: BudgetConfig) -> ImageCap | None:
    """What an image says of itself; None if nothing."""
    own = image.vlm
    if own is not None and own.tokens is not None:
        return ImageCap(tokens=own.tokens)
    detail = own.detail if own is not None and own.detail is not None else image.image_url.detail
    match detail:
        case "low":
            return ImageCap(ratio=config.low_detail_ratio)
        case "high":
            return ImageCap()
    return None


def _amounts(level: Level, own: Sequence[ImageCap | None], config: BudgetConfig) -> VisualBudget:
    tokens = level.tokens if isinstance(level.tokens, int) else None
    ratio = level.ratio
    stated = level.tokens not in (None, "auto") or level.per_image is not None or ratio is not None
    each_for_itself = bool(own) and all(cap is not None for cap in own)
    if not stated and not each_for_itself:
        tokens, ratio = config.tokens or None, config.ratio
    floor = level.floor
    if floor is None:  # the server's floor yields to a smaller budget that the request asks for
        floor = min(config.floor, tokens or config.floor, level.per_image or config.floor)
        floor = 1 if any(cap is not None for cap in own) else floor
    return VisualBudget(
        tokens=tokens,
        fit=level.tokens != "full",
        per_image=level.per_image,
        ratio=1.0 if ratio is None else ratio,
        floor=floor,
    )


def _check_clamp(above: Level, below: Level, most: int) -> None:
    """What the request itself states, named where it states it: the server's own defaults are never its mistake."""
    for name, header, own, other in (
        ("tokens", TOKENS, above.tokens, below.tokens),
        ("floor", FLOOR, above.floor, below.floor),
    ):
        where, value = (header, other) if own is None else (f"vlm.visual.{name}", own)
        if isinstance(value, int) and value > most:
            raise invalid_vlm(where, f"{value} is more than budget.max_tokens {most}")


def _clamp(visual: VisualBudget, most: int) -> VisualBudget:
    if not most:
        return visual
    return structs.replace(visual, tokens=min(visual.tokens or most, most), floor=min(visual.floor, most))


def _distribute(visual: VisualBudget, own: Sequence[ImageCap | None]) -> tuple[VisualBudget, list[ImageCap]]:
    """Where some images speak for themselves, what is said per image becomes caps of the others."""
    if all(cap is None for cap in own):
        return visual, [ImageCap() for _ in own]
    others = ImageCap(tokens=visual.per_image, ratio=None if visual.ratio == 1.0 else visual.ratio)
    total = VisualBudget(tokens=visual.tokens, fit=visual.fit, floor=visual.floor)
    return total, [others if cap is None else cap for cap in own]


def _method(body: str | None, header: str | None, default: str, methods: Sequence[MethodInfo]) -> Method:
    where, text = ("vlm.visual.method", body) if body is not None else (METHOD, header)
    if text is not None:
        return read_method(where, text, methods)
    return read_method("budget.method", default, methods)
