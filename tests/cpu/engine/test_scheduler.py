"""Properties of the scheduler, with a runner that computes nothing."""

import random
from collections.abc import Sequence as Many

import pytest
import torch

from foveate.configs.config import SchedulerConfig
from foveate.engine.cache.pool import BlockPool
from foveate.engine.cache.prefix import ImageRun, image_key
from foveate.engine.cache.sequence_cache import CacheSpace
from foveate.engine.common import Grid, Image, SamplingParams, VisualUsage
from foveate.engine.request import Picture, Request
from foveate.engine.scheduler import MAX_PREEMPTIONS, Scheduler, StepPlan
from foveate.engine.sequence import Sequence

ROW = {0: torch.zeros(1, 1)}


class NoStore:
    """For runs in which no block is shared and then written, and nothing is evicted."""

    def copy_slots(self, source: object, target: object) -> None:
        raise AssertionError("nothing moves")


class Simulation:
    """A scheduler and its pool, driven as the engine does, every step checked."""

    def __init__(self, n_blocks: int = 64, *, sharing: bool = True, **config: int) -> None:
        self.config = SchedulerConfig(**{"step_tokens": 32, "max_running": 8, "chunk_tokens": 8, **config})
        self.space = CacheSpace(BlockPool(n_blocks), NoStore(), 4, sharing)
        self.scheduler = Scheduler(self.config, lambda r, i: r.pictures[i].n_patches)
        self.sequences: list[Sequence] = []
        self.n_encoded = 0

    def add(self, ids: list[int], n_output: int, images: Many[tuple[int, int, int, int]] = (), n: int = 1) -> Request:
        """`images`: (start, tokens, patches, seed)."""
        pictures = [
            Picture(
                image=Image(pixels=b"", height=1, width=1, digest=bytes([seed]) * 32),
                grid=Grid(1, kept), n_patches=patches, budget=kept, n_kept=kept, positions=torch.zeros(1, kept),
                runs=(ImageRun(start, start + kept, image_key(bytes([seed]) * 32, "none", kept)),),
            )
            for start, kept, patches, seed in images
        ]  # fmt: skip
        request = Request(
            id=str(len(self.sequences)), sampling=SamplingParams(max_tokens=n_output), stop_ids=frozenset(),
            n_choices=n, prompt_ids=ids, pictures=pictures,
            positions=torch.zeros(1, len(ids)), next_pos=len(ids), root_key=b"", visual=VisualUsage(),
        )  # fmt: skip
        for choice in range(n):
            sequence = Sequence(request=request, choice=choice, arrival=len(self.sequences), space=self.space)
            self.sequences.append(sequence)
            request.sequences.append(sequence)
            self.scheduler.add(sequence)
        return request

    @property
    def busy(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting)

    def step(self) -> StepPlan:
        decoding = [s for s in self.scheduler.running if s.n_missing == 1]
        preempted = {s: s.n_preemptions for s in self.sequences}
        plan = self.scheduler.schedule()
        self.check(plan)
        planned = {chunk.sequence for chunk in plan.chunks}
        assert not any(s in planned and s.n_preemptions > preempted[s] for s in preempted), "preempted, then planned"
        for sequence in decoding:
            gone = sequence.n_preemptions > preempted[sequence]
            stuck = self.space.n_blocks(sequence.n_tokens) > len(sequence.cache.blocks())
            assert sequence in planned or gone or stuck, "a decode with room for its token is never left out"
        for request, i in plan.images:
            assert request.pictures[i].rows is None, "no picture is asked for twice"
            request.pictures[i].rows = ROW
        for chunk in plan.chunks:
            for picture in chunk.sequence.request.pictures:
                assert picture.rows is not None or not list(picture.within(chunk.start, chunk.stop)), "rows are there"
        self.n_encoded += len(plan.images)
        for chunk in plan.chunks:
            sequence, samples = chunk.sequence, chunk.samples
            sequence.cache.commit(chunk.stop - chunk.start)
            sequence.admitted = sequence.admitted or 1.0
            sequence.request.drop_rows()
            if samples:
                sequence.token_ids.append(1000 + sequence.arrival)
                if sequence.n_output == sequence.request.sampling.max_tokens:
                    sequence.finish = "length"
                    self.scheduler.remove(sequence)
        self.space.check(s.cache for s in self.scheduler.running)
        return plan

    def check(self, plan: StepPlan) -> None:
        assert plan.n_tokens == sum(c.stop - c.start for c in plan.chunks) <= self.config.step_tokens
        assert len({chunk.sequence for chunk in plan.chunks}) == len(plan.chunks), "one chunk per sequence"
        assert plan.n_patches <= self.config.encode_patches or len(plan.images) == 1
        assert len(self.scheduler.running) <= self.config.max_running
        for chunk in plan.chunks:
            assert chunk.sequence in self.scheduler.running and chunk.start == chunk.sequence.n_computed
            assert 0 < chunk.stop - chunk.start <= self.config.chunk_tokens and chunk.stop <= chunk.sequence.n_tokens

    def finish(self, limit: int = 2000) -> int:
        for n in range(limit):
            if not self.busy:
                return n
            assert self.step().chunks, "while something waits, something moves"
        raise AssertionError("no end")


