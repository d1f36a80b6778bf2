"""Log-probabilities in the two formats of OpenAI's API, with the text and the bytes of each token."""

import json
import re
from collections.abc import Sequence
from itertools import accumulate

from tokenizers import Tokenizer

from foveate.engine.common import TokenLogprob
from foveate.server.common.replies import ChatLogprobs, ContentLogprob, TextLogprobs, TopLogprob

LEAST = -9999.0  # OpenAI's value for an impossible token; JSON has no infinity
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """Map each printable character of byte-level BPE to its byte (256 entries)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(rest)}


def _is_byte_level(tokenizer: Tokenizer) -> bool:
    """Return whether the decoder reads characters as bytes, alone or as a step of several."""
    decoder = tokenizer.decoder
    if decoder is None:
        return False
    described = json.loads(decoder.__getstate__())
    return any(step["type"] == "ByteLevel" for step in described.get("decoders", [described]))


class TokenTexts:
    """Text and bytes of single tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._raw: dict[int, bytes] = {}
        self._alphabet = _byte_alphabet() if _is_byte_level(tokenizer) else None
        added = tokenizer.get_added_tokens_decoder()
        self._verbatim = {i: token.content for i, token in added.items()}
        self._silent = {i for i, token in added.items() if token.special}

    def is_silent(self, token_id: int) -> bool:
        """Return whether a decoder leaves a token out: a special token or an unknown id."""
        return token_id in self._silent or self.tokenizer.id_to_token(token_id) is None

    def raw(self, token_id: int) -> bytes:
        """Return the bytes of a token; they may end inside a character. Empty for an unknown id."""
        found = self._raw.get(token_id)
        if found is None:
            found = self._raw[token_id] = self._bytes(token_id)
        return found

    def _bytes(self, token_id: int) -> bytes:
        if token_id in self._verbatim:
            return self._verbatim[token_id].encode()
        piece = self.tokenizer.id_to_token(token_id) or ""
        alphabet = self._alphabet
        if alphabet is not None and all(char in alphabet for char in piece):  # the decoder reads others as they are
            return bytes(alphabet[char] for char in piece)
        if alphabet is not None:
            return piece.encode()
        if byte := _BYTE_TOKEN.fullmatch(piece):
            return bytes([int(byte[1], 16)])
        return piece.replace("\u2581", " ").encode()

    def text(self, token_id: int) -> str:
        return self.raw(token_id).decode("utf-8", "replace")

    def _top(self, token_id: int, logprob: float) -> TopLogprob:
        raw = self.raw(token_id)
        return TopLogprob(token=raw.decode("utf-8", "replace"), logprob=max(logprob, LEAST), bytes=list(raw))

    def chat(self, tokens: Sequence[TokenLogprob]) -> ChatLogprobs:
        content = []
        for token in tokens:
            chosen = self._top(token.token_id, token.logprob)
            top = [self._top(token_id, logprob) for token_id, logprob in token.top]
            content.append(
                ContentLogprob(token=chosen.token, logprob=chosen.logprob, bytes=chosen.bytes, top_logprobs=top)
            )
        return ChatLogprobs(content=content, refusal=None)

    def completion(self, tokens: Sequence[TokenLogprob], offset: int) -> TextLogprobs:
        """Format for text completions. `offset`: number of characters of the answer before these tokens."""
        texts = [self.text(token.token_id) for token in tokens]
        offsets = list(accumulate(map(len, texts[:-1]), initial=offset)) if texts else []
        return TextLogprobs(
            text_offset=offsets,
            token_logprobs=[max(token.logprob, LEAST) for token in tokens],
            tokens=texts,
            top_logprobs=[{self.text(i): max(value, LEAST) for i, value in token.top} for token in tokens],
        )
