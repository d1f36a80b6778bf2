"""A wrong budget never costs the full price in silence: it is refused with the nearest name, or it is understood."""

import json
from collections.abc import Callable
from typing import Any

import pytest

Part = Callable[..., dict[str, Any]]

# `vlm` of a request, the path the error names, the name it proposes.
BODIES: list[tuple[Any, str, str]] = [
    ({"tokens": 16}, "vlm.tokens", "vlm.visual.tokens"),
    ({"ratio": 0.5}, "vlm.ratio", "vlm.visual.ratio"),
    ({"per_image": 4}, "vlm.per_image", "vlm.visual.per_image"),
    ({"tokens_per_image": 4}, "vlm.tokens_per_image", "vlm.visual.per_image"),
    ({"max_tokens": 16}, "vlm.max_tokens", "vlm.visual.tokens"),
    ({"budget": 16}, "vlm.budget", "vlm.visual.tokens"),
    ({"keepRatio": 0.5}, "vlm.keepRatio", "vlm.visual.ratio"),
    ({"Visual": {"tokens": 16}}, "vlm.Visual", "vlm.visual.tokens"),
    ({"visual": {"tokns": 16}}, "vlm.visual.tokns", "vlm.visual.tokens"),
    ({"visual": {"Ratio": 0.5}}, "vlm.visual.Ratio", "vlm.visual.ratio"),
    ({"visual": {"strict": True}}, "vlm.visual.strict", "vlm.strict"),
    ({"visual": {"methd": "foveal"}}, "vlm.visual.methd", "vlm.visual.method"),
    ({"visual": {"keep": 3}}, "vlm.visual.keep", "vlm.visual.ratio"),
    ({"visual": {"nonsense": {"tokens": 3}}}, "vlm.visual.nonsense", "vlm.visual.floor"),
    ({"strct": True}, "vlm.strct", "vlm.strict"),
    ({"strict": False, "visul": {"tokens": 16}}, "vlm.visul", "vlm.visual.tokens"),
    ({"vlm": {"visual": {"tokens": 16}}}, "vlm.vlm", "vlm.visual.tokens"),
    ({"unknown": None}, "vlm.unknown", "vlm.visual.tokens"),
]


@pytest.mark.parametrize(("vlm", "param", "near"), BODIES)
def test_unknown_names_under_vlm(api: Any, vlm: Any, param: str, near: str) -> None:
    for path, body in (
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
        ("/v1/completions", {"prompt": "x"}),
    ):
        reply = api.send("POST", path, json={"model": "m", "vlm": vlm} | body)
        error = reply.json()["error"]
        assert reply.status_code == 400 and (error["param"], error["code"]) == (param, "invalid_vlm_parameter")
        assert near in error["message"] and "no such field" in error["message"]
    assert not api.client.requests


@pytest.mark.parametrize(
    "name", ["vlm_tokens", "vlm.visual.tokens", "VLM-Visual-Tokens", "visual", "visual_tokens", "visualTokens", "VLM"]
)
def test_budget_names_at_the_top(api: Any, name: str) -> None:
    error = api.chat(**{name: 16}).json()["error"]
    assert (error["param"], error["code"]) == (name, "invalid_vlm_parameter")
    assert "vlm.visual.tokens" in error["message"]


def test_budgets_of_one_image_in_the_wrong_place(api: Any, png: str, image_part: Part) -> None:
    at = "messages[0].content[0]"
    plain = image_part(png)
    for part, param, near in (
        (plain | {"vlm": {"tokns": 4}}, f"{at}.vlm.tokns", f"{at}.vlm.tokens"),
        (plain | {"vlm": {"ratio": 0.5}}, f"{at}.vlm.ratio", f"{at}.vlm.detail"),
        (plain | {"vlm": {"visual": {"tokens": 4}}}, f"{at}.vlm.visual", f"{at}.vlm.tokens"),
        (plain | {"tokens": 4}, f"{at}.tokens", f"{at}.vlm.tokens"),
        (plain | {"detail": "low"}, f"{at}.detail", f"{at}.vlm.detail"),
        ({"type": "image_url", "image_url": {"url": png, "vlm": {"tokens": 4}}}, f"{at}.image_url.vlm", "vlm.tokens"),
        ({"type": "image_url", "image_url": {"url": png, "tokens": 4}}, f"{at}.image_url.tokens", f"{at}.vlm.tokens"),
    ):
        error = api.chat([part]).json()["error"]
        assert (error["param"], error["code"]) == (param, "invalid_vlm_parameter"), error
        assert near in error["message"]
    message = {"role": "user", "content": [plain], "vlm": {"tokens": 4}}
    assert api.chat(messages=[message]).json()["error"]["param"] == "messages[0].vlm"
    assert not api.client.requests
    assert api.chat([plain | {"vlm": {"tokens": "4"}}]).json()["usage"]["vlm"]["visual"]["kept"] == 4


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("VLM-Tokens", "VLM-Visual-Tokens"),
        ("VLM-Visual-Token", "VLM-Visual-Tokens"),
        ("VLM-Max-Tokens", "VLM-Visual-Tokens"),
        ("VLM-Budget", "VLM-Visual-Tokens"),
        ("VLM-Ratio", "VLM-Visual-Ratio"),
        ("VLM-Visual-Keep-Ratio", "VLM-Visual-Ratio"),
        ("VLM-Visual-Per-Image", "VLM-Visual-Tokens-Per-Image"),
        ("VLM-Visual-Quality", "VLM-Visual-Method"),
        ("X-VLM-Visual-Tokens", "VLM-Visual-Tokens"),
        ("VLM_Visual_Ratio", "VLM-Visual-Ratio"),
        ("VLM-Stric", "VLM-Strict"),
    ],
)
def test_headers_that_resemble_a_budget(api: Any, name: str, near: str) -> None:
    error = api.chat(headers={name: "1"}).json()["error"]
    assert (error["code"], error["param"]) == ("invalid_vlm_parameter", name.lower())
    assert near in error["message"]
    assert not api.client.requests


