"""Requests as client libraries write them: numbers as text, null members, empty values, fields of other servers."""

from collections.abc import Callable
from typing import Any

import pytest

from foveate.server.common.known_fields import CHAT, COMPLETION, KnownFields

Part = Callable[..., dict[str, Any]]
INTEGERS = ["top_k", "seed", "min_tokens", "max_tokens", "max_completion_tokens", "n"]
NUMBERS = ["temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"]


@pytest.mark.parametrize("name", INTEGERS)
def test_integers_in_every_spelling(api: Any, name: str) -> None:
    for value in (2, 2.0, "2", "2.0", " 2", "2e0"):
        assert api.chat(**{name: value}).status_code == 200, value
    held = "max_tokens" if name == "max_completion_tokens" else name
    owners = [request if name == "n" else request.sampling for request in api.client.requests]
    assert [getattr(owner, held) for owner in owners] == [2] * 6
    for value in (2.5, "2.5", "two", "", True, "true", [2], {}, "9" * 50, "2" * 5000, "0x2", "²"):
        reply = api.chat(**{name: value})
        assert reply.status_code == 400 and reply.json()["error"]["param"] == name, value


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_in_every_spelling(api: Any, name: str) -> None:
    for value in (0.5, "0.5", "5e-1", "+0.5"):
        assert api.chat(**{name: value}).status_code == 200, value
    assert [getattr(request.sampling, name) for request in api.client.requests] == [0.5] * 4
    for value in ("half", "", True, "true", "nan", "inf", "1e999", [0.5], "0,5"):
        reply = api.chat(**{name: value})
        assert reply.status_code == 400 and reply.json()["error"]["param"] == name, value


def test_numbers_inside_other_fields(api: Any) -> None:
    assert api.chat(logit_bias={"5": "1.5"}, stop_token_ids=["7", 8.0], logprobs=True, top_logprobs="2").is_success
    sampling = api.client.requests[0].sampling
    assert (sampling.logit_bias, sampling.stop_token_ids, sampling.logprobs) == ({5: 1.5}, (7, 8), 2)
    for prompt in ([65, "66", 67.0], [["65", 66, 67.0]]):
        assert api.send("POST", "/v1/completions", json={"model": "m", "prompt": prompt, "logprobs": "1"}).is_success
    assert api.client.requests[1].prompt_ids == api.client.requests[2].prompt_ids == [65, 66, 67]
    assert api.send("POST", "/detokenize", json={"tokens": ["65", 66.0]}).is_success


NEUTRAL: list[dict[str, Any]] = [
    {"top_logprobs": 0}, {"top_logprobs": 0, "logprobs": False}, {"top_logprobs": 0, "logprobs": True},
    {"top_logprobs": None, "logprobs": False}, {"logprobs": None}, {"stop": ""}, {"stop": [""]}, {"stop": []},
    {"stop": ["", ""]}, {"stream_options": {}}, {"stream_options": {"include_usage": False}},
    {"stream_options": {"include_usage": None}, "stream": False}, {"response_format": {"type": "text"}},
    {"response_format": {"type": "text", "json_schema": None, "schema": None}}, {"response_format": {}},
    {"tools": None}, {"tools": []}, {"tool_choice": None}, {"tool_choice": "auto"}, {"tool_choice": {"type": "none"}},
    {"functions": []}, {"logit_bias": {}}, {"logit_bias": None}, {"echo": False}, {"best_of": 1},
    {"add_generation_prompt": True}, {"continue_final_message": False}, {"documents": None}, {"documents": []},
    {"return_token_ids": False}, {"return_token_ids": None}, {"truncate_prompt_tokens": None},
    {"allowed_token_ids": None}, {"prompt_logprobs": None}, {"chat_template_kwargs": {"enable_thinking": False}},
    {"chat_template_kwargs": {}}, {"thinking": {"type": "disabled"}}, {"enable_thinking": False}, {"typical_p": 1.0},
    {"mirostat": 0, "mirostat_tau": 5.0}, {"dry_multiplier": 0.0, "dry_base": 1.75}, {"cache_prompt": True},
    {"length_penalty": 1.0}, {"num_beams": 1}, {"do_sample": True}, {"skip_special_tokens": True}, {"lora_path": None},
    {"regex": ""}, {"grammar": ""}, {"json_schema": None}, {"logits_processors": []}, {"use_beam_search": False},
    {"metadata": {"a": "b"}, "store": True, "service_tier": "auto", "user": "u", "priority": 3, "session_id": "s"},
    {"anything": None}, {"vlm": None}, {"vlm": {}}, {"vlm": {"visual": None}}, {"vlm": {"visual": {"tokens": None}}},
]  # fmt: skip


