"""Chat and text completions: shapes, streams, budgets, accounting, disconnects."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from openai import AsyncOpenAI

from foveate.configs.config import BudgetConfig

Part = Callable[..., dict[str, Any]]


def test_an_answer_and_its_accounting(api: Any, png: str, image_part: Part) -> None:
    reply = api.chat([image_part(png), {"type": "text", "text": "What?"}], vlm={"visual": {"tokens": 9}})
    assert reply.status_code == 200, reply.text
    body = reply.json()
    assert body["object"] == "chat.completion" and body["model"] == "m"
    choice = body["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": "The answer is 42.", "refusal": None}
    assert choice["finish_reason"] == "stop" and choice["logprobs"] is None
    usage = body["usage"]
    request = api.client.requests[0]
    assert usage["prompt_tokens"] == len(request.prompt_ids) - 1 + 9
    assert usage["completion_tokens"] == len("The answer is 42.") + 1
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 7, "image_tokens": 9}
    assert usage["vlm"] == {
        "visual": {
            "offered": 36,
            "kept": 9,
            "kept_mean": 9.0,
            "method": "foveal",
            "per_image": [{"grid": [6, 6], "offered": 36, "kept": 9}],
        },
        "time_ms": {"queue": 1.0, "encode": 2.0, "reduce": 0.5, "prefill": 3.0, "decode": 4.0},
        "sched": {"preemptions": 0},
        "kv": {"peak_tokens": usage["total_tokens"]},
    }
    assert reply.headers["VLM-Resolved"] == "vis=9, method=foveal, floor=1"
    assert reply.headers["VLM-Request-Id"] == body["id"] == request.id
    assert reply.headers["VLM-Spent"].startswith("vis_in=36, vis_kept=9, enc_hits=1, prefix_hit=7, kv_peak=")
    timing = "queue;dur=1.0, encode;dur=2.0, reduce;dur=0.5, prefill;dur=3.0, decode;dur=4.0"
    assert reply.headers["Server-Timing"] == timing
    assert api.metrics.routes == ["/v1/chat/completions"]
    assert api.metrics.outcomes == [("success", "stop")]
    assert [each.model_dump(exclude_none=True) for each in api.metrics.spent] == [usage]
    assert not api.client.aborted


def test_the_official_client_streams_what_it_would_get_at_once(api: Any, png: str, image_part: Part) -> None:
    messages: Any = [{"role": "user", "content": [image_part(png), {"type": "text", "text": "What?"}]}]

    async def ask(client: AsyncOpenAI) -> tuple[Any, list[Any]]:
        whole = await client.chat.completions.create(model="m", messages=messages, n=2)
        stream = await client.chat.completions.create(
            model="m", messages=messages, n=2, stream=True, stream_options={"include_usage": True}
        )
        return whole, [chunk async for chunk in stream]

    whole, chunks = api.openai(ask)
    for index in range(2):
        deltas = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == index]
        assert deltas[0].delta.role == "assistant"
        assert "".join(d.delta.content or "" for d in deltas) == whole.choices[index].message.content
        assert [d.finish_reason for d in deltas if d.finish_reason] == ["stop"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    order = [c.choices[0].index for c in chunks if c.choices]
    assert order[:6] == [0, 1, 0, 1, 0, 1], "choices come interleaved"


def test_a_stream_without_usage_has_none(api: Any) -> None:
    found = api.events(api.chat(stream=True))
    assert all("usage" not in chunk for chunk in found)
    assert all(len(chunk["choices"]) == 1 for chunk in found)


def test_a_stream_says_what_was_resolved_before_its_first_byte(api: Any, png: str, image_part: Part) -> None:
    reply = api.chat([image_part(png)], headers={"VLM-Visual-Tokens": "5"}, stream=True)
    assert reply.headers["VLM-Resolved"] == "vis=5, method=foveal, floor=1"
    assert reply.headers["content-type"].startswith("text/event-stream")


def test_stop_strings_end_answer_and_work(api: Any) -> None:
    for stop in ("is", ["xx", " is 4", "is 42"], "42."):
        reply = api.chat(stop=stop).json()["choices"][0]
        cut = api.client.text.index(stop if isinstance(stop, str) else " is 4")
        assert (reply["message"]["content"], reply["finish_reason"]) == (api.client.text[:cut], "stop")
    assert len(api.client.ended) == 3 and not api.client.aborted, "ended choice by choice, with their usage"
    chunks = api.events(api.chat(stop="is", stream=True, stream_options={"include_usage": True}))
    text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"])
    assert text == "The answer " and chunks[-1]["usage"]["completion_tokens"] == len("The answer is")
    assert chunks[-1]["usage"]["vlm"]["kv"]["peak_tokens"] > 0
    api.client.ended.clear()
    reply = api.chat(stop="is", n=2).json()
    assert [c["message"]["content"] for c in reply["choices"]] == ["The answer "] * 2
    assert {choice for _, choice in api.client.ended} == {0, 1}


def test_min_tokens_hold_for_stop_strings_too(api: Any) -> None:
    reply = api.chat(stop=["e", "4"], min_tokens=4, max_tokens=50).json()["choices"][0]
    assert reply["message"]["content"] == "The answ"


def test_max_tokens_in_the_middle_of_a_character(api: Any) -> None:
    api.client.text = "naïve"
    assert api.chat(max_tokens=3).json()["choices"][0] == {
        "index": 0,
        "message": {"role": "assistant", "content": "na", "refusal": None},
        "logprobs": None,
        "finish_reason": "length",
    }


def test_logprobs_have_text_and_bytes(api: Any) -> None:
    api.client.text = "é!"
    for stream in (False, True):
        reply = api.chat(logprobs=True, top_logprobs=2, stream=stream)
        found = api.events(reply) if stream else [reply.json()]
        entries = [e for c in found for e in ((c["choices"][0].get("logprobs") or {}).get("content") or [])]
        assert [e["bytes"] for e in entries] == [[0xC3], [0xA9], [ord("!")]]
        assert entries[2]["token"] == "!" and entries[2]["logprob"] == -0.5
        assert [t["logprob"] for t in entries[2]["top_logprobs"]] == [-0.5, -1.5]
    assert api.client.requests[0].sampling.logprobs == 2


def test_header_and_body_resolve_alike(api: Any, png: str, image_part: Part) -> None:
    pairs: list[tuple[dict[str, str], dict[str, Any]]] = [
        ({"VLM-Visual-Tokens": "12"}, {"tokens": 12}),
        ({"VLM-Visual-Tokens": "full"}, {"tokens": "full"}),
        ({"VLM-Visual-Tokens": "auto"}, {"tokens": "auto"}),
        ({"VLM-Visual-Tokens-Per-Image": "7"}, {"per_image": 7}),
        ({"VLM-Visual-Ratio": "0.111"}, {"ratio": 0.111}),
        ({"VLM-Visual-Ratio": "1"}, {"ratio": 1}),
        ({"VLM-Visual-Floor": "4", "VLM-Visual-Ratio": "0.5"}, {"floor": 4, "ratio": 0.5}),
        ({"VLM-Visual-Method": "pool;how=max"}, {"method": "pool;how=max"}),
        ({"VLM-Visual-Method": "foveal;alpha=1"}, {"method": "foveal;alpha=1"}),
    ]
    for headers, visual in pairs:
        by_header = api.chat([image_part(png)], headers=headers)
        by_body = api.chat([image_part(png)], vlm={"visual": visual})
        assert by_header.status_code == by_body.status_code == 200, by_header.text
        one, other = api.client.requests[-2:]
        assert one.visual == other.visual, headers
        assert by_header.headers["VLM-Resolved"] == by_body.headers["VLM-Resolved"]
        assert by_header.json()["usage"] == by_body.json()["usage"]


def test_unknown_fields_and_headers_are_named_not_refused(api: Any) -> None:
    reply = api.chat(headers={"VLM-Telepathy": "1"}, tempreature=3, store=True)
    assert reply.status_code == 200
    warnings = ["unknown field tempreature", "unknown header vlm-telepathy"]
    assert reply.headers["VLM-Warning"] == ", ".join(warnings)
    assert reply.json()["usage"]["vlm"]["warnings"] == warnings
    strict = api.chat(headers={"VLM-Strict": "?1", "VLM-Telepathy": "1"})
    assert strict.status_code == 400 and strict.json()["error"]["param"] == "vlm-telepathy"


def test_the_server_caps_budgets(make_api: Any, png: str, image_part: Part) -> None:
    api = make_api(budget=BudgetConfig(max_tokens=8, method="none"))
    assert api.chat([image_part(png)]).status_code == 200
    api.chat([image_part(png)], vlm={"visual": {"tokens": 30, "floor": 20}})
    assert [(r.visual.tokens, r.visual.floor) for r in api.client.requests] == [(8, 1), (8, 8)]
    strict = api.chat([image_part(png)], vlm={"strict": True, "visual": {"tokens": 30}})
    assert strict.status_code == 400 and "budget.max_tokens" in strict.json()["error"]["message"]


def test_completions_of_several_prompts(api: Any) -> None:
    async def ask(client: AsyncOpenAI) -> tuple[Any, list[Any]]:
        prompts: Any = ["one", "three"]
        whole = await client.completions.create(model="m", prompt=prompts, n=2, max_tokens=40, logprobs=1)
        stream = await client.completions.create(model="m", prompt=prompts, n=2, max_tokens=40, stream=True)
        return whole, [chunk async for chunk in stream]

    whole, chunks = api.openai(ask)
    assert [(c.index, c.text) for c in whole.choices] == [(i, api.client.text) for i in range(4)]
    assert whole.usage.prompt_tokens == 8 and whole.usage.completion_tokens == 4 * 18
    assert whole.choices[0].logprobs.tokens == list(api.client.text)
    assert whole.choices[0].logprobs.text_offset == list(range(17))
    for index in range(4):
        assert "".join(c.choices[0].text for c in chunks if c.choices[0].index == index) == api.client.text
    assert [len(r.prompt_ids) for r in api.client.requests] == [3, 5, 3, 5]


@pytest.mark.parametrize("prompt", ["abc", ["abc"], [68, 69, 70], [[68, 69, 70]]])
def test_completions_take_text_or_ids(api: Any, prompt: object) -> None:
    reply = api.send("POST", "/v1/completions", json={"model": "m", "prompt": prompt})
    assert reply.status_code == 200, reply.text
    assert reply.json()["choices"][0]["finish_reason"] == "length"
    assert reply.json()["usage"]["prompt_tokens"] == 3 and reply.json()["usage"]["completion_tokens"] == 16


def test_the_salt_is_a_function_of_what_the_client_says(api: Any) -> None:
    for salt in (None, "a", "a", "b"):
        api.chat(cache_salt=salt)
    salts = [request.salt for request in api.client.requests]
    assert salts[0] == b"" and salts[1] == salts[2] and salts[1] != salts[3]


def test_request_ids_go_back_and_nowhere_else(api: Any) -> None:
    reply = api.chat(headers={"X-Request-Id": "mine-1"})
    assert reply.headers["x-request-id"] == "mine-1" and api.client.requests[0].id != "mine-1"
    assert api.chat(headers={"X-Request-Id": "a b"}).headers["x-request-id"] not in ("", "a b")
    assert api.send("GET", "/nowhere", headers={"X-Request-Id": "x"}).headers["x-request-id"] == "x"


def test_sampling_reaches_the_engine(api: Any) -> None:
    fields = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "seed": -1, "repetition_penalty": 1.1,
        "presence_penalty": -0.5, "frequency_penalty": 0.25, "stop_token_ids": [9], "min_tokens": 1,
        "max_tokens": 5, "ignore_eos": True,
    }  # fmt: skip
    assert api.chat(**fields, logit_bias={"5": -100}).status_code == 200
    sampling = api.client.requests[0].sampling
    for name, value in fields.items():
        want = {"seed": 2**63 - 1, "stop_token_ids": (9,)}.get(name, value)
        assert getattr(sampling, name) == want, name
    assert sampling.logit_bias == {5: -100.0}
    api.chat(temperature=1e-300, top_k=-1, max_completion_tokens=3, max_tokens=4)
    sampling = api.client.requests[1].sampling
    assert (sampling.temperature, sampling.top_k, sampling.max_tokens) == (0.0, 0, 3)


def test_models_methods_tokens_health(api: Any) -> None:
    card = api.send("GET", "/v1/models").json()["data"][0]
    assert card["id"] == "m" and card["max_model_len"] == 2000 and api.send("GET", "/v1/models/m").json() == card
    methods = api.send("GET", "/v1/vlm/methods").json()
    assert [m["name"] for m in methods["data"]] == ["none", "foveal", "pool", "fastv"]
    assert methods["data"][1]["fields"] == [{"name": "alpha", "type": "float", "default": 0.5}]
    tokens = api.send("POST", "/tokenize", json={"prompt": "hé", "return_token_strs": True}).json()
    assert tokens["count"] == 3 == len(tokens["token_strs"]) and tokens["max_model_len"] == 2000
    assert api.send("POST", "/detokenize", json={"tokens": tokens["tokens"]}).json() == {"prompt": "hé"}
    chat = api.send("POST", "/tokenize", json={"messages": [{"role": "user", "content": "x"}]}).json()
    api.chat("x")
    assert chat["tokens"] == api.client.requests[0].prompt_ids
    assert api.send("GET", "/health/live").status_code == 200
    assert b"foveate_requests_total" in api.send("GET", "/metrics").content


def test_before_the_engine_is_ready(api: Any) -> None:
    api.client.state, api.client.reason = "starting", "the model is being loaded"
    for reply in (api.chat(), api.send("GET", "/v1/models"), api.send("POST", "/tokenize", json={"prompt": "x"})):
        assert reply.status_code == 503 and "loaded" in reply.text and "retry-after" in reply.headers


def test_the_schema_describes_the_routes(api: Any) -> None:
    schema = api.send("GET", "/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/completions", "/tokenize"} <= set(schema["paths"])
    chat = schema["paths"]["/v1/chat/completions"]["post"]
    assert "422" not in chat["responses"] and "400" in chat["responses"]
    assert "#/components/schemas/ChatRequest" in json.dumps(chat["requestBody"])
