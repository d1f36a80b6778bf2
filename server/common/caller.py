"""The caller: the sender of a request. The gate creates the caller; the salt of the engine's caches depends on it."""

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Caller:
    """The holder of an API key. `key` is empty if the server has no keys."""

    key: bytes = b""

    def salt(self, cache_salt: str | None) -> bytes:
        """Return the namespace in the engine's caches: hits of one key never reveal prompts or pictures of another."""
        if not self.key and cache_salt is None:
            return b""
        return hashlib.sha256(hashlib.sha256(self.key).digest() + (cache_salt or "").encode()).digest()
