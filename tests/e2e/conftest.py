"""A real server per bundled model, started once for all tests that talk to it, and stopped with SIGTERM at the end."""

import base64
import io
from collections.abc import Callable, Iterator

import pytest
from openai import OpenAI

from foveate.bundled.scenes import HELD_OUT_SEED, make_scene, render
from foveate.server.launch import launched


@pytest.fixture(scope="session", params=["tiny-llava", "tiny-qwen2-vl"])
def server(request: pytest.FixtureRequest) -> Iterator[str]:
    """Address of a server of the bundled model; ends it and checks that it ended well."""
    with launched(request.param, environment={"PYTHONSAFEPATH": "1"}) as server:
        yield server.url
        assert "Traceback" not in server.written(), server.written()[-8000:]


@pytest.fixture
def client(server: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0, timeout=60.0) as opened:
        yield opened


@pytest.fixture
def model(client: OpenAI) -> str:
    """Its name in /v1/models."""
    (only,) = client.models.list().data
    return only.id


@pytest.fixture
def picture() -> Callable[[int], str]:
    """Data URL of a scene that training never saw, by number."""

    def make(number: int) -> str:
        buffer = io.BytesIO()
        render(make_scene(HELD_OUT_SEED + 5_000_000 + number)).save(buffer, "PNG")
        return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()

    return make
