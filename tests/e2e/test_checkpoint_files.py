"""`foveate serve` on directories as people have them: defaults are honoured and shown, other files are named."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

import foveate.bundled
from foveate.server.launch import launched

WRONG = [
    ("generation_config.json", {"temperature": "hot"}, "generation_config.json: temperature is 'hot'"),
    ("config.json", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized by gptq (4 bits)"),
    ("adapter_config.json", {"base_model_name_or_path": "org/base"}, "merge the adapter into org/base"),
]


def edited(directory: Path, file: str, values: dict[str, Any]) -> Path:
    """A copy of the bundled model with these values in one of its files."""
    source = foveate.bundled.path("tiny-llava")
    assert source is not None
    shutil.copytree(source, directory)
    path = directory / file
    path.write_text(json.dumps((json.loads(path.read_text()) if path.is_file() else {}) | values))
    return directory


@pytest.mark.parametrize(("file", "values", "words"), WRONG)
def test_what_cannot_be_served_ends_the_start_in_one_line(
    tmp_path: Path, file: str, values: dict[str, Any], words: str
) -> None:
    model = edited(tmp_path / "model", file, values)
    if file == "adapter_config.json":
        (model / "adapter_model.safetensors").touch()
    script = Path(sys.executable).with_name("foveate")
    done = subprocess.run(
        [str(script), "serve", str(model), "--port", "0"], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("foveate: error: ") and done.stderr.count("\n") == 1
    assert words in done.stderr


@pytest.mark.parametrize("rule", ["auto", "ignore"])
def test_the_defaults_in_force_are_shown_and_used(tmp_path: Path, rule: str) -> None:
    values = {"do_sample": True, "temperature": 1.5, "top_k": 1, "max_new_tokens": 9}
    model = edited(tmp_path / "model", "generation_config.json", values)
    with launched(str(model), "--set", f"model.generation_config={rule}") as server:
        card, *_ = httpx.get(f"{server.url}/v1/models").json()["data"]  # the others are further names
        body = {"model": card["id"], "messages": [{"role": "user", "content": "Describe."}], "ignore_eos": True}
        answers = [
            httpx.post(f"{server.url}/v1/chat/completions", json=body | more, timeout=60).json()
            for more in ({"seed": 1}, {"seed": 2}, {"max_tokens": 30})
        ]
        written = server.written()
    lengths = [answer["usage"]["completion_tokens"] for answer in answers]
    texts = {answer["choices"][0]["message"]["content"] for answer in answers[:2]}
    defaults = card["sampling_defaults"]
    if rule == "auto":
        assert (defaults["temperature"], defaults["top_k"], defaults["max_tokens"]) == (1.5, 1, 9)
        assert "temperature 1.5, top_p 1.0, top_k 1" in written and "max_tokens 9" in written
        assert lengths == [9, 9, 30] and len(texts) == 1, "top_k 1 is greedy at any temperature"
    else:
        assert (defaults["temperature"], defaults["top_k"], defaults["max_tokens"]) == (1.0, 0, None)
        assert "temperature 1.0, top_p 1.0, top_k 0" in written
        assert lengths[0] > 1000 and lengths[2] == 30 and len(texts) == 2
