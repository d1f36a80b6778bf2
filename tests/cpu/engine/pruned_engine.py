"""An engine whose pruned requests stay in sight, and methods that prune by noise."""

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from foveate.bundled.scenes import make_scene, render
from foveate.configs.config import CacheConfig, Config, SchedulerConfig
from foveate.engine.common import Delta, Failed, Generate, Image, SamplingParams, Stage, TokenLogprob, VisualBudget
from foveate.engine.engine import Engine
from foveate.engine.models.base import Model
from foveate.engine.prune.base import Kept, Pruner, best
from foveate.engine.prune.probe import Probe
from foveate.engine.prune.schedule import Point
from foveate.engine.request import Request

_spec = importlib.util.spec_from_file_location("mask_oracle", Path(__file__).with_name("mask_oracle.py"))
mask_oracle = importlib.util.module_from_spec(_spec)
sys.modules["mask_oracle"] = mask_oracle  # dataclasses look their module up
_spec.loader.exec_module(mask_oracle)

N_TOKENS = 6


@dataclass(frozen=True, kw_only=True)
class Noisy(Pruner):
    """Three points; ranks by noise, and with `mixes` pours what leaves into the first that stays."""

    shares: tuple[float, ...] = (0.6, 0.3, 0.1)
    mixes: bool = False

    def points(self, n_layers: int) -> tuple[Point, ...]:
        return tuple(Point(layer, share) for layer, share in zip(range(1, n_layers), self.shares, strict=False))

    def select(self, probe: Probe, counts: Sequence[int]) -> Kept:
        noise = torch.Generator().manual_seed(probe.seed % 1000 + probe.layer)
        keep = best(probe, torch.rand(len(probe.visual), generator=noise), counts)
        if not self.mixes:
            return Kept(keep)
        mix = torch.zeros(len(keep), len(probe.visual))
        mix[torch.arange(len(keep)), keep] = 0.7
        mix[0] += 0.3 / len(probe.visual)
        return Kept(keep, mix)


@dataclass(frozen=True, kw_only=True)
class Blind(Noisy):
    question_aware: ClassVar[bool] = False


OURS: dict[str, Pruner] = {
    "noisy": Noisy(),
    "mixing": Noisy(mixes=True),
    "blind": Blind(),
    "blind and mixing": Blind(mixes=True, shares=(1.0, 0.4)),
    "all out": Noisy(shares=(1.0, 0.5, 0.0)),
    "out at once": Blind(shares=(0.0,)),
    "compact": Noisy(compact=True),
    "compact, mixing": Blind(compact=True, mixes=True),
}


class Watched:
    """An engine whose requests and reduced rows stay in sight."""

    def __init__(self, model: Model, monkeypatch: pytest.MonkeyPatch, *, pages_mb: int = 16, **scheduler: int) -> None:
        import foveate.engine.engine as module
        import foveate.engine.resolve as resolving

        built = resolving.build_pruner
        monkeypatch.setattr(resolving, "build_pruner", lambda stage: OURS.get(stage.method) or built(stage))
        self.requests: dict[str, Request] = {}
        self.rows: dict[str, list[torch.Tensor | None]] = {}

        def watched(generate, *rest):
            request = resolving.resolve(generate, *rest)
            self.requests[request.id] = request
            self.rows[request.id] = [None] * len(request.pictures)
            place = request.place

            def placed(i, rows, anchor):
                self.rows[request.id][i] = rows[0].clone()
                place(i, rows, anchor)

            request.place = placed
            return request

        monkeypatch.setattr(module, "resolve", watched)
        self.model = model
        config = Config(cache=CacheConfig(memory_mb=pages_mb, block_tokens=4), scheduler=SchedulerConfig(**scheduler))
        self.engine = Engine(model, config)
        for pages in self.engine._kv.pages:
            pages.fill_(torch.nan)

    def answers(self, generates: Sequence[Generate]) -> dict[str, list[TokenLogprob]]:
        """By request and choice; every step is checked, and at the end nothing is held."""
        out: dict[str, list[TokenLogprob]] = {}
        for generate in generates:
            self.engine.add(generate)
        while self.engine.has_work:
            for event in self.engine.step():
                assert not isinstance(event, Failed), event
                if isinstance(event, Delta):
                    out.setdefault(f"{event.id}/{event.choice}", []).extend(event.logprobs or [])
            self.engine.check()
        assert self.engine._space.pool.n_used == 0
        return out

    def check(self, name: str, tokens: Sequence[TokenLogprob], like: str = "") -> None:
        """Log-probabilities of an answer are those of the masked dense run; choices are the method's own.

        Args:
            like: a request with the same pictures, if those of this one were found in the prefix cache.
        """
        request, first = self.requests[name], self.requests[like or name]
        for picture, known in zip(request.pictures, first.pictures, strict=True):
            picture.anchors = known.anchors
        request.positions[:, : request.depth.visual_stop] = first.positions[:, : request.depth.visual_stop]
        ids = [*request.prompt_ids, *(t.token_id for t in tokens)]
        output = torch.arange(len(tokens)) + request.next_pos
        positions = torch.cat([request.positions, output.expand(request.positions.shape[0], -1)], 1)
        dense = mask_oracle.run(self.model, request, self.rows[like or name], ids, positions)
        n = len(request.prompt_ids)
        expected = dense.logits[n - 1 : -1].log_softmax(-1)
        ours = torch.tensor([t.logprob for t in tokens])
        theirs = expected[torch.arange(len(tokens)), torch.tensor([t.token_id for t in tokens])]
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)
        assert torch.equal(expected.argmax(-1), torch.tensor([t.token_id for t in tokens]))
        if not request.depth.is_flat:
            chosen = mask_oracle.choices(self.model, request, self.rows[like or name], dense)
            for ours_, theirs_ in zip(request.depth.decision.kept, chosen, strict=True):
                assert ours_.keep.tolist() == theirs_.keep.tolist(), "the probe shows what the oracle shows"


def ask(
    model: Model,
    name: str,
    prune: str,
    *,
    seed: int = 0,
    n_images: int = 1,
    n_text: int = 12,
    n: int = 1,
    n_output: int = N_TOKENS,
    **visual,
) -> Generate:
    """A prompt of random words with pictures between them; the question is as long as `n_text`."""
    noise = torch.Generator().manual_seed(seed)

    def words(count: int) -> list[int]:
        ids = torch.randint(5, min(200, model.spec.vocab_size), (count,), generator=noise).tolist()
        return [i + 1 if i == model.spec.image_token_id else i for i in ids]

    images, ids = [], words(5)
    for i in range(n_images):
        picture, cut = render(make_scene(100 * seed + i, (224, 160 + 32 * i))), model.processor.is_cut(n_images)
        ready = model.processor.prepare_tiles(picture) if cut else model.processor.prepare(picture)
        original = (picture.height, picture.width) if cut else None
        pixels = ready.tobytes()
        images.append(
            Image(pixels=pixels, height=ready.height, width=ready.width, original=original,
                  digest=sha256(pixels).digest())
        )  # fmt: skip
        ids += [model.spec.image_token_id, *words(3)]
    budget = VisualBudget(**({"method": "none", "prune": Stage(method=prune) if prune else None} | visual))
    return Generate(
        id=name, prompt_ids=ids + words(n_text), images=images, visual=budget, n=n,
        sampling=SamplingParams(temperature=0.0, max_tokens=n_output, ignore_eos=True, logprobs=1,
                                logit_bias={model.spec.image_token_id: -1e4}),
    )  # fmt: skip
