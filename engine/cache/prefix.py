"""Keys under which full blocks are found again. Pure functions of all inputs of the block's keys and values.

A key covers its parent, hence everything before it; the first parent covers the tenant's salt, the position scheme and
the dtype. Two blocks with equal keys hold equal keys and values, whoever computed them.
"""

import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256


@dataclass(frozen=True, slots=True)
class ImageRun:
    """Visual tokens of one image that follow each other: tokens [start, stop) of a sequence."""

    start: int
    stop: int
    key: bytes  # 32 bytes, of `image_key`
    first_row: int = 0  # of the image's rows, which its runs share out in order


def _digest(*parts: bytes) -> bytes:
    """SHA-256 over parts with their lengths, so that no two lists of parts run into each other."""
    state = sha256()
    for part in parts:
        state.update(struct.pack("<q", len(part)))
        state.update(part)
    return state.digest()


def root_key(salt: bytes, scheme: str, dtype: str) -> bytes:
    """The parent of a sequence's first block.

    Args:
        salt: the tenant's namespace; different salts never share.
        scheme: how pruned tokens are placed, e.g. "keep".
        dtype: of the stored keys and values.
    """
    return _digest(salt, scheme.encode(), dtype.encode())


def image_key(digest: bytes, method: str, kept: int) -> bytes:
    """Key of one reduced image's rows: covers pixels, the reducer with its settings, and the count."""
    return _digest(digest, method.encode(), struct.pack("<q", kept))


def decision_key(root: bytes, token_ids: Sequence[int], runs: Sequence[ImageRun], method: str) -> bytes:
    """Key of a pruning decision: covers all tokens that the method reads, and the method."""
    parts = [root, array("q", token_ids).tobytes(), method.encode()]
    for run in runs:
        parts += [run.key, struct.pack("<q", run.start)]
        parts += [struct.pack("<q", run.first_row)] if run.first_row else []
    return _digest(*parts)


def group_key(root: bytes, layers: range) -> bytes:
    """The parent of a layer group's first block: its blocks hold those layers and no others."""
    return _digest(root, struct.pack("<qq", layers.start, layers.stop))


def block_key(
    parent: bytes, token_ids: Sequence[int], start: int, runs: Sequence[ImageRun], decided: bytes = b""
) -> bytes:
    """The key of the full block whose first token is token `start` of its sequence.

    Args:
        parent: key of the block before, or the group's.
        token_ids: of this block; image placeholders count by the images they stand for.
        runs: the images of the sequence; those that overlap the block enter with the row at the block's first token.
        decided: key of the pruning decision, if tokens of the prompt left before this layer.
    """
    stop = start + len(token_ids)
    parts = [parent, array("q", token_ids).tobytes(), decided]
    for run in runs:
        if run.start < stop and start < run.stop:
            parts += [run.key, struct.pack("<q", start - run.start + run.first_row)]
    return _digest(*parts)
