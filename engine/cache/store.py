"""The tensors behind the pages: keys and values, in pieces of `block_tokens` tokens of one layer.

One tier today ("model": the dtype of the weights). Any page may serve any layer, so layers that hold fewer tokens take
fewer pages. Slots know nothing of positions: those stay with the sequence.
"""

import torch

from foveate.configs.config import CacheConfig
from foveate.configs.errors import ConfigError
from foveate.engine.models.base import ModelSpec
from foveate.kernels.memory import Arena

_CPU_POOL_MB = 256


class KVStore:
    """Owns the key and value tensors. Contents of a slot are undefined until written.

    Attributes:
        keys, values: [n_pages, block_tokens, n_kv_heads, head_dim] each; written in place.
    """

    def __init__(self, spec: ModelSpec, config: CacheConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.block_tokens = config.block_tokens
        self.n_layers = spec.n_layers
        shape = (config.block_tokens, spec.n_kv_heads, spec.head_dim)
        self.page_bytes = 2 * config.block_tokens * spec.n_kv_heads * spec.head_dim * dtype.itemsize
        self.n_blocks = _pool_bytes(config, device) // (self.page_bytes * spec.n_layers)  # of all layers
        if self.n_blocks < 1:
            raise ConfigError(
                f"cache.memory_mb: {config.memory_mb} holds no block of {config.block_tokens} tokens "
                f"({self.page_bytes * spec.n_layers / 2**20:.2f} MiB for this model); raise it"
            )
        self.n_pages = self.n_blocks * spec.n_layers
        self.keys = _empty((self.n_pages, *shape), dtype, device)
        self.values = _empty((self.n_pages, *shape), dtype, device)

    @property
    def n_tokens(self) -> int:
        """Tokens that fit if every layer holds them."""
        return self.n_blocks * self.block_tokens


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """On the CPU in huge pages: what a step reads lies scattered, and every small page costs a walk of the tables."""
    return Arena().empty(shape, dtype) if device.type == "cpu" else torch.empty(shape, dtype=dtype, device=device)


def _pool_bytes(config: CacheConfig, device: torch.device) -> int:
    if config.memory_mb:
        return config.memory_mb * 2**20
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * config.memory_fraction)
    return _CPU_POOL_MB * 2**20
