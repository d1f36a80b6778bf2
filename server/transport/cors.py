"""Which web pages may use the server (`server.cors_origins`), by the origin that the browser states."""

import re
from collections.abc import Sequence
from functools import partial

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

ANY = "*"
EXPOSED = (
    "VLM-Resolved",
    "VLM-Spent",
    "VLM-Warning",
    "VLM-Request-Id",
    "X-Request-Id",
    "Retry-After",
    "Server-Timing",
)


def allowed(origins: Sequence[str]) -> re.Pattern[str]:
    """Return the pattern that an allowed origin matches whole. `origins`: as `server.cors_origins`."""
    return re.compile("|".join(_pattern(origin) for origin in origins) or r"(?!)")


def with_cors(app: ASGIApp, origins: Sequence[str]) -> ASGIApp:
    """Wrap `app`: preflights of allowed pages are answered, and every reply lets these pages read its headers."""
    answer = partial(
        CORSMiddleware, app, allow_methods=("GET", "HEAD", "POST"), allow_headers=(ANY,), expose_headers=EXPOSED
    )
    return answer(allow_origins=(ANY,)) if ANY in origins else answer(allow_origin_regex=allowed(origins).pattern)


def _pattern(origin: str) -> str:
    """`*` alone is any origin, `:*` at the end any port or none, `*.` before the host any subdomain."""
    if origin == ANY:
        return ".*"
    scheme, mark, place = origin.partition("://")
    host, any_port, _ = place.partition(":*") if place.endswith(":*") else (place, "", "")
    below = r"(?:[a-z0-9-]+\.)+" if host.startswith("*.") else ""
    return re.escape(scheme + mark) + below + re.escape(host.removeprefix("*.")) + (r"(?::\d+)?" if any_port else "")
