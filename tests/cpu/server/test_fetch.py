"""Fetching pictures: only public addresses, the checked one, few hops, few bytes, little time."""

import asyncio
import gzip
import ipaddress
import socket
import zlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest

import foveate
from foveate.configs.config import LimitsConfig
from foveate.server.common.errors import ApiError
from foveate.server.fetch import Fetcher, is_public

PUBLIC = "93.184.216.34"
LIMITS = LimitsConfig(image_mb=1, fetch_timeout_s=0.3)


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[list[str]]]:
    """Host to the answers of successive look-ups; literal addresses answer themselves."""
    table: dict[str, list[list[str]]] = {}

    async def look_up(_: object, host: str, port: int, **__: Any) -> list[Any]:
        answers = table.get(host)
        if answers is None:
            found = [socket.inet_ntoa(socket.inet_aton(host))] if ":" not in host else [host]
        else:
            found = answers.pop(0) if len(answers) > 1 else answers[0]
        return [(0, 0, 0, "", (address, port)) for address in found]

    monkeypatch.setattr(asyncio.base_events.BaseEventLoop, "getaddrinfo", look_up)
    return table


def fetch(handler: Callable[..., Any], url: str, hosts: tuple[str, ...] = ()) -> tuple[bytes, list[httpx.Request]]:
    seen: list[httpx.Request] = []

    async def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        response = handler(request)
        return await response if asyncio.iscoroutine(response) else response

    async def main() -> bytes:
        fetcher = Fetcher(LIMITS, hosts, httpx.MockTransport(answer))
        try:
            return await fetcher(url, "p")
        finally:
            await fetcher.aclose()

    return asyncio.run(main()), seen


def fine(_: httpx.Request) -> httpx.Response:
    async def body() -> AsyncIterator[bytes]:
        yield b"pict"
        yield b"ure"

    return httpx.Response(200, content=body())


def refused(handler: Callable[..., Any], url: str, word: str, hosts: tuple[str, ...] = ()) -> None:
    with pytest.raises(ApiError, match=word) as caught:
        fetch(handler, url, hosts)
    assert (caught.value.param, caught.value.code, caught.value.status) == ("p", "invalid_image", 400)


def never(request: httpx.Request) -> httpx.Response:
    raise AssertionError(f"connected to {request.url}")


def test_the_connection_goes_to_the_checked_address(names: dict[str, list[list[str]]]) -> None:
    names["pictures.example"] = [[PUBLIC], ["127.0.0.1"]]  # a resolver that changes its mind
    body, (request,) = fetch(fine, "https://pictures.example:8443/a.png?x=1")
    assert body == b"picture"
    assert request.url.host == PUBLIC and request.url.port == 8443 and request.url.raw_path == b"/a.png?x=1"
    assert request.headers["host"] == "pictures.example:8443"
    assert request.extensions["sni_hostname"] == "pictures.example"


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
     "2130706433", "0x7f000001", "017700000001", "127.1", "[::1]", "[::ffff:127.0.0.1]", "[fe80::1]", "[fd00::1]",
     "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "[ff02::1]", "255.255.255.255"],
)  # fmt: skip
def test_addresses_that_are_not_public(names: dict[str, list[list[str]]], host: str) -> None:
    refused(never, f"http://{host}/x.png", "not a public address")


def test_one_private_address_among_many(names: dict[str, list[list[str]]]) -> None:
    names["mixed.example"] = [[PUBLIC, "10.0.0.1"]]
    refused(never, "http://mixed.example/", "not a public address")
    names["empty.example"] = [[]]
    refused(never, "http://empty.example/", "not a public address")


@pytest.mark.parametrize("url", ["http://user:pw@example.com/", "http://", "http:///x", "ftp://x/", "file:///etc/x"])
def test_urls_that_are_not_plain(names: dict[str, list[list[str]]], url: str) -> None:
    with pytest.raises(ApiError):
        fetch(never, url)


def test_redirects_are_checked_anew(names: dict[str, list[list[str]]]) -> None:
    names["a.example"] = [[PUBLIC]]
    to = {
        "/1": "/2",
        "/2": "http://a.example/3",
        "/3": "//a.example/4",
        "/private": "http://127.0.0.1/",
        "/loop": "/loop",
    }

    def follow(request: httpx.Request) -> httpx.Response:
        target = to.get(request.url.path)
        return httpx.Response(302, headers={"location": target}) if target else fine(request)

    assert fetch(follow, "http://a.example/1")[0] == b"picture"
    refused(follow, "http://a.example/private", "not a public address")
    refused(follow, "http://a.example/loop", "3 redirects")
    to["/scheme"] = "file:///etc/hostname"
    refused(follow, "http://a.example/scheme", "only plain http")


