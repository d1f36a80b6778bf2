"""Run one engine request from `Generate` to text. Chat and text completions share this code."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

from foveate.engine.common import Accepted, Delta, Failed, TokenLogprob, Usage
from foveate.server.answer.logprobs import TokenTexts
from foveate.server.answer.text import TextStream
from foveate.server.common.engine_api import EngineApi
from foveate.server.common.errors import ApiError, from_failed
from foveate.server.common.replies import FinishReason
from foveate.server.common.track import Track
from foveate.server.prepare.request import Prepared


@dataclass(frozen=True, slots=True)
class Piece:
    """New text and tokens of one choice. Choice numbers run over all answers. The last piece has `finish`."""

    choice: int
    text: str
    logprobs: list[TokenLogprob]
    finish: FinishReason | None


@dataclass(slots=True)
class Choice:
    text: TextStream
    n_tokens: int = 0  # generated tokens that usage counts, including the stopping token
    finish: FinishReason | None = None
    usage: Usage | None = None  # set once the engine has ended the choice: one step later after a stop string


class Answer:
    """Runs one prepared request. Call `start`, then iterate over `pieces` once. Call `aclose` in every case."""

    def __init__(self, engine: EngineApi, texts: TokenTexts, prepared: Prepared, track: Track, first: int = 0) -> None:
        generate = prepared.generate
        self.id = generate.id
        self.choices = [
            Choice(TextStream(texts, prepared.stop, generate.sampling.min_tokens)) for _ in range(generate.n)
        ]
        self._engine = engine
        self._first = first
        self._prompt_param = prepared.prompt_param
        self._track = track
        self._accepted: Accepted | None = None
        self._events = engine.generate(generate)

    @property
    def accepted(self) -> Accepted:
        assert self._accepted is not None, "start comes first"
        return self._accepted

    async def start(self) -> None:
        """Wait until the engine has accepted the request. Raises ApiError if the engine refuses the request."""
        event = await anext(self._events)
        if isinstance(event, Failed):
            raise from_failed(event, self._prompt_param)
        assert isinstance(event, Accepted), "the engine answers Accepted or Failed first"
        self._accepted = event

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Yield new text as it arrives, until all choices have ended. Raises ApiError if the engine fails."""
        async for event in self._events:
            if isinstance(event, Failed):
                raise from_failed(event, self._prompt_param)
            assert isinstance(event, Delta), "Accepted comes once"
            piece = self._read(event)
            if piece is not None:
                yield piece
        assert all(choice.usage is not None for choice in self.choices), "every choice ends with its usage"
        await self.aclose()

    async def aclose(self) -> None:
        """Abort the request in the engine unless the request has ended."""
        await self._events.aclose()

    def _read(self, delta: Delta) -> Piece | None:
        choice = self.choices[delta.choice]
        choice.usage = delta.usage
        if choice.finish is not None:  # a stop string ended the choice: drop the tokens generated since
            return None
        stopped_by = 0 if delta.stop_token is None else 1
        ids = delta.token_ids[: len(delta.token_ids) - stopped_by]
        text, n_read = choice.text.push(ids)
        if delta.finish is not None:
            text += choice.text.flush()
        if choice.text.stopped:
            choice.finish, stopped_by = "stop", 0
            if delta.finish is None:
                self._engine.end_choice(self.id, delta.choice)
        elif delta.finish is not None:
            choice.finish = _reason(delta.finish)
        choice.n_tokens += n_read + stopped_by
        if delta.token_ids:
            self._track.tokens(delta.choice, len(delta.token_ids))
        logprobs = (delta.logprobs or [])[:n_read]
        if not text and not logprobs and choice.finish is None:
            return None
        return Piece(self._first + delta.choice, text, logprobs, choice.finish)


def _reason(finish: str) -> FinishReason:
    match finish:
        case "stop" | "length":
            return finish
    raise ApiError("the request was aborted by the server; send it again", None, "aborted", 503)


async def start_all(answers: Sequence[Answer]) -> None:
    """Start several answers. If one fails to start, close all."""
    starting = [asyncio.create_task(answer.start()) for answer in answers]
    try:
        await asyncio.gather(*starting)
    except BaseException:
        for task in starting:  # a generator that is being read cannot be closed
            task.cancel()
        await asyncio.gather(*starting, return_exceptions=True)
        await close_all(answers)
        raise


async def close_all(answers: Sequence[Answer]) -> None:
    for answer in answers:
        await answer.aclose()


def pieces_of(answers: Sequence[Answer]) -> AsyncGenerator[Piece, None]:
    """Yield pieces of all answers as they arrive. A single answer is read directly, without a queue per token."""
    return answers[0].pieces() if len(answers) == 1 else _merged(answers)


async def _merged(answers: Sequence[Answer]) -> AsyncGenerator[Piece, None]:
    """Yield pieces from a queue of all answers. Closing the generator closes the answers."""
    queue: asyncio.Queue[Piece | Exception | None] = asyncio.Queue()

    async def pump(answer: Answer) -> None:
        try:
            async for piece in answer.pieces():
                queue.put_nowait(piece)
            queue.put_nowait(None)
        except Exception as error:  # the reader below raises the error again
            queue.put_nowait(error)

    tasks = [asyncio.create_task(pump(answer)) for answer in answers]
    try:
        unfinished = len(tasks)
        while unfinished:
            entry = await queue.get()
            if isinstance(entry, Exception):
                raise entry
            if entry is None:
                unfinished -= 1
            else:
                yield entry
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await close_all(answers)
