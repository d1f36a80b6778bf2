"""The block tables that the runner keeps from step to step are those of the sequences of each step."""

import random
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from foveate.engine.batch import BatchBuffers
from foveate.engine.cache.sequence_cache import SequenceCache
from foveate.engine.common import Failed, Generate, Image, SamplingParams, Stage, VisualBudget
from foveate.engine.engine import Engine, Event

BUDGETS = [
    VisualBudget(),
    VisualBudget(method="none", prune=Stage(method="fastv", params={"k": 1, "r": 0.6})),
    VisualBudget(method="random", ratio=0.5),
]


@pytest.mark.parametrize("memory_mb", [1, 8])
def test_kept_tables_are_those_of_the_blocks(
    make_engine: Callable[..., Engine],
    run: Callable[[Engine], list[Event]],
    picture: Callable[..., Image],
    monkeypatch: pytest.MonkeyPatch,
    memory_mb: int,
) -> None:
    """With sequences that come and go, grow, are preempted in the smaller pool, and are pruned to several tables."""
    of, steps = BatchBuffers.tables, [0, 0]

    def checked(self: BatchBuffers, caches: Sequence[SequenceCache]) -> Tensor:
        before = self._sent
        pages = of(self, caches)
        steps[pages.data_ptr() == before.data_ptr()] += 1
        for i, cache in enumerate(caches):
            for table in cache._tables:
                expected = torch.tensor([block.pages for block in table.blocks], dtype=torch.int32).T
                assert torch.equal(
                    pages[table.group.layers.start : table.group.layers.stop, i, : len(table.blocks)], expected
                )
        return pages

    monkeypatch.setattr(BatchBuffers, "tables", checked)
    chance, engine = random.Random(memory_mb), make_engine({"memory_mb": memory_mb}, max_running=6)
    for i in range(40):
        ids = [chance.randrange(256) for _ in range(chance.randrange(1, 40))]
        sampling = SamplingParams(temperature=0.0, max_tokens=chance.randrange(1, 40), ignore_eos=True)
        visual, images = chance.choice(BUDGETS), []
        if chance.random() < 0.6:
            ids, images = [*ids, 256, 1], [picture(i, 4, 5)]
        engine.add(Generate(id=f"{i}", prompt_ids=ids, images=images, sampling=sampling, visual=visual))
        for _ in range(chance.randrange(6)):
            assert not any(isinstance(event, Failed) for event in engine.step())
    run(engine)
    assert steps[True] > steps[False] > 0, "most steps go on with the tables of the one before"
    assert (engine.heartbeat().preemptions > 0) == (memory_mb == 1)
