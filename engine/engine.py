"""The engine: requests in, events out, one synchronous step at a time. Single-threaded; knows no sockets.

A request that raises anywhere becomes one `Failed`, and the others go on; only a lost device ends them all.
"""

import logging
import time
from collections.abc import Sequence as Many
from dataclasses import dataclass

from torch import Tensor

from foveate.configs.config import Config
from foveate.configs.errors import ConfigError
from foveate.engine.cache.pool import BlockPool
from foveate.engine.cache.sequence_cache import CacheSpace
from foveate.engine.cache.store import KVStore
from foveate.engine.common import (
    Accepted,
    Delta,
    DeviceLostError,
    EngineError,
    Failed,
    Generate,
    Heartbeat,
    ModelError,
    ModelInfo,
    QueueFullError,
    RequestError,
    SamplingParams,
    TokenLogprob,
)
from foveate.engine.encoder import Encoder
from foveate.engine.models.base import Model
from foveate.engine.prune.depth import Decisions
from foveate.engine.request import Request
from foveate.engine.resolve import Room, resolve
from foveate.engine.runner import Runner
from foveate.engine.sampler import Drawn, sample
from foveate.engine.scheduler import Chunk, Scheduler
from foveate.engine.sequence import Sequence
from foveate.kernels.hardware.device import describe, is_lost

Event = Accepted | Delta | Failed
log = logging.getLogger(__name__)


@dataclass(slots=True)
class Counters:
    """Counts since the start; they never decrease."""

    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    visual_offered: int = 0
    visual_kept: int = 0


