"""From token ids to text, piece by piece: whole characters only, and nothing of a stop string."""

from collections.abc import Sequence

from tokenizers import Tokenizer

_REPLACEMENT = "\ufffd"
_MAX_PENDING = 8  # tokens; a character has at most 4 bytes, so more than that is not UTF-8 at all


class Detokenizer:
    """Turns ids into text as they come. The pieces joined are the text of all ids together.

    Decoding looks at the tokens of the last piece as well, because decoders treat the first token of a text in a
    special way (Llama strips its leading space).
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # of the last piece, then those not yet text
        self._n_done = 0  # of _ids are text already
        self._done = ""  # the text of those

    def push(self, token_id: int) -> str:
        """Text that this token completes; empty within a character or for a special token."""
        self._ids.append(token_id)
        text = self._new_text()
        pending = len(self._ids) - self._n_done
        if not text or (text.endswith(_REPLACEMENT) and pending < _MAX_PENDING):
            return ""
        self._ids = self._ids[self._n_done :]
        self._n_done, self._done = len(self._ids), self._decode(self._ids)
        return text

    def flush(self) -> str:
        """What is still held at the end, without a character that was cut in the middle."""
        text = self._new_text().rstrip(_REPLACEMENT)
        self._n_done, self._done = len(self._ids), self._decode(self._ids)
        return text

    def _new_text(self) -> str:
        return self._decode(self._ids)[len(self._done) :]

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text


class StopStrings:
    """Cuts a stream of text before the first stop string, holding back what may become one.

    "First" is the one that is complete first, the longest of those that end together: the result does not depend on
    where the stream is split.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Text that is certainly part of the answer. After a stop: nothing more."""
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
        """What was held back and became no stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` without being all of it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0


class TextStream:
    """The text of one choice.

    Args:
        min_tokens: stop strings do not count among the first so many tokens.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], min_tokens: int) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._stop = StopStrings(stop)
        self._min_tokens = min_tokens
        self.n_tokens = 0

    @property
    def stopped(self) -> bool:
        return self._stop.stopped

    def push(self, token_ids: Sequence[int]) -> tuple[str, int]:
        """New text, and how many of the tokens were read: fewer than all if a stop string ended the answer."""
        text = ""
        for number, token_id in enumerate(token_ids):
            self.n_tokens += 1
            piece = self._detokenizer.push(token_id)
            text += piece if self.n_tokens <= self._min_tokens else self._stop.push(piece)
            if self.stopped:
                return text, number + 1
        return text, len(token_ids)

    def flush(self) -> str:
        """The rest, once the engine has finished the choice; a stop string may still be in it."""
        if self.stopped:
            return ""
        text = self._stop.push(self._detokenizer.flush())
        return text + self._stop.flush()
