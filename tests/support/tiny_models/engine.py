"""What the server sends to the engine for a tiny checkpoint, and the engine's answer in the form of the reference."""

from collections.abc import Sequence
from hashlib import sha256

import torch
from PIL import Image as Pictures
from torch import Tensor

from foveate.engine.common import Image, SamplingParams, TokenLogprob
from foveate.engine.images.preprocess import ImageProcessor
from tiny_models.common import IMAGE_TOKEN, VOCAB


def sent(processor: ImageProcessor, pictures: Sequence[Pictures.Image]) -> list[Image]:
    """What the server sends for the pictures of one request."""
    cut = processor.is_cut(len(pictures))
    images = []
    for picture in pictures:
        ready = processor.prepare_tiles(picture) if cut else processor.prepare(picture)
        original = (picture.height, picture.width) if cut else None
        pixels = ready.tobytes()
        digest = sha256(f"{ready.size} {original}".encode() + pixels).digest()
        images.append(Image(pixels=pixels, height=ready.height, width=ready.width, digest=digest, original=original))
    return images


def greedy(n_tokens: int) -> SamplingParams:
    """Sampling as `reference_greedy` samples, with the log-probabilities of the whole vocabulary."""
    return SamplingParams(
        temperature=0.0, max_tokens=n_tokens, ignore_eos=True, logprobs=VOCAB, logit_bias={IMAGE_TOKEN: -1e4}
    )


def logprobs(answered: Sequence[TokenLogprob], n_tokens: int) -> Tensor:
    """[n_tokens, VOCAB] log-probabilities of an answer; NaN where the engine told none."""
    found = torch.full((n_tokens, VOCAB), torch.nan)
    for row, token in enumerate(answered):
        for token_id, logprob in token.top:
            found[row, token_id] = logprob
    return found
