"""Time and memory of the cells of `bench.quality`: one client, pictures new to the server, eight tokens."""

import asyncio
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, median

import httpx

import foveate.bundled
from bench.quality.cells import Cell, Kept, Times
from bench.scenes import body, held_out
from bench.server import Server, serving
from bench.stream import Streamed, streamed

FIRST_SCENE = 200_000  # away from the scenes that are scored, and from those of bench.serve
_N_OUTPUT = 8  # of a description, so that every token is text
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2}


def token_bytes(server: Server, folder: Path) -> int:
    """Bytes of keys and values of one token, from the checkpoint's shape and the dtype that the server reports."""
    text = json.loads((folder / "config.json").read_text())["text_config"]
    metrics = httpx.get(f"{server.url}/metrics", timeout=10.0, trust_env=False).text
    dtype = re.search(r'dtype="(\w+)"', metrics)
    assert dtype is not None, "the server says in which dtype it holds the model"
    head_dim = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    values = 2 * text["num_hidden_layers"] * text["num_key_value_heads"] * head_dim
    return int(values * _DTYPE_BYTES[dtype[1]])


async def _ask(server: Server, cell: Cell, first: int, n: int) -> list[Streamed]:
    found = []
    async with httpx.AsyncClient(timeout=120.0, trust_env=False) as client:
        for item in held_out(n + 1, first, kinds=("describe",)):
            request = body(server.model, item, _N_OUTPUT, cell.method, cell.ratio)
            request |= {"stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True}
            found.append(await streamed(client, server.url, json.dumps(request).encode(), {}))
    return found[1:]  # the first one warms up


def summary(runs: Sequence[Streamed], kv_token_bytes: int) -> Times:
    return Times(
        n=len(runs),
        ttft_ms=round(1e3 * median(r.pieces_s[0] for r in runs), 2),
        encode_ms=round(1e3 * median(r.encode_s for r in runs), 2),
        reduce_ms=round(1e3 * median(r.reduce_s for r in runs), 2),
        prefill_ms=round(1e3 * median(r.prefill_s for r in runs), 2),
        kv_bytes=round(mean(r.prompt_tokens - r.visual_kept + r.visual_mean for r in runs) * kv_token_bytes),
        token_ms=round(1e3 * median(r.per_token_s for r in runs), 2),
    )


def measure_times(kept: Kept, models: Sequence[str], n: int, reducers: Path) -> None:
    """Time every cell of bundled models with `n` pictures each. The dense model's times serve every row's 100 %."""
    for model in models:
        folder = foveate.bundled.path(model)
        assert folder is not None, "times are taken of bundled models"
        with serving(model, ["cache.prefix_sharing=false"], reducers=reducers) as server:
            per_token, first = token_bytes(server, folder), FIRST_SCENE
            dense: Times | None = None
            for cell in kept.of(model):
                if cell.ratio < 1.0 or dense is None:
                    runs = asyncio.run(_ask(server, cell, first, n))
                    times, first = summary(runs, per_token), first + n + 1
                    dense = dense or times
                kept.put(replace(cell, times=times if cell.ratio < 1.0 else dense))
