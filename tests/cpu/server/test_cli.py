"""The command line as a user meets it: mistakes are one line and status 2, at once; help shows examples."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import foveate
from foveate.configs.config import Config
from foveate.configs.load import load
from foveate.server.main import main
from foveate.tune.command import METHODS, Options

MISTAKES = [
    (["serve", "--set", "cache.block_token=32"], "did you mean cache.block_tokens?"),
    (["serve", "--set", "scheduler.step_tokens=1"], "scheduler.step_tokens: 1 is less than scheduler.max_running 64"),
    (["serve", "--set", "budget.method=divprone"], "did you mean divprune?"),
    (["serve", "--set", "budget.method=base"], "budget.method: base is not a method; "),
    (["serve", "--port", "eighty"], "server.port: eighty is not a whole number"),
    (["serve", "--host", "256.1.1.1", "--port", "0"], "server.host: 256.1.1.1"),
    (["serve", "--config", "gpus"], "did you mean gpu?"),
    (["serve", "tiny-lava"], "did you mean tiny-llava?"),
    (["serve", "./nowhere"], "./nowhere is no directory"),
    (["serve", "~nobody/x"], "~nobody/x is no directory"),
    (["serve", "/"], "/ holds no config.json"),
    (["serve", "--prot", "80"], "did you mean --port?"),
    (["serve", "a", "b"], "unrecognized arguments: b"),
    (["serv"], "did you mean serve?"),
    (["tune", "tiny-llava", "./nowhere.jsonl"], "./nowhere.jsonl: no such file or folder"),
    (["tune", "--agreement", "99"], "--agreement: 99 is not in (0, 1)"),
    (["tune", "--limit", "0"], "--limit: 0 is not positive"),
    (["tune", "--limit", "2"], "give at least 4"),
    (["tune", "tiny-lava"], "did you mean tiny-llava?"),
    (["tune", "--metods", "divprune"], "did you mean --methods?"),
    ([], "required: COMMAND"),
    (["config", "--set", "server.port"], "section.key=value"),
]


@pytest.mark.parametrize(("argv", "words"), MISTAKES, ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_a_mistake_is_one_line_and_status_2(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = main(argv)
    except SystemExit as exit_:
        status = exit_.code
    captured = capsys.readouterr()
    assert status == 2 and captured.out == ""
    assert captured.err.startswith("foveate: error: ") and captured.err.count("\n") == 1
    assert words in captured.err


@pytest.fixture
def busy_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def foveate_process(*argv: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-X", "importtime", "-m", "foveate.server.main", *argv]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **variables}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=30)


def test_a_process_ends_before_anything_slow_is_imported(busy_port: int) -> None:
    done = foveate_process("serve", "--port", str(busy_port))
    lines = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 2 and len(lines) == 1
    assert lines[0].startswith(f"foveate: error: server.port: cannot listen on 127.0.0.1:{busy_port}: ")
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "uvloop" in imported and not imported & {"torch", "fastapi", "pydantic", "uvicorn", "transformers"}


def test_a_hub_name_that_cannot_be_had_names_the_bundled_ones(tmp_path: Path) -> None:
    began = time.monotonic()
    done = foveate_process("serve", "nobody/nothing", HF_HOME=str(tmp_path))
    lines = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 2 and len(lines) == 1 and time.monotonic() - began < 15
    assert "nobody/nothing" in lines[0] and "bundled are tiny-llava, tiny-qwen2-vl" in lines[0]


def test_the_tuners_help_tells_its_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    """It states them itself: importing the tuner takes three seconds."""
    with pytest.raises(SystemExit):
        main(["tune", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    scenes = Options(config=Config()).n_scenes
    assert f"default: {' '.join(METHODS)}" in said and f"bundled pictures (default: {scenes})" in said


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--help"], ["examples:", "foveate serve tiny-qwen2-vl", "start the server", "list the bundled models"]),
        (["serve", "--help"], ["examples:", "--set", "tiny-llava", "long-documents", "SIGTERM"]),
        (["config", "--help"], ["examples:", "foveate serve --config mine.yaml"]),
        (["tune", "--help"], ["examples:", "foveate serve --config ./tuned/preset.yaml", "--agreement", "divprune"]),
        (["models", "--help"], ["bundled"]),
        (["--version"], [f"foveate {foveate.__version__}"]),
    ],
)
def test_help(argv: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(argv)
    out = capsys.readouterr().out
    assert exit_.value.code == 0 and all(word in out for word in words)


def test_config_prints_what_config_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOVEATE__VISION__FEATURE_CACHE_MB", "7")
    assert main(["config", "--config", "cpu", "--set", "server.port=9"]) == 0
    file = tmp_path / "mine.yaml"
    file.write_text(capsys.readouterr().out)
    config = load(file)
    assert (config.server.port, config.vision.feature_cache_mb, config.model.device) == (9, 7, "cpu")
    assert config.limits == Config().limits


def test_models_lists_the_bundled_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in out] == [["tiny-llava", "llava"], ["tiny-qwen2-vl", "qwen2_vl"]]
