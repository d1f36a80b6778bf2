"""The cache of a sequence against a plain model: who holds which token, and what lies in its slot."""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from numpy.typing import NDArray

from foveate.configs.config import CacheConfig
from foveate.engine.cache.groups import LayerGroup, Waiting
from foveate.engine.cache.pool import Block, BlockPool
from foveate.engine.cache.sequence_cache import CacheSpace, SequenceCache
from foveate.engine.cache.store import KVStore
from foveate.engine.common import Tower
from foveate.engine.geometry.base import ModelSpec
from foveate.engine.prune.base import Kept
from foveate.engine.prune.depth import Decision, Depth

SIZE, N_PAGES = 4, 80
TIGHT = 34  # pages: too few for some openings, copies and growth
PROMPT = 14  # tokens of a prompt that is pruned; its span is [START, STOP)
START, STOP = 3, 11
INSIDE = ([3, 5, 6, 9, 10],)
POISON = -1
OPERATIONS = 20_000


class Contents:
    """A store whose slots hold one number each; a slot that nobody wrote holds poison."""

    def __init__(self) -> None:
        self.slots = np.full(N_PAGES * SIZE, POISON, dtype=np.int64)

    def copy_slots(self, source: NDArray[np.int64], target: NDArray[np.int64]) -> None:
        self.slots[target] = self.slots[source]


def flat() -> Depth:
    return Depth(groups=(LayerGroup(range(2)),))


def pruned(members: tuple[list[int], ...], key: bytes) -> Depth:
    """Groups of 2, 1 and 2 layers, of which the deeper ones hold fewer tokens of the span."""
    bounds = [range(2), range(2, 3), range(3, 5)][: len(members) + 1]
    dropped = [0, *(STOP - START - len(own) for own in members)]
    groups = tuple(LayerGroup(layers, (), n) for layers, n in zip(bounds, dropped, strict=True))
    return Depth(groups=groups, start=START, stop=STOP, visual_stop=STOP, decision=Decision((), members, key))


def undecided() -> Depth:
    """As the first pruned map, once its span is computed; until then the span's tokens wait."""
    depth = pruned(INSIDE, b"one")
    depth.decision = None
    return depth


MAPS = [
    flat,
    lambda: pruned(INSIDE, b"one"),
    lambda: pruned(([3, 5, 6, 9, 10], [5, 10]), b"two"),
    lambda: pruned(([4, 7, 8], []), b"none"),
    undecided,
]


@dataclass(eq=False)
class Model:
    """One sequence as it should be: plain lists, no slots."""

    ids: list[int]
    depth: Depth
    cache: SequenceCache
    kind: int
    n_computed: int = 0
    evicted: list[set[int]] = field(default_factory=list)
    altered: list[int] = field(default_factory=list)  # by group: the evictions that its tokens to come do not see
    own: dict[tuple[int, int], int] = field(default_factory=dict)  # by group and token, of those computed since

    def held(self, group: int) -> list[int]:
        holds = set(range(self.n_computed))
        if group and self.cache.waiting is not None:
            holds = set(range(START))
        elif group and self.depth.decision is not None:
            holds -= set(range(START, STOP)) - set(self.depth.decision.members[group - 1])
        return sorted(holds - self.evicted[group])

    def value(self, layer: int, token: int) -> int:
        """What the slot of a token holds: it depends on all tokens before this one, on what was pruned, and on what had
        been evicted when this token was computed."""
        group = next(g for g, own in enumerate(self.depth.groups) if layer in own.layers)
        decided = self.depth.decision.key if group and self.depth.decision and token >= START else b""
        own = (id(self), self.own[group, token]) if self.own.get((group, token)) else ()
        return hash((tuple(self.ids[: token + 1]), layer, decided, own)) & 2**62 - 1

    def closed(self) -> None:
        self.n_computed, self.own = 0, {}
        self.evicted, self.altered = [set() for _ in self.depth.groups], [0] * len(self.depth.groups)


