"""Token ids of a prompt in which the text of users stays text.

A rendered prompt mixes the control tokens of the template ("<|im_start|>") with the text of users, who may type the
same characters. Before the template is rendered, `Encoder.mark` replaces each typed spelling of a control token by as
many lone surrogates, characters that no text of a client can hold. Lengths and all other characters stay, so templates
that trim, join or measure content still work. In the rendered prompt, spellings without surrogates are the template's.

A prompt without a mark is encoded by the model's tokenizer as it is. A prompt with marks is encoded by a second
tokenizer, in which every control token has another, unguessable spelling: the template's tokens get this spelling, and
the typed ones are restored and are ordinary text. All else (normalizer, merges, the space in front) is the same.
"""

import json
import re
import secrets
from collections.abc import Iterable

from tokenizers import Tokenizer

_FIRST_MARK = 0xD800  # the surrogates: 2048 code points that UTF-8 cannot carry
_N_MARKS = 2048


class Encoder:
    """Encodes prompts. Safe to use from several threads.

    Args:
        control: spellings of the tokens that only the template may make.
    """

    def __init__(self, tokenizer: Tokenizer, control: Iterable[str]) -> None:
        self._tokenizer = tokenizer
        self._control = sorted(control, key=lambda spelling: (-len(spelling), spelling))
        self._any = re.compile("|".join(map(re.escape, self._control)) or r"(?!)")
        letters = sorted(set("".join(self._control)))
        assert len(letters) <= _N_MARKS, "control tokens are spelled with few different characters"
        self._marks = {ord(letter): _FIRST_MARK + i for i, letter in enumerate(letters)}
        self._letters = {mark: letter for letter, mark in self._marks.items()}
        self._marked = re.compile(f"[{chr(_FIRST_MARK)}-{chr(_FIRST_MARK + _N_MARKS - 1)}]")
        self._heads = {spelling[:n] for spelling in self._control for n in range(1, len(spelling))}
        self._tails = {spelling[-n:] for spelling in self._control for n in range(1, len(spelling))}
        self._longest = max(map(len, self._control), default=0)
        self._second, self._alias = _renamed(tokenizer, self._control)
        self._ids = self._renumbered()

    def mark(self, text: str) -> str:
        """Return `text` with marks in place of control tokens, and of ends that neighbours could complete to one."""
        assert not self._marked.search(text), "a client's text is UTF-8, which holds no surrogate"
        text = self._any.sub(lambda found: found[0].translate(self._marks), text)
        start, end = len(text) - len(text.lstrip()), len(text.rstrip())
        if start >= end:
            return text
        # A template may trim or join: "<ima" and "ge>" of two parts, or "<" of the template in front of "s>".
        head = self._reach(text[start:end], self._tails, at_start=True)
        text = text[:start] + text[start : start + head].translate(self._marks) + text[start + head :]
        tail = self._reach(text[start:end], self._heads, at_start=False)
        return text[: end - tail] + text[end - tail : end].translate(self._marks) + text[end:]

    def _reach(self, text: str, pieces: set[str], at_start: bool) -> int:
        """Return the length of the longest start, or end, of `text` that is one of `pieces`, or lies inside a token."""
        if len(text) <= self._longest and any(text in spelling for spelling in self._control):
            return len(text)
        for n in range(min(len(text), self._longest), 0, -1):
            if (text[:n] if at_start else text[-n:]) in pieces:
                return n
        return 0

    def unmark(self, text: str) -> str:
        """Return the text as the client wrote the text."""
        return text.translate(self._letters)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Return the token ids of a rendered prompt. Marked characters become text; other spellings control tokens."""
        if not self._marked.search(text):
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
            return ids
        renamed = self._any.sub(lambda found: self._alias[found[0]], text)
        before, after = self._around if add_special_tokens else ([], [])
        found = self._second.encode(self.unmark(renamed), add_special_tokens=False).ids
        return [*before, *(self._ids.get(token_id, token_id) for token_id in found), *after]

    def plain(self, text: str) -> list[int]:
        """Return the token ids of text alone, without any control token."""
        if not self._any.search(text):
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
            return ids
        return [self._ids.get(i, i) for i in self._second.encode(text, add_special_tokens=False).ids]

    def _renumbered(self) -> dict[int, int]:
        """Map the ids of the second tokenizer that differ to the ids of the model."""
        found: dict[int, int] = {}
        for token_id, token in self._tokenizer.get_added_tokens_decoder().items():
            other = self._second.token_to_id(self._alias.get(token.content, token.content))
            assert other is not None, "the second tokenizer has every added token"
            if other != token_id:
                found[other] = token_id
        return found

    @property
    def _around(self) -> tuple[list[int], list[int]]:
        """The ids that the tokenizer itself puts before and after a prompt, such as <s>."""
        sample = self._tokenizer.encode("a", add_special_tokens=True)
        own = [i for i, special in enumerate(sample.special_tokens_mask) if not special]
        return sample.ids[: own[0]], sample.ids[own[-1] + 1 :]


def _renamed(tokenizer: Tokenizer, control: Iterable[str]) -> tuple[Tokenizer, dict[str, str]]:
    """Return a copy of the tokenizer in which control tokens have unguessable spellings, and these spellings."""
    wanted = set(control)
    described = json.loads(tokenizer.to_str())
    alias = {}
    for token in described["added_tokens"]:
        if token["content"] in wanted:
            alias[token["content"]] = f"\ue000{secrets.token_hex(16)}\ue001"
            token |= {"content": alias[token["content"]], "normalized": False}
    described["post_processor"] = None  # names tokens by their old spelling; `encode` adds what it adds
    second = Tokenizer.from_str(json.dumps(described))
    second.no_truncation()
    second.no_padding()
    return second, alias
