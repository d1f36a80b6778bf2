"""Pictures in tiles over HTTP: the bundled LLaVA, dressed as a LLaVA-NeXT."""

import base64
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import foveate.bundled as bundled
from foveate.server.launch import launched

SIZES = [[168, 336], [336, 168], [336, 336]]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory = tmp_path_factory.mktemp("models") / "tiny-llava-next"
    shutil.copytree(Path(next(iter(bundled.__path__))) / "tiny-llava", directory)
    config, processor = directory / "config.json", directory / "preprocessor_config.json"
    own = json.loads(config.read_text()) | {"model_type": "llava_next", "image_grid_pinpoints": SIZES}
    config.write_text(json.dumps(own))
    cut = {"image_processor_type": "LlavaNextImageProcessor", "image_grid_pinpoints": SIZES}
    processor.write_text(json.dumps(json.loads(processor.read_text()) | cut))
    tensors = load_file(directory / "model.safetensors")
    tensors["image_newline"] = torch.zeros(own["text_config"]["hidden_size"], dtype=torch.bfloat16)
    save_file(tensors, directory / "model.safetensors")
    with launched(str(directory), environment={"PYTHONSAFEPATH": "1"}) as server:
        yield server.url
        assert "Traceback" not in server.written(), server.written()[-8000:]


def ask(server: str, sizes: list[tuple[int, int]], visual: dict[str, object]) -> dict[str, Any]:
    """JSON, hence Any."""
    parts: list[dict[str, object]] = [{"type": "text", "text": "How many shapes are there?"}]
    for i, (height, width) in enumerate(sizes):
        file = io.BytesIO()
        Image.new("RGB", (width, height), (200, 40 * i, 40)).save(file, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        parts.append({"type": "image_url", "image_url": {"url": url}})
    body = {
        "model": httpx.get(f"{server}/v1/models").json()["data"][0]["id"],
        "messages": [{"role": "user", "content": parts}],
        "max_tokens": 8,
        "temperature": 0,
        "vlm": {"visual": visual},
    }
    reply = httpx.post(f"{server}/v1/chat/completions", json=body, timeout=60.0)
    answer: dict[str, Any] = reply.json()
    return answer | {"status": reply.status_code}


@pytest.mark.parametrize("method", ["divprune", "random", "uniform", "visionzip", "pool"])
def test_a_budget_over_tiles(server: str, method: str) -> None:
    """144 of the thumbnail, then rows of cells, each with a newline."""
    sizes = [(168, 336), (300, 500)]
    full = ask(server, sizes, {"method": method})
    assert full["status"] == 200, full
    seen = full["usage"]["vlm"]["visual"]
    assert seen["kept"] == seen["offered"] == (144 + 12 * 25) + (144 + 14 * 25)
    less = ask(server, sizes, {"method": method, "tokens": 90})
    assert less["status"] == 200, less
    kept = less["usage"]["vlm"]["visual"]["kept"]
    assert kept == 90 if method != "pool" else 0 < kept <= 90
    assert full["usage"]["prompt_tokens"] - less["usage"]["prompt_tokens"] == seen["offered"] - kept


def test_a_thread_of_a_picture_is_refused(server: str) -> None:
    answer = ask(server, [(2, 3000)], {})
    assert answer["status"] == 400 and "too long and thin" in answer["error"]["message"]
