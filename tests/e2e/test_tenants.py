"""Two API keys, two tenants: neither learns that the other has sent a picture."""

from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from foveate.server.launch import launched


@pytest.fixture
def keyed(tmp_path: Path) -> str:
    """A configuration with two keys."""
    path = tmp_path / "keys.yaml"
    path.write_text("server: {api_keys: [key-1, key-2]}\ncache: {memory_mb: 64}\n")
    return str(path)


def test_hits_of_one_key_say_nothing_about_the_other(keyed: str, picture: Callable[[int], str]) -> None:
    with launched("tiny-llava", "--config", keyed, environment={"PYTHONSAFEPATH": "1"}) as server:

        def spent(key: str, ratio: str, salt: str | None = None) -> dict[str, str]:
            content = [{"type": "image_url", "image_url": {"url": picture(0)}}, {"type": "text", "text": "How many?"}]
            messages = [{"role": "user", "content": content}]
            reply = httpx.post(
                f"{server.url}/v1/chat/completions",
                json={"model": "tiny-llava", "messages": messages, "max_tokens": 1, "cache_salt": salt},
                headers={"Authorization": f"Bearer {key}", "VLM-Visual-Ratio": ratio},
                timeout=60.0,
            )
            assert reply.status_code == 200, reply.text
            pairs = (pair.split("=") for pair in reply.headers["VLM-Spent"].split(", "))
            return {name: value for name, value in pairs}

        # Another ratio finds no prefix, so the picture is reduced anew, from features if they are there.
        assert [spent("key-1", ratio)["enc_hits"] for ratio in ("0.5", "0.25")] == ["0", "1"]
        first = spent("key-2", "0.5")
        assert (first["enc_hits"], first["prefix_hit"]) == ("0", "0")
        assert spent("key-2", "0.25")["enc_hits"] == "1"
        salted = spent("key-2", "0.25", "another room")
        assert (salted["enc_hits"], salted["prefix_hit"]) == ("0", "0")
