"""Pictures whose tokens stand in several runs, and whose rows enter the decoder at several layers."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from foveate.engine import resolve as resolving
from foveate.engine.cache.prefix import ImageRun, block_key, decision_key, image_key
from foveate.engine.common import (
    Delta,
    Generate,
    Grid,
    Image,
    SamplingParams,
    Stage,
    TokenLogprob,
    VisualBudget,
    VisualUsage,
)
from foveate.engine.encoder import Encoder
from foveate.engine.engine import Engine, Event
from foveate.engine.models.base import Attention, Model
from foveate.engine.request import Layout, Picture, Request
from foveate.engine.resolve import Room, resolve
from foveate.engine.vision import TokenTransform, VisualInputs

MakeEngine, Run, MakePicture = Callable[..., Engine], Callable[[Engine], list[Event]], Callable[..., Image]
KEY = image_key(b"v" * 32, "none", 5)
TEXT_BETWEEN = [9, 8, 7]


def item(runs: Sequence[ImageRun], n_offered: int = 6) -> Picture:
    return Picture(
        image=Image(pixels=b"", height=1, width=1, digest=b"v" * 32), grid=Grid(1, n_offered), n_patches=n_offered,
        budget=5, n_kept=sum(run.stop - run.start for run in runs), runs=tuple(runs),
        positions=torch.arange(100, 100 + n_offered)[None],
    )  # fmt: skip


def of_frames() -> Request:
    """Two frames, tokens [2, 4) and [6, 9), then a picture of one run, [10, 12)."""
    pictures = [item([ImageRun(2, 4, KEY), ImageRun(6, 9, KEY, first_row=2)]), item([ImageRun(10, 12, KEY)])]
    positions = torch.arange(14)[None].clone()
    for picture in pictures:
        positions[:, list(picture.tokens())] = -1
    return Request(
        id="x", sampling=SamplingParams(max_tokens=1), stop_ids=frozenset(), n_choices=1, prompt_ids=[0] * 14,
        pictures=pictures, positions=positions, next_pos=14, root_key=b"", visual=VisualUsage(),
    )  # fmt: skip


def test_kept_rows_are_shared_out_to_the_runs_in_order() -> None:
    request, rows = of_frames(), torch.arange(5.0)[:, None]
    frames = request.pictures[0]
    assert [run.start for run in request.runs] == [2, 6, 10]
    assert not request.is_reduced(0)
    request.place(0, {0: rows}, torch.tensor([0, 2, 3, 4, 5]))
    assert request.is_reduced(0) and not request.is_reduced(1)
    assert request.positions[0].tolist() == [0, 1, 100, 102, 4, 5, 103, 104, 105, 9, -1, -1, 12, 13]
    assert [(first, rows[own, 0].tolist()) for first, own in frames.within(0, 14)] == [(2, [0, 1]), (6, [2, 3, 4])]
    assert [(first, rows[own, 0].tolist()) for first, own in frames.within(3, 8)] == [(3, [1]), (6, [2, 3])]
    assert not list(frames.within(4, 6)) and frames.stop == 9
    request.place(1, {0: rows[:2]}, torch.tensor([1, 4]))
    assert request.cells == {2: (0, 0), 3: (0, 2), 6: (0, 3), 7: (0, 4), 8: (0, 5), 10: (1, 1), 11: (1, 4)}


def test_rows_go_when_the_last_run_is_computed() -> None:
    request = of_frames()
    choice = SimpleNamespace(n_computed=0, is_finished=False)
    request.sequences.append(choice)
    request.place(0, {0: torch.zeros(5, 1)}, torch.arange(5))
    for n_computed, are_there in ((4, True), (8, True), (9, False)):
        choice.n_computed = n_computed
        request.drop_rows()
        assert (request.pictures[0].rows is not None) == are_there


def test_runs_that_interleave_are_no_prompt() -> None:
    request = of_frames()
    with pytest.raises(AssertionError, match="runs ascend"):
        replace_pictures(request, request.pictures[::-1])


def replace_pictures(request: Request, pictures: list[Picture]) -> Request:
    return Request(
        id="x", sampling=request.sampling, stop_ids=frozenset(), n_choices=1, prompt_ids=request.prompt_ids,
        pictures=pictures, positions=request.positions, next_pos=14, root_key=b"", visual=VisualUsage(),
    )  # fmt: skip


def test_keys_tell_the_frames_of_an_item_apart() -> None:
    first, second = ImageRun(0, 2, KEY), ImageRun(2, 4, KEY, first_row=2)
    one, two = (block_key(b"", [7, 7], start, [first, second]) for start in (0, 2))
    assert one != two, "the same placeholders stand for other rows"
    assert two == block_key(b"", [7, 7], 2, [ImageRun(0, 4, KEY)]), "whose rows they are is all that counts"
    again = [replace(first, start=1, stop=3), replace(second, start=3, stop=5)]
    assert two == block_key(b"", [7, 7], 3, again), "wherever the item stands"
    whole = decision_key(b"", [7] * 4, [first, second], "m")
    assert whole != decision_key(b"", [7] * 4, [first, replace(second, first_row=1)], "m")


def test_what_is_added_follows_the_rows() -> None:
    inputs = VisualInputs(
        grid=Grid(2, 2), proj=torch.arange(4.0)[:, None], added={1: 10 * torch.arange(4.0)[:, None]},
        newline=torch.tensor([7.0]),
    )  # fmt: skip
    taken = inputs.take(TokenTransform.merging(torch.tensor([0, 0, -1, 1]), torch.tensor([0, 3])))
    assert taken.proj[:, 0].tolist() == [0.5, 3] and taken.added[1][:, 0].tolist() == [5, 30]
    newlines = Grid(2, 2, newlines="rows")
    assert inputs.unreduced(newlines)[:, 0].tolist() == [0, 1, 7, 2, 3, 7]
    assert inputs.unreduced_added(newlines)[1][:, 0].tolist() == [0, 10, 0, 20, 30, 0]


@pytest.fixture
def deep(model: Any) -> Model:
    """The mock model, with rows that enter its second layer too."""
    spec = replace(model.spec, row_layers=(0, 1))
    model.geometry.spec = spec
    encode = model.encode
    model.encode = lambda *args: [replace(one, added={1: one.proj.flip(-1) * 2}) for one in encode(*args)]
    return model


@pytest.fixture
def frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every picture is sent as two frames with text between."""
    whole = resolving.lay_out

    def lay_out(ids: list[int], *rest: Any) -> Layout:
        laid_out, pictures = whole(ids, *rest), rest[1]
        token_ids, parts, at = [], [], 0
        for picture in pictures:
            (run,) = picture.runs
            middle, shift = run.start + picture.n_kept // 2, len(token_ids) - at
            token_ids += [*laid_out.token_ids[at:middle], *TEXT_BETWEEN]
            parts += [laid_out.positions[:, at:middle], torch.full((3, len(TEXT_BETWEEN)), 50)]
            second = middle + shift + len(TEXT_BETWEEN)
            picture.runs = (
                ImageRun(run.start + shift, middle + shift, run.key),
                ImageRun(second, second + run.stop - middle, run.key, first_row=middle - run.start),
            )
            at = middle
        parts.append(laid_out.positions[:, at:])
        return Layout([*token_ids, *laid_out.token_ids[at:]], torch.cat(parts, 1), laid_out.next_pos + 60)

    monkeypatch.setattr(resolving, "lay_out", lay_out)


