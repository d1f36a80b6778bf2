"""Deliver pieces through the formatter of an API, as one whole answer or as server-sent events."""

from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import orjson
from fastapi import Request, Response

from foveate.engine.common import TokenLogprob
from foveate.server.answer.answer import Answer, Piece, close_all, pieces_of, start_all
from foveate.server.answer.usage import report, resolved_header, spent_headers
from foveate.server.common.replies import FinishReason, Reply, UsageReport
from foveate.server.common.track import Track
from foveate.server.prepare.checks import MAX_WARNINGS
from foveate.server.prepare.request import Prepared
from foveate.server.routes.context import Context
from foveate.server.transport.events import EventStream

HOLE = "\x00hole\x00"  # placeholder for the text in a template event; no model name or id contains it


@dataclass(slots=True)
class Collected:
    """One complete choice."""

    text: str = ""
    tokens: list[TokenLogprob] = field(default_factory=list)
    finish: FinishReason = "stop"


@dataclass(frozen=True, slots=True)
class Head:
    """The fields that every chunk of one answer repeats."""

    id: str
    created: int
    model: str


class Formatter(Protocol):
    """Formats the answers of one API. Choice numbers run over all answers of a request."""

    def opening(self) -> Iterator[bytes]:
        """Yield the events before the first piece."""
        ...

    def events(self, piece: Piece) -> Sequence[bytes]:
        """Return the events of one piece."""
        ...

    def closing(self, usage: UsageReport | None) -> Iterator[bytes]:
        """Yield the events after the last piece. `usage`: None unless the client asked for usage."""
        ...

    def whole(self, choices: Sequence[Collected], usage: UsageReport) -> Reply:
        """Return the whole answer."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """Delivers started answers to the client."""

    context: Context
    answers: Sequence[Answer]
    formatter: Formatter
    headers: dict[str, str]
    warnings: Sequence[str]
    track: Track
    with_usage: bool  # whether a stream ends with the usage

    async def stream(self) -> AsyncGenerator[bytes, None]:
        for event in self.formatter.opening():
            yield event
        pieces = pieces_of(self.answers)
        try:
            async for piece in pieces:
                for event in self.formatter.events(piece):
                    yield event
            usage = report(self.answers, self.warnings)
            self._succeed(usage)
            for event in self.formatter.closing(usage if self.with_usage else None):
                yield event
        finally:
            await pieces.aclose()

    async def collect(self) -> Response:
        collected = [Collected() for answer in self.answers for _ in answer.choices]
        async for piece in pieces_of(self.answers):
            entry = collected[piece.choice]
            entry.text += piece.text
            entry.tokens += piece.logprobs
            entry.finish = piece.finish or entry.finish
        usage = report(self.answers, self.warnings)
        headers = {**self.headers, **spent_headers(self.answers, usage)}
        body = self.formatter.whole(collected, usage).to_json()
        self._succeed(usage)
        return Response(body, headers=headers, media_type="application/json")

    def _succeed(self, usage: UsageReport) -> None:
        """Count the request as a success."""
        self.context.metrics.usage(usage)
        self.track.usage = usage
        self.track.finish("success", self.answers[0].choices[0].finish or "stop")


async def deliver(
    context: Context, request: Request, prepared: Sequence[Prepared], formatter: Formatter, stream: "Streaming"
) -> Response:
    """Start the answers, then stream or collect. Raises ApiError."""
    track: Track = request.state.track
    track.reply_id = stream.reply_id
    answers = [
        Answer(context.engine, context.texts, each, track, first=i * each.generate.n) for i, each in enumerate(prepared)
    ]
    try:
        await start_all(answers)
        headers = answer_headers(answers[0], prepared[0]) | {"VLM-Request-Id": stream.reply_id}
        track.resolved = headers["VLM-Resolved"]
        track.prompt_tokens = sum(answer.accepted.prompt_tokens for answer in answers)
        track.n_pictures = len(answers[0].accepted.visual.per_image)
        delivery = Delivery(
            context=context,
            answers=answers,
            formatter=formatter,
            headers=headers,
            warnings=warnings_of(prepared[0]),
            track=track,
            with_usage=stream.usage,
        )
        if stream.wanted:
            return EventStream(delivery.stream(), headers, track, lambda: close_all(answers))
        return await delivery.collect()
    except BaseException:
        await close_all(answers)
        raise


@dataclass(frozen=True, slots=True)
class Streaming:
    """The client's choice of streaming."""

    reply_id: str
    wanted: bool
    usage: bool


def answer_headers(answer: Answer, prepared: Prepared) -> dict[str, str]:
    headers = {"VLM-Resolved": resolved_header(answer, prepared.resolved.figures)}
    return headers | warning_header(warnings_of(prepared))


def warnings_of(prepared: Prepared) -> list[str]:
    """Return what the server ignored of a request: fields, then headers."""
    return bounded([*prepared.warnings, *prepared.resolved.warnings])


def bounded(warnings: Sequence[str]) -> list[str]:
    """Return the first warnings, and how many more there are."""
    more = len(warnings) - MAX_WARNINGS
    return [*warnings[:MAX_WARNINGS], f"{more} more"] if more > 0 else list(warnings)


def warning_header(warnings: Sequence[str]) -> dict[str, str]:
    """Return VLM-Warning, if there is a warning."""
    return {"VLM-Warning": ", ".join(warnings)} if warnings else {}


def cut(event: bytes) -> tuple[bytes, bytes]:
    """Return the bytes before and after the JSON string `HOLE` in an encoded event."""
    before, hole, after = event.partition(orjson.dumps(HOLE))
    assert hole, "the event has a hole"
    return before, after
