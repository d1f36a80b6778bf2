"""The same answers on a GPU as on the CPU, in float32."""

from pathlib import Path

import pytest
import torch

import foveate.bundled
from foveate.configs.config import CacheConfig, Config
from foveate.engine.common import Delta, Failed, Generate, Image, SamplingParams, VisualBudget
from foveate.engine.engine import Engine
from foveate.engine.models.loader import load_model
from foveate.kernels.attention import AttentionBatch, paged_attention
from foveate.kernels.cuda import vision_attention as on_cuda
from foveate.kernels.hardware import device as hardware
from foveate.kernels.hardware.dispatch import choose
from foveate.kernels.vision_attention import reference, vision_attention

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_paged_attention() -> None:
    noise = torch.Generator().manual_seed(0)
    blocks = [torch.randn(12, 4, 2, 16, generator=noise) for _ in range(2)]
    q = torch.randn(9, 6, 16, generator=noise)
    tables = torch.tensor([[3, 0, 7, 0], [9, 4, 1, 11]])
    batch = AttentionBatch([0, 1, 9], [10, 15], tables)
    on_gpu = AttentionBatch([0, 1, 9], [10, 15], tables.cuda())
    expected = paged_attention(q, *blocks, batch, scale=0.25)
    found = paged_attention(q.cuda(), *(b.cuda() for b in blocks), on_gpu, scale=0.25)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-4, atol=1e-5)


def test_vision_attention() -> None:
    noise, segments = torch.Generator().manual_seed(0), [0, 25, 50, 51, 150]
    q, k, v = torch.randn(3, 150, 3, 20, generator=noise).unbind(0)
    found = vision_attention(q.cuda(), k.cuda(), v.cuda(), segments, 0.2)
    torch.testing.assert_close(found.cpu(), reference(q, k, v, segments, 0.2), rtol=1e-4, atol=1e-5)
    assert choose(reference, found.device, q.dtype, k.dtype, v.dtype) is on_cuda.run


def test_a_device_answers() -> None:
    device = hardware.find("auto")
    assert device == torch.device("cuda") and hardware.free_bytes(device)
    assert hardware.empty_pages((2, 3), torch.bfloat16, device).is_cuda


@pytest.mark.parametrize("name", ["tiny-llava", "tiny-qwen2-vl"])
def test_the_engine(name: str) -> None:
    path = foveate.bundled.path(name)
    assert path is not None
    answers = [_answers(path, torch.device(device)) for device in ("cpu", "cuda")]
    assert answers[0] == answers[1]


def _answers(path: Path, device: torch.device) -> dict[str, list[int]]:
    model = load_model(path, torch.float32, device)
    engine = Engine(model, Config(cache=CacheConfig(memory_mb=64)))
    side = 144 if model.spec.family != "llava" else 168
    noise = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (side, side, 3), generator=noise, dtype=torch.uint8).numpy().tobytes()
    image = Image(pixels=pixels, height=side, width=side, digest=bytes(32))
    prompt = [10, 11, model.spec.image_token_id, 12, 13, 14]
    for method in ("none", "uniform", "pool", "fastervlm", "divprune", "visionzip"):
        visual = VisualBudget(method=method, ratio=1.0 if method == "none" else 0.3)
        sampling = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
        engine.add(Generate(id=method, prompt_ids=prompt, images=[image], visual=visual, sampling=sampling))
    found: dict[str, list[int]] = {}
    while engine.has_work:
        for event in engine.step():
            assert not isinstance(event, Failed), event
            if isinstance(event, Delta):
                found.setdefault(event.id, []).extend(event.token_ids)
    engine.check()
    return found
