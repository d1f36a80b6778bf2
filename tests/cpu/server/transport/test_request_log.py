"""The log of requests: one line each, for answers, errors and departures, with figures and without content."""

import asyncio
import logging
import re
from collections.abc import Callable
from typing import Any

import pytest

from foveate.configs.config import LimitsConfig, ServerConfig
from foveate.engine.common import Failed
from foveate.server.common.errors import MAX_SHOWN, ApiError
from foveate.server.transport.request_log import MAX_TEXT, one_line

SECRET = "xyzzy"


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.WARNING, "httpx")  # the client of the tests logs its URLs
    caplog.set_level(logging.INFO)

    def taken() -> list[str]:
        found = [record.getMessage() for record in caplog.records if record.name == "foveate.request"]
        assert SECRET not in caplog.text
        caplog.clear()
        return found

    return taken


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_is_one_line_with_its_figures(
    api: Any, png: str, lines: Callable[[], list[str]], stream: bool
) -> None:
    content = [{"type": "text", "text": SECRET}, {"type": "image_url", "image_url": {"url": png}}]
    reply = api.chat(content, headers={"x-request-id": "mine", "VLM-Visual-Tokens": "9"}, stream=stream)
    (line,) = lines()
    assert line.startswith("200 POST /v1/chat/completions id=mine client=127.0.0.1 ")
    assert f" reply={reply.headers['vlm-request-id']} finish=stop prompt=" in line
    for figure in ("cached=7", "output=18", "pictures=1", "visual=9/36", "vis=9, method=foveal", "queue=1ms"):
        assert figure in line, (figure, line)
    assert re.search(r" ttft=\d+ms total=\d+ms$", line)


def test_an_error_is_one_line_with_its_code_and_the_id_of_the_reply(
    make_api: Callable[..., Any], lines: Callable[[], list[str]]
) -> None:
    api = make_api(server=ServerConfig(api_keys=(SECRET,)), limits=LimitsConfig(body_mb=1))
    good = {"authorization": f"Bearer {SECRET}"}
    for status, code, reply in (
        (401, "invalid_api_key", lambda: api.chat(headers={"authorization": "Bearer xyzzy2"})),
        (404, "model_not_found", lambda: api.chat(model="other", headers=good)),
        (404, "not_found", lambda: api.send("GET", f"/nowhere?key={SECRET}", headers=good)),
        (405, "method_not_allowed", lambda: api.send("DELETE", "/v1/models", headers=good)),
        (413, "too_large", lambda: api.send("POST", "/tokenize", content=b" " * 2**21, headers=good)),
        (400, "invalid_value", lambda: api.chat(temperature=SECRET, headers=good)),
        (400, "invalid_image", lambda: api.chat(
            [{"type": "image_url", "image_url": {"url": f"https://a.example/p.png?sig={SECRET}"}}], headers=good)),
    ):  # fmt: skip
        answered = reply()
        (line,) = lines()
        assert answered.status_code == status and line.startswith(f"{status} ")
        assert f" id={answered.headers['x-request-id']} " in line and f" code={code} error=" in line


def test_a_bug_of_ours_is_in_the_log_under_the_id_once(api: Any, caplog: pytest.LogCaptureFixture) -> None:
    api.client.generate = None
    with caplog.at_level(logging.INFO):
        assert api.chat(headers={"x-request-id": "mine"}).status_code == 500
    assert caplog.text.count("Traceback") == 1 and "request mine failed" in caplog.text
    assert "500 POST /v1/chat/completions id=mine" in caplog.text and "code=internal_error" in caplog.text


def test_a_stream_that_fails_names_the_code(api: Any, lines: Callable[[], list[str]]) -> None:
    api.client.fails, api.client.fails_at = Failed(id="", code="engine_restarted", message="it died"), 4
    api.chat(stream=True)
    (line,) = lines()
    assert line.startswith("200 ") and line.endswith("code=engine_restarted error='it died'") and "output=" in line


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_is_499(api: Any, lines: Callable[[], list[str]], stream: bool) -> None:
    api.client.hangs = True
    body = {"model": "m", "messages": [{"role": "user", "content": SECRET}], "stream": stream}
    asyncio.run(api.leave(body, until="data: " if stream else ""))
    (line,) = lines()
    assert line.startswith("499 POST /v1/chat/completions ") and line.endswith("code=client_disconnected")


def test_probes_and_preflights_are_no_lines(api: Any, lines: Callable[[], list[str]]) -> None:
    for path in ("/health", "/ping", "/health/ready", "/metrics"):
        assert api.send("GET", path).status_code == 200
    api.send("OPTIONS", "/v1/models", headers={"origin": "http://localhost", "access-control-request-method": "GET"})
    assert lines() == []


def test_a_setting_turns_the_lines_off(make_api: Callable[..., Any], lines: Callable[[], list[str]]) -> None:
    make_api(server=ServerConfig(log_requests=False)).chat()
    assert lines() == []


def test_a_client_cannot_write_lines_of_its_own(api: Any, lines: Callable[[], list[str]]) -> None:
    api.send("GET", "/a%0A2026-01-01 INFO forged%1b[2J" + "x" * 1000)
    api.chat(model="a\n200 POST forged")
    api.chat(**{"a\nb" * 5000: 1}, vlm={"visual": {"c\n" * 5000: 1}, "strict": True})
    found = lines()
    assert len(found) == 3
    assert all(line.isprintable() and len(line) < 3 * MAX_TEXT for line in found)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("see https://a.example/p.png?sig=s3cr3t&x=1 now", "see https://a.example/p.png?... now"),
        ("http://user:pass@host/x", "http://...host/x"),
        ("data:image/png;base64,AAAA+/= is broken", "data:... is broken"),
        ("why? because", "why? because"),
        ("a\r\nb\u2028c\x1b[0m", "a??b?c?[0m"),
    ],
)
def test_urls_lose_what_may_be_secret(text: str, shown: str) -> None:
    assert one_line(text) == shown


def test_the_texts_of_an_error_are_bounded_and_printable() -> None:
    error = ApiError("a\nb" * 10_000, "p\x1b" * 10_000)
    assert error.param is not None
    for text in (error.message, error.param):
        assert len(text) == MAX_SHOWN and text.isprintable() and text.endswith("...")