def test_what_asks_for_nothing_changes_nothing_and_warns_of_nothing(api: Any) -> None:
    plain = api.chat(seed=1, stream=False).json()
    for fields in NEUTRAL:
        reply = api.chat(**({"seed": 1, "stream": False} | fields))
        assert reply.status_code == 200, (fields, reply.text)
        assert "VLM-Warning" not in reply.headers, (fields, reply.headers["VLM-Warning"])
        without = [choice | {"logprobs": None} for choice in reply.json()["choices"]]
        assert without == plain["choices"], fields
        assert api.client.requests[-1].prompt_ids == api.client.requests[0].prompt_ids


def test_neutral_members_of_messages_and_parts(api: Any, png: str, image_part: Part) -> None:
    answered = {
        "role": "assistant", "content": "yes", "refusal": None, "annotations": [], "audio": None,
        "function_call": None, "tool_calls": None, "name": None,
    }  # fmt: skip
    for content in (None, "", []):
        messages = [{"role": "user", "content": "a"}, answered, {"role": "user", "content": content}]
        reply = api.chat(messages=messages)
        assert reply.status_code == 200 and "VLM-Warning" not in reply.headers, reply.text
    assert len({tuple(request.prompt_ids) for request in api.client.requests}) == 1
    for detail in ("", "original", "auto", None):
        part = {"type": "image_url", "image_url": {"url": png, "detail": detail}}
        assert api.chat([part]).json()["usage"]["vlm"]["visual"]["kept"] == 36
    assert [request.images[0].tokens for request in api.client.requests[3:]] == [None] * 4
    cached = image_part(png) | {"cache_control": {"type": "ephemeral"}, "uuid": "u"}
    assert "VLM-Warning" not in api.chat([cached]).headers


