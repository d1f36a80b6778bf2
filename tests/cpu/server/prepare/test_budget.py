"""Resolution of the visual budget: precedence, defaults, what images say of themselves."""

import itertools
from typing import Any

import pytest

from foveate.configs.config import BudgetConfig
from foveate.engine.common import MethodInfo
from foveate.server.common.header_fields import parse
from foveate.server.common.protocol import ImagePart, VlmFields
from foveate.server.prepare.budget import ImageCap, Resolved, resolve
from foveate.server.prepare.request import wish_of

METHOD = MethodInfo(
    name="foveal", summary="", source="", fields=[], question_aware=False, shared=True, signals_cls=[],
    signals_no_cls=[],
)  # fmt: skip


def run(
    headers: dict[str, str] | None = None,
    visual: dict[str, Any] | None = None,
    images: tuple[dict[str, Any], ...] = ({},),
    **config: Any,
) -> Resolved:
    parts = [
        ImagePart.model_validate({"type": "image_url", "image_url": {"url": "u", "detail": i.get("detail")}} | i)
        for i in images
    ]
    stated = [(name.lower(), value) for name, value in (headers or {}).items()]
    body = None if visual is None else VlmFields.model_validate({"visual": visual})
    return resolve(body, [wish_of(part) for part in parts], BudgetConfig(**config), [METHOD], stated)


def test_defaults_hold_only_for_those_who_state_nothing() -> None:
    assert run(tokens=50, ratio=0.5).visual.tokens == 50
    assert run(tokens=50, ratio=0.5).visual.ratio == 0.5
    for visual in ({"ratio": 0.9}, {"per_image": 3}, {"tokens": 400}, {"tokens": "full"}):
        found = run(visual=visual, tokens=50, ratio=0.5).visual
        assert found.tokens == (400 if visual.get("tokens") == 400 else None)
        assert found.ratio == visual.get("ratio", 1.0)
    assert run(visual={"tokens": "auto", "floor": 2}, tokens=50).visual.tokens == 50


def test_body_goes_before_header_field_by_field() -> None:
    fields = {"tokens": (20, 10), "per_image": (8, 4), "ratio": (0.5, 0.25), "floor": (3, 2)}
    names = {"tokens": "Tokens", "per_image": "Tokens-Per-Image", "ratio": "Ratio", "floor": "Floor"}
    for in_body, in_header in itertools.product(itertools.product((0, 1), repeat=4), repeat=2):
        body = {name: fields[name][0] for name, there in zip(fields, in_body, strict=True) if there}
        header = {name: fields[name][1] for name, there in zip(fields, in_header, strict=True) if there}
        found = run({f"VLM-Visual-{names[name]}": str(value) for name, value in header.items()}, body).visual
        want = header | body
        assert found.tokens == want.get("tokens") and found.per_image == want.get("per_image")
        assert found.ratio == want.get("ratio", 1.0) and found.floor == want.get("floor", 1)
        assert found.fit


def test_full_cancels_what_lies_below_it() -> None:
    found = run({"VLM-Visual-Ratio": "0.5", "VLM-Visual-Tokens": "9"}, {"tokens": "full"}).visual
    assert (found.tokens, found.ratio, found.fit) == (None, 1.0, False)
    found = run({"VLM-Visual-Tokens": "full"}, {"ratio": 0.5}).visual
    assert (found.tokens, found.ratio, found.fit) == (None, 0.5, True)


def test_images_speak_for_themselves() -> None:
    images = ({"vlm": {"tokens": 9}, "detail": "high"}, {"detail": "low"}, {"detail": "high"}, {}, {"detail": "auto"})
    resolved = run(visual={"per_image": 5, "ratio": 0.5}, images=images, low_detail_ratio=0.2)
    assert resolved.caps == [
        ImageCap(tokens=9), ImageCap(ratio=0.2), ImageCap(), ImageCap(tokens=5, ratio=0.5),
        ImageCap(tokens=5, ratio=0.5),
    ]  # fmt: skip
    assert (resolved.visual.per_image, resolved.visual.ratio, resolved.visual.floor) == (None, 1.0, 1)
    inside = run(images=({"vlm": {"detail": "low"}, "detail": "high"},), low_detail_ratio=0.2)
    assert inside.caps == [ImageCap(ratio=0.2)], "the part's own vlm goes before image_url.detail"


def test_high_detail_lifts_the_default_but_not_the_request() -> None:
    assert run(images=({"detail": "high"},), tokens=4, ratio=0.5).visual.tokens is None
    assert run(images=({"detail": "high"}, {}), tokens=4).visual.tokens == 4
    assert run(visual={"tokens": 4}, images=({"detail": "high"},)).visual.tokens == 4


def test_the_default_floor_yields_and_a_stated_one_does_not() -> None:
    assert run(floor=32).visual.floor == 32
    assert run(visual={"tokens": 16}, floor=32).visual.floor == 16
    assert run(visual={"per_image": 3}, floor=32).visual.floor == 3
    assert run(visual={"tokens": 16, "floor": 20}, floor=32).visual.floor == 20


def test_the_cap_holds_for_everyone() -> None:
    for visual in (None, {"tokens": 100}, {"tokens": "full"}, {"ratio": 1}):
        assert run(visual=visual, max_tokens=7).visual.tokens == 7
    assert run(visual={"tokens": 5}, max_tokens=7).visual.tokens == 5


@pytest.mark.parametrize(
    ("text", "value", "params"),
    [("12", 12, {}), ("-1.5", -1.5, {}), ("?1", True, {}), ("foveal", "foveal", {}),
     ('a; b=2;c ;d="x;y\\"";e=0.25;f=?0', "a", {"b": 2, "c": True, "d": 'x;y"', "e": 0.25, "f": False})],
)  # fmt: skip
def test_structured_fields(text: str, value: object, params: dict[str, object]) -> None:
    item = parse(text)
    assert (item.value, item.params) == (value, params)


@pytest.mark.parametrize(
    "text", ["", ";", "a;", "a;=1", "a;B=1", "a;b=", "a b", "1.", ".5", "1e5", "?2", '"', "é", "a;b=é"]
)
def test_broken_structured_fields(text: str) -> None:
    with pytest.raises(ValueError, match="expected|twice"):
        parse(text)


def test_strict_budgets_blame_the_request_alone(make_api: Any, png: str, image_part: Any) -> None:
    api = make_api(budget=BudgetConfig(tokens=10, max_tokens=5))
    strict = {"VLM-Strict": "?1"}
    assert api.chat([image_part(png)], headers=strict).status_code == 200, "it states nothing"
    by_header = api.chat([image_part(png)], headers=strict | {"VLM-Visual-Tokens": "9"})
    by_body = api.chat([image_part(png)], headers=strict, vlm={"visual": {"tokens": 9}})
    assert by_header.status_code == by_body.status_code == 400
    assert by_header.json()["error"]["param"] == "VLM-Visual-Tokens"
    assert by_body.json()["error"]["param"] == "vlm.visual.tokens"