class Engine:
    """One model and everything that serves it.

    Raises:
        ConfigError: the settings do not fit the model.
    """

    def __init__(self, model: Model, config: Config) -> None:
        kv = KVStore(model.spec, config.cache, model.dtype, model.device)
        self._model = model
        self._config = config
        self._room = Room(context=_context(model, config), pool=kv.n_tokens)
        self._kv = kv
        self._space = CacheSpace(BlockPool(kv.n_pages), kv, kv.block_tokens, config.cache.prefix_sharing)
        self._encoder = Encoder(model, config.vision.feature_cache_mb * 2**20)
        self._scheduler = Scheduler(config.scheduler, self._encoder.cost)
        self._runner = Runner(model, kv)
        self._decisions = Decisions()
        self._requests: dict[str, Request] = {}  # some choice of which is unfinished
        self._events: list[Event] = []
        self._arrivals = 0
        self._counters = Counters()
        self._stepped = time.monotonic()

    def add(self, generate: Generate) -> None:
        """Accept or refuse a request: the next events hold its `Accepted` or `Failed`."""
        try:
            if generate.id in self._requests:
                raise RequestError(f"request id {generate.id!r} is in use")
            limit = self._config.scheduler.max_waiting
            if self._scheduler.n_waiting_requests >= limit:
                raise QueueFullError(f"{limit} requests wait already; try again later")
            request = resolve(generate, self._model.geometry, str(self._model.dtype), self._room)
            self._decisions.recall(request.depth)
            for choice in range(request.n_choices):
                arrival = self._arrivals + choice
                sequence = Sequence(request=request, choice=choice, arrival=arrival, space=self._space)
                request.sequences.append(sequence)
        except Exception as error:
            self._events.append(_failed(generate.id, error))
            return
        request.arrived = time.monotonic()
        self._requests[request.id] = request
        self._arrivals += request.n_choices
        for sequence in request.sequences:
            self._scheduler.add(sequence)
        n_prompt = len(request.prompt_ids)
        self._counters.prompt_tokens += n_prompt
        self._counters.visual_offered += request.visual.offered
        self._counters.visual_kept += request.visual.kept
        self._events.append(Accepted(id=request.id, prompt_tokens=n_prompt, visual=request.visual))

    def abort(self, request_id: str, choice: int | None = None) -> None:
        """End a request, or one choice of it, now; its blocks are free when this returns.

        An unknown id has ended by itself: no effect.
        """
        if request := self._requests.get(request_id):
            for sequence in request.sequences:
                if not sequence.is_finished and choice in (None, sequence.choice):
                    self._finish(sequence, "abort")

    def step(self) -> list[Event]:
        """Schedule, encode, run, commit, emit."""
        plan = self._scheduler.schedule()
        for request, error in self._encoder.run(plan.images):
            self._fail(request, error)
        chunks = [chunk for chunk in plan.chunks if not chunk.sequence.is_finished]
        if chunks:
            self._start_clocks(chunks)
            self._run(chunks)
        self._counters.steps += 1
        self._stepped = time.monotonic()
        return self.take_events()

    def take_events(self) -> list[Event]:
        """Events since the last call, in order. `step` returns them; a call before `step` returns `Accepted` sooner."""
        events, self._events = self._events, []
        return events

    @property
    def has_work(self) -> bool:
        """Whether a step would do work or return events."""
        return bool(self._requests or self._events)

    def _run(self, chunks: Many[Chunk]) -> None:
        """Run, commit and emit. If the forward raises, run its halves: only requests that raise alone fail."""
        try:
            logits = self._runner.run(chunks)
        except Exception as error:
            requests = list({id(chunk.sequence.request): chunk.sequence.request for chunk in chunks}.values())
            if len(requests) == 1 or is_lost(error):
                self._fail(requests[0], error)
                return
            log.warning("a forward for %d requests raised %r; running its halves", len(requests), error)
            first = {id(request) for request in requests[: len(requests) // 2]}
            for half in (True, False):
                self._run([chunk for chunk in chunks if (id(chunk.sequence.request) in first) is half])
            return
        self._commit(chunks)
        sampling = [chunk.sequence for chunk in chunks if chunk.samples]
        self._emit(sampling, _draw(logits, sampling))

    def _start_clocks(self, chunks: Many[Chunk]) -> None:
        for chunk in chunks:
            if chunk.sequence.admitted is None:
                chunk.sequence.admitted = time.monotonic()
                chunk.sequence.cached_tokens = chunk.start
                self._counters.cached_tokens += chunk.start

    def _commit(self, chunks: Many[Chunk]) -> None:
        """Record that the chunks' keys and values are in the cache."""
        for chunk in chunks:
            chunk.sequence.cache.commit(chunk.stop - chunk.start)
        for request in {id(c.sequence.request): c.sequence.request for c in chunks}.values():
            self._decisions.keep(request.depth)
            request.drop_rows()

    def _emit(self, sequences: Many[Sequence], tokens: Many[Drawn | Exception | None]) -> None:
        """Append each sequence's new token and queue its event."""
        for sequence, drawn in zip(sequences, tokens, strict=True):
            if drawn is None:
                self._fail(sequence.request, EngineError("the model's logits are not finite"))
            elif isinstance(drawn, Exception):
                self._fail(sequence.request, drawn)
            elif not sequence.is_finished:  # another choice of its request may just have failed
                self._append(sequence, drawn)

    def _append(self, sequence: Sequence, drawn: Drawn) -> None:
        request = sequence.request
        sequence.token_ids.append(drawn.token_id)
        sequence.answered = sequence.answered or time.monotonic()
        self._counters.output_tokens += 1
        logprobs = None if drawn.logprob is None else [drawn.logprob]
        if drawn.token_id in request.stop_ids:
            self._finish(sequence, "stop", drawn.token_id, logprobs)
        elif sequence.n_output == request.sampling.max_tokens:
            self._finish(sequence, "length", drawn.token_id, logprobs)
        else:
            delta = Delta(id=request.id, choice=sequence.choice, token_ids=[drawn.token_id], logprobs=logprobs)
            self._events.append(delta)

    def _finish(
        self, sequence: Sequence, reason: str, token_id: int | None = None, logprobs: list[TokenLogprob] | None = None
    ) -> None:
        """End one choice, with its last token if given."""
        request = sequence.request
        self._events.append(
            Delta(
                id=request.id,
                choice=sequence.choice,
                token_ids=[] if token_id is None else [token_id],
                logprobs=logprobs,
                finish=reason,
                stop_token=token_id if reason == "stop" else None,
                usage=sequence.usage(),
            )
        )
        self._remove(sequence, reason)

    def _fail(self, request: Request, error: Exception) -> None:
        """End all choices of a request with one `Failed`. A second call does nothing.

        Raises:
            DeviceLostError: the error is not the request's: the device fails everything from now on.
        """
        if is_lost(error):
            raise DeviceLostError(f"the device failed: {_first_line(error)}") from error
        if request.id in self._requests:
            for sequence in request.sequences:
                if not sequence.is_finished:
                    self._remove(sequence, "error")
            self._events.append(_failed(request.id, error))

    def _remove(self, sequence: Sequence, reason: str) -> None:
        sequence.finish = reason
        self._scheduler.remove(sequence, forget=reason == "error")
        request = sequence.request
        if all(s.is_finished for s in request.sequences):
            for picture in request.pictures:
                picture.rows = None
            del self._requests[request.id]

    def warm_up(self) -> None:
        """Run one real request, so that the first user does not pay one-time costs. Resets the counters.

        Raises:
            ModelError: the model cannot answer this request.
        """
        token = 0 if self._model.spec.image_token_id != 0 else 1
        self.add(Generate(id="warm-up", prompt_ids=[token], sampling=SamplingParams(temperature=0.0, max_tokens=2)))
        events = self.take_events()
        while self.has_work:
            events += self.step()
        for event in events:
            if isinstance(event, Failed):
                raise ModelError(f"the model does not run: {event.message}")
        self._counters = Counters()

    def check(self) -> None:
        """Assert every invariant between steps. An idle engine holds no block. Linear in blocks and tokens."""
        running, waiting = self._scheduler.running, self._scheduler.waiting
        self._space.check(sequence.cache for sequence in running)
        self._encoder.cache.check()
        alive = [s for request in self._requests.values() for s in request.sequences if not s.is_finished]
        assert {id(s) for s in alive} == {id(s) for s in running + waiting}, "unfinished = running + waiting"
        assert len(alive) == len(running) + len(waiting), "no sequence runs and waits"
        for sequence in running:
            assert sequence.cache.is_open, "running sequences hold blocks"
            assert 0 <= sequence.n_computed < sequence.n_tokens, "running sequences lack some token"
        for sequence in waiting:
            assert not sequence.cache.is_open and sequence.n_computed == 0, "waiting ones hold nothing"
        if not alive:
            assert self._space.pool.n_used == 0, "an idle engine holds no block"

    def info(self) -> ModelInfo:
        spec = self._model.spec
        return ModelInfo(
            family=spec.family,
            max_context=self._room.context,
            vocab_size=spec.vocab_size,
            image_token_id=spec.image_token_id,
            n_parameters=self._model.n_parameters,
            dtype=str(self._model.dtype).removeprefix("torch."),
            weights=self._model.weights,
            kernels=describe(self._model.device),
            device=str(self._model.device),
            block_tokens=self._space.block_tokens,
            n_blocks=self._kv.n_blocks,
            cache_mb=round(self._kv.n_pages * self._kv.page_bytes / 2**20),
        )

    def heartbeat(self) -> Heartbeat:
        pool, counters = self._space.pool, self._counters
        n_layers, total = self._kv.n_layers, self._kv.n_blocks
        cached, used = pool.n_cached // n_layers, -(-pool.n_used // n_layers)  # blocks of all layers
        return Heartbeat(
            since_step_s=time.monotonic() - self._stepped,
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            free_blocks=total - cached - used,
            cached_blocks=cached,
            used_blocks=used,
            total_blocks=total,
            steps=counters.steps,
            preemptions=self._scheduler.n_preemptions,
            prompt_tokens=counters.prompt_tokens,
            cached_tokens=counters.cached_tokens,
            output_tokens=counters.output_tokens,
            visual_offered=counters.visual_offered,
            visual_kept=counters.visual_kept,
            images_encoded=self._encoder.n_encoded,
            encoder_hits=self._encoder.n_hits,
        )


def _context(model: Model, config: Config) -> int:
    own, asked = model.spec.max_context, config.model.max_context
    if asked > own:
        raise ConfigError(f"model.max_context: {asked} is more than the {own} tokens of the checkpoint; lower it")
    return asked or own


def _draw(logits: Tensor, sequences: Many[Sequence]) -> Many[Drawn | Exception | None]:
    """As `sample`. If that raises, draw row by row, with the error in place of the token of each row that raises."""
    try:
        return sample(logits, [sequence.draw for sequence in sequences])
    except Exception as error:
        if len(sequences) == 1:
            return [error]
        return [_draw(row[None], [sequence])[0] for row, sequence in zip(logits, sequences, strict=True)]


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _failed(request_id: str, error: Exception) -> Failed:
    """The `Failed` of an error. A `RequestError` is the user's mistake; any other error is ours and logged in full."""
    if isinstance(error, RequestError):
        return Failed(id=request_id, code=error.code, message=str(error), param=error.param)
    log.error("request %s failed", request_id, exc_info=error)
    return Failed(id=request_id, code="internal_error", message=f"{type(error).__name__}: {error}")
