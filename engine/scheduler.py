"""Which tokens of which sequences the next step computes.

There are no phases. A running sequence has computed some of its tokens and wants all of them; every step closes the
gap as far as the budgets allow. That one rule covers chunked prefill, prefix hits, decoding and resuming after
preemption. The order in which a step is filled:

    1. running sequences with one token missing (they decode): prefill never starves them
    2. running sequences with more missing, a chunk each
    3. waiting sequences, a chunk each, as long as blocks for all their tokens are there
    4. images of sequences still waiting, with what is left of the encode budget

and in order of arrival within each. A chunk ends before an image that is neither reduced nor encoded in this step.
Blocks come from the free ones, then from the cached ones, then from the running sequence that arrived last: that one
is preempted. It keeps its tokens, its place in the order and its resolved budget, and recomputes the rest later. The
oldest sequence can preempt all others and fits the pool alone, so there is always progress.

Refuses to know: models, tensors, sampling. Host only.
"""

from bisect import insort
from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from itertools import islice

from torch import Tensor

from foveate.configs.config import SchedulerConfig
from foveate.engine.request import Request
from foveate.engine.sequence import Sequence

MAX_PREEMPTIONS = 3  # after so many, others are preempted rather than this one, if there are others
_PREFETCH_SEQUENCES = 8  # how far ahead images are encoded: it bounds the rows that waiting requests hold


@dataclass(frozen=True, slots=True)
class Chunk:
    """Compute tokens [start, stop) of a sequence in this step.

    Attributes:
        n_drafts: the last tokens that are drafts: logits are wanted after each of them and after the token before.
        ancestors: bool [stop - start, stop - start], row = query, True = visible, where drafts form a tree; None: each
            token sees all tokens before it.
    """

    sequence: Sequence
    start: int
    stop: int
    n_drafts: int = 0
    ancestors: Tensor | None = None

    @property
    def samples(self) -> bool:
        """Whether the last token of the sequence is computed, so that the next one can be drawn."""
        return self.stop == self.sequence.n_tokens

    @property
    def offsets(self) -> Many[int]:
        """By token, how far its position is from the first token's; drafts with the same parent share a position."""
        if self.ancestors is None:
            return range(self.stop - self.start)
        return [n_seen - 1 for n_seen in self.ancestors.sum(1).tolist()]

    @property
    def n_sampled(self) -> int:
        """The last rows of the chunk after which logits are wanted."""
        return self.n_drafts + 1 if self.samples else 0


@dataclass(slots=True)
class StepPlan:
    """One step: encode the images, then run the chunks. At most one chunk per sequence."""

    chunks: list[Chunk] = field(default_factory=list)
    images: list[tuple[Request, int]] = field(default_factory=list)  # (request, index of its picture)
    n_tokens: int = 0
    n_patches: int = 0

    def add(self, chunk: Chunk) -> None:
        self.chunks.append(chunk)
        self.n_tokens += chunk.stop - chunk.start


def _by_arrival(sequence: Sequence) -> int:
    return sequence.arrival


