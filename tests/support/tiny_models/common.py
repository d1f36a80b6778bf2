"""Sizes that all tiny checkpoints share, and their random weights."""

from collections.abc import Callable
from typing import Any

import torch

IMAGE_TOKEN = 90
VOCAB = 97
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCAB,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Weights large enough that a wrong mask or rotation shows in the logits; norms and biases too."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1 and "class_embedding" not in name:
                p.add_(torch.randn(p.shape, generator=noise) * 0.2)
            else:
                p.copy_(torch.randn(p.shape, generator=noise) * p[0].numel() ** -0.5 * 1.5)


def random_model(make: Callable[[Any], Any], config: Any, seed: int) -> Any:
    """The model of a `transformers` class and config, with weights that follow from the seed."""
    torch.manual_seed(seed)
    model = make(config)
    randomise(model, seed)
    return model