REFUSED: list[tuple[str, Any]] = [
    ("allowed_token_ids", [1]), ("truncate_prompt_tokens", 5), ("documents", [{"text": "x"}]),
    ("return_token_ids", True), ("add_generation_prompt", False), ("logits_processors", ["x"]), ("echo", True),
    ("regex", "a+"), ("json_schema", "{}"), ("json_schema", {"type": "object"}), ("ebnf", "root ::= a"),
    ("no_stop_trim", True), ("stop_regex", "a"), ("lora_path", "x"), ("custom_logit_processor", "x"), ("mirostat", 2),
    ("typical_p", 0.5), ("dry_multiplier", 0.8), ("grammar", "root ::= a"), ("samplers", ["top_k"]), ("n_probs", 3),
    ("vllm_xargs", {"a": 1}), ("enable_thinking", True), ("thinking", {"type": "enabled"}), ("guided_json", {"a": 1}),
    ("structured_outputs", {"regex": "a"}), ("response_format", {"type": "json_object"}), ("best_of", 4),
    ("continue_final_message", True), ("chat_template_kwargs", {"x": 1}), ("prompt_logprobs", 0), ("bad_words", ["a"]),
    ("add_special_tokens", True), ("skip_special_tokens", False), ("include_stop_str_in_output", True),
    ("length_penalty", 0.5), ("num_beams", 4), ("do_sample", False), ("max_new_tokens", 5), ("repeat_penalty", 1.1),
    ("return_tokens_as_token_ids", True), ("input_ids", [1]), ("xtc_probability", 0.5), ("top_n_sigma", 1.0),
    ("system", "Be brief."), ("stop_sequences", ["a"]), ("extra_body", {"vlm": {}}), ("options", {"num_ctx": 4}),
    ("prompt", "x"), ("media_io_kwargs", {"image": {}}), ("use_beam_search", True), ("tool_choice", "required"),
    ("repetition_detection", {"max_pattern_size": 4}), ("logprob_token_ids", [4]), ("images", ["x"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_what_changes_the_answer_and_is_not_honoured_is_refused_by_name(api: Any, name: str, value: Any) -> None:
    error = api.chat(**{name: value}).json()["error"]
    assert (error["param"], error["code"]) == (name, "unsupported_parameter")
    assert not api.client.requests


def test_a_refused_field_names_the_one_of_this_server(api: Any) -> None:
    for name, ours in (("n_predict", "max_tokens"), ("repeat_penalty", "repetition_penalty"), ("system", "messages")):
        assert api.chat(**{name: 7}).json()["error"]["message"].endswith(f"use {ours}")
    body = {"model": "m", "prompt": "a", "max_completion_tokens": 3}
    assert "use max_tokens" in api.send("POST", "/v1/completions", json=body).json()["error"]["message"]


def test_refused_members_of_messages_parts_and_options(api: Any, png: str, image_part: Part) -> None:
    message = {"role": "user", "content": [image_part(png)]}
    for change, param in (
        ({"messages": [message | {"tool_calls": [{}]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "assistant", "content": "a", "prefix": True}]}, "messages[0].prefix"),
        ({"messages": [message | {"content": [image_part(png, max_pixels=9)]}]}, "messages[0].content[0].max_pixels"),
        ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, "stream_options.continuous_usage_stats"),
    ):
        error = api.chat(**change).json()["error"]
        assert (error["param"], error["code"]) == (param, "unsupported_parameter")
    for path, body, param in (
        ("/tokenize", {"prompt": "a", "truncate_prompt_tokens": 3}, "truncate_prompt_tokens"),
        ("/tokenize", {"messages": [message], "continue_final_message": True}, "continue_final_message"),
        ("/detokenize", {"tokens": [5], "skip_special_tokens": True}, "skip_special_tokens"),
    ):
        assert api.send("POST", path, json=body).json()["error"]["param"] == param


def test_every_ignored_field_is_told_of(api: Any, png: str, image_part: Part) -> None:
    image = image_part(png, caption="c") | {"image_url": {"url": png, "alt": "a"}}
    messages = [
        {"role": "user", "name": "ann", "mood": "good", "content": [image, {"type": "text", "text": "x", "y": 1}]}
    ]
    reply = api.chat(messages=messages, reasoning_effort="low", zeta=1, alpha=2, stream_options={"pace": 1})
    assert reply.json()["usage"]["vlm"]["warnings"] == [
        f"unknown field {path}"
        for path in (
            "reasoning_effort", "zeta", "alpha", "stream_options.pace", "messages[0].mood",
            "messages[0].content[0].caption", "messages[0].content[0].image_url.alt", "messages[0].content[1].y",
        )
    ] + ["1 more"]  # fmt: skip
    reply = api.send("POST", "/tokenize", json={"prompt": "a", "colour": 1})
    assert reply.headers["VLM-Warning"] == "unknown field colour"


def test_huge_names_stay_out_of_errors_and_headers(api: Any) -> None:
    reply = api.chat(**{"é\n" * 100_000: 1})
    assert reply.status_code == 200 and len(reply.headers["VLM-Warning"]) < 100
    for fields in (
        {"vlm": {"x" * 100_000: 1}},
        {"logit_bias": {"x" * 100_000: 1}},
        {"logit_bias": {"5": "x" * 100_000}},
    ):
        reply = api.chat(**fields)
        assert reply.status_code == 400 and len(reply.text) < 1000


@pytest.mark.parametrize("known", [CHAT, COMPLETION])
def test_the_tables_do_not_contradict_each_other(known: KnownFields) -> None:
    assert not known.refused.keys() & known.no_effect
    assert known.instead.keys() <= known.refused.keys()
