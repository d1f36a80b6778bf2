"""The requests to every system, and the times of an answer.

A request is a chat turn with a 336 x 336 picture and a short question (603 tokens on the random LLaVA: 576 of the
picture, 27 of text), or a text of 1,000 tokens. Each picture and text is drawn from a seed that a run uses once, so
neither a prefix cache nor a feature cache helps.
"""

import asyncio
import base64
import io
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from random import Random

import httpx
from PIL import Image

from bench.random_model.text import text_of
from bench.stream import streamed

SIDE = 336
QUESTION_TOKENS = 12
TEXT_TOKENS = 1_000
_TURN_TOKENS = 14  # of the chat template around a text


@dataclass(frozen=True)
class Ask:
    """One request. Two requests of a kind differ only in `seed`."""

    seed: int
    text: str
    picture: bool
    visual_tokens: int = 0  # 0: all; else the budget that ours is given


@dataclass(frozen=True)
class Timing:
    """One answer. The system counts the tokens. The times are taken where the request is made."""

    ttft_s: float
    tpot_s: float  # between the first and the last token; 0 for an answer of one token
    prompt_tokens: int
    output_tokens: int
    encode_s: float = 0.0  # as our server says; 0 where it is not said
    prefill_s: float = 0.0


@dataclass(frozen=True)
class Batch:
    """Several answers that were requested at once."""

    timings: tuple[Timing, ...]
    wall_s: float

    @property
    def tokens_per_s(self) -> float:
        return sum(t.output_tokens for t in self.timings) / self.wall_s


class Asks:
    """Draws requests, each with a seed of its own."""

    def __init__(self, first_seed: int = 1) -> None:
        self._seeds = count(first_seed)

    def about_picture(self, visual_tokens: int = 0) -> Ask:
        seed = next(self._seeds)
        return Ask(seed, text_of(QUESTION_TOKENS, seed), True, visual_tokens)

    def about_text(self, n_tokens: int = TEXT_TOKENS) -> Ask:
        """A prompt of `n_tokens`, with the chat template's tokens."""
        seed = next(self._seeds)
        return Ask(seed, text_of(n_tokens - _TURN_TOKENS, seed), False)


def picture(seed: int) -> Image.Image:
    """Coarse random colours: the PNG is small, and two seeds never give the same picture."""
    blocks = Image.frombytes("RGB", (21, 21), Random(seed).randbytes(21 * 21 * 3))
    return blocks.resize((SIDE, SIDE), Image.Resampling.NEAREST)


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    picture(seed).save(buffer, "PNG")
    return buffer.getvalue()


def body(ask: Ask, model: str, n_tokens: int) -> dict[str, object]:
    """The streaming chat request that both servers understand: greedy, exactly `n_tokens` tokens."""
    content: list[dict[str, object]] = [{"type": "text", "text": ask.text}]
    if ask.picture:
        url = "data:image/png;base64," + base64.b64encode(png(ask.seed)).decode()
        content.insert(0, {"type": "image_url", "image_url": {"url": url}})
    return {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": n_tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def _stream(client: httpx.AsyncClient, url: str, model: str, ask: Ask, n_tokens: int) -> Timing:
    headers = {"VLM-Visual-Tokens": str(ask.visual_tokens)} if ask.visual_tokens else {}
    request = json.dumps(body(ask, model, n_tokens)).encode()  # before the clock starts
    found = await streamed(client, url, request, headers)
    if found.output_tokens != n_tokens:
        raise RuntimeError(f"{found.output_tokens} tokens came, {n_tokens} were asked for")
    return Timing(
        ttft_s=found.pieces_s[0],
        tpot_s=found.per_token_s,
        prompt_tokens=found.prompt_tokens,
        output_tokens=found.output_tokens,
        encode_s=found.encode_s,
        prefill_s=found.prefill_s,
    )


def over_http(url: str, model: str, asks: Sequence[Ask], n_tokens: int) -> Batch:
    """Send all requests at once, each on a connection of its own, and wait for all answers.

    Raises:
        RuntimeError: an answer was refused, broke off, or had another length.
    """

    async def all_of_them() -> tuple[Timing, ...]:
        async with httpx.AsyncClient(timeout=600.0, trust_env=False) as client:
            return tuple(await asyncio.gather(*(_stream(client, url, model, ask, n_tokens) for ask in asks)))

    started = time.perf_counter()
    timings = asyncio.run(all_of_them())
    return Batch(timings, time.perf_counter() - started)
