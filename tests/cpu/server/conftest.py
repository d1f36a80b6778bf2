"""The API without an engine process: a scripted client, a tokenizer of bytes, a CLIP-style processor."""

import asyncio
import base64
import io
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import httpx
import msgspec
import pytest
from fastapi import FastAPI
from openai import AsyncOpenAI
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from foveate.configs.config import Config, ModelConfig
from foveate.engine.common import (
    Accepted,
    Delta,
    Failed,
    FieldInfo,
    Generate,
    Heartbeat,
    ImageUsage,
    MethodInfo,
    ModelInfo,
    TokenLogprob,
    Usage,
    VisualUsage,
)
from foveate.server.app import create_app
from foveate.server.common.metrics import Metrics
from foveate.server.common.replies import UsageReport

T = TypeVar("T")
SPECIALS = ("<|end|>", "<|turn|>", "<image>")
SIDE, OFFERED = 24, 36
TEMPLATE = """{% for m in messages %}<|turn|>{{ m['role'] }}
{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for p in m['content'] %}{% if p['type'] == 'image' %}\
<image>{% else %}{{ p['text'] }}{% endif %}{% endfor %}{% endif %}<|end|>
{% endfor %}{% if add_generation_prompt %}<|turn|>assistant
{% endif %}"""


def make_tokenizer() -> Tokenizer:
    """One token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([*SPECIALS, *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIALS])
    return tokenizer


METHODS = [
    MethodInfo(
        name=name, summary=f"{name}.", source="", fields=fields, question_aware=False, shared=True,
        signals_cls=[], signals_no_cls=[],
    )
    for name, fields in (
        ("none", []),
        ("foveal", [FieldInfo(name="alpha", type="float", default=0.5)]),
        ("pool", [FieldInfo(name="how", type='"mean" | "max"', default="mean")]),
    )
] + [
    MethodInfo(
        name="fastv", summary="", source="", fields=[FieldInfo(name="k", type="int", default=2)], question_aware=True,
        shared=False, signals_cls=[], signals_no_cls=[], stage="decoder",
    )
]  # fmt: skip
MODEL = ModelInfo(
    family="llava", max_context=2000, vocab_size=259, image_token_id=2, n_parameters=1, dtype="float32", device="cpu",
    weights="fp32", kernels="avx2",
    block_tokens=16, n_blocks=100,
)  # fmt: skip
BEAT = Heartbeat(
    since_step_s=0.0, running=0, waiting=0, free_blocks=100, cached_blocks=0, used_blocks=0, total_blocks=100, steps=1,
    preemptions=0, prompt_tokens=0, cached_tokens=0, output_tokens=0, visual_offered=0, visual_kept=0,
    images_encoded=0, encoder_hits=0,
)  # fmt: skip


class FakeClient:
    """Answers every choice with `text`, byte by byte; `fails` is sent instead of what stands at that place."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.state, self.reason, self.restarts, self.turn_s = "ready", "", 0, 0.0
        self.model, self.methods, self.heartbeat, self.heartbeat_at = MODEL, METHODS, BEAT, time.monotonic()
        self.text = "The answer is 42."
        self.ids: list[int] | None = None
        self.fails: Failed | None = None
        self.fails_at = 0  # events before it
        self.hangs = False  # after the first token
        self.requests: list[Generate] = []
        self.aborted: list[str] = []
        self.ended: set[tuple[str, int]] = set()  # choices ended early
        self.tokenizer = tokenizer

    async def generate(self, request: Generate) -> AsyncGenerator[Accepted | Delta | Failed, None]:
        self.requests.append(request)
        finished = False
        events = self._events(request)
        try:
            for number, event in enumerate(events):
                if self.fails is not None and number == self.fails_at:
                    finished = True
                    yield Failed(id=request.id, code=self.fails.code, message=self.fails.message)
                    return
                await asyncio.sleep(0)
                finished = number == len(events) - 1
                if isinstance(event, Delta) and (event.id, event.choice) in self.ended:
                    if event.finish is None:
                        continue
                    event = msgspec.structs.replace(event, token_ids=[], logprobs=None, finish="abort")
                yield event
                if self.hangs and number == 1:
                    await asyncio.Event().wait()
        finally:
            if not finished:
                self.aborted.append(request.id)

    def end_choice(self, request_id: str, choice: int) -> None:
        self.ended.add((request_id, choice))

    def _events(self, request: Generate) -> list[Accepted | Delta]:
        n = len(request.images)
        kept = [min(OFFERED, image.tokens or OFFERED) for image in request.images]
        if request.visual.tokens is not None and n:
            kept = [min(k, max(1, request.visual.tokens // n)) for k in kept]
        per_image = [ImageUsage(offered=OFFERED, kept=k, rows=6, cols=6) for k in kept]
        visual = VisualUsage(
            offered=n * OFFERED, kept=sum(kept), method=request.visual.label if n else "none", per_image=per_image,
            mean=sum(kept) / (1 if request.visual.prune is None else 2),
            layers=[(0, sum(kept)), (2, 0)] if n and request.visual.prune else [],
        )  # fmt: skip
        n_prompt = len(request.prompt_ids) - n + sum(kept)
        events: list[Accepted | Delta] = [Accepted(id=request.id, prompt_tokens=n_prompt, visual=visual)]
        ids = self.ids or [*self.tokenizer.encode(self.text).ids, 0]
        ids = ids[: request.sampling.max_tokens]
        usage = Usage(
            cached_tokens=7, output_tokens=len(ids), encoder_hits=1, preemptions=0, queue_s=0.001, encode_s=0.002,
            reduce_s=0.0005, prefill_s=0.003, decode_s=0.004, peak_kv_tokens=n_prompt + len(ids),
        )  # fmt: skip
        for place, token in enumerate(ids):
            last = place == len(ids) - 1
            stopped = last and token == 0
            for choice in range(request.n):
                events.append(
                    Delta(
                        id=request.id,
                        choice=choice,
                        token_ids=[token],
                        logprobs=[TokenLogprob(token, -0.5, [(token, -0.5), (5, -1.5)])]
                        if request.sampling.logprobs is not None
                        else None,
                        finish=("stop" if stopped else "length") if last else None,
                        stop_token=0 if stopped else None,
                        usage=usage if last else None,
                    )
                )
        return events


class CountingMetrics(Metrics):
    """Remembers what it was told."""

    def __init__(self) -> None:
        super().__init__("m")
        self.routes: list[str] = []
        self.outcomes: list[tuple[str, str]] = []
        self.spent: list[UsageReport] = []

    def received(self, route: str) -> None:
        self.routes.append(route)
        super().received(route)

    def finished(self, outcome: Any, code: str) -> None:
        self.outcomes.append((outcome, code))
        super().finished(outcome, code)

    def usage(self, usage: UsageReport) -> None:
        self.spent.append(usage)
        super().usage(usage)


class Api:
    """A server in this process."""

    def __init__(self, model_dir: Path, config: Config) -> None:
        self.config = config
        self.tokenizer = make_tokenizer()
        self.client = FakeClient(self.tokenizer)
        self.metrics = CountingMetrics()
        self.app: FastAPI = create_app(config, self.client, self.metrics, model_dir)  # type: ignore[arg-type]

    def run(self, use: Callable[[httpx.AsyncClient], Awaitable[T]]) -> T:
        async def main() -> T:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://server") as http:
                return await use(http)

        return asyncio.run(main())

    def send(self, method: str, path: str, **request: Any) -> httpx.Response:
        return self.run(lambda http: http.request(method, path, **request))

    def chat(self, content: object = "hi", headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
        body = {"model": "m", "messages": [{"role": "user", "content": content}]} | fields
        return self.send("POST", "/v1/chat/completions", json=body, headers=headers)

    def events(self, reply: httpx.Response) -> list[dict[str, Any]]:
        """The events of a stream but the last, [DONE]."""
        lines = [line for line in reply.text.split("\n\n") if line]
        assert all(line.startswith("data: ") for line in lines)
        assert lines[-1] == "data: [DONE]"
        return [json.loads(line[6:]) for line in lines[:-1]]

    async def leave(self, body: dict[str, Any], until: str) -> list[dict[str, Any]]:
        """Run the application by hand and go away once `until` was sent, or at once."""
        sent: list[dict[str, Any]] = []
        gone = asyncio.Event()
        incoming = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

        async def receive() -> dict[str, Any]:
            if incoming:
                return incoming.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)
            if until.encode() in message.get("body", b""):
                gone.set()

        if not until:
            asyncio.get_running_loop().call_later(0.05, gone.set)
        headers = [(b"content-type", b"application/json"), (b"host", b"h")]
        path = "/v1/chat/completions"
        scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST",
            "scheme": "http", "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
            "headers": headers, "client": ("c", 1), "server": ("s", 2), "state": {},
        }  # fmt: skip
        await asyncio.wait_for(self.app(scope, receive, send), 10)
        return sent

    def openai(self, use: Callable[[AsyncOpenAI], Awaitable[T]]) -> T:
        async def with_client(http: httpx.AsyncClient) -> T:
            return await use(AsyncOpenAI(base_url="http://server/v1", api_key="key-1", http_client=http, max_retries=0))

        return self.run(with_client)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    make_tokenizer().save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": SIDE},
        "crop_size": {"height": SIDE, "width": SIDE},
    }
    (directory / "preprocessor_config.json").write_text(json.dumps(processor))
    return directory


@pytest.fixture
def api(model_dir: Path) -> Api:
    return Api(model_dir, Config(model=ModelConfig(name="m")))


@pytest.fixture
def make_api(model_dir: Path) -> Callable[..., Api]:
    """An API with some sections of the configuration replaced."""
    return lambda **sections: Api(model_dir, replace(Config(model=ModelConfig(name="m")), **sections))


@pytest.fixture(scope="session")
def png() -> str:
    return data_url(Image.new("RGB", (30, 20), (200, 30, 30)))


def data_url(image: Image.Image, kind: str = "PNG", **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


@pytest.fixture(scope="session")
def to_url() -> Callable[..., str]:
    return data_url


def part(url: str, **fields: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}} | fields


@pytest.fixture(scope="session")
def image_part() -> Callable[..., dict[str, Any]]:
    return part


@pytest.fixture
def tokenizer() -> Tokenizer:
    return make_tokenizer()
