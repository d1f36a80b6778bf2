"""Every mistake is a 4xx in OpenAI's shape that names what is wrong; none is a 5xx, none reaches the engine."""

import json
import random
from collections.abc import Callable
from typing import Any

import pytest

from foveate.configs.config import LimitsConfig

LIMITS = LimitsConfig(
    body_mb=1, images=2, choices=3, logprobs=4, stop_strings=2, stop_chars=5, output_tokens=50, image_mb=1
)
MESSAGE = {"role": "user", "content": "hi"}


def user(content: object) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


# Changed fields of a good chat, the path the error must name, its code, a word of its message.
CHAT: list[tuple[dict[str, Any], str, str, str]] = [
    ({"temperature": 2.1}, "temperature", "invalid_value", "2"),
    ({"temperature": "warm"}, "temperature", "invalid_value", "number"),
    ({"temperature": True}, "temperature", "invalid_value", "number"),
    ({"top_p": 0}, "top_p", "invalid_value", "0"),
    ({"top_k": -2}, "top_k", "invalid_value", "-1"),
    ({"min_p": 1.5}, "min_p", "invalid_value", "1"),
    ({"seed": 2**63}, "seed", "invalid_value", ""),
    ({"seed": 10**400}, "seed", "", ""),
    ({"presence_penalty": -2.01}, "presence_penalty", "invalid_value", "-2"),
    ({"frequency_penalty": 3}, "frequency_penalty", "invalid_value", "2"),
    ({"repetition_penalty": 0}, "repetition_penalty", "invalid_value", ""),
    ({"n": 4}, "n", "invalid_value", "limits.choices"),
    ({"n": 0}, "n", "invalid_value", "1"),
    ({"max_tokens": 0}, "max_tokens", "invalid_value", "1"),
    ({"max_completion_tokens": -1}, "max_completion_tokens", "invalid_value", "1"),
    ({"min_tokens": 51}, "min_tokens", "invalid_value", "limits.output_tokens"),
    ({"min_tokens": 3, "max_tokens": 2}, "min_tokens", "invalid_value", "max_tokens"),
    ({"logprobs": True, "top_logprobs": 5}, "top_logprobs", "invalid_value", "limits.logprobs"),
    ({"top_logprobs": 1}, "top_logprobs", "invalid_value", "logprobs"),
    ({"stop": ["a", "b", "c"]}, "stop", "invalid_value", "limits.stop_strings"),
    ({"stop": ["a", "b" * 6]}, "stop[1]", "invalid_value", "limits.stop_chars"),
    ({"stop_token_ids": [259]}, "stop_token_ids", "invalid_value", "259"),
    ({"logit_bias": {"259": 1}}, "logit_bias", "invalid_value", "259"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5", "invalid_value", "100"),
    ({"logit_bias": {"x": 1}}, "logit_bias.x", "invalid_value", ""),
    ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value", "stream"),
    ({"cache_salt": ""}, "cache_salt", "invalid_value", ""),
    ({"model": "other"}, "model", "model_not_found", "other"),
    ({"tools": [{"type": "function"}]}, "tools", "unsupported_parameter", "support"),
    ({"tool_choice": "required"}, "tool_choice", "unsupported_parameter", "support"),
    ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter", "support"),
    ({"audio": {"voice": "x"}}, "audio", "unsupported_parameter", "support"),
    ({"modalities": ["text", "audio"]}, "modalities", "unsupported_parameter", "support"),
    ({"chat_template": "{{ 1 }}"}, "chat_template", "unsupported_parameter", "support"),
    ({"messages": []}, "messages", "invalid_value", ""),
    ({"messages": "hi"}, "messages", "invalid_value", "list"),
    ({"messages": [MESSAGE, {"role": "user"}]}, "messages[1].content", "invalid_value", "required"),
    ({"messages": [MESSAGE, {"content": "x"}]}, "messages[1].role", "missing_required_parameter", ""),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "unsupported_parameter", "tool"),
    ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls", "unsupported_parameter", ""),
    ({"messages": user(5)}, "messages[0].content", "invalid_value", ""),
    ({"messages": user([{"type": "text"}])}, "messages[0].content[0].text", "missing_required_parameter", ""),
    ({"messages": user([{"type": "text", "text": 1}])}, "messages[0].content[0].text", "invalid_value", ""),
    ({"messages": user([{"type": "odd"}])}, "messages[0].content[0]", "invalid_value", ""),
    ({"messages": user([{"type": "input_audio"}])}, "messages[0].content[0]", "unsupported_parameter", "audio"),
    (
        {"messages": user([{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}])},
        "messages[0].content[1].image_url.url",
        "missing_required_parameter",
        "",
    ),
    ({"vlm": {"visual": {"ratio": 0}}}, "vlm.visual.ratio", "invalid_vlm_parameter", "0"),
    ({"vlm": {"visual": {"tokens": 0}}}, "vlm.visual.tokens", "invalid_vlm_parameter", ""),
    ({"vlm": {"visual": {"tokens": "many"}}}, "vlm.visual.tokens", "invalid_vlm_parameter", ""),
    ({"vlm": {"visual": {"floor": -1}}}, "vlm.visual.floor", "invalid_vlm_parameter", ""),
    ({"vlm": {"visual": {"method": "nosuch"}}}, "vlm.visual.method", "invalid_vlm_parameter", "none, foveal, pool"),
    ({"vlm": {"visual": {"method": "pool;how=odd"}}}, "vlm.visual.method", "invalid_vlm_parameter", '"max"'),
    ({"vlm": {"visual": {"method": "pool;size=3"}}}, "vlm.visual.method", "invalid_vlm_parameter", "size"),
    ({"vlm": {"visual": {"method": "foveal;alpha=?1"}}}, "vlm.visual.method", "invalid_vlm_parameter", "float"),
    ({"vlm": {"strict": True, "visual": {"tokns": 1}}}, "vlm.visual.tokns", "invalid_vlm_parameter", ""),
    ({"vlm": 3}, "vlm", "invalid_vlm_parameter", ""),
]
HEADERS = [
    ("VLM-Visual-Tokens", "0"),
    ("VLM-Visual-Tokens", "some"),
    ("VLM-Visual-Tokens", "?1"),
    ("VLM-Visual-Tokens", "5;x=1"),
    ("VLM-Visual-Tokens", "9" * 4000),
    ("VLM-Visual-Tokens", "144.5"),
    ("VLM-Visual-Ratio", "120%"),
    ("VLM-Visual-Ratio", "0%"),
    ("VLM-Visual-Tokens-Per-Image", "1.5"),
    ("VLM-Visual-Ratio", "1.01"),
    ("VLM-Visual-Ratio", "nan"),
    ("VLM-Visual-Ratio", "-0.5"),
    ("VLM-Visual-Floor", ""),
    ("VLM-Visual-Method", "../secret"),
    ("VLM-Visual-Method", "pool;;"),
    ("VLM-Visual-Method", "pool;how=mean;how=max"),
    ("VLM-Strict", "yes"),
]
BODIES = [
    b"",
    b"{",
    b"null",
    b"[]",
    b'"x"',
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b'{"model": "m", "temperature": NaN}',
    b'{"model": "m", "temperature": Infinity}',
    b'{"model": "m", "temperature": 1e999}',
    b'{"model": "m", "model": "m", "messages": [{"role": "user", "content": "x"}]}',
    b'{"model": "m", "messages": [{"role": "user", "content": "\\ud800"}]}',
    b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "n": ' + b"9" * 5000 + b"}",
    json.dumps({"model": "m", "messages": "x" * (1 << 20)}).encode(),
]