class CacheMachine(RuleBasedStateMachine):
    """Sequences that open, compute, share, truncate, evict and close over one small pool."""

    n_operations = 0

    def __init__(self) -> None:
        super().__init__()
        self.contents = Contents()
        self.models: list[Model] = []

    def pick(self, i: int) -> Model | None:
        """One sequence, opened if its cache is closed; None if that takes too many pages."""
        if not self.models:
            return None
        model = self.models[i % len(self.models)]
        return model if model.cache.is_open or self.open(model, 0) else None

    @initialize(kind=st.integers(0, 4), n_pages=st.sampled_from([TIGHT, N_PAGES]))
    def begin(self, kind: int, n_pages: int) -> None:
        self.space = CacheSpace(BlockPool(n_pages), self.contents, SIZE)
        self.add(list(range(PROMPT + 9)), kind)

    def add(self, ids: list[int], kind: int) -> None:
        depth = MAPS[kind]()
        cache = SequenceCache(self.space, ids, depth, b"root", ())
        self.models.append(Model(ids, depth, cache, kind))
        self.models[-1].closed()

    @rule(kind=st.integers(0, 4), more=st.integers(0, 20))
    def arrive(self, kind: int, more: int) -> None:
        type(self).n_operations += 1
        if len(self.models) < 6:
            self.add(list(range(PROMPT + more)), kind)

    @rule(i=st.integers(0, 5), n=st.integers(0, 6))
    def fork(self, i: int, n: int) -> None:
        """Another sequence with the tokens of one there is, so that they share blocks."""
        type(self).n_operations += 1
        if self.models and len(self.models) < 6:
            model = self.models[i % len(self.models)]
            self.add(model.ids[: max(PROMPT, len(model.ids) - n)], model.kind)

    @rule(spare=st.integers(0, 8))
    def open_another(self, spare: int) -> None:
        type(self).n_operations += 1
        closed = [model for model in self.models if not model.cache.is_open]
        if closed:
            self.open(closed[0], spare)

    def open(self, model: Model, spare: int) -> bool:
        before, found = self.space.pool.n_available, model.cache.n_found()
        if model.cache.open(spare):
            assert model.cache.n_computed == found < len(model.ids), "open finds what it promised"
            left = self.space.pool.n_available
            assert left >= spare and model.cache.grow() and self.space.pool.n_available == left, "all tokens have room"
            model.n_computed = found
            return True
        assert self.space.pool.n_available == before and not model.cache.is_open, "nothing changed"
        return False

    @rule(i=st.integers(0, 5), n=st.integers(1, 12))
    def compute(self, i: int, n: int) -> None:
        type(self).n_operations += 1
        if (model := self.pick(i)) is None or not model.cache.grow():
            return
        start, stop = model.n_computed, min(len(model.ids), model.n_computed + n)
        waited = model.cache.waiting is not None
        self.wait(model, start, stop)
        for g, group in enumerate(model.depth.groups):
            first = START if g and waited else start
            last = min(stop, START) if g and model.cache.waiting is not None else stop
            tokens = model.depth.tokens(g, first, last)
            if tokens:
                self.write(model, g, group, tokens)
        model.cache.commit(stop - start)
        model.n_computed = stop

    @staticmethod
    def wait(model: Model, start: int, stop: int) -> None:
        """Put tokens of an undecided span aside, or decide when the last of them is computed."""
        if model.depth.decision is not None or model.depth.is_flat:
            return
        if stop >= STOP:
            model.depth.decision = Decision((), INSIDE, b"one")
            model.cache.take_up()
        elif stop > START:
            rows = torch.arange(max(start, START), stop)[:, None]
            own = Waiting(rows, rows, rows)
            model.cache.put_aside(own)

    def write(self, model: Model, g: int, group: LayerGroup, tokens: list[int]) -> None:
        model.own.update({(g, token): model.altered[g] for token in tokens})
        first = model.cache.first_slot(g, tokens[0])
        for slot, token in enumerate(tokens, first):
            if slot < model.cache.n_shared(g):
                continue
            block = self.block(model, g, slot // SIZE)
            assert block.references == 1 and block.key is None, "nobody else reads or finds what is written"
            for layer, page in zip(group.layers, block.pages, strict=True):
                self.contents.slots[page * SIZE + slot % SIZE] = model.value(layer, token)

    @staticmethod
    def block(model: Model, group: int, i: int) -> Block:
        layers = len(model.depth.groups[group].layers)
        own = model.cache._tables[group].blocks
        assert len(own[i].pages) == layers
        return own[i]

    @rule(i=st.integers(0, 5), token=st.integers(50, 51), n=st.integers(1, 5))
    def append(self, i: int, token: int, n: int) -> None:
        type(self).n_operations += 1
        if (model := self.pick(i)) is not None and len(model.ids) < 60:
            model.ids += [token] * n

    @rule(i=st.integers(0, 5), n=st.integers(0, 25), replaced=st.booleans())
    def truncate(self, i: int, n: int, replaced: bool) -> None:
        """With `replaced`, other tokens follow, as after rejected drafts; else the same ones are computed again."""
        type(self).n_operations += 1
        if (model := self.pick(i)) is None:
            return
        n = min(n, model.n_computed)
        shared = [block for block in model.cache.blocks() if block.references > 1]
        kept = {id(block): self.read(block) for block in shared}
        model.cache.truncate(n)
        model.n_computed -= n
        for own in model.evicted:
            own -= set(range(model.n_computed, 99))
        if replaced and model.n_computed >= PROMPT:
            model.cache.shorten(model.n_computed)
            model.ids[model.n_computed :] = [50, 51, 50, 51]
        for g in range(len(model.depth.groups)):
            blocks = model.cache._tables[g].blocks
            assert len(blocks) == self.space.n_blocks(len(model.held(g))), "whole blocks return"
        assert all(self.read(block) == kept[id(block)] for block in shared), "shared blocks are untouched"

    @rule(i=st.integers(0, 5), n=st.integers(0, 6), look=st.booleans())
    def replace(self, i: int, n: int, look: bool) -> None:
        """Other tokens stand at the end of the sequence, computed or not, the cache open or closed."""
        type(self).n_operations += 1
        if not self.models:
            return
        model = self.models[i % len(self.models)]
        if look and not model.cache.is_open:
            model.cache.n_found()
        left = len(model.ids) - n
        if left < PROMPT:
            return
        model.cache.shorten(left)
        model.ids[left:] = [51, 50, 51, 51, 50][: max(1, n)]
        if model.cache.is_open:
            model.n_computed = min(model.n_computed, left)
            for own in model.evicted:
                own -= set(range(model.n_computed, 99))

    @rule(i=st.integers(0, 5), g=st.integers(0, 2), seed=st.integers(0, 999), share=st.floats(0.05, 1.0))
    def evict(self, i: int, g: int, seed: int, share: float) -> None:
        type(self).n_operations += 1
        if (model := self.pick(i)) is None:
            return
        g %= len(model.depth.groups)
        if model.cache.waiting is not None:
            return
        held = model.held(g)
        random = np.random.default_rng(seed)
        gone = [token for token in held if random.random() < share]
        blocks = list(model.cache._tables[g].blocks)
        shared = {id(block): self.read(block) for block in blocks if block.references > 1}
        if model.cache.evict(g, gone):
            model.evicted[g] |= set(gone)
            if gone:
                model.altered = [n + (own >= g) for own, n in enumerate(model.altered)]
                assert len(model.cache._tables[g].blocks) == self.space.n_blocks(len(held) - len(gone))
        else:
            assert model.cache._tables[g].blocks == blocks, "nothing changed"
        for block in blocks:
            assert id(block) not in shared or self.read(block) == shared[id(block)], "shared blocks are untouched"

    @rule(i=st.integers(0, 5), forget=st.sampled_from([False, False, True]), gone=st.booleans())
    def close(self, i: int, forget: bool, gone: bool) -> None:
        type(self).n_operations += 1
        if self.models and (model := self.models[i % len(self.models)]).cache.is_open:
            model.cache.close(forget=forget)
            model.closed()
            if gone:
                self.models.remove(model)

    def read(self, block: Block) -> list[int]:
        return [int(self.contents.slots[page * SIZE + i]) for page in block.pages for i in range(SIZE)]

    @invariant()
    def every_token_lies_in_its_slot(self) -> None:
        for model in self.models:
            if not model.cache.is_open:
                continue
            assert model.cache.n_computed == model.n_computed
            if model.cache.waiting is not None:
                assert model.cache.waiting.rows[:, 0].tolist() == list(range(START, model.n_computed))
            pages = model.cache.pages()
            for g, group in enumerate(model.depth.groups):
                held = model.held(g)
                assert model.cache.n_held(g) == len(held)
                for slot, token in enumerate(held):
                    assert model.cache.first_slot(g, token) == slot
                    for layer in group.layers:
                        at = int(pages[layer, slot // SIZE]) * SIZE + slot % SIZE
                        assert self.contents.slots[at] == model.value(layer, token), (g, slot, token, layer)

    @invariant()
    def every_page_is_counted(self) -> None:
        self.space.check(model.cache for model in self.models)

    def teardown(self) -> None:
        for model in self.models:
            model.cache.close()
        self.space.check([])
        assert self.space.pool.n_used == 0, "an idle pool holds nothing"


def test_random_operations_keep_every_token_in_its_slot() -> None:
    CacheMachine.n_operations = 0
    often = settings(
        max_examples=700,
        stateful_step_count=50,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    run_state_machine_as_test(CacheMachine, settings=often)
    assert CacheMachine.n_operations >= OPERATIONS, CacheMachine.n_operations


def opened(space: CacheSpace, ids: list[int], n: int, depth: Depth | None = None) -> SequenceCache:
    """A cache with `n` computed tokens; token t is stored as 100 + t."""
    cache = SequenceCache(space, ids, depth or flat(), b"root", ())
    assert cache.open()
    assert isinstance(space.store, Contents)
    for slot in range(cache.n_computed, n):
        for layer in range(2):
            space.store.slots[int(cache.pages()[layer, slot // SIZE]) * SIZE + slot % SIZE] = 100 + ids[slot]
    cache.commit(n - cache.n_computed)
    return cache


def stored(space: CacheSpace, cache: SequenceCache, group: int = 0) -> list[list[int]]:
    """By layer of a group of two layers from the first on, what its slots hold."""
    assert isinstance(space.store, Contents)
    slots = np.arange(cache.n_held(group))
    pages = cache.pages().numpy()[:2, slots // SIZE].astype(np.int64)
    return [[int(x) for x in row] for row in space.store.slots[pages * SIZE + slots % SIZE]]


def test_a_block_that_others_read_is_copied_before_its_first_write() -> None:
    space = CacheSpace(BlockPool(40), Contents(), SIZE)
    ids = list(range(10))
    first, second = opened(space, ids, 10), opened(space, list(ids), 10)
    assert second.blocks()[0] is first.blocks()[0] and second.blocks()[1] is first.blocks()[1]
    second.truncate(4)  # token 5 lies in the middle of the second block
    assert second.blocks()[1] is first.blocks()[1], "nothing is copied before anything is written"
    assert second.grow()
    assert second.blocks()[0] is first.blocks()[0] and second.blocks()[1] is not first.blocks()[1]
    assert second.n_shared(0) == 4 and second.first_slot(0, 6) == 6
    assert stored(space, second) == [[100, 101, 102, 103, 104, 105]] * 2
    assert stored(space, first) == [[100 + i for i in ids]] * 2
    space.check([first, second])


def test_an_eviction_copies_shared_blocks_or_leaves_all_as_it_is() -> None:
    space = CacheSpace(BlockPool(8), Contents(), SIZE)
    first = opened(space, list(range(9)), 9)  # 3 blocks of 2 pages
    second = SequenceCache(space, list(range(9)), flat(), b"root", ())
    assert second.open(), "two blocks are shared, and the last pages are taken"
    second_blocks = second.blocks()
    assert second.n_computed == 8 and space.pool.n_available == 0
    assert not second.evict(0, [0]), "both shared blocks would have to be copied, and one block comes back"
    assert second.blocks() == second_blocks and second.n_held(0) == 8
    assert second.evict(0, [2, 3, 4, 5, 6, 7]), "one copy, and more pages come back than the copy takes"
    assert stored(space, second) == [[100, 101]] * 2 and second.n_held(0) == 2
    assert stored(space, first) == [[100 + i for i in range(9)]] * 2
    assert second.first_slot(0, 8) == 2 and second.n_shared(0) == 0
    space.check([first, second])


def test_rows_that_wait_are_cut_with_their_tokens() -> None:
    space = CacheSpace(BlockPool(60), Contents(), SIZE)
    depth = pruned(([4, 7],), b"later")
    depth.decision = None
    cache = SequenceCache(space, list(range(PROMPT)), depth, b"root", ())
    assert cache.open()
    cache.put_aside(Waiting(torch.arange(5.0)[:, None], torch.zeros(5, 1, 1), torch.zeros(5, 1)))
    cache.commit(START + 5)
    assert (cache.n_held(0), cache.n_held(1)) == (START + 5, START), "deeper layers hold nothing of the span"
    cache.truncate(2)
    assert cache.waiting is not None and cache.waiting.rows.flatten().tolist() == [0.0, 1.0, 2.0]
    cache.truncate(4)
    assert cache.waiting is None and (cache.n_held(0), cache.n_held(1)) == (2, 2)
    space.check([cache])


def test_tokens_computed_after_an_eviction_are_not_found_by_others() -> None:
    space = CacheSpace(BlockPool(60), Contents(), SIZE)
    depth, ids = pruned(([4, 7],), b"same"), list(range(30))
    first = SequenceCache(space, ids, depth, b"root", ())
    assert first.open()
    first.commit(17)  # deeper layers hold 11 tokens: two full blocks
    assert first.evict(0, [13]) and first.grow()
    first.commit(13)
    keys = [[block.key is not None for block in table.blocks] for table in first._tables]
    assert keys == [[True] * 3 + [False] * 5, [True] * 2 + [False] * 4]
    second = SequenceCache(space, list(ids), pruned(([4, 7],), b"same"), b"root", ())
    assert second.n_found() == 12
    assert first.evict(1, [0]) and first.grow()
    assert second.n_found() == 0, "the first block of the deeper layers was compacted"
    space.check([first])


def test_a_cut_into_a_span_with_mixed_rows_forgets_the_span() -> None:
    space = CacheSpace(BlockPool(60), Contents(), SIZE)
    depth = pruned(([4, 7],), b"mixed")
    depth.decision = Decision((Kept(torch.tensor([0]), torch.ones(1, 1)),), ([4, 7],), b"mixed")
    cache = SequenceCache(space, list(range(PROMPT)), depth, b"root", ())
    assert cache.open()
    cache.commit(PROMPT)
    cache.truncate(1)
    assert cache.n_computed == PROMPT - 1, "behind the span a token goes alone"
    cache.truncate(PROMPT - 1 - (STOP - 2))
    assert cache.n_computed == START and (cache.n_held(0), cache.n_held(1)) == (START, START)
    space.check([cache])


def test_a_span_that_waits_is_not_evicted_from() -> None:
    space = CacheSpace(BlockPool(60), Contents(), SIZE)
    depth = pruned(([4, 7],), b"later")
    depth.decision = None
    cache = SequenceCache(space, list(range(PROMPT)), depth, b"root", ())
    assert cache.open()
    cache.put_aside(Waiting(torch.zeros(2, 1), torch.zeros(2, 1, 1), torch.zeros(2, 1)))
    cache.commit(START + 2)
    with pytest.raises(AssertionError, match="read whole"):
        cache.evict(0, [START])


def test_the_store_reads_all_slots_before_it_writes_any() -> None:
    spec = ModelSpec(
        family="mock", n_layers=1, n_heads=1, n_kv_heads=2, head_dim=3, hidden_size=3, vocab_size=9, max_context=64,
        image_token_id=0, eos_ids=(1,), n_pos_axes=1, tower=Tower(has_cls=False, depth=1),
    )  # fmt: skip
    store = KVStore(spec, CacheConfig(block_tokens=4, memory_mb=1), torch.float32, torch.device("cpu"))
    for pages in store.pages:
        pages.copy_(torch.randn(pages.shape, generator=torch.Generator().manual_seed(1)))
    before = [pages.flatten(0, 1).clone() for pages in store.pages]
    source, target = np.array([1, 2, 3, 9]), np.array([0, 1, 2, 3])
    store.copy_slots(source, target)
    for pages, old in zip(store.pages, before, strict=True):
        assert torch.equal(pages.flatten(0, 1)[target], old[source])
        assert torch.equal(pages.flatten(0, 1)[4:], old[4:])
