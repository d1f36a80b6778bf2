"""Half-blank pages, and their time to first token: the second half of `bench.reducers_cost`."""

import asyncio
import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import httpx
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from bench.random_model.text import text_of
from bench.report import table
from bench.server import Server, serving
from bench.stream import streamed

SIDE = 336
PAGE_METHODS = (
    "none", "divprune", "foveal", "pixelprune", "pixelprune+divprune", "pixelprune+foveal", "evit",
    "evit;keep=0.5+foveal", "tome", "mctf", "expedite", "flowcut",
)  # fmt: skip
PAGE_TARGET, PAGE_RATIO = 0.45, 0.25


@dataclass(frozen=True)
class Page:
    """TTFT of half-blank pages."""

    method: str
    kept: int
    encode_s: float
    ttft_s: float


def page(seed: int, side: int = SIDE) -> Image.Image:
    """Letters on white in the upper half, nothing in the lower half. Every cell of the upper half shows some ink."""
    picture, random = Image.new("RGB", (side, side), "white"), Random(seed)
    draw = ImageDraw.Draw(picture)
    for y in range(0, side // 2, 12):
        for x in range(0, side, 7):
            draw.text((x, y), chr(random.randrange(65, 91)), fill="black")
    draw.rectangle((0, side // 2, side, side), fill="white")
    return picture


def pixels_of(picture: Image.Image) -> Tensor:
    raw = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return raw.view(picture.height, picture.width, 3)


async def _ask(server: Server, method: str, seed: int) -> Page:
    raw = io.BytesIO()
    page(seed).save(raw, "PNG")
    url = "data:image/png;base64," + base64.b64encode(raw.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text_of(12, seed)}]
    visual = {"method": method, "ratio": 1.0 if method == "none" else PAGE_RATIO}
    request = {
        "model": server.model,
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": 2,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "vlm": {"visual": visual, "strict": True},
    }
    async with httpx.AsyncClient(timeout=120.0, trust_env=False) as client:
        found = await streamed(client, server.url, json.dumps(request).encode(), {})
    return Page(method, found.visual_kept, found.encode_s, found.pieces_s[0])


def pages(folder: Path, n: int) -> list[Page]:
    """The fastest of `n` pages. The methods run in turns, so a slow spell of the machine slows all methods."""
    found: dict[str, list[Page]] = {method: [] for method in PAGE_METHODS}
    with serving(str(folder)) as server:
        asyncio.run(_ask(server, "none", 1))
        for i in range(n * len(PAGE_METHODS)):
            method = PAGE_METHODS[i % len(PAGE_METHODS)]
            found[method].append(asyncio.run(_ask(server, method, 2 + i)))
    return [min(own, key=lambda one: one.ttft_s) for own in found.values()]


def page_table(found: Sequence[Page]) -> str:
    full = found[0].ttft_s
    rows = [
        [p.method, str(p.kept), f"{p.encode_s:.2f}", f"{p.ttft_s:.2f}", f"{p.ttft_s / full:.2f}"]
        for p in sorted(found, key=lambda p: -p.ttft_s)
    ]
    return table(["method", "visual tokens", "tower s", "TTFT s", "of full"], rows)