class Dense(Attention):
    """Every token attends to itself and to all before it."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
        scores = torch.einsum("mhd,nhd->hmn", q, k) * q.shape[-1] ** -0.5
        ahead = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
        return torch.einsum("hmn,nhd->mhd", scores.masked_fill(ahead, -torch.inf).softmax(-1), v)


def dense(model: Model, generate: Generate, output: Sequence[int]) -> Tensor:
    """[n, vocab_size] log-probabilities of each output token's place, without engine, cache or chunks."""
    request = resolve(generate, model.geometry, "float32", Room(400, 400))
    assert Encoder(model, 1 << 20).run([(request, i) for i in range(len(request.pictures))]) == []
    following = request.next_pos + torch.arange(len(output))
    rotary = model.rotary(torch.cat([request.positions, following.expand(3, -1)], 1))
    x = model.embed(torch.tensor([*request.prompt_ids, *output])).clone()

    for layer in range(model.spec.n_layers):
        for picture in request.pictures:
            assert picture.rows is not None
            tokens = torch.tensor(list(picture.tokens()))
            if layer == 0:
                x[tokens] = picture.rows[0]
            elif layer in picture.rows:
                x[tokens] += picture.rows[layer]
        x = model.run(x, rotary, Dense(), range(layer, layer + 1))
    n_prompt = len(request.prompt_ids)
    return model.logits(x).log_softmax(-1)[n_prompt - 1 : -1]


