"""A batch: buffers that stay where they are, several sampled rows of one sequence, and draft trees."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from foveate.configs.config import CacheConfig
from foveate.engine.attention import AttentionBackend, CpuBackend, ReferenceBackend, attention_backend
from foveate.engine.batch import Batch, BatchBuffers, QuerySpan
from foveate.engine.cache.groups import LayerGroup
from foveate.engine.cache.pool import BlockPool
from foveate.engine.cache.sequence_cache import CacheSpace
from foveate.engine.cache.store import KVStore
from foveate.engine.common import Generate, SamplingParams, VisualUsage
from foveate.engine.engine import Engine, Event
from foveate.engine.models.base import Model
from foveate.engine.prune.depth import Depth
from foveate.engine.request import Request
from foveate.engine.runner import Runner
from foveate.engine.scheduler import Chunk
from foveate.engine.sequence import Sequence as Choice
from foveate.kernels.cpu import levels


class Bench:
    """A runner over a small pool, without a scheduler."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.kv = KVStore(model.spec, CacheConfig(memory_mb=8, block_tokens=4), torch.float32, torch.device("cpu"))
        for pages in self.kv.pages:
            pages.fill_(torch.nan)
        self.space = CacheSpace(BlockPool(self.kv.n_pages), self.kv, 4, sharing=False)
        self.runner = Runner(model, self.kv)

    def choice(self, ids: Sequence[int], n_computed: int) -> Choice:
        """A text sequence whose first tokens are computed."""
        axes, n = self.model.spec.n_pos_axes, len(ids)
        request = Request(
            id="x", sampling=SamplingParams(max_tokens=9), stop_ids=frozenset(), n_choices=1, prompt_ids=list(ids),
            pictures=[], positions=torch.arange(n).expand(axes, -1), next_pos=n, root_key=b"",
            visual=VisualUsage(), depth=Depth(groups=(LayerGroup(range(self.model.spec.n_layers)),)),
        )  # fmt: skip
        choice = Choice(request=request, choice=0, arrival=0, space=self.space)
        assert choice.cache.open()
        self.run(Chunk(choice, 0, n_computed))
        return choice

    def run(self, *chunks: Chunk) -> Tensor:
        logits = self.runner.run(chunks)
        for chunk in chunks:
            chunk.sequence.cache.commit(chunk.stop - chunk.start)
        return logits

    def one_by_one(self, ids: Sequence[int], start: int) -> Tensor:
        """[n, vocab_size]: logits after each of the tokens from `start` on, each computed alone."""
        choice = self.choice(ids[: start + 1], start)
        found = [self.run(Chunk(choice, start, start + 1))]
        for stop in range(start + 2, len(ids) + 1):
            longer = self.choice(ids[:stop], stop - 1)
            found.append(self.run(Chunk(longer, stop - 1, stop)))
        return torch.cat(found)


@pytest.fixture
def bench(model: Model) -> Bench:
    return Bench(model)


@pytest.mark.parametrize("joins", [True, False], ids=["layers together", "last layer apart"])
def test_several_rows_of_a_sequence_are_sampled(bench: Bench, monkeypatch: pytest.MonkeyPatch, joins: bool) -> None:
    for backend in (AttentionBackend, CpuBackend):
        monkeypatch.setattr(backend, "joins_layers", lambda self, n_rows: joins)
    ids, others = [5, 9, 2, 7, 1, 8, 4, 3, 6], [11, 12, 13, 14, 15, 16]
    drafts, prefill = bench.choice(ids, 5), bench.choice([20, *others], 1)
    chunks = [Chunk(drafts, 5, 9, n_drafts=3), Chunk(prefill, 1, 4), Chunk(bench.choice(others, 2), 2, 6)]
    logits = bench.run(*chunks)
    assert [chunk.n_sampled for chunk in chunks] == [4, 0, 1]
    expected = torch.cat([bench.one_by_one(ids, 5), bench.one_by_one(others, 5)])
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_rejected_drafts_are_truncated_and_others_follow(bench: Bench) -> None:
    choice = bench.choice([5, 9, 2, 7, 1, 8, 4], 4)
    bench.run(Chunk(choice, 4, 7, n_drafts=2))
    choice.cache.truncate(2)
    choice.token_ids[5:] = [3, 6, 2]
    assert choice.cache.grow()
    logits = bench.run(Chunk(choice, 5, 8, n_drafts=2))
    torch.testing.assert_close(logits, bench.one_by_one([5, 9, 2, 7, 1, 3, 6, 2], 5), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside a prompt"])
def test_a_branch_of_a_draft_tree_does_not_see_the_other(bench: Bench, beside: bool) -> None:
    """Two drafts with one parent, one of which has a child: each branch is as if it were the only one."""
    prompt, last, drafts = [5, 9, 2, 7], 1, [8, 4, 3]
    tree = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]], dtype=torch.bool)
    choice, other = bench.choice(prompt, 4), bench.choice([20, 11, 12], 1)
    choice.token_ids += [last, *drafts]
    assert choice.cache.grow()
    chunk = Chunk(choice, 4, 8, n_drafts=3, ancestors=tree)
    assert list(chunk.offsets) == [0, 1, 1, 2]
    logits = bench.run(chunk, Chunk(other, 1, 3)) if beside else bench.run(chunk)
    first = bench.one_by_one([*prompt, last, 8], 4)
    second = bench.one_by_one([*prompt, last, 4, 3], 5)
    torch.testing.assert_close(logits[:4], torch.cat([first, second]), atol=1e-4, rtol=1e-4)


