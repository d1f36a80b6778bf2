"""Through the whole engine (paged, chunked, batched with strangers) our models say what `transformers` says."""

import pytest
import torch

from foveate.configs.config import CacheConfig, Config, SchedulerConfig
from foveate.engine.common import Delta, Failed, Generate, TokenLogprob
from foveate.engine.engine import Engine
from foveate.engine.models.loader import load_model

N_TOKENS = 32


pytestmark = pytest.mark.usefixtures("one_thread")


def answer(engine: Engine, requests: list[Generate]) -> dict[str, list[TokenLogprob]]:
    """Each request's tokens with the log-probabilities of the whole vocabulary; one joins every other step."""
    out: dict[str, list[TokenLogprob]] = {}
    waiting = list(requests)
    steps = 0
    while waiting or engine.has_work:
        if waiting and steps % 2 == 0:
            engine.add(waiting.pop(0))
        for event in engine.step():
            assert not isinstance(event, Failed), event
            if isinstance(event, Delta):
                out.setdefault(event.id, []).extend(event.logprobs or [])
        engine.check()
        steps += 1
    return out


CASES = [
    ("llava", dict(vision="clip", decoder="llama", n_kv_heads=1, tied=False), [(45, 61)]),
    ("llava", dict(vision="siglip", decoder="qwen2", n_kv_heads=2, tied=True), [(64, 30), (20, 33)]),
    ("llava", dict(vision="clip", decoder="llama", n_kv_heads=4, tied=True, naming="published"), []),
    ("tiled", dict(family="llava_next", decoder="mistral", n_kv_heads=1, tied=True), [(45, 61)]),
    ("tiled", dict(family="llava_next", decoder="qwen2", n_kv_heads=2), [(80, 33), (40, 71)]),
    ("tiled", dict(family="llava_next", decoder="llama", n_kv_heads=4, naming="published"), []),
    ("tiled", dict(family="llava_onevision", decoder="qwen2", n_kv_heads=2), [(97, 80)]),  # scaled down
    ("tiled", dict(family="llava_onevision", decoder="qwen2", n_kv_heads=1, tied=True), [(60, 24), (30, 90)]),
    ("qwen", dict(family="qwen2_vl", n_kv_heads=1, tied=True), [(24, 40), (56, 33)]),
    ("qwen", dict(family="qwen2_vl", n_kv_heads=4, tied=False, naming="published"), []),
    ("qwen", dict(family="qwen2_5_vl", n_kv_heads=2, tied=False), [(60, 24), (30, 90)]),
    ("qwen", dict(family="qwen2_5_vl", n_kv_heads=4, tied=True), [(47, 61)]),
]


@pytest.mark.parametrize("seed, case", list(enumerate(CASES)))
def test_the_engine_agrees_with_transformers(tiny_models, tmp_path, seed, case):
    kind, options, sizes = case
    getattr(tiny_models, f"save_{kind}")(tmp_path, seed=seed, **options)
    pictures = [tiny_models.picture(h, w, seed + i) for i, (h, w) in enumerate(sizes)]
    prompt = tiny_models.prompt(19, len(sizes), seed)
    expected = tiny_models.reference_greedy(tmp_path, prompt, pictures, N_TOKENS)
    full = tiny_models.reference_logits(tmp_path, prompt + expected, pictures)
    theirs = full[-N_TOKENS - 1 : -1].log_softmax(-1)

    model = load_model(tmp_path, torch.float32, "cpu")
    engine = Engine(
        model,
        Config(
            cache=CacheConfig(memory_mb=1, block_tokens=4),
            scheduler=SchedulerConfig(chunk_tokens=7, step_tokens=40, max_running=5),
        ),
    )
    sampling = tiny_models.greedy(N_TOKENS)
    images = tiny_models.sent(model.processor, pictures)
    strangers = [
        Generate(id=f"stranger {i}", prompt_ids=tiny_models.prompt(5 + 9 * i, 0, 50 + i), sampling=sampling)
        for i in range(3)
    ]
    again = Generate(id="again", prompt_ids=prompt, images=images, sampling=sampling)  # meets a warm prefix cache
    asked = Generate(id="asked", prompt_ids=prompt, images=images, sampling=sampling)
    answers = answer(engine, [strangers[0], asked, *strangers[1:], again])
    for name in ("asked", "again"):
        ours = tiny_models.logprobs(answers[name], N_TOKENS)
        assert [token.token_id for token in answers[name]] == expected
        assert (ours - theirs).abs().max() / theirs.abs().max() < 1e-4
