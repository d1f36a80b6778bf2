"""One streamed chat completion, timed piece by piece."""

import json
import time
from dataclasses import dataclass

import httpx


@dataclass(frozen=True)
class Streamed:
    """Times of one answer, in seconds from the start of the request. Figures that a server does not report are 0."""

    pieces_s: list[float]  # when each piece of text arrived; at least one
    total_s: float
    prompt_tokens: int
    output_tokens: int
    visual_kept: int = 0
    visual_mean: float = 0.0  # over the decoder's layers
    encode_s: float = 0.0
    reduce_s: float = 0.0
    prefill_s: float = 0.0

    @property
    def per_token_s(self) -> float:
        """Seconds per token between the first piece and the last."""
        return (self.pieces_s[-1] - self.pieces_s[0]) / max(self.output_tokens - 1, 1)


async def streamed(client: httpx.AsyncClient, url: str, request: bytes, headers: dict[str, str]) -> Streamed:
    """Send a JSON body that asks for a stream with usage.

    Args:
        url: without /v1.

    Raises:
        RuntimeError: the server refuses, or the stream breaks off, or the stream has no text or no usage.
    """
    started = time.perf_counter()
    pieces, usage = list[float](), None
    headers = {"Content-Type": "application/json"} | headers
    async with client.stream("POST", f"{url}/v1/chat/completions", content=request, headers=headers) as reply:
        if reply.status_code != 200:
            raise RuntimeError(f"{url}: {reply.status_code} {(await reply.aread()).decode()[:500]}")
        async for line in reply.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise RuntimeError(f"the stream broke off: {chunk['error']}")
            usage = chunk.get("usage") or usage
            if any(choice["delta"].get("content") for choice in chunk["choices"]):
                pieces.append(time.perf_counter() - started)
    total_s = time.perf_counter() - started
    if usage is None or not pieces:
        raise RuntimeError("the stream ended without text or usage")
    ours = usage.get("vlm", {})
    spent, visual = ours.get("time_ms", {}), ours.get("visual", {})
    return Streamed(
        pieces_s=pieces,
        total_s=total_s,
        prompt_tokens=usage["prompt_tokens"],
        output_tokens=usage["completion_tokens"],
        visual_kept=visual.get("kept", 0),
        visual_mean=visual.get("kept_mean", 0.0),
        encode_s=spent.get("encode", 0.0) / 1e3,
        reduce_s=spent.get("reduce", 0.0) / 1e3,
        prefill_s=spent.get("prefill", 0.0) / 1e3,
    )