def ask(picture: MakePicture, **visual: Any) -> Generate:
    images = [picture(3, 5, 4), picture(4, 3, 3)]
    return Generate(
        id="a", prompt_ids=[1, 2, 256, 3, 256, 4, 5, 6], images=images, visual=VisualBudget(**visual),
        sampling=SamplingParams(temperature=0.0, max_tokens=5, logprobs=1, ignore_eos=True, logit_bias={256: -1e4}),
    )  # fmt: skip


def answered(engine: Engine, run: Run, generate: Generate) -> list[TokenLogprob]:
    engine.add(generate)
    return [told for event in run(engine) if isinstance(event, Delta) for told in event.logprobs or []]


@pytest.mark.parametrize("chunk", [3, 512])
@pytest.mark.parametrize("budget", [None, 12])
@pytest.mark.parametrize("kinds", [("frames",), ("deep",), ("frames", "deep")])
def test_the_engine_gives_what_a_dense_run_gives(
    make_engine: MakeEngine, run: Run, picture: MakePicture, model: Any, request: pytest.FixtureRequest,
    kinds: tuple[str, ...], budget: int | None, chunk: int,
) -> None:  # fmt: skip
    for kind in kinds:
        request.getfixturevalue(kind)
    generate = ask(picture, tokens=budget, method="divprune")
    engine = make_engine(chunk_tokens=chunk)
    for _ in range(2):  # the second time out of the prefix cache
        told = answered(engine, run, generate)
        output = [t.token_id for t in told]
        expected = dense(model, generate, output)
        ours = torch.tensor([t.logprob for t in told])
        torch.testing.assert_close(
            ours, expected[torch.arange(len(output)), torch.tensor(output)], rtol=1e-4, atol=1e-4
        )


def test_rows_that_enter_deeper_change_the_answer(
    make_engine: MakeEngine, run: Run, picture: MakePicture, model: Any, request: pytest.FixtureRequest
) -> None:
    plain = answered(make_engine(), run, ask(picture))
    request.getfixturevalue("deep")
    assert answered(make_engine(), run, ask(picture))[0].logprob != pytest.approx(plain[0].logprob, abs=1e-3)


def test_rows_enter_behind_a_pruning_point_however_the_prompt_is_chunked(
    make_engine: MakeEngine, run: Run, picture: MakePicture, deep: Model, frames: None
) -> None:
    """Those of tokens that waited are added when these are taken up again, in a later chunk."""
    generate = ask(picture, method="none", tokens=20, prune=Stage(method="fastv", params={"k": 1, "r": 0.5}))
    told = [answered(make_engine(chunk_tokens=chunk), run, generate) for chunk in (512, 3, 7)]
    assert len(told[0]) == 5
    for other in told[1:]:
        assert [t.token_id for t in other] == [t.token_id for t in told[0]]
        assert [t.logprob for t in other] == pytest.approx([t.logprob for t in told[0]], abs=1e-4)