def check(reply: Any, param: str | None, code: str = "", word: str = "") -> None:
    assert 400 <= reply.status_code < 500, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"] and error["type"]
    assert len(error["message"]) < 600, "the request must not come back in the error"
    if param is not None:
        assert error["param"] == param
    assert not code or error["code"] == code
    assert word in error["message"]


@pytest.fixture
def api(make_api: Callable[..., Any]) -> Any:
    return make_api(limits=LIMITS)


def test_chat_fields(api: Any) -> None:
    for fields, param, code, word in CHAT:
        body = json.dumps({"model": "m", "messages": [MESSAGE]} | fields).encode()
        reply = api.send("POST", "/v1/chat/completions", content=body, headers={"content-type": "application/json"})
        try:
            check(reply, None if 10**400 in fields.values() else param, code, word)
        except AssertionError as error:
            raise AssertionError(f"{fields}: {reply.text}") from error
    assert not api.client.requests
    assert [outcome for outcome, _ in api.metrics.outcomes] == ["error"] * len(CHAT)
    assert len(api.metrics.routes) == len(CHAT)


def test_what_is_at_the_limit_is_served(api: Any) -> None:
    fields: list[dict[str, Any]] = [
        {"temperature": 2}, {"temperature": 0}, {"top_p": 1}, {"n": 3}, {"max_tokens": 50}, {"stop": ["a", "b" * 5]},
        {"logprobs": True, "top_logprobs": 4}, {"seed": 2**63 - 1}, {"seed": -(2**63)}, {"logit_bias": {"258": 100}},
        {"tools": []}, {"tool_choice": "none"}, {"response_format": {"type": "text"}}, {"modalities": ["text"]},
        {"temperature": None, "stop": None, "n": None, "tools": None, "logit_bias": None, "vlm": None},
        {"parallel_tool_calls": True, "metadata": {"a": "b"}, "service_tier": "auto", "user": "u"},
    ]  # fmt: skip
    for field in fields:
        reply = api.chat(**field)
        assert reply.status_code == 200, (field, reply.text)
        assert "VLM-Warning" not in reply.headers, field


