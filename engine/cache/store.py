"""The tensors behind the blocks: keys and values of every layer, in pieces of `block_tokens` tokens.

One tier ("model": the dtype of the weights) and one layer group today. A block number means the same block in every
layer of its group, so one block table per (sequence, layer group) is enough. Slots know nothing of positions: those
stay with the sequence.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.configs.config import CacheConfig
from foveate.configs.errors import ConfigError
from foveate.engine.models.base import ModelSpec

_CPU_POOL_MB = 256


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Consecutive decoder layers that hold the same set of tokens, hence share block tables."""

    id: int
    layers: range


class KVStore:
    """Owns the key and value tensors. Contents of a slot are undefined until written."""

    def __init__(self, spec: ModelSpec, config: CacheConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.block_tokens = config.block_tokens
        self.groups = (LayerGroup(0, range(spec.n_layers)),)
        shape = (config.block_tokens, spec.n_kv_heads, spec.head_dim)
        block_bytes = 2 * spec.n_layers * config.block_tokens * spec.n_kv_heads * spec.head_dim * dtype.itemsize
        self.n_blocks = _pool_bytes(config, device) // block_bytes
        if self.n_blocks < 1:
            raise ConfigError(
                f"cache.memory_mb: {config.memory_mb} holds no block of {config.block_tokens} tokens "
                f"({block_bytes / 2**20:.2f} MiB for this model); raise it"
            )
        self._layers = [
            (
                torch.empty(self.n_blocks, *shape, dtype=dtype, device=device),
                torch.empty(self.n_blocks, *shape, dtype=dtype, device=device),
            )
            for _ in range(spec.n_layers)
        ]

    @property
    def n_tokens(self) -> int:
        """Slots of one layer group."""
        return self.n_blocks * self.block_tokens

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, [n_blocks, block_tokens, n_kv_heads, head_dim] each; written in place."""
        return self._layers[index]


def _pool_bytes(config: CacheConfig, device: torch.device) -> int:
    if config.memory_mb:
        return config.memory_mb * 2**20
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * config.memory_fraction)
    return _CPU_POOL_MB * 2**20