def test_hosts_that_the_server_allows(names: dict[str, list[list[str]]]) -> None:
    names["inside.example"] = [["10.0.0.1"]]
    names["a.example"] = [[PUBLIC]]
    assert fetch(fine, "http://inside.example/", ("Inside.Example",))[0] == b"picture"
    refused(never, "http://a.example/", "image_url_hosts", ("inside.example",))


def test_too_large_too_slow_no_success(names: dict[str, list[list[str]]]) -> None:
    names["a.example"] = [[PUBLIC]]
    read = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal read
        while True:
            read += 1
            yield b"x" * 100_000

    refused(lambda _: httpx.Response(200, content=endless()), "http://a.example/", "limits.image_mb")
    assert read < 15

    async def slow(_: httpx.Request) -> httpx.Response:
        await asyncio.sleep(30)
        raise AssertionError

    refused(slow, "http://a.example/", "limits.fetch_timeout_s")
    refused(lambda _: httpx.Response(404), "http://a.example/", "404")

    def broken(_: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused by 10.0.0.7")

    refused(broken, "http://a.example/", "cannot be fetched")


def test_public_addresses() -> None:
    for address in (PUBLIC, "2606:4700::1111", "::ffff:93.184.216.34"):
        assert is_public(ipaddress.ip_address(address)), address


def test_the_fetcher_says_who_it_is_and_what_it_reads(names: dict[str, list[list[str]]]) -> None:
    names["a.example"] = [[PUBLIC]]

    def once(request: httpx.Request) -> httpx.Response:
        return httpx.Response(302, headers={"location": "/there"}) if request.url.path == "/" else fine(request)

    for request in fetch(once, "http://a.example/")[1]:
        assert request.headers["user-agent"] == f"Foveate/{foveate.__version__}"
        assert request.headers["accept"].startswith("image/png, image/jpeg") and "*/*" not in request.headers["accept"]
        assert request.headers["accept-encoding"] == "identity"
        assert not {"cookie", "referer", "authorization"} & set(request.headers)


def compressed(data: bytes, coding: str) -> Callable[[httpx.Request], httpx.Response]:
    """A server that compresses without being asked."""

    async def body() -> AsyncIterator[bytes]:
        for i in range(0, len(data), 1000):
            yield data[i : i + 1000]

    return lambda _: httpx.Response(200, headers={"content-encoding": coding}, content=body())


def test_compressed_pictures_are_read_within_the_limit(names: dict[str, list[list[str]]]) -> None:
    names["a.example"] = [[PUBLIC]]
    picture = b"picture" * 10_000
    for coding, data in (("gzip", gzip.compress(picture)), ("X-Gzip", gzip.compress(picture)),
                         ("deflate", zlib.compress(picture)), ("identity", picture)):  # fmt: skip
        assert fetch(compressed(data, coding), "http://a.example/")[0] == picture
    bomb = gzip.compress(bytes(300 * 2**20), 1)
    refused(compressed(bomb, "gzip"), "http://a.example/", "limits.image_mb")
    refused(compressed(picture, "gzip"), "http://a.example/", "is broken")
    refused(compressed(picture, "br"), "http://a.example/", "as 'br'")


def test_a_length_that_is_not_true_does_not_matter(names: dict[str, list[list[str]]]) -> None:
    names["a.example"] = [[PUBLIC]]

    def lie(length: str, n: int) -> Callable[[httpx.Request], httpx.Response]:
        async def body() -> AsyncIterator[bytes]:
            for _ in range(n):
                yield bytes(100_000)

        return lambda _: httpx.Response(200, headers={"content-length": length}, content=body())

    assert len(fetch(lie("99999999999", 2), "http://a.example/")[0]) == 200_000
    refused(lie("10", 1000), "http://a.example/", "limits.image_mb")


@pytest.mark.parametrize(
    ("status", "word"), [(403, "send a data URL"), (429, "send a data URL"), (500, "answered 500$")]
)
def test_a_refusal_is_told_with_its_remedy(names: dict[str, list[list[str]]], status: int, word: str) -> None:
    names["a.example"] = [[PUBLIC]]
    refused(lambda _: httpx.Response(status), "http://a.example/", word)