class Scheduler:
    """Owns the two queues.

    Args:
        encode_cost: patches that encoding a request's i-th picture takes now; 0 if its features are cached.
    """

    def __init__(self, config: SchedulerConfig, encode_cost: Callable[[Request, int], int]) -> None:
        self._config = config
        self._encode_cost = encode_cost
        self.waiting: list[Sequence] = []  # by arrival; hold no blocks
        self.running: list[Sequence] = []  # by arrival; hold blocks for all their tokens
        self.n_preemptions = 0

    @property
    def n_waiting_requests(self) -> int:
        """Requests none of whose choices has been admitted yet."""
        return sum(s.choice == 0 and s.admitted is None for s in self.waiting)

    def add(self, sequence: Sequence) -> None:
        insort(self.waiting, sequence, key=_by_arrival)

    def remove(self, sequence: Sequence, *, forget: bool = False) -> None:
        """Take out a sequence that ended. Its blocks are released; with `forget`, nobody finds their contents again."""
        (self.running if sequence in self.running else self.waiting).remove(sequence)
        sequence.cache.close(forget=forget)

    def schedule(self) -> StepPlan:
        """StepPlan one step and reserve its blocks. An empty plan means that nothing waits or runs."""
        plan = StepPlan()
        for sequence in sorted(self.running, key=lambda s: s.n_missing > 1):  # stable: each part by arrival
            if sequence.cache.is_open and self._reserve(sequence):  # closed: preempted earlier in this loop
                self._extend(plan, sequence)
        self._admit(plan)
        self._prefetch(plan)
        assert plan.n_tokens <= self._config.step_tokens, "a step holds at most step_tokens"
        return plan

    def _extend(self, plan: StepPlan, sequence: Sequence) -> None:
        stop = self._reach(plan, sequence, sequence.n_computed)
        if stop > sequence.n_computed:
            plan.add(Chunk(sequence, sequence.n_computed, stop))

    def _admit(self, plan: StepPlan) -> None:
        """Move waiting sequences to running. One that lacks blocks holds up those behind it; one that lacks its
        image does not."""
        for sequence in list(self.waiting):
            if plan.n_tokens == self._config.step_tokens or len(self.running) == self._config.max_running:
                break
            if sequence.must_wait:
                continue
            found = sequence.cache.n_found()
            if self._reach(plan, sequence, found) == found:
                continue
            if not sequence.cache.open(spare=self._spare()):
                break
            self.waiting.remove(sequence)
            insort(self.running, sequence, key=_by_arrival)
            self._extend(plan, sequence)

    def _prefetch(self, plan: StepPlan) -> None:
        """Ask for the images of the next in line, in order of need."""
        for sequence in islice((s for s in self.waiting if not s.must_wait), _PREFETCH_SEQUENCES):
            found = sequence.cache.n_found()
            for i, picture in enumerate(sequence.request.pictures):
                if picture.stop > found and not self._claim(plan, sequence.request, i):
                    return

    def _reach(self, plan: StepPlan, sequence: Sequence, start: int) -> int:
        """Where a chunk from `start` can end in this step. Asks for the images it runs over."""
        left = self._config.step_tokens - plan.n_tokens
        stop = min(sequence.n_wanted, start + min(self._config.chunk_tokens, left))
        pictures = sequence.request.pictures if start < sequence.n_prompt else ()
        for i, picture in enumerate(pictures):
            first = next((token for token, _ in picture.within(start, stop)), None)
            if first is not None and not self._claim(plan, sequence.request, i):
                return first
        return stop

    def _claim(self, plan: StepPlan, request: Request, i: int) -> bool:
        """Whether picture `i` is there or will be encoded in this step; the first one always fits."""
        if request.pictures[i].rows is not None or (request, i) in plan.images:
            return True
        key = request.pictures[i].key
        same = ((other, j) for other, j in plan.images if other.pictures[j].key == key)
        # Encoded once for both; but where the other's features are cached, this one may lack a signal in them.
        encoded = any(self._encode_cost(other, j) for other, j in same)
        cost = 0 if encoded else self._encode_cost(request, i)
        if plan.n_patches and plan.n_patches + cost > self._config.encode_patches:
            return False
        plan.images.append((request, i))
        plan.n_patches += cost
        return True

    def _reserve(self, sequence: Sequence) -> bool:
        """Get blocks for all tokens of a running sequence, at the cost of those that arrived later."""
        while not sequence.cache.grow():
            later = [s for s in self.running if s.arrival > sequence.arrival]
            if not later:
                return False  # it keeps its blocks and tries again when an older one has ended
            self._preempt(max(later, key=lambda s: (s.n_preemptions < MAX_PREEMPTIONS, s.arrival)))
        return True

    def _spare(self) -> int:
        """Pages for the next block of each running sequence."""
        return sum(sequence.request.depth.n_layers for sequence in self.running)

    def _preempt(self, sequence: Sequence) -> None:
        sequence.cache.close()
        sequence.n_preemptions += 1
        self.n_preemptions += 1
        self.running.remove(sequence)
        insort(self.waiting, sequence, key=_by_arrival)
