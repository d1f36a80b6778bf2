"""Browsers and launchers: which pages may use the server, what they may read, probes, and an id on every reply."""

from collections.abc import Callable
from typing import Any

import httpx
import pytest

import foveate
from foveate.configs.config import LimitsConfig, ServerConfig
from foveate.configs.errors import ConfigError
from foveate.server.transport.cors import EXPOSED, allowed

LOCAL = [
    "http://localhost",
    "http://localhost:5173",
    "https://localhost:3000",
    "http://127.0.0.1:8080",
    "http://[::1]:1",
]
STRANGE = [
    "https://evil.example", "http://localhost.evil.example", "http://evil.example:8000", "http://localhost:80.evil",
    "null", "http://192.168.0.7", "file://", "http://localhost:5173/", "http://xlocalhost", "http://127.0.0.1.evil:1",
]  # fmt: skip
REFUSED = [
    ("POST", "/v1/chat/completions", {"content": b"{", "headers": {"content-type": "application/json"}}, 400),
    ("GET", "/nowhere", {}, 404),
    ("PUT", "/v1/models", {}, 405),
    ("POST", "/v1/completions", {"content": b"x" * (1024 * 1024 + 1)}, 413),
    ("POST", "/v1/completions", {"content": b"{}", "headers": {"content-type": "text/plain"}}, 415),
]


def preflight(api: Any, origin: str, headers: str = "authorization,content-type,vlm-visual-ratio") -> httpx.Response:
    asked = {"origin": origin, "access-control-request-method": "POST", "access-control-request-headers": headers}
    reply: httpx.Response = api.send("OPTIONS", "/v1/chat/completions", headers=asked)
    return reply


@pytest.mark.parametrize("keys", [(), ("key-1",)])
@pytest.mark.parametrize("origin", LOCAL)
def test_local_pages_may_use_the_server(make_api: Callable[..., Any], origin: str, keys: tuple[str, ...]) -> None:
    api = make_api(server=ServerConfig(api_keys=keys))
    before = preflight(api, origin)
    assert before.status_code == 200 and before.headers["access-control-allow-origin"] == origin
    assert "vlm-visual-ratio" in before.headers["access-control-allow-headers"]
    reply = api.chat(headers={"origin": origin, "authorization": "Bearer key-1"})
    assert reply.status_code == 200 and reply.headers["access-control-allow-origin"] == origin
    readable = {name.strip().lower() for name in reply.headers["access-control-expose-headers"].split(",")}
    assert readable == {name.lower() for name in EXPOSED} and "vlm-resolved" in readable
    assert "Origin" in reply.headers["vary"]


@pytest.mark.parametrize("origin", STRANGE)
def test_other_pages_may_not(make_api: Callable[..., Any], origin: str) -> None:
    for host, keys, status in (("127.0.0.1", (), 403), ("::1", (), 403), ("0.0.0.0", (), 200), ("::1", ("k",), 200)):
        api = make_api(server=ServerConfig(host=host, api_keys=keys))
        assert preflight(api, origin).status_code == 400
        reply = api.chat(headers={"origin": origin, "authorization": "Bearer k"})
        assert "access-control-allow-origin" not in reply.headers and reply.status_code == status
        if status == 403:
            assert "server.cors_origins" in reply.json()["error"]["message"] and not api.client.requests


@pytest.mark.parametrize(
    ("setting", "yes", "no"),
    [
        ("*", ["null", "https://a.b"], []),
        ("null", ["null"], ["http://localhost"]),
        ("https://app.example", ["https://app.example"], ["https://app.example:1", "https://appxexample", "http://app.example"]),
        ("https://*.app.example", ["https://a.app.example", "https://a.b.app.example"], ["https://app.example", "https://xapp.example"]),
        ("tauri://localhost", ["tauri://localhost"], ["http://localhost"]),
        ("http://[::1]:*", ["http://[::1]", "http://[::1]:99"], ["http://[::1]:x"]),
    ],
)  # fmt: skip
def test_an_origin_of_the_setting(setting: str, yes: list[str], no: list[str]) -> None:
    pattern = allowed(ServerConfig(cors_origins=(setting,)).cors_origins)
    assert all(pattern.fullmatch(origin) for origin in yes)
    assert not any(pattern.fullmatch(origin) for origin in no)


@pytest.mark.parametrize(
    "wrong", ["https://app.example/", "app.example", "https://", "", "http://*", "HTTP://A", "a b://c"]
)
def test_a_wrong_origin_is_refused_at_start(wrong: str) -> None:
    with pytest.raises(ConfigError, match=r"server\.cors_origins: .* write https://app\.example"):
        ServerConfig(cors_origins=(wrong,))


def test_no_origin_is_allowed_without_any(make_api: Callable[..., Any]) -> None:
    api = make_api(server=ServerConfig(cors_origins=()))
    assert preflight(api, "http://localhost").status_code == 400
    assert api.chat().status_code == 200, "a client that is no browser states no origin"


def test_errors_carry_an_id_and_can_be_read_by_the_page(make_api: Callable[..., Any]) -> None:
    api = make_api(limits=LimitsConfig(body_mb=1))
    page = "http://localhost:5173"
    for method, path, request, status in REFUSED:
        headers = {"origin": page, **request.get("headers", {})}
        reply = api.send(method, path, **request | {"headers": headers})
        assert reply.status_code == status and reply.headers["access-control-allow-origin"] == page
        assert len(reply.headers["x-request-id"]) == 32
        mine = api.send(method, path, **request | {"headers": headers | {"x-request-id": "mine"}})
        assert mine.headers["x-request-id"] == "mine"
    api.client.generate = None  # a bug of ours
    broken = api.chat(headers={"origin": page, "x-request-id": "mine"})
    assert broken.status_code == 500 and broken.headers["access-control-allow-origin"] == page
    assert broken.headers["x-request-id"] == "mine"
    locked = make_api(server=ServerConfig(api_keys=("k",))).chat(headers={"origin": page})
    assert locked.status_code == 401 and locked.headers["access-control-allow-origin"] == page
    assert locked.headers["www-authenticate"] == "Bearer" and len(locked.headers["x-request-id"]) == 32


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "é", "\x7f"])
def test_an_unsound_id_is_replaced(api: Any, given: str) -> None:
    reply = api.send("GET", "/v1/models", headers={"x-request-id": given.encode()})
    assert len(reply.headers["x-request-id"]) == 32
    assert len(preflight(api, "https://evil.example").headers["x-request-id"]) == 32


@pytest.mark.parametrize("path", ["/health", "/ping", "/health/ready", "/health/live", "/version"])
def test_probes_need_no_key_and_answer_get_and_head(make_api: Callable[..., Any], path: str) -> None:
    api = make_api(server=ServerConfig(api_keys=("k",)))
    for method in ("GET", "HEAD"):
        assert api.send(method, path, headers={"origin": "https://evil.example"}).status_code == 200
    api.client.state, api.client.reason = "starting", "it loads"
    reply = api.send("GET", path)
    waits = path not in ("/health/live", "/version")
    assert reply.status_code == (503 if waits else 200) and ("it loads" in reply.text) == waits
    assert api.send("GET", "/health/other").status_code == 401
    if path == "/version":
        assert reply.json() == {"version": foveate.__version__}


def test_a_key_of_any_letters_is_known(make_api: Callable[..., Any]) -> None:
    api = make_api(server=ServerConfig(api_keys=("schlüssel",)))
    assert api.chat(headers={"authorization": "Bearer schlüssel".encode()}).status_code == 200
    assert api.chat(headers={"authorization": "Bearer schlussel"}).status_code == 401
