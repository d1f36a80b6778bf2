"""Download images from http(s) URLs. Off unless server.image_urls is set; then only public addresses are allowed.

The fetcher resolves a name once. Every address of the name must be public. The connection goes to the checked address,
so DNS rebinding has no effect. The fetcher follows redirects itself and checks each redirect. A host in
server.image_url_hosts may be private. If this list is set, all other hosts are refused.
"""

import asyncio
import ipaddress
import socket
import zlib
from collections.abc import Callable
from http.cookiejar import CookieJar, DefaultCookiePolicy
from urllib.parse import urljoin

import httpx

import foveate
from foveate.configs.config import LimitsConfig
from foveate.server.prepare.media import MEGABYTE, bad_image

MAX_REDIRECTS = 3
# Hosts refuse clients that do not say who they are. The formats are named, because hosts choose by them: a bare image/*
# brings AVIF from some.
_HEADERS = {
    "user-agent": f"Foveate/{foveate.__version__}",
    "accept": "image/png, image/jpeg, image/webp, image/gif, image/*;q=0.1",
    "accept-encoding": "identity",
}
_GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS  # zlib tells the two apart by their headers
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def is_public(address: Address) -> bool:
    """Return whether an address is public. An IPv4 address inside an IPv6 address is unwrapped first."""
    if isinstance(address, ipaddress.IPv6Address):
        if address in _NAT64:
            return is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)
        if inner is not None:
            return is_public(inner)
    return address.is_global and not address.is_multicast


class Fetcher:
    """Downloads with one connection pool. One deadline covers name resolution, connection, redirects and body."""

    def __init__(
        self, limits: LimitsConfig, hosts: tuple[str, ...], transport: httpx.AsyncBaseTransport | None = None
    ) -> None:
        self._limits = limits
        self._hosts = {host.lower() for host in hosts}
        # Ignore proxies from the environment: a proxy would resolve names itself.
        self._http = httpx.AsyncClient(
            trust_env=False,
            follow_redirects=False,
            transport=transport,
            timeout=None,  # `__call__` sets the only deadline
            limits=httpx.Limits(max_keepalive_connections=0),  # a reused connection would skip the check of the name
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),  # never share cookies between clients
        )

    async def __call__(self, url: str, param: str) -> bytes:
        """Download the bytes of `url`.

        Raises:
            ApiError: the URL is refused, unreachable, too slow, too large or without success. `param` names the field.
        """
        try:
            async with asyncio.timeout(self._limits.fetch_timeout_s):
                for _ in range(MAX_REDIRECTS + 1):
                    target, body = await self._get(url, param)
                    if body is not None:
                        return body
                    url = urljoin(url, target)
        except TimeoutError:
            limit = f"limits.fetch_timeout_s {self._limits.fetch_timeout_s}"
            raise bad_image(param, f"the picture did not arrive within {limit} s") from None
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError):
            raise bad_image(param, "the picture cannot be fetched") from None
        except zlib.error:
            raise bad_image(param, "the picture's server compressed the picture, and the result is broken") from None
        raise bad_image(param, f"more than {MAX_REDIRECTS} redirects")

    async def aclose(self) -> None:
        await self._http.aclose()

    async def _get(self, url: str, param: str) -> tuple[str, bytes | None]:
        """Send one request. Return (redirect target, None) or ("", body)."""
        parsed = httpx.URL(url)
        if parsed.scheme not in ("http", "https") or not parsed.host or parsed.userinfo:
            raise bad_image(param, "only plain http and https URLs are fetched, without user or password")
        address = await self._resolve(parsed, param)
        request = self._http.build_request(
            "GET",
            parsed.copy_with(host=address),
            headers={"host": parsed.netloc.decode("ascii"), **_HEADERS},
            extensions={"sni_hostname": parsed.raw_host.decode("ascii")},  # TLS checks the name, not the address
        )
        response = await self._http.send(request, stream=True)
        try:
            if response.has_redirect_location:
                return response.headers["location"], None
            if response.status_code != 200:
                hint = (
                    "; the server may refuse programs: send a data URL"
                    if response.status_code in (401, 403, 429)
                    else ""
                )
                raise bad_image(param, f"the picture's server answered {response.status_code}{hint}")
            return "", await self._body(response, param)
        finally:
            await response.aclose()

    async def _body(self, response: httpx.Response, param: str) -> bytes:
        """Read the body within limits.image_mb, whatever its headers say of its length."""
        most = self._limits.image_mb * MEGABYTE
        unpack = _unpacker(response.headers.get("content-encoding", ""), param)
        body = bytearray()
        async for chunk in response.aiter_raw():
            body += chunk if unpack is None else unpack(chunk, most + 1 - len(body))
            if len(body) > most:
                raise bad_image(param, f"the picture is larger than limits.image_mb {self._limits.image_mb}")
        return bytes(body)

    async def _resolve(self, url: httpx.URL, param: str) -> str:
        """Resolve the host and return one checked address."""
        host = url.host.lower()
        if self._hosts and host not in self._hosts:
            raise bad_image(param, "its host is not in server.image_url_hosts")
        port = url.port or (443 if url.scheme == "https" else 80)
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = [ipaddress.ip_address(str(info[4][0]).partition("%")[0]) for info in found]
        if not addresses or (host not in self._hosts and not all(is_public(address) for address in addresses)):
            raise bad_image(param, "its host is not a public address; server.image_url_hosts can allow it")
        return str(addresses[0])


def _unpacker(coding: str, param: str) -> Callable[[bytes, int], bytes] | None:
    """Return what undoes a content coding, bytes and most bytes of the result -> result; None: nothing is to be undone.

    The fetcher asks for none, but some servers compress all the same.
    """
    match coding.strip().lower():
        case "" | "identity":
            return None
        case "gzip" | "x-gzip" | "deflate":
            return zlib.decompressobj(_GZIP_OR_ZLIB).decompress
        case other:
            raise bad_image(param, f"the picture's server compressed the picture as {other[:20]!r}; send a data URL")
