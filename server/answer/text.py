"""Turn token ids into text, piece by piece. Pieces hold whole characters and no part of a stop string."""

import codecs
from collections.abc import Sequence

from foveate.server.answer.logprobs import TokenTexts

_REPLACEMENT = "\ufffd"


class Detokenizer:
    """Turns ids into text as they arrive. The joined pieces equal the text of all ids decoded together.

    The bytes of the tokens, not the decoded text, say whether a character is complete: U+FFFD may be the answer itself.
    Each decoding reads the tokens of the last piece and the new ones, because decoders treat the first token of a text
    specially (Llama strips the leading space). Tokens that decode to nothing are left out, so the cost of a token is
    constant. (`tokenizers.DecodeStream` decodes all tokens since the last text: 16,000 special tokens take 10 s.)
    """

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts
        self._ids: list[int] = []  # ids of the last piece, then ids not yet decoded
        self._n_done = 0  # number of leading ids in _ids that are already text
        self._done = ""  # the text of the first _n_done ids
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """Return the text that this token completes. Empty inside a character or for a special token."""
        if self._texts.is_silent(token_id):
            return ""
        self._ids.append(token_id)
        raw = self._texts.raw(token_id)
        self._utf8.decode(raw)
        n_open = len(self._utf8.getstate()[0])  # bytes of an incomplete character
        # A character that begins in this token leaves all earlier tokens complete, or no text at all.
        n_ready = len(self._ids) - (0 if not n_open else 1 if n_open <= len(raw) else len(self._ids) - self._n_done)
        if n_ready <= self._n_done:
            return ""
        text = self._decode(self._ids[:n_ready])[len(self._done) :]
        last = self._ids[self._n_done : n_ready]
        self._ids = self._ids[self._n_done :]
        self._n_done, self._done = len(last), self._decode(last)
        return text

    def flush(self) -> str:
        """Return the pending text at the end, without an incomplete last character."""
        if len(self._ids) == self._n_done:
            return ""
        text = self._decode(self._ids)[len(self._done) :].rstrip(_REPLACEMENT)
        self._n_done, self._done = len(self._ids), self._decode(self._ids)
        return text

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._texts.tokenizer.decode(ids, skip_special_tokens=True)
        return text


class StopStrings:
    """Cuts a stream of text before the first stop string. Holds back text that may become a stop string.

    The first stop string is the one that completes first; if several end together, the longest. So the result does
    not depend on where the stream is split.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Return text that is certainly part of the answer; empty after a stop."""
        if self.stopped or not self._strings:
            return "" if self.stopped else text
        buffer = self._held + text
        found = [(buffer.find(stop) + len(stop), -len(stop)) for stop in self._strings if stop in buffer]
        if found:
            end, length = min(found)
            self.stopped, self._held = True, ""
            return buffer[: end + length]
        n_held = max(_overlap(buffer, stop) for stop in self._strings)
        self._held = buffer[len(buffer) - n_held :]
        return buffer[: len(buffer) - n_held]

    def flush(self) -> str:
        """Return the text held back, which did not become a stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of `text` that is a proper prefix of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0


class TextStream:
    """The text of one choice.

    Args:
        min_tokens: ignore stop strings within the first `min_tokens` tokens.
    """

    def __init__(self, texts: TokenTexts, stop: Sequence[str], min_tokens: int) -> None:
        self._detokenizer = Detokenizer(texts)
        self._stop = StopStrings(stop)
        self._min_tokens = min_tokens
        self.n_tokens = 0

    @property
    def stopped(self) -> bool:
        return self._stop.stopped

    def push(self, token_ids: Sequence[int]) -> tuple[str, int]:
        """Return new text and the number of tokens read. After a stop string, the remaining tokens are not read."""
        text = ""
        for number, token_id in enumerate(token_ids):
            self.n_tokens += 1
            piece = self._detokenizer.push(token_id)
            text += piece if self.n_tokens <= self._min_tokens else self._stop.push(piece)
            if self.stopped:
                return text, number + 1
        return text, len(token_ids)

    def flush(self) -> str:
        """Return the remaining text once the engine has finished the choice. Stop strings still apply to this text."""
        if self.stopped:
            return ""
        text = self._stop.push(self._detokenizer.flush())
        return text + self._stop.flush()
