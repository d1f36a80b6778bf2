"""The sampler against brute force and against its own law."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from foveate.engine.common import SamplingParams
from foveate.engine.sampler import Draw, sample
from foveate.kernels.draw import gumbel, truncate

V = 37


def draw(choice: int = 0, ids: tuple[int, ...] = (1, 2), n_prompt: int = 2, **params: Any) -> Draw:
    stop = params.pop("stop_ids", frozenset[int]())
    return Draw(SamplingParams(**params), choice, ids, n_prompt, stop)


def logits(seed: int, rows: int = 1) -> Tensor:
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed)) * 3


def tokens(scores: Tensor, draws: list[Draw]) -> list[int]:
    return [drawn.token_id for drawn in sample(scores, draws) if drawn is not None]


def test_greedy_takes_the_largest_and_of_equals_the_lowest_id() -> None:
    scores = logits(1, 3)
    scores[1, 5] = scores[1, 30] = 50.0
    assert tokens(scores, [draw(temperature=0.0)] * 3) == [int(scores[0].argmax()), 5, int(scores[2].argmax())]


def _support(row: Tensor, params: SamplingParams) -> set[int]:
    """Token by token: what may be drawn."""
    order = sorted(range(V), key=lambda t: (-float(row[t]), t))
    probs = row.double().div(params.temperature).softmax(-1)
    kept = [t for t in order if float(probs[t]) >= params.min_p * float(probs.max()) * (1 - 1e-12)]
    kept = kept[: params.top_k or V]
    mass, total, nucleus = 0.0, sum(float(probs[t]) for t in kept), []
    for t in kept:
        if params.top_p < 1 and mass / total >= params.top_p:
            break
        nucleus.append(t)
        mass += float(probs[t])
    return set(nucleus)


@pytest.mark.parametrize("seed", range(40))
def test_truncation_keeps_exactly_the_support(seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    u = torch.rand(4, generator=rng).tolist()
    params = SamplingParams(
        temperature=0.3 + u[0],
        top_p=[1.0, 0.05 + 0.9 * u[1]][seed % 2],
        top_k=[0, 1 + int(u[2] * 20)][seed // 2 % 2],
        min_p=[0.0, u[3] * 0.3][seed // 4 % 2],
    )
    row = logits(seed)[0]
    if seed % 3 == 0:
        row = row.round()  # ties
    kept = truncate(row.double()[None] / params.temperature, [Draw(params, 0, (1,), 1, frozenset()).law])[0]
    assert set(torch.nonzero(kept.isfinite()).flatten().tolist()) == _support(row, params)
    drawn = {tokens(row[None], [Draw(params, c, (1,), 1, frozenset())])[0] for c in range(50)}
    assert drawn <= _support(row, params)


def test_draws_follow_the_law() -> None:
    """Chi-square over 20,000 draws, with and without truncation; 99.9% quantile by Wilson and Hilferty."""
    n = 20_000
    row = logits(3)[0] / 2
    for params in (SamplingParams(temperature=0.8, seed=5), SamplingParams(temperature=1.3, top_k=9, seed=6)):
        drawn: Counter[int] = Counter()
        for start in range(0, n, 2000):
            draws = [Draw(params, c, (1,), 1, frozenset()) for c in range(start, start + 2000)]
            drawn.update(tokens(row.expand(2000, V), draws))
        support = sorted(_support(row, params))
        law = row[support].double().div(params.temperature).softmax(-1)
        chi = sum((drawn[t] - n * float(p)) ** 2 / (n * float(p)) for t, p in zip(support, law, strict=True))
        df = len(support) - 1
        assert chi < df * (1 - 2 / (9 * df) + 3.09 * math.sqrt(2 / (9 * df))) ** 3
        assert sum(drawn.values()) == n and set(drawn) <= set(support)


def test_noise_is_gumbel_and_uncorrelated_between_rows() -> None:
    draws = [draw(choice=c, ids=(1,) * (2 + i), seed=s) for s in (0, 1) for c in (0, 1) for i in (0, 1)]
    noise = gumbel([d.law.key for d in draws], 50_000, torch.device("cpu"))
    assert noise.isfinite().all()
    assert (noise.mean(-1) - 0.5772).abs().max() < 0.03 and (noise.std(-1) - math.pi / math.sqrt(6)).abs().max() < 0.03
    correlation = torch.corrcoef(noise) - torch.eye(8)
    assert correlation.abs().max() < 0.03
    neighbours = torch.corrcoef(torch.stack([noise[0, :-1], noise[0, 1:]]))[0, 1]
    assert abs(float(neighbours)) < 0.03


def test_a_draw_depends_on_seed_choice_and_index_only() -> None:
    row = logits(4)
    mixed = [
        draw(temperature=1.0, seed=9),
        draw(temperature=0.0),
        draw(choice=1, temperature=1.0, seed=9),
        draw(temperature=0.7, top_p=0.9, seed=9, ids=(1, 2, 3)),
        draw(temperature=1.0, top_k=3, seed=2**63 - 1),
    ]
    together = tokens(row.expand(5, V), mixed)
    for i, alone in enumerate(mixed):
        assert tokens(row, [alone]) == [together[i]]
    assert tokens(row.expand(5, V).flip(0), mixed[::-1]) == together[::-1]
    other_history = draw(temperature=1.0, seed=9, ids=(7, 8, 9), n_prompt=3)
    assert tokens(row, [other_history]) == [together[0]], "the tokens before do not enter the noise"
    by_index = {tokens(row, [draw(temperature=2.0, ids=(1,) * n, n_prompt=1)])[0] for n in range(1, 40)}
    assert len(by_index) > 5, "the output index does"


def test_penalties_match_brute_force() -> None:
    ids, n_prompt = (3, 3, 4, 5, 6, 6, 6, 7), 4
    for seed in range(20):
        row = logits(seed)[0]
        expected = row.tolist()
        for t in set(ids):
            expected[t] = expected[t] / 1.7 if expected[t] > 0 else expected[t] * 1.7
        for t, n in Counter(ids[n_prompt:]).items():
            expected[t] -= 0.9 + 0.4 * n
        expected[9] += 2.5  # neither seen nor penalised
        best = max(range(V), key=lambda t: (expected[t], -t))
        params: dict[str, Any] = {
            "repetition_penalty": 1.7,
            "presence_penalty": 0.9,
            "frequency_penalty": 0.4,
            "logit_bias": {9: 2.5},
        }
        assert tokens(row[None], [draw(ids=ids, n_prompt=n_prompt, temperature=0.0, **params)]) == [best]


def test_penalties_count_on_as_the_answer_grows() -> None:
    """One `Draw` over a whole answer, which counts only what is new, gives what fresh ones give."""
    random = torch.Generator().manual_seed(1)
    params: dict[str, Any] = {"repetition_penalty": 1.3, "presence_penalty": 0.2, "frequency_penalty": 0.7}
    for n_prompt in (1, 5, 300):
        ids = torch.randint(V, (n_prompt,), generator=random).tolist()
        kept = Draw(SamplingParams(temperature=0.0, **params), 0, ids, n_prompt, frozenset())
        for step in range(60):
            row = logits(step + 1000 * n_prompt)
            fresh = Draw(kept.params, 0, list(ids), n_prompt, frozenset())
            assert tokens(row, [kept]) == tokens(row, [fresh])
            ids.append(int(torch.randint(V, (1,), generator=random)))


def test_bias_forces_and_bans() -> None:
    row = logits(5)
    assert tokens(row, [draw(temperature=0.0, logit_bias={11: 100.0})]) == [11]
    best = int(row.argmax())
    assert tokens(row, [draw(temperature=0.0, logit_bias={best: -100.0})]) != [best]


def test_stop_tokens_are_masked_until_min_tokens() -> None:
    row = logits(6)
    best = int(row.argmax())
    for n_output, masked in ((0, True), (1, True), (2, False)):
        rule = draw(ids=(1,) * (1 + n_output), n_prompt=1, temperature=0.0, min_tokens=2, stop_ids=frozenset({best}))
        assert (tokens(row, [rule]) != [best]) is masked


def test_logprobs_are_the_raw_models_and_sum_to_one() -> None:
    row = logits(7)
    [drawn] = sample(row, [draw(temperature=0.4, top_k=2, logprobs=V, logit_bias={1: 50.0}, presence_penalty=2.0)])
    assert drawn is not None and drawn.logprob is not None
    top = drawn.logprob.top
    assert drawn.token_id == 1 and math.isclose(sum(math.exp(p) for _, p in top), 1.0, rel_tol=1e-5)
    raw = row[0].log_softmax(-1)
    assert math.isclose(drawn.logprob.logprob, float(raw[1]), rel_tol=1e-5)
    assert [t for t, _ in top] == raw.argsort(descending=True).tolist()
    [none, chosen] = sample(row.expand(2, V), [draw(), draw(logprobs=0)])
    assert none is not None and none.logprob is None
    assert chosen is not None and chosen.logprob is not None and chosen.logprob.top == []


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_fails_alone(bad: float) -> None:
    scores = logits(8, 3)
    before = tokens(scores, [draw(seed=i) for i in range(3)])
    scores[1, 4] = bad
    first, failed, last = sample(scores, [draw(seed=i) for i in range(3)])
    assert failed is None and first is not None and last is not None
    assert [first.token_id, last.token_id] == [before[0], before[2]]


def test_extreme_settings_still_draw() -> None:
    row = logits(9)
    best = int(row.argmax())
    for params in ({"temperature": 1e-30}, {"top_p": 1e-9}, {"top_k": 1}, {"min_p": 1.0}):
        assert tokens(row, [draw(**params)]) == [best]
    assert sample(torch.empty(0, V), []) == []
