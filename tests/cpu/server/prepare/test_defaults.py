"""Sampling that a request leaves out: the checkpoint's generation_config.json decides, a stated value always wins."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import foveate.bundled
from foveate.configs.config import Config, LimitsConfig, ModelConfig
from foveate.configs.errors import ConfigError
from foveate.server.prepare.defaults import SamplingDefaults

Serve = Callable[..., Any]
QWEN = {"do_sample": True, "temperature": 0.01, "top_k": 1, "top_p": 0.001, "repetition_penalty": 1.05}
NEUTRAL = {
    "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "max_tokens": None,
}  # fmt: skip


@pytest.fixture
def serve(model_dir: Path, tmp_path: Path, api: Any) -> Serve:
    """An API over a checkpoint with these values in its generation_config.json; None: without the file."""

    def make(generation: dict[str, Any] | None, rule: str = "auto", **sections: Any) -> Any:
        directory = tmp_path / f"model{len(list(tmp_path.iterdir()))}"
        shutil.copytree(model_dir, directory)
        if generation is not None:
            (directory / "generation_config.json").write_text(json.dumps(generation))
        config = Config(model=ModelConfig(name="m", generation_config=rule), **sections)  # type: ignore[arg-type]
        return type(api)(directory, config)

    return make


def shown(api: Any) -> dict[str, Any]:
    found: dict[str, Any] = api.send("GET", "/v1/models").json()["data"][0]["sampling_defaults"]
    return found


def sampled(api: Any, **fields: Any) -> dict[str, Any]:
    """What reaches the engine of a chat, by the names of the defaults."""
    assert api.chat(**fields).status_code == 200
    params = api.client.requests[-1].sampling
    return {name: getattr(params, name) for name in NEUTRAL}


FILES: list[tuple[dict[str, Any] | None, dict[str, Any]]] = [
    (None, {}),
    ({"eos_token_id": 2}, {}),
    ({"do_sample": False}, {"temperature": 0.0}),
    ({"do_sample": False, "temperature": 0.7, "top_p": 0.9}, {"temperature": 0.0, "top_p": 0.9}),
    ({"do_sample": True}, {}),
    ({"temperature": 0}, {"temperature": 0.0}),
    ({"temperature": 0.6, "do_sample": None, "top_k": None}, {"temperature": 0.6}),
    (QWEN, {"temperature": 0.01, "top_k": 1, "top_p": 0.001, "repetition_penalty": 1.05}),
    ({"top_k": 50.0, "min_p": 0.05}, {"top_k": 50, "min_p": 0.05}),
    ({"top_k": -1, "top_p": 1}, {}),
    ({"max_new_tokens": 64, "max_length": 20}, {"max_tokens": 64}),
]


@pytest.mark.parametrize(("generation", "changed"), FILES)
def test_the_file_fills_in_what_a_request_omits(
    serve: Serve, generation: dict[str, Any] | None, changed: dict[str, Any]
) -> None:
    api = serve(generation)
    in_force = NEUTRAL | changed
    assert shown(api) == in_force
    expected = in_force | {"max_tokens": in_force["max_tokens"] or LimitsConfig().output_tokens}
    assert sampled(api) == expected
    assert sampled(api, temperature=None, top_p=None, top_k=None, max_tokens=None) == expected, "null omits"
    completion = api.send("POST", "/v1/completions", json={"model": "m", "prompt": "x"})
    params = api.client.requests[-1].sampling
    assert completion.status_code == 200 and params.max_tokens == 16, "OpenAI's default of a text completion is less"
    assert {name: getattr(params, name) for name in NEUTRAL if name != "max_tokens"} == {
        name: value for name, value in expected.items() if name != "max_tokens"
    }


@pytest.mark.parametrize(
    "stated",
    [
        {"temperature": 1.0}, {"temperature": 0}, {"top_p": 1}, {"top_k": 0}, {"top_k": -1}, {"top_k": 5}, {"min_p": 0},
        {"repetition_penalty": 1}, {"max_tokens": 300}, {"max_tokens": 3}, {"max_completion_tokens": 300},
        {"temperature": 0.7, "top_p": 0.5},
    ],
)  # fmt: skip
def test_a_stated_value_wins_and_the_others_stay(serve: Serve, stated: dict[str, Any]) -> None:
    api = serve(QWEN | {"do_sample": False, "min_p": 0.2, "max_new_tokens": 64})
    defaults = shown(api)
    changed = {name.replace("max_completion", "max"): max(value, 0) for name, value in stated.items()}
    assert sampled(api, **stated) == defaults | changed


def test_ignore_leaves_the_file_unread(serve: Serve) -> None:
    api = serve(QWEN | {"top_p": 7}, rule="ignore")
    assert shown(api) == NEUTRAL
    assert sampled(api)["temperature"] == 1.0


def test_the_default_length_yields_to_min_tokens_and_to_the_operator(serve: Serve) -> None:
    api = serve({"max_new_tokens": 8}, limits=LimitsConfig(output_tokens=50))
    assert sampled(api)["max_tokens"] == 8 and sampled(api, min_tokens=20)["max_tokens"] == 20
    completion = {"model": "m", "prompt": "x"}
    assert api.send("POST", "/v1/completions", json=completion).status_code == 200
    assert api.client.requests[-1].sampling.max_tokens == 8
    long = serve({"max_new_tokens": 2048}, limits=LimitsConfig(output_tokens=50))
    assert sampled(long)["max_tokens"] == 50


@pytest.mark.parametrize(
    ("generation", "words"),
    [
        ({"temperature": "hot"}, "temperature is 'hot', not a number"),
        ({"temperature": -0.1}, "temperature is -0.1, not a number from 0 up"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": True}, "temperature is True"),
        ({"top_k": 10**400}, "top_k is 1000"),
        ({"do_sample": "no"}, "do_sample is 'no', not true or false"),
        ({"top_p": 2}, "top_p is 2, not above 0, up to 1"),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_k": -2}, "top_k is -2, not a whole number from -1 up"),
        ({"top_k": 1.5}, "top_k is 1.5"),
        ({"min_p": 1.1}, "min_p is 1.1"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0, not a number above 0"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty is inf"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0, not a whole number from 1 up"),
        ({"max_new_tokens": [8]}, "max_new_tokens is [8], not a number"),
        (["temperature"], "holds no JSON object"),
    ],
)
def test_a_wrong_value_of_the_file_ends_the_start(tmp_path: Path, generation: Any, words: str) -> None:
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps(generation))
    with pytest.raises(ConfigError) as refused:
        SamplingDefaults.load(tmp_path, ModelConfig())
    message = str(refused.value)
    assert message.startswith(str(file)) and words in message and "\n" not in message
    if isinstance(generation, dict):
        assert message.endswith("model.generation_config=ignore")
    assert SamplingDefaults.load(tmp_path, ModelConfig(generation_config="ignore")) == SamplingDefaults()


def test_several_greedy_choices_come_with_a_warning(serve: Serve) -> None:
    """The request did not ask for greedy sampling, so the equal answers need a word. Who asks for greedy knows."""
    api = serve({"do_sample": False})
    assert "2 choices are equal" in api.chat(n=2).headers["VLM-Warning"]
    completion = {"model": "m", "prompt": "x", "n": 3}
    assert "3 choices" in api.send("POST", "/v1/completions", json=completion).headers["VLM-Warning"]
    for fields in ({"n": 1}, {"n": 2, "temperature": 0.5}, {"n": 2, "temperature": 0}):
        assert "VLM-Warning" not in api.chat(**fields).headers


@pytest.mark.parametrize("name", foveate.bundled.names())
def test_the_bundled_models_are_greedy(name: str) -> None:
    directory = foveate.bundled.path(name)
    assert directory is not None
    defaults = SamplingDefaults.load(directory, ModelConfig())
    assert defaults.temperature == 0.0
    assert defaults.max_tokens is None or defaults.max_tokens >= 100, "twice the longest description"


UNBOUNDED = [{}, *({name: n} for name in ("max_tokens", "max_completion_tokens") for n in (51, 65535, 128_000, 10**9))]


@pytest.mark.parametrize("stated", UNBOUNDED)
def test_max_tokens_is_an_upper_bound(serve: Serve, stated: dict[str, int]) -> None:
    api = serve(None, limits=LimitsConfig(output_tokens=50))
    assert sampled(api, **stated)["max_tokens"] == 50
    body = {"model": "m", "prompt": "x", "max_tokens": 65535}
    assert api.send("POST", "/v1/completions", json=body).status_code == 200
    assert api.client.requests[-1].sampling.max_tokens == 50
    refused = api.chat(min_tokens=51, **stated)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "min_tokens"
