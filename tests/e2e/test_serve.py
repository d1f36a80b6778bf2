"""The server as its users meet it: official client, budgets, streams, concurrency, mistakes."""

import asyncio
import base64
import struct
import time
import zlib
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI, OpenAI

METHODS = ("divprune", "fastervlm", "none", "pool", "random", "uniform", "visionzip")
BUDGETS: tuple[dict[str, int | float], ...] = ({"ratio": 0.5}, {"tokens": 17}, {"ratio": 0.06})


def body(model: str, text: str, *pictures: str, **more: object) -> dict[str, Any]:
    """A greedy chat request; JSON, hence Any."""
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in pictures]
    message = {"role": "user", "content": [*parts, {"type": "text", "text": text}]}
    return {"model": model, "messages": [message], "temperature": 0, "max_tokens": 24} | more


def post(server: str, request: dict[str, Any], **headers: str) -> dict[str, Any]:
    reply = httpx.post(f"{server}/v1/chat/completions", json=request, headers=headers, timeout=60.0)
    assert reply.status_code == 200, reply.text
    answer: dict[str, Any] = reply.json()
    return answer


def quarter(offered: int) -> int:
    """A quarter to the nearest token, halves up."""
    return (offered + 2) // 4


def test_one_model_is_listed(server: str, model: str) -> None:
    assert model in ("tiny-llava", "tiny-qwen2-vl")
    assert httpx.get(f"{server}/health/live").status_code == 200


def test_a_request_that_states_nothing_gets_the_checkpoints_sampling(
    server: str, model: str, client: OpenAI, picture: Callable[[int], str]
) -> None:
    """The bundled models ask for greedy answers, whose length cuts no description."""
    (card,) = httpx.get(f"{server}/v1/models").json()["data"]
    assert card["sampling_defaults"]["temperature"] == 0
    stated = body(model, "Describe the picture.", picture(21), max_tokens=200)
    plain = {key: value for key, value in stated.items() if key not in ("temperature", "max_tokens")}
    (choice,) = post(server, stated)["choices"]
    for _ in range(3):
        assert post(server, plain)["choices"] == [choice] and choice["finish_reason"] == "stop"
    prompts = [client.completions.create(model=model, prompt="The star is", seed=i).choices[0].text for i in range(3)]
    assert len(set(prompts)) == 1
    hot = [post(server, plain | {"temperature": 2, "top_p": 1, "seed": i, "max_tokens": 30}) for i in range(3)]
    assert len({one["choices"][0]["message"]["content"] for one in hot}) > 1


