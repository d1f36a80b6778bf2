"""What goes wrong on the way: the engine refuses or dies, the client leaves, the key is missing."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from foveate.configs.config import ServerConfig
from foveate.engine.common import Failed, Generate
from foveate.server.common.metrics import Metrics
from foveate.server.common.track import Track
from foveate.server.transport.events import EventStream


class Outcomes(Metrics):
    """Remembers how requests ended."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.outcomes: list[tuple[str, str]] = []

    def finished(self, outcome: Any, code: str) -> None:
        self.outcomes.append((outcome, code))


@pytest.mark.parametrize(
    ("code", "status"),
    [("invalid_image", 400), ("context_length_exceeded", 400), ("queue_full", 429), ("engine_restarted", 503),
     ("internal_error", 500), ("surprise", 500)],
)  # fmt: skip
def test_what_the_engine_refuses(api: Any, code: str, status: int) -> None:
    api.client.fails = Failed(id="", code=code, message="secret" if status == 500 else "because")
    for stream in (False, True):
        reply = api.chat(stream=stream)
        assert reply.status_code == status, "a stream is refused before it begins"
        assert ("because" in reply.text) == (status < 500 or status == 503)
        assert ("retry-after" in reply.headers) == (status in (429, 503))
    assert [outcome for outcome, _ in api.metrics.outcomes] == ["error", "error"]


def test_a_failure_within_a_stream_is_an_event(api: Any) -> None:
    api.client.fails, api.client.fails_at = Failed(id="", code="engine_restarted", message="it died"), 4
    reply = api.chat(stream=True)
    assert reply.status_code == 200
    last = api.events(reply)[-1]
    assert last["error"]["message"] == "it died" and last["error"]["code"] == "engine_restarted"
    assert api.metrics.outcomes == [("error", "engine_restarted")]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_aborts(api: Any, stream: bool) -> None:
    api.client.hangs = True
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": stream}
    asyncio.run(api.leave(body, '"content":"T"' if stream else ""))
    assert api.client.aborted == [api.client.requests[0].id]
    assert api.metrics.outcomes == [("aborted", "client_disconnected")]


def test_a_client_that_went_before_the_first_event() -> None:
    closed = []

    async def events() -> AsyncGenerator[bytes, None]:
        yield b"never sent"

    async def close() -> None:
        closed.append(True)

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def send(_: object) -> None:
        await asyncio.Event().wait()

    metrics = Outcomes("m")
    stream = EventStream(events(), {}, Track(metrics, "r"), close)
    asyncio.run(asyncio.wait_for(stream({}, receive, send), 5))
    assert closed and metrics.outcomes == [("aborted", "client_disconnected")]


def test_our_own_bug_within_a_stream_is_an_event(api: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> None:
        raise RuntimeError("inside")

    monkeypatch.setattr("foveate.server.answer.text.Detokenizer.push", lambda *_: broken(None))
    reply = api.chat(stream=True)
    assert api.events(reply)[-1]["error"]["code"] == "internal_error" and "inside" not in reply.text
    assert api.metrics.outcomes == [("error", "internal_error")] and api.client.aborted


def test_keys_guard_everything_but_health(make_api: Any) -> None:
    api = make_api(server=ServerConfig(api_keys=("key-1", "key-2")))
    for route in api.app.routes:
        path = getattr(route, "path", "")
        method = "POST" if "POST" in (getattr(route, "methods", None) or ()) else "GET"
        reply = api.send(method, path)
        assert (reply.status_code == 401) == (not path.startswith("/health/")), path
    assert api.send("GET", "/nowhere").status_code == 401
    wrong = api.send("GET", "/v1/models", headers={"Authorization": "Bearer key-3"})
    assert wrong.status_code == 401 and wrong.json()["error"]["code"] == "invalid_api_key"
    assert api.send("GET", "/v1/models", headers={"Authorization": "Bearer kéy".encode()}).status_code == 401
    for key in ("key-1", "key-2"):
        assert api.chat(headers={"Authorization": f"Bearer {key}"}).status_code == 200
    one, other = api.client.requests
    assert one.salt != other.salt and len(one.salt) == 32
    assert not api.metrics.outcomes[2:], "a refused key is no request"


def test_one_refused_prompt_of_several_refuses_all_and_leaves_none_running(api: Any) -> None:
    answer = api.client.generate

    async def generate(request: Generate) -> AsyncGenerator[Any, None]:
        if request.id.endswith("-1"):
            yield Failed(id=request.id, code="context_length_exceeded", message="too long", param="messages")
            return
        await asyncio.sleep(0.05)  # its sibling is refused meanwhile
        async for event in answer(request):
            yield event

    api.client.generate = generate
    reply = api.send("POST", "/v1/completions", json={"model": "m", "prompt": ["a", "b"]})
    error = reply.json()["error"]
    assert (reply.status_code, error["param"], error["code"]) == (400, "prompt", "context_length_exceeded")
    assert api.metrics.outcomes == [("error", "context_length_exceeded")]
