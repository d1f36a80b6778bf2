"""Names of the model: what a path gives, what flags give, and where each name answers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import foveate.server.serve
from foveate.configs.config import Config, ModelConfig
from foveate.configs.describe import describe_settings
from foveate.server import find_model, foreign_flags
from foveate.server.main import main

HUB = "Qwen/Qwen2-VL-2B-Instruct"


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that passes for a checkpoint, also for every hub name."""
    directory = tmp_path / "models" / "my-llava"
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    monkeypatch.setattr(find_model, "_from_hub", lambda name: directory)
    monkeypatch.chdir(tmp_path)
    return directory


@pytest.mark.parametrize(
    ("path", "settings", "names"),
    [
        (HUB, {}, ["Qwen2-VL-2B-Instruct", HUB]),
        ("./models/my-llava", {}, ["my-llava", "./models/my-llava"]),
        ("models/my-llava/", {}, ["my-llava", "models/my-llava"]),
        ("models/my-llava/.", {}, ["my-llava"]),
        ("tiny-llava", {}, ["tiny-llava"]),
        (HUB, {"aliases": ("qwen", HUB)}, ["Qwen2-VL-2B-Instruct", HUB, "qwen"]),
        (HUB, {"name": "a"}, ["a"]),
        (HUB, {"name": "a", "aliases": ("b", "a", "b")}, ["a", "b"]),
    ],
)
def test_a_path_gives_the_full_name_and_its_last_part(
    checkpoint: Path, path: str, settings: dict[str, Any], names: list[str]
) -> None:
    found = find_model.find_model(Config(model=ModelConfig(path=path, **settings)))[0].model
    assert [found.name, *found.aliases] == names


@pytest.mark.parametrize(
    ("flags", "names", "keys"),
    [
        (["--served-model-name", "A", "[B]", "c,d"], ["A", "[B]", "c,d"], ()),
        (["--served-model-name", "A", "--served-model-name", "B"], ["A", "B"], ()),
        (["--served-model-name", "A", "--set", "model.aliases=x"], ["A"], ()),
        (["--api-key", "one,two", '["', "--set", "server.api_keys=x"], ["tiny-llava"], ("one,two", '["')),
        (["--api-key", "a", "--api-key", "b"], ["tiny-llava"], ("a", "b")),
    ],
)
def test_flags_give_names_and_keys(
    flags: list[str], names: list[str], keys: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Config] = []

    def run(config: Config, _: Path, __: float) -> int:
        seen.append(config)
        return 0

    monkeypatch.setattr(foveate.server.serve, "run", run)
    assert main(["serve", "tiny-llava", *flags]) == 0
    (config,) = seen
    assert [config.model.name, *config.model.aliases] == names and config.server.api_keys == keys


def test_every_name_answers_and_the_first_is_in_replies(make_api: Callable[..., Any]) -> None:
    api = make_api(model=ModelConfig(name="m", aliases=("org/m", "/data/m")))
    listed = api.send("GET", "/v1/models").json()["data"]
    assert [card["id"] for card in listed] == ["m", "org/m", "/data/m"]
    for name in ("m", "org/m", "/data/m", "/data/m/", ""):
        assert api.chat(model=name).json()["model"] == "m"
        assert api.send("POST", "/v1/completions", json={"model": name, "prompt": "x"}).status_code == 200
        assert api.send("POST", "/tokenize", json={"model": name, "prompt": "x"}).status_code == 200
    for card in listed:
        assert api.send("GET", f"/v1/models/{card['id']}").json() == card
        assert api.send("GET", "/v1/models/" + card["id"].replace("/", "%2F")).json() == card
    unnamed = api.send("POST", "/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}]})
    assert unnamed.status_code == 200 and unnamed.json()["model"] == "m"
    refused = api.chat(model="M")
    assert refused.status_code == 404 and "'m' or 'org/m' or '/data/m'" in refused.json()["error"]["message"]


@pytest.mark.parametrize("form", ["{} 1", "{}=1", "underscores"])
def test_a_flag_of_another_server_names_the_setting(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    known = {setting.key for setting in describe_settings()}
    for flag, key in foreign_flags.SETTINGS.items():
        words = form.format(flag).split() if "{" in form else ["--" + flag.strip("-").replace("-", "_"), "1"]
        if not flag.startswith("--") and form != "{} 1":
            continue
        with pytest.raises(SystemExit):
            main(["serve", "tiny-llava", *words])
        said = capsys.readouterr().err
        assert key in known and said.count("\n") == 1 and f"; write --set {key}=VALUE" in said, flag


def test_a_flag_without_a_setting_names_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    for flag, text in foreign_flags.REMEDIES.items():
        with pytest.raises(SystemExit):
            main(["serve", flag, "x"])
        assert f"; {text}\n" in capsys.readouterr().err, flag
