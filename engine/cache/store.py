"""The tensors behind the pages: keys and values, in pieces of `block_tokens` tokens of one layer.

One tier today ("model": the dtype of the weights). Any page may serve any layer, so layers that hold fewer tokens take
fewer pages. Slots know no positions: the sequence holds positions.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from foveate.configs.config import CacheConfig
from foveate.configs.errors import ConfigError
from foveate.engine.geometry.base import ModelSpec
from foveate.kernels.attention import gather
from foveate.kernels.hardware.device import empty_pages, free_bytes

_POOL_MB = 256  # where a device does not say what is free


class KVPages(NamedTuple):
    """The tensors that attention reads and writes, [n_pages, block_tokens, n_kv_heads, head_dim] each."""

    keys: Tensor
    values: Tensor


class KVStore:
    """Owns the key and value tensors. Contents of a slot are undefined until written.

    Attributes:
        pages: the tensors, written in place; only an attention backend takes them.
    """

    def __init__(self, spec: ModelSpec, config: CacheConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.block_tokens = config.block_tokens
        self.n_layers = spec.n_layers
        self.page_bytes = 2 * config.block_tokens * spec.n_kv_heads * spec.head_dim * dtype.itemsize
        self.n_blocks = _pool_bytes(config, device) // (self.page_bytes * spec.n_layers)  # of all layers
        if self.n_blocks < 1:
            raise ConfigError(
                f"cache.memory_mb: {config.memory_mb} holds no block of {config.block_tokens} tokens "
                f"({self.page_bytes * spec.n_layers / 2**20:.2f} MiB for this model); raise it"
            )
        self.n_pages = self.n_blocks * spec.n_layers
        shape = (self.n_pages, config.block_tokens, spec.n_kv_heads, spec.head_dim)
        self.pages = KVPages(empty_pages(shape, dtype, device), empty_pages(shape, dtype, device))

    @property
    def n_tokens(self) -> int:
        """Tokens that fit if every layer holds them."""
        return self.n_blocks * self.block_tokens

    def keys_of(self, pages: Tensor, n: int) -> Tensor:
        """[n, n_kv_heads, head_dim]: the keys in the first `n` slots of a table [n_blocks], in order."""
        return gather(self.pages.keys, pages, n)

    def copy_slots(self, source: NDArray[np.int64], target: NDArray[np.int64]) -> None:
        """Copy keys and values of slots `source` to slots `target`, [n] each; all are read before any is written."""
        rows_from, rows_to = (torch.from_numpy(slots).to(self.pages.keys.device) for slots in (source, target))
        for tensor in self.pages:
            flat = tensor.flatten(0, 1)
            flat.index_copy_(0, rows_to, flat.index_select(0, rows_from))


def _pool_bytes(config: CacheConfig, device: torch.device) -> int:
    if config.memory_mb:
        return config.memory_mb * 2**20
    free = free_bytes(device)
    return _POOL_MB * 2**20 if free is None else int(free * config.memory_fraction)