@pytest.mark.parametrize("seed", range(30))
def test_random_loads_end_and_leave_nothing(seed: int) -> None:
    rng = random.Random(seed)
    sim = Simulation(rng.choice([24, 40, 200]), sharing=seed % 3 > 0, encode_patches=20, max_running=rng.choice([3, 8]))
    left = 25
    while left or sim.busy:
        if left and rng.random() < 0.5:
            n_prompt = rng.randrange(1, 60)
            images: list[tuple[int, int, int, int]] = []
            at = rng.randrange(4)
            while at + 6 < n_prompt and len(images) < 3:
                images.append((at, rng.randrange(1, 6), rng.choice([5, 15, 40]), rng.randrange(6)))
                at += 6 + rng.randrange(9)
            ids = [rng.randrange(3) for _ in range(n_prompt)]
            sim.add(ids, rng.randrange(1, 30), images, n=rng.choice([1, 1, 1, 3]))
            left -= 1
        sim.step()
        if rng.random() < 0.03 and sim.scheduler.running:
            request = rng.choice(sim.scheduler.running).request  # a client leaves: all its choices go
            for sequence in request.sequences:
                if not sequence.is_finished:
                    sequence.finish = "abort"
                    sim.scheduler.remove(sequence)
            sim.space.check(s.cache for s in sim.scheduler.running)
    assert sim.space.pool.n_used == 0
    whole = [s.request for s in sim.sequences if all(other.finish == "length" for other in s.request.sequences)]
    assert whole and all(picture.rows is None for request in whole for picture in request.pictures), (
        "rows go when all are past them"
    )


def test_decodes_go_on_at_every_step_beside_long_prompts() -> None:
    sim = Simulation(400, max_running=8)
    early = [sim.add([i] * 4, 40).sequences[0] for i in range(3)]
    sim.step()
    for i in range(3):
        sim.add([50 + i] * 200, 2)
    for _ in range(20):
        before = [s.n_output for s in early]
        plan = sim.step()
        assert [s.n_output for s in early] == [n + 1 for n in before]
        assert plan.n_tokens > 3, "and what is left of the step goes to prefill"
    sim.finish()


def test_prompts_are_served_in_order_and_share_a_step() -> None:
    sim = Simulation(400, step_tokens=16, chunk_tokens=8)
    a, b, c = (sim.add([i] * 24, 3).sequences[0] for i in range(3))
    first = sim.step()
    assert [(x.sequence, x.stop - x.start) for x in first.chunks] == [(a, 8), (b, 8)]
    sim.step()
    sim.step()
    assert a.n_output == b.n_output == 1 and c.n_computed == 0
    assert [x.sequence for x in sim.step().chunks] == [a, b, c]
    sim.finish()