def test_what_is_left_after_an_eviction_is_attended_to(bench: Bench) -> None:
    """Against attention over the left keys alone, written out."""
    ids = [5, 9, 2, 7, 1, 8, 4, 3, 6, 10]
    evicted, whole = bench.choice(ids, 9), bench.choice(ids, 9)
    assert evicted.cache.evict(0, [1, 2, 6])
    assert evicted.cache.n_held(0) == 6 and evicted.cache.grow()
    logits = bench.run(Chunk(evicted, 9, 10))
    tree = torch.eye(1, dtype=torch.bool)
    untouched = bench.run(Chunk(whole, 9, 10, ancestors=tree))
    torch.testing.assert_close(untouched, bench.one_by_one(ids, 9), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits, untouched, atol=1e-3), "keys are gone"
    again = bench.choice(ids, 9)
    left = [0, 3, 4, 5, 7, 8]
    pages = again.cache.pages()[0]
    keys = bench.kv.keys_of(pages, 9)
    kept = bench.kv.keys_of(evicted.cache.pages()[0], 6)
    assert torch.equal(kept, keys[left]), "the slots moved up with their contents"


def test_buffers_stay_where_they_are_from_step_to_step(
    make_engine: Callable[..., Engine], run: Callable[[Engine], list[Event]], monkeypatch: pytest.MonkeyPatch
) -> None:
    addresses: list[tuple[int, ...]] = []
    prepare = AttentionBackend.prepare

    def recorded(self: AttentionBackend, batch: Batch, watched: int = -1) -> None:
        tensors = (batch.slots, batch.tables, batch.queries, batch.lengths)
        addresses.append(tuple(tensor.data_ptr() for tensor in tensors))
        prepare(self, batch, watched)

    monkeypatch.setattr(AttentionBackend, "prepare", recorded)
    engine = make_engine(max_running=4)
    for i in range(4):
        sampling = SamplingParams(temperature=0.0, max_tokens=20 + i, ignore_eos=True)
        engine.add(Generate(id=f"{i}", prompt_ids=[i + 1] * 6, sampling=sampling))
    run(engine)
    assert len(addresses) > 20 and len(set(addresses[4:])) == 1, "a step that decodes fills the same tensors"


def test_a_buffer_that_is_too_small_grows_and_keeps_nothing_stale() -> None:
    buffers = BatchBuffers(2, 1, 4, torch.device("cpu"))
    few = buffers.positions(list(range(3)))
    many = buffers.positions(list(range(1000)))
    assert many.tolist() == [list(range(1000))] and few.tolist() == [[0, 1, 2]]
    assert buffers.positions([7]).data_ptr() == many.data_ptr()
    assert buffers.token_ids([4, 5]).tolist() == [4, 5]


def test_batches_of_some_sequences_lie_in_buffers_too(bench: Bench) -> None:
    """Where a sequence has no rows in a segment, and where only sampled rows ask: the same tensors at every step."""
    choices = [bench.choice([20 + i, 5, 9, 2, 7, 1], 5) for i in range(3)]
    buffers, addresses = BatchBuffers(bench.kv.n_layers, 1, 4, torch.device("cpu")), set()
    for step in range(3):
        tables = buffers.tables([choice.cache for choice in choices])
        left = [step % 2, 2]
        batch = buffers.batch([QuerySpan(5, 1, 0), QuerySpan(4, 2, 0, n_sampled=1)], left)
        asking = buffers.sampled_only(batch)
        assert asking is not None and torch.equal(batch.tables, tables[:, left])
        assert batch.queries.tolist() == [0, 1, 3] and torch.equal(asking.tables, tables[:, 2:])
        assert asking.queries.tolist() == [0, 1] and asking.lengths.tolist() == [6]
        tensors = (batch.tables, batch.queries, asking.tables, asking.queries, asking.lengths)
        addresses.add(tuple(tensor.data_ptr() for tensor in tensors))
    assert len(addresses) == 1


def test_a_part_of_a_draft_tree_cannot_ask_alone() -> None:
    tree = torch.eye(3, dtype=torch.bool)
    empty, buffers = torch.zeros(2, 1, 1, dtype=torch.int32), BatchBuffers(2, 1, 4, torch.device("cpu"))
    spans = [QuerySpan(4, 3, 0, 2, tree)]
    batch = Batch(empty, empty, torch.tensor([0, 3]), torch.tensor([7]), spans, [tree])
    assert batch.sampled() == [1, 2] and buffers.sampled_only(batch) is None
    whole = Batch(empty, empty, torch.tensor([0, 3]), torch.tensor([7]), [QuerySpan(4, 3, 0, 3, tree)], [tree])
    asking = buffers.sampled_only(whole)
    assert asking is not None and asking.queries.tolist() == [0, 3] and asking.ancestors == [tree]


def test_all_backends_give_the_same(bench: Bench) -> None:
    ids = [5, 9, 2, 7, 1, 8, 4]
    expected = bench.run(Chunk(bench.choice(ids, 4), 4, 7, n_drafts=2))
    bench.runner._attention = ReferenceBackend(bench.kv.pages, bench.model.spec.head_dim**-0.5)
    reference = bench.run(Chunk(bench.choice(ids, 4), 4, 7, n_drafts=2))
    torch.testing.assert_close(reference, expected, atol=1e-4, rtol=1e-4)
    kept = bench.runner._attention.capture(lambda: expected)
    assert kept() is expected


def test_the_backend_follows_the_kernels_there_are(bench: Bench) -> None:
    for level in ("reference", levels.machine()):
        with levels.force(level):
            backend = ReferenceBackend if level == "reference" else CpuBackend
            assert type(attention_backend(bench.kv.pages, torch.device("cpu"), 1.0)) is backend
