"""The visual budget of a request, resolved: per image > body > header > server default, then the server's cap.

Precedence is per field, as the table of `common/budget_fields.py` declares. Two rules hold for amounts (tokens,
per_image, ratio), which limit each other: the server's default amounts hold only for a request that states none, and
`full` cancels every amount of a lower level.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from msgspec import structs

from foveate.configs.config import BudgetConfig
from foveate.engine.common import MethodInfo, VisualBudget
from foveate.server.common.budget_fields import (
    FIELDS,
    BudgetLevel,
    Headers,
    Stated,
    clamp,
    header_level,
    merge,
    over_cap,
    resolved_figures,
)
from foveate.server.common.budget_names import did_you_mean, header_names, is_visual_name, nearest, unknown_headers
from foveate.server.common.errors import invalid_vlm, printable
from foveate.server.common.protocol import VlmFields, body_level
from foveate.server.prepare.stages import MethodChoice, read_method

TOKENS, PER_IMAGE, RATIO = "vlm.visual.tokens", "vlm.visual.per_image", "vlm.visual.ratio"
FLOOR, METHOD, SPLIT = "vlm.visual.floor", "vlm.visual.method", "vlm.visual.split"
STRICT, EXPLAIN = "vlm.strict", "vlm.explain"


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageWish:
    """What a request says beside one image."""

    tokens: int | None = None
    detail: Literal["low", "high", "auto"] | None = None


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
    figures: list[str]  # for the VLM-Resolved header, what is known before the engine answers
    reads_question: bool = False  # whether the method reads the question
    explain: str = ""  # "kept_map": the answer says which tokens survived


def resolve(
    body: VlmFields | None,
    images: Sequence[ImageWish],
    config: BudgetConfig,
    methods: Sequence[MethodInfo],
    headers: Headers = (),
) -> Resolved:
    """The budget of one request.

    Raises:
        ApiError: `invalid_vlm_parameter`, naming the header or the body's path, and what is legal.
    """
    own = [_own_cap(image, config) for image in images]
    unknown = unknown_headers(headers)
    merged, method = _merged(body_level(body), headers, config, methods)
    visual = _amounts(merged, own, config)
    if config.max_tokens:
        most = config.max_tokens
        visual = structs.replace(visual, tokens=min(visual.tokens or most, most), floor=min(visual.floor, most))
    visual, caps = _distribute(visual, own)
    visual = structs.replace(
        visual,
        method=method.name,
        params=method.params,
        stages=method.stages,
        prune=method.prune,
        enter=method.enter,
        split=merged.text(SPLIT) or "area",
    )
    return Resolved(
        visual=visual,
        caps=caps,
        warnings=[f"unknown header {printable(name)}" for name in unknown],
        figures=list(resolved_figures(BudgetLevel({**merged.stated, FLOOR: Stated(visual.floor, FLOOR)}))),
        reads_question=method.question_aware,
        explain=merged.text(EXPLAIN) or "",
    )


def _merged(
    above: BudgetLevel, headers: Headers, config: BudgetConfig, methods: Sequence[MethodInfo]
) -> tuple[BudgetLevel, MethodChoice]:
    """Body over headers, clamped, and the method. A strict request is refused instead of warned or clamped."""
    options = {each.path for each in FIELDS if each.is_option}
    strict = merge(above, header_level(headers, {STRICT} - above.stated.keys())).value(STRICT)
    # A wrong budget must not cost the full price: a name that resembles a budget's is refused, any other is told of.
    for name in unknown_headers(headers):
        if strict or is_visual_name(name) or nearest(name, header_names()) is not None:
            raise invalid_vlm(printable(name), f"no such header; {did_you_mean(name, header_names())}")
    stated = merge(above, header_level(headers, {each.path for each in FIELDS} - options))
    method = _method(stated, config.method, methods)
    # The server's own defaults are never the request's mistake: only stated amounts are compared.
    for each, most in over_cap(stated, config) if strict else ():
        found = stated.stated[each.path]
        raise invalid_vlm(found.where, f"{found.value} is more than budget.{each.clamped_by} {most}")
    return clamp(merge(stated, header_level(headers, options - above.stated.keys())), config), method


def _own_cap(image: ImageWish, config: BudgetConfig) -> ImageCap | None:
    """What an image says of itself; None if nothing."""
    if image.tokens is not None:
        return ImageCap(tokens=image.tokens)
    match image.detail:
        case "low":
            return ImageCap(ratio=config.low_detail_ratio)
        case "high":
            return ImageCap()
    return None


def _amounts(level: BudgetLevel, own: Sequence[ImageCap | None], config: BudgetConfig) -> VisualBudget:
    tokens, per_image, ratio, floor = (
        level.count(TOKENS),
        level.count(PER_IMAGE),
        level.ratio(RATIO),
        level.count(FLOOR),
    )
    stated = level.value(TOKENS) not in (None, "auto") or per_image is not None or ratio is not None
    each_for_itself = bool(own) and all(cap is not None for cap in own)
    if not stated and not each_for_itself:
        tokens, ratio = config.tokens or None, config.ratio
    if floor is None:  # the server's floor yields to a smaller budget that the request asks for
        floor = min(config.floor, tokens or config.floor, per_image or config.floor)
        floor = 1 if any(cap is not None for cap in own) else floor
    return VisualBudget(
        tokens=tokens,
        fit=level.value(TOKENS) != "full",
        per_image=per_image,
        ratio=1.0 if ratio is None else ratio,
        floor=floor,
    )


def _distribute(visual: VisualBudget, own: Sequence[ImageCap | None]) -> tuple[VisualBudget, list[ImageCap]]:
    """Where some images speak for themselves, what is said per image becomes caps of the others."""
    if all(cap is None for cap in own):
        return visual, [ImageCap() for _ in own]
    others = ImageCap(tokens=visual.per_image, ratio=None if visual.ratio == 1.0 else visual.ratio)
    total = VisualBudget(tokens=visual.tokens, fit=visual.fit, floor=visual.floor)
    return total, [others if cap is None else cap for cap in own]


def _method(merged: BudgetLevel, default: str, methods: Sequence[MethodInfo]) -> MethodChoice:
    stated = merged.stated.get(METHOD)
    if stated is None:
        return read_method("budget.method", default, methods)
    return read_method(stated.where, str(stated.value), methods)