@pytest.mark.parametrize("bound", ["max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize("most", [32768, 65535, 128_000, 10**9])
def test_max_tokens_above_the_context_is_an_upper_bound(server: str, model: str, bound: str, most: int) -> None:
    request = body(model, "hi") | {"ignore_eos": True, bound: most}
    if bound != "max_tokens":
        del request["max_tokens"]
    answer = post(server, request)
    assert answer["choices"][0]["finish_reason"] == "length" and answer["usage"]["total_tokens"] == 2048


def test_the_methods_are_listed(server: str) -> None:
    reply = httpx.get(f"{server}/v1/vlm/methods")
    assert reply.status_code == 200
    assert {method["name"] for method in reply.json()["data"]} >= set(METHODS)


def test_a_quarter_of_the_budget_shortens_the_prompt(server: str, model: str, picture: Callable[[int], str]) -> None:
    request = body(model, "Describe the picture.", picture(0))
    full = post(server, request)["usage"]
    less = post(server, request, **{"VLM-Visual-Ratio": "0.25"})["usage"]
    offered = full["vlm"]["visual"]["offered"]
    assert offered >= 60
    assert full["vlm"]["visual"]["kept"] == offered
    assert less["vlm"]["visual"]["offered"] == offered
    assert less["vlm"]["visual"]["kept"] == quarter(offered)
    assert full["prompt_tokens"] - less["prompt_tokens"] == offered - quarter(offered)


def test_header_and_body_say_the_same(server: str, model: str, picture: Callable[[int], str]) -> None:
    request = body(model, "How many shapes are there?", picture(1))
    by_header = post(server, request, **{"VLM-Visual-Tokens": "30", "VLM-Visual-Method": "uniform"})
    by_body = post(server, request | {"vlm": {"visual": {"tokens": 30, "method": "uniform"}}})
    assert by_header["usage"]["vlm"]["visual"] == by_body["usage"]["vlm"]["visual"]
    assert by_header["usage"]["vlm"]["visual"]["kept"] == 30
    assert by_header["choices"][0]["message"] == by_body["choices"][0]["message"]


def test_the_official_client_streams(client: OpenAI, model: str, picture: Callable[[int], str]) -> None:
    request = body(model, "Describe the picture.", picture(2))
    headers = {"VLM-Visual-Ratio": "0.25"}
    whole = client.chat.completions.create(**request, extra_headers=headers)
    chunks = list(
        client.chat.completions.create(
            **request, stream=True, stream_options={"include_usage": True}, extra_headers=headers
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text and text == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == [
        whole.choices[0].finish_reason
    ]
    assert not chunks[-1].choices and chunks[-1].usage is not None and whole.usage is not None
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    extra = chunks[-1].usage.model_extra or {}
    assert extra["vlm"]["visual"]["kept"] == quarter(extra["vlm"]["visual"]["offered"])


def test_two_pictures_share_a_total(server: str, model: str, picture: Callable[[int], str]) -> None:
    request = body(model, "What do you see?", picture(3), picture(4), vlm={"visual": {"tokens": 41}})
    visual = post(server, request)["usage"]["vlm"]["visual"]
    first, second = visual["per_image"]
    assert first["kept"] + second["kept"] == visual["kept"] == 41
    for image in (first, second):
        exact = 41 * image["grid"][0] * image["grid"][1] / visual["offered"]
        assert abs(image["kept"] - exact) < 1


def test_mixed_budgets_in_one_batch_answer_as_alone(server: str, model: str, picture: Callable[[int], str]) -> None:
    requests = [
        body(model, "Describe the picture.", picture(5 + i), vlm={"visual": {"method": method} | budget})
        for method in METHODS
        for i, budget in enumerate(({},) if method == "none" else BUDGETS)
    ]
    alone = [post(server, request) for request in requests]

    async def together() -> list[dict[str, Any]]:
        async with httpx.AsyncClient(timeout=120.0) as http:
            url = f"{server}/v1/chat/completions"
            replies = await asyncio.gather(*(http.post(url, json=request) for request in requests))
        return [reply.json() for reply in replies]

    for request, one, other in zip(requests, alone, asyncio.run(together()), strict=True):
        assert one["choices"][0]["message"] == other["choices"][0]["message"], request["vlm"]
        assert one["usage"]["vlm"]["visual"]["kept"] == other["usage"]["vlm"]["visual"]["kept"]
        assert one["usage"]["prompt_tokens"] == other["usage"]["prompt_tokens"]


def metric(server: str, name: str) -> float:
    """Sum of a metric's samples over its labels."""
    text = httpx.get(f"{server}/metrics", timeout=10.0).text
    lines = [line for line in text.splitlines() if line.startswith((f"{name} ", f"{name}{{"))]
    assert lines, f"no metric {name}"
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def eventually(what: str, holds: Callable[[], bool], seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.2)


def test_a_client_that_leaves_gives_its_blocks_back(server: str, model: str, picture: Callable[[int], str]) -> None:
    n, length = 8, 1500
    eventually("idle", lambda: metric(server, "vllm:num_requests_running") == 0)
    request = body(model, "Describe the picture.", picture(9), stream=True, n=n, ignore_eos=True, max_tokens=length)
    with httpx.stream("POST", f"{server}/v1/chat/completions", json=request, timeout=60.0) as reply:
        assert reply.status_code == 200
        lines = reply.iter_lines()  # named, because dropping it closes the connection
        assert next(lines).startswith("data: ")
        eventually("it runs", lambda: metric(server, "vllm:num_requests_running") > 0)
        before = metric(server, "foveate_steps_total")
    eventually("nothing runs", lambda: metric(server, "vllm:num_requests_running") == 0)
    eventually("no block is held", lambda: metric(server, "vllm:kv_cache_usage_perc") == 0)
    assert metric(server, "foveate_steps_total") - before < length / 2, "it answered to the end, for nobody"


def png_header(width: int, height: int) -> str:
    """Data URL of a PNG that claims a size and holds no pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + chunk).decode()


def visual(**fields: object) -> dict[str, object]:
    return {"vlm": {"visual": fields}}


# Changes to a good request (or its picture), headers, and the word its error must hold.
POISON: list[tuple[str, dict[str, object], dict[str, str], str]] = [
    ("unknown model", {"model": "gpt-none"}, {}, "gpt-none"),
    ("no messages", {"messages": []}, {}, "messages"),
    ("messages of another type", {"messages": "hello"}, {}, "messages"),
    ("unknown role", {"messages": [{"role": "wizard", "content": "x"}]}, {}, "role"),
    ("temperature", {"temperature": -1}, {}, "temperature"),
    ("top_p", {"top_p": 2}, {}, "top_p"),
    ("max_tokens", {"max_tokens": 0}, {}, "max_tokens"),
    ("n", {"n": 0}, {}, "n"),
    ("too many choices", {"n": 100_000}, {}, "n"),
    ("top_logprobs", {"logprobs": True, "top_logprobs": 10_000}, {}, "logprobs"),
    ("stop strings", {"stop": ["x"] * 1000}, {}, "stop"),
    ("logit_bias", {"logit_bias": {"99999999": 1}}, {}, "logit_bias"),
    ("ratio above one", visual(ratio=2), {}, "ratio"),
    ("ratio of nothing", visual(ratio=0), {}, "ratio"),
    ("tokens below one", visual(tokens=-1), {}, "tokens"),
    ("unknown method", visual(method="nosuch"), {}, "nosuch"),
    ("a method's file that is none", visual(method="base"), {}, "base"),
    ("floor above tokens", visual(floor=50, tokens=20), {}, "floor"),
    ("none with a budget", visual(method="none", tokens=5), {}, "none"),
    ("header that is no number", {}, {"VLM-Visual-Ratio": "some"}, "Ratio"),
    ("header out of range", {}, {"VLM-Visual-Tokens": "-3"}, "Tokens"),
]
PICTURES = [
    ("broken base64", "data:image/png;base64,@@@@"),
    ("no picture", "data:image/png;base64,aGVsbG8gd29ybGQ="),
    ("empty picture", "data:image/png;base64,"),
    ("a bomb", png_header(100_000, 100_000)),
    ("cut off", png_header(100, 100)),
    ("no data URL", "hello"),
    ("a file", "file:///etc/hostname"),
    ("a web address, not enabled", "http://127.0.0.1:9/cat.png"),
]


def poison(model: str, good: str) -> list[tuple[str, dict[str, Any], dict[str, str], str]]:
    """Every request that must be refused: what it is, body, headers, word of the error."""
    asks = "What is it?"
    bad = [(what, body(model, asks, good) | change, headers, word) for what, change, headers, word in POISON]
    bad += [(what, body(model, asks, url), {}, "") for what, url in PICTURES]
    bad.append(("too long", body(model, "shape " * 5000, good), {}, "context"))
    bad.append(("too many pictures", body(model, asks, *[good] * 100), {}, "image"))
    return bad


def test_bad_requests_are_refused_and_a_healthy_stream_goes_on(
    server: str, model: str, picture: Callable[[int], str]
) -> None:
    good = picture(10)
    healthy = body(model, "Describe the picture.", good, max_tokens=300, ignore_eos=True)
    expected = post(server, healthy)["choices"][0]["message"]["content"]

    async def stream() -> str:
        text = ""
        async with AsyncOpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0, timeout=120.0) as client:
            extra = {"ignore_eos": healthy.pop("ignore_eos")}
            async for chunk in await client.chat.completions.create(**healthy, stream=True, extra_body=extra):
                text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
        return text

    async def both() -> tuple[str, list[httpx.Response]]:
        healthy_one = asyncio.create_task(stream())
        url = f"{server}/v1/chat/completions"
        async with httpx.AsyncClient(timeout=120.0) as http:
            replies = [await http.post(url, json=b, headers=h) for _, b, h, _ in poison(model, good)]
            replies.append(await http.post(url, content=b"{not json", headers={"content-type": "application/json"}))
        return await healthy_one, replies

    text, replies = asyncio.run(both())
    assert text == expected
    refused = [*((what, word) for what, _, _, word in poison(model, good)), ("no JSON", "")]
    for (what, word), reply in zip(refused, replies, strict=True):
        assert 400 <= reply.status_code < 500, f"{what}: {reply.status_code} {reply.text}"
        error = reply.json()["error"]
        assert error["message"] and error["type"], what
        assert word.lower() in f"{error['message']} {error['param']}".lower(), f"{what}: {error}"
    assert replies[0].status_code == 404


def test_the_same_seed_draws_the_same_answer(server: str, model: str, picture: Callable[[int], str]) -> None:
    request = body(model, "Describe the picture.", picture(11), temperature=1.5, seed=3, n=2)
    first, again = post(server, request)["choices"], post(server, request)["choices"]
    assert [c["message"]["content"] for c in first] == [c["message"]["content"] for c in again]
    assert [c["index"] for c in first] == [0, 1]


@pytest.mark.parametrize("path", ["/v1/models", "/health/ready", "/metrics"])
def test_pages_that_machines_read(server: str, path: str) -> None:
    assert httpx.get(f"{server}{path}", timeout=10.0).status_code == 200