def test_the_latest_is_preempted_keeps_its_tokens_and_comes_back_first() -> None:
    sim = Simulation(10, sharing=False)
    a, b = (sim.add([i] * 12, 20).sequences[0] for i in range(2))
    while not b.n_preemptions:
        sim.step()
    late = sim.add([9], 1).sequences[0]
    assert not a.n_preemptions and b in sim.scheduler.waiting and b.n_output > 0 and b.n_computed == 0
    tokens = list(b.token_ids)
    while b in sim.scheduler.waiting:
        assert late in sim.scheduler.waiting, "who waits for blocks is not overtaken"
        sim.step()
    assert b.token_ids[: len(tokens)] == tokens and a.finish == "length"
    sim.finish()


def test_after_a_few_preemptions_another_one_goes() -> None:
    sim = Simulation(12, sharing=False)
    a, b, c = (sim.add([i] * 12, 30).sequences[0] for i in range(3))
    sim.step()
    sim.step()
    c.n_preemptions = MAX_PREEMPTIONS
    while not b.n_preemptions and c.n_preemptions == MAX_PREEMPTIONS:
        sim.step()
    assert b.n_preemptions == 1 and c.n_preemptions == MAX_PREEMPTIONS and not a.n_preemptions
    sim.finish()


def test_choices_wait_for_the_first_and_share_its_blocks() -> None:
    sim = Simulation(200)
    request = sim.add(list(range(22)), 4, n=4)
    first, *others = request.sequences
    while not first.n_output:
        assert all(s in sim.scheduler.waiting for s in others)
        sim.step()
    plan = sim.step()
    assert {c.sequence: c.start for c in plan.chunks} == {first: 22, **dict.fromkeys(others, 20)}
    assert len({tuple(s.cache.blocks()[:5]) for s in request.sequences}) == 1, "full prompt blocks are the same"
    assert len({s.cache.blocks()[5] for s in request.sequences}) == 4, "the partial one is not"
    sim.finish()


def test_a_full_hit_recomputes_the_last_token() -> None:
    sim = Simulation(200)
    sim.add(list(range(16)), 1)
    sim.finish()
    again = sim.add(list(range(16)), 1).sequences[0]
    [chunk] = sim.step().chunks
    assert (chunk.sequence, chunk.start, chunk.stop) == (again, 12, 16)


def test_a_chunk_stops_before_an_image_that_is_not_encoded() -> None:
    sim = Simulation(200, encode_patches=10)
    a = sim.add([0] * 20, 1, [(2, 5, 8, 1), (10, 5, 8, 2)]).sequences[0]
    b = sim.add([1] * 20, 1, [(0, 5, 8, 3)]).sequences[0]
    text = sim.add([2] * 6, 1).sequences[0]
    plan = sim.step()
    assert {c.sequence: c.stop for c in plan.chunks} == {a: 8, text: 6}, "the text-only one passes b, which has no rows"
    assert [i for _, i in plan.images] == [0]
    plan = sim.step()
    assert [(r, i) for r, i in plan.images] == [(a.request, 1)], "need order: a runs already"
    assert b in sim.scheduler.waiting
    sim.finish()


def test_one_image_larger_than_the_budget_is_encoded_alone() -> None:
    sim = Simulation(200, encode_patches=10)
    sim.add([0] * 9, 1, [(0, 5, 100, 1)])
    assert sim.step().n_patches == 100
    sim.finish()


def test_images_of_waiting_sequences_are_fetched_ahead() -> None:
    sim = Simulation(200, max_running=1, encode_patches=50)
    sim.add([0] * 9, 9)
    waiting = sim.add([1] * 9, 1, [(0, 5, 20, 1)])
    assert sim.step().images == [(waiting, 0)]
    sim.finish()


def test_an_image_found_whole_in_the_cache_is_not_encoded() -> None:
    sim = Simulation(200)
    ids = [0] * 20
    sim.add(ids, 1, [(2, 6, 20, 1)])
    sim.finish()
    assert sim.n_encoded == 1
    sim.add(ids, 1, [(2, 6, 20, 1)])
    sim.finish()
    assert sim.n_encoded == 1, "its blocks were found"
    sim.add(ids, 1, [(2, 6, 20, 2)])
    sim.finish()
    assert sim.n_encoded == 2, "another picture behind the same ids was not"
