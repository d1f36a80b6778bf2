"""What the command says of the number of pairs, before it loads a model."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from foveate.configs.config import Config
from foveate.configs.errors import ConfigError
from foveate.tune import command
from foveate.tune.command import Options, tune
from foveate.tune.confidence import allowed_misses

CONFIG = replace(Config(), model=replace(Config().model, path="tiny-llava"))


class Loaded(Exception):
    """The command went on to load the model."""


@pytest.fixture(autouse=True)
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(config: Config, directory: Path) -> None:
        raise Loaded

    monkeypatch.setattr(command, "Asker", load)


def options(folder: Path, n_pairs: int, agreement: float, per_picture: int = 1) -> Options:
    file = folder / "data.jsonl"
    lines = [
        {"image": f"data:image/png;base64,{i // per_picture}", "question": f"What is number {i}?"}
        for i in range(n_pairs)
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    return Options(config=CONFIG, data=str(file), agreement=agreement, out=folder / "out")


@pytest.mark.parametrize(("agreement", "needed"), [(0.9, 29), (0.95, 59), (0.99, 299)])
@pytest.mark.parametrize("per_picture", [1, 7])
def test_too_few_pairs_are_refused_with_the_number_that_suffices(
    tmp_path: Path, agreement: float, needed: int, per_picture: int
) -> None:
    with pytest.raises(ConfigError, match=rf"--agreement: {agreement:g} takes {needed} held-out pairs") as raised:
        tune(options(tmp_path, 35, agreement, per_picture))
    (give,) = map(int, re.findall(r"give (\d+) pairs", str(raised.value)))
    (possible,) = map(float, re.findall(r"ask for at most ([\d.]+)", str(raised.value)))
    with pytest.raises(Loaded):
        tune(options(tmp_path, give, agreement, per_picture))
    with pytest.raises(Loaded):
        tune(options(tmp_path, 35, possible, per_picture))
    assert "\n" not in str(raised.value)


def test_too_few_scenes_are_refused_with_the_option(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"give \d+ pairs \(--scenes (\d+)\)") as raised:
        tune(Options(config=CONFIG, n_scenes=5, agreement=0.95, out=tmp_path))
    (n,) = map(int, re.findall(r"--scenes (\d+)", str(raised.value)))
    with pytest.raises(Loaded):
        tune(Options(config=CONFIG, n_scenes=n, agreement=0.95, out=tmp_path))


def test_enough_pairs_say_how_many_answers_may_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Loaded):
        tune(options(tmp_path, 1000, 0.99))
    assert "1000 pairs, of which 600 are held out; 99 % is confirmed" in (said := capsys.readouterr().err)
    assert f"at most {allowed_misses(600, 0.99)} of the held-out answers change" in said


@pytest.mark.parametrize(
    ("agreement", "words"), [(1.0, "no number of pairs confirms 1"), (0.0, "not in"), (1.01, "not in")]
)
def test_an_agreement_that_nothing_confirms_is_refused(tmp_path: Path, agreement: float, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        tune(options(tmp_path, 400, agreement))