def test_headers(api: Any) -> None:
    for name, value in HEADERS:
        check(api.chat(headers={name: value}), name, "invalid_vlm_parameter")
    twice = [("VLM-Visual-Tokens", "3"), ("VLM-Visual-Tokens", "4")]
    body = {"model": "m", "messages": [MESSAGE]}
    check(api.send("POST", "/v1/chat/completions", json=body, headers=twice), "VLM-Visual-Tokens")
    assert not api.client.requests


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"])
def test_bodies_that_are_no_json_object(api: Any, path: str) -> None:
    for body in BODIES:
        reply = api.send("POST", path, content=body, headers={"content-type": "application/json"})
        check(reply, None)
        if len(body) > 1 << 20:
            assert reply.status_code == 413 and "limits.body_mb" in reply.text
    check(api.send("POST", path, content=b"{}", headers={"content-type": "text/plain"}), None)
    assert not api.client.requests


def test_a_body_without_a_length_is_bounded_too(api: Any) -> None:
    async def endless() -> Any:
        for _ in range(1000):
            yield b"x" * 100_000
        raise AssertionError("the server reads without end")

    reply = api.send("POST", "/v1/chat/completions", content=endless(), headers={"content-type": "application/json"})
    assert reply.status_code == 413


def test_random_json_is_never_our_fault(api: Any) -> None:
    random_ = random.Random(5)
    atoms = [None, True, -1, 0, 3, 1e308, "", "m", "user", [], {}, ["x"], {"type": "text"}, "data:,", 2**70]
    names = ["model", "messages", "n", "stop", "vlm", "logit_bias", "stream", "stream_options", "temperature", "user"]

    def value(depth: int) -> Any:
        if depth == 0 or random_.random() < 0.5:
            return random_.choice(atoms)
        if random_.random() < 0.5:
            return [value(depth - 1) for _ in range(random_.randrange(3))]
        keys = ["role", "content", "type", "text", "image_url", "url", "visual", "tokens", "x"]
        return {random_.choice(keys): value(depth - 1) for _ in range(random_.randrange(4))}

    for _ in range(150):
        body = {"model": "m", "messages": [MESSAGE]} | {name: value(4) for name in random_.sample(names, 3)}
        reply = api.send("POST", "/v1/chat/completions", json=body)
        assert reply.status_code in (200, 400, 404), (body, reply.text)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"), ({"prompt": []}, "prompt"), ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": [259]}, "prompt"), ({"prompt": [2]}, "prompt"), ({"prompt": [-1]}, "prompt[0]"),
        ({"prompt": ["a", ""]}, "prompt[1]"), ({"prompt": ["a", 3]}, "prompt[1]"),
        ({"prompt": 5}, "prompt"), ({}, "prompt"), ({"prompt": "a", "echo": True}, "echo"),
        ({"prompt": "a", "best_of": 5}, "best_of"), ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "logprobs": 5}, "logprobs"), ({"prompt": ["a"] * 129}, "prompt"),
    ],
)  # fmt: skip
def test_completion_fields(api: Any, fields: dict[str, Any], param: str) -> None:
    check(api.send("POST", "/v1/completions", json={"model": "m"} | fields), param)
    assert not api.client.requests


def test_a_text_that_cannot_fit_is_not_tokenized(api: Any) -> None:
    check(api.chat("x " * 200_000), "messages", "context_length_exceeded", "2000")
    for phrase in ("maximum context length", "prompt is too long"):  # what client libraries look for
        assert phrase in api.chat("x " * 200_000).json()["error"]["message"]


def test_routes_that_are_not_there(api: Any) -> None:
    for method, path, status in (
        ("GET", "/nowhere", 404), ("GET", "/v1/chat/completions", 405), ("DELETE", "/v1/models", 405),
        ("GET", "/v1/models/gpt", 404), ("GET", "/v1/models/%ff", 404),
    ):  # fmt: skip
        reply = api.send(method, path)
        assert reply.status_code == status and set(reply.json()) == {"error"}, path
    assert api.send("GET", "/v1/chat/completions").headers["allow"] == "POST"


def test_our_own_bug_is_a_500_without_its_insides(api: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> None:
        raise RuntimeError("inside")

    monkeypatch.setattr(api.client, "generate", broken)
    reply = api.chat()
    assert reply.status_code == 500 and "inside" not in reply.text and reply.json()["error"]["code"] == "internal_error"
    assert api.metrics.outcomes == [("error", "internal_error")]


def test_images(api: Any, png: str, image_part: Callable[..., Any]) -> None:
    param = "messages[0].content[1].image_url.url"
    for url in ("data:image/png;base64,@@", "data:image/gif;base64,R0lG", "http://x/y.png", "ftp://x", "", "data:,"):
        check(api.chat([{"type": "text", "text": "a"}, image_part(url)]), param, "invalid_image")
    check(api.chat([image_part("http://x/y.png")]), None, "", "server.image_urls")
    check(api.chat([image_part(png)] * 3), "messages", "", "limits.images")
    system = [{"role": "system", "content": [image_part(png)]}, MESSAGE]
    body = {"model": "m", "messages": system}
    check(api.send("POST", "/v1/chat/completions", json=body), "messages[0].content[0]", "unsupported_parameter")
    assert not api.client.requests
