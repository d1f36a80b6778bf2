"""Who sends a request: travels with the request from the door to the engine's salt."""

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Caller:
    """The holder of an API key; `key` is empty where the server has no keys."""

    key: bytes = b""

    def salt(self, cache_salt: str | None) -> bytes:
        """Prefix-cache namespace: prompts of one key never tell anything about prompts of another."""
        if not self.key and cache_salt is None:
            return b""
        return hashlib.sha256(hashlib.sha256(self.key).digest() + (cache_salt or "").encode()).digest()