def test_headers_that_do_not_are_told_of_in_the_order_received(api: Any) -> None:
    headers = [("VLM-Telepathy", "1"), ("VLM-Aura", "2"), ("VLM-Telepathy", "3"), ("VLM-Resolved", "x")]
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
    reply = api.send("POST", "/v1/chat/completions", json=body, headers=headers)
    told = [f"unknown header vlm-{name}" for name in ("telepathy", "aura", "telepathy", "resolved")]
    assert reply.headers["VLM-Warning"] == ", ".join(told)
    assert reply.json()["usage"]["vlm"]["warnings"] == told


def test_warnings_stand_in_the_usage_of_every_reply(api: Any) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chat = {"messages": [{"role": "user", "content": "x"}]}
    for path, body in (("/v1/chat/completions", chat), ("/v1/completions", {"prompt": ["x", "y"]})):
        body = {"model": "m", "wrong": 1} | body
        whole = api.send("POST", path, json=body)
        stream = api.send("POST", path, json=body | options)
        for reply, usage in ((whole, whole.json()["usage"]), (stream, api.events(stream)[-1]["usage"])):
            assert usage["vlm"]["warnings"] == ["unknown field wrong"], path
            assert reply.headers["VLM-Warning"] == "unknown field wrong"
        assert "warnings" not in api.send("POST", path, json=body | {"wrong": None}).json()["usage"]["vlm"]


def test_more_warnings_than_a_header_should_hold(api: Any) -> None:
    reply = api.chat(**{f"wrong{number}": 1 for number in range(30)})
    warnings = reply.json()["usage"]["vlm"]["warnings"]
    assert len(warnings) == 9 and warnings[-1] == "22 more" and reply.headers["VLM-Warning"] == ", ".join(warnings)


@pytest.mark.parametrize(
    ("header", "text", "key", "values", "resolved"),
    [
        ("VLM-Visual-Ratio", "25%", "ratio", ["25%", "25 %", "0.25", " 25%"], 0.25),
        ("VLM-Visual-Ratio", '"25%"', "ratio", ["25.0%"], 0.25),
        ("VLM-Visual-Ratio", "12.5%", "ratio", ["12.5%"], 0.125),
        ("VLM-Visual-Ratio", "100%", "ratio", ["100%", "1", 1.0], 1.0),
        ("VLM-Visual-Tokens", "16.0", "tokens", ["16", 16.0, "16.0"], 16),
        ("VLM-Visual-Tokens", '"16"', "tokens", [16], 16),
        ("VLM-Visual-Tokens-Per-Image", "9.0", "per_image", ["9", 9.0], 9),
        ("VLM-Visual-Floor", '"3"', "floor", ["3", 3.0], 3),
        ("VLM-Visual-Method", '"pool;how=max"', "method", ["pool;how=max"], "pool"),
        ("VLM-Visual-Method", '"foveal"', "method", ["foveal"], "foveal"),
        ("VLM-Visual-Split", '"uniform"', "split", ["uniform"], "uniform"),
    ],
)
def test_budgets_in_every_spelling(
    api: Any, png: str, image_part: Part, header: str, text: str, key: str, values: list[Any], resolved: Any
) -> None:
    replies = [api.chat([image_part(png)], headers={header: text})]
    replies += [api.chat([image_part(png)], vlm={"visual": {key: value}}) for value in values]
    assert [reply.status_code for reply in replies] == [200] * len(replies), json.dumps([r.text for r in replies])
    assert [getattr(request.visual, key) for request in api.client.requests] == [resolved] * len(replies)
    one, *others = api.client.requests
    assert all(other.visual == one.visual for other in others)


def test_spellings_that_are_no_budget(api: Any) -> None:
    for key, value in (("ratio", "120%"), ("ratio", "0%"), ("ratio", "%"), ("ratio", "-5%"), ("ratio", "nan%"),
                       ("tokens", "16.5"), ("tokens", "25%"), ("tokens", True), ("tokens", ""), ("floor", "none"),
                       ("per_image", "auto")):  # fmt: skip
        error = api.chat(vlm={"visual": {key: value}}).json()["error"]
        assert (error["param"], error["code"]) == (f"vlm.visual.{key}", "invalid_vlm_parameter"), (key, value)
    for name, text in (("Ratio", "120%"), ("Ratio", "0%"), ("Tokens", "25%"), ("Tokens", "16.5"), ("Floor", '"a"')):
        error = api.chat(headers={f"VLM-Visual-{name}": text}).json()["error"]
        assert (error["param"], error["code"]) == (f"VLM-Visual-{name}", "invalid_vlm_parameter"), (name, text)
