"""Token ids of a prompt in which the text of users stays text.

A rendered prompt mixes the control tokens of the template ("<|im_start|>") with the text of users, who may type the
same characters. Before the template is rendered, characters of users are replaced by marks: lone surrogates, which no
text of a client can hold, one for one. In the rendered prompt, spellings without marks are the template's.

`Encoder.hide` marks so many characters that no trimming, joining or replacing makes a control token. A template that
looks into the text ("if '</think>' in content") may render another prompt then; `Encoder.mark` is for such templates
and marks little more than the control tokens.

The model's tokenizer encodes the prompt as it is, if this gives the control tokens of the template and no other. Else a
second tokenizer does, in which every control token has another, unguessable spelling: the template's tokens get this
spelling, and the typed ones are ordinary text. All else (ids, normalizer, merges, the space in front) is the same.
(`Tokenizer.encode_special_tokens` would also spell out the template's tokens, and not every placeholder is special.)
"""

import json
import re
import secrets
import string
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

from tokenizers import Encoding, Tokenizer

_FIRST_MARK = 0xD800  # the surrogates: 2048 code points that UTF-8 cannot carry
_N_MARKS = 2048
_CASED = (range(0x2200), range(0xFB00, 0xFB07))  # all characters whose other case is a letter of the Latin alphabet


class Encoder:
    """Encodes prompts. Safe to use from several threads.

    Args:
        control: spellings of the added tokens that only the template may make.
    """

    def __init__(self, tokenizer: Tokenizer, control: Iterable[str]) -> None:
        self._tokenizer = tokenizer
        self.control = frozenset(control)
        self._any = re.compile(_pattern(self.control))
        self._typed = re.compile(_pattern(self.control), re.IGNORECASE)
        letters = sorted(_alike(set("".join(self.control))) - set(string.whitespace))
        assert len(letters) <= _N_MARKS, "control tokens are spelled with few different characters"
        self._marks = {ord(letter): _FIRST_MARK + i for i, letter in enumerate(letters)}
        self._letters = {mark: letter for letter, mark in self._marks.items()}
        self._marked = re.compile(f"[{chr(_FIRST_MARK)}-{chr(_FIRST_MARK + _N_MARKS - 1)}]+")
        signs = (set(filter(_is_sign, word)) or set(word) for word in self.control)  # at least one of each token
        self._sign = re.compile(_any_of(_alike(set[str]().union(*signs))))
        self._lowered = {spelling.lower() for spelling in self.control}
        self._heads = {spelling[:n] for spelling in self._lowered for n in range(1, len(spelling))}
        self._tails = {spelling[-n:] for spelling in self._lowered for n in range(1, len(spelling))}
        self._longest = max(map(len, self.control), default=0)
        added = tokenizer.get_added_tokens_decoder().items()
        self._ids = {token.content: token_id for token_id, token in added if token.content in self.control}
        self.control_ids = frozenset(self._ids.values())
        self._alias = {spelling: f"\ue000{secrets.token_hex(16)}\ue001" for spelling in self.control}
        described = json.loads(tokenizer.to_str())
        unknown = described["model"].get("unk_token")
        self._unknown = described["model"].get("unk_id") if unknown is None else tokenizer.token_to_id(unknown)
        self._seconds = _renamed(described, self._alias)
        for spelling, token_id in self._ids.items():
            same = all(second.token_to_id(self._alias[spelling]) == token_id for second in self._seconds)
            assert same, "a token keeps its id under another spelling"

    def hide(self, text: str) -> str:
        """Return `text` with marks so that no change of the text makes a control token, with or without neighbours.

        Marks stand for the signs of control tokens ("<"; most texts have few), and for all letters near the ends.
        """
        assert not self._marked.search(text), "a client's text is UTF-8, which holds no surrogate"
        text = self._sign.sub(lambda found: found[0].translate(self._marks), text)
        start, end = len(text) - len(text.lstrip()), len(text.rstrip())
        if start >= end:
            return text
        head, tail = min(start + self._longest, end), max(end - self._longest, start)
        text = text[:start] + text[start:head].translate(self._marks) + text[head:]
        return text[:tail] + text[tail:end].translate(self._marks) + text[end:]

    def mark(self, text: str, allowed: Collection[str] = ()) -> str:
        """Return `text` with marks in place of control tokens, and of ends that neighbours could complete to one.

        Args:
            allowed: control tokens that stay as they are.
        """
        assert not self._marked.search(text), "a client's text is UTF-8, which holds no surrogate"
        text = self._typed.sub(lambda found: found[0] if found[0] in allowed else found[0].translate(self._marks), text)
        start, end = len(text) - len(text.lstrip()), len(text.rstrip())
        if start >= end or any(text[start:end].startswith(token) or text[:end].endswith(token) for token in allowed):
            return text
        # A template may trim or join: "<ima" and "ge>" of two parts, or "<" of the template in front of "s>".
        head = self._reach(text[start:end], self._tails, at_start=True)
        text = text[:start] + text[start : start + head].translate(self._marks) + text[start + head :]
        tail = self._reach(text[start:end], self._heads, at_start=False)
        return text[: end - tail] + text[end - tail : end].translate(self._marks) + text[end:]

    def _reach(self, text: str, pieces: Collection[str], at_start: bool) -> int:
        """Return the length of the longest start, or end, of `text` that is one of `pieces`, or lies inside a token."""
        if len(text) <= self._longest and any(text.lower() in spelling for spelling in self._lowered):
            return len(text)
        for n in range(min(len(text), self._longest), 0, -1):
            if (text[:n] if at_start else text[-n:]).lower() in pieces:
                return n
        return 0

    def unmark(self, text: str) -> str:
        """Return the text as the client wrote the text."""
        return self._marked.sub(lambda found: found[0].translate(self._letters), text)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Return the token ids of a rendered prompt. Marked characters become text; other spellings control tokens."""
        plain = self.unmark(text)
        encoded = self._tokenizer.encode(plain, add_special_tokens=False)
        wanted = [self._ids[found[0]] for found in self._any.finditer(text)]
        if not self._is_right(encoded, wanted, self._places(plain) == self._places(text)):
            encoded = self._encode_renamed(
                self.unmark(self._any.sub(lambda found: self._alias[found[0]], text)), wanted
            )
        if add_special_tokens:
            encoded = self._tokenizer.post_process(encoded, None, True)
        return _ids(encoded)

    def _places(self, text: str) -> list[tuple[int, int]]:
        return [found.span() for found in self._typed.finditer(text)]

    def _control_ids(self, encoded: Encoding, besides: int | None = None) -> list[int]:
        return [token_id for token_id in encoded.ids if token_id in self.control_ids and token_id != besides]

    def _is_right(self, encoded: Encoding, wanted: Sequence[int], none_typed: bool) -> bool:
        """Return whether the model's own tokenizer reads control tokens of the template alone.

        If nobody typed one, the tokenizer may miss one of the template, and the model knows its prompts this way.
        """
        if none_typed:
            return len(self._control_ids(encoded, self._unknown)) <= len(wanted)
        return self._control_ids(encoded) == wanted

    def _encode_renamed(self, renamed: str, wanted: Sequence[int]) -> Encoding:
        """Return what the first of the second tokenizers makes that gives the wanted control tokens."""
        wanted = [token_id for token_id in wanted if token_id != self._unknown]  # unknown characters give it as well
        for second in self._seconds:
            encoded = second.encode(renamed, add_special_tokens=False)
            if self._control_ids(encoded, self._unknown) == wanted:
                break
        return encoded

    def plain(self, text: str) -> list[int]:
        """Return the token ids of text alone, without any control token."""
        return self.encode(self.hide(text), add_special_tokens=False)


def _ids(encoded: Encoding) -> list[int]:
    ids: list[int] = encoded.ids
    return ids


def _any_of(letters: set[str]) -> str:
    return "[" + "".join(map(re.escape, sorted(letters))) + "]+" if letters else r"(?!)"


def _is_sign(character: str) -> bool:
    return not character.isalnum() and not character.isspace()


def _alike(letters: set[str]) -> set[str]:
    """Return the letters, and the characters that become one of them in upper, lower or title case."""
    cased = (chr(code) for code in chain(*_CASED))
    return letters | {c for c in cased if letters & {*c.lower(), *c.upper(), *c.title()}}


def _pattern(words: Collection[str]) -> str:
    """Return a pattern for the longest of `words` at a place. Words share their heads: a thousand cost as one."""
    if not words:
        return r"(?!)"
    by_letter: dict[str, list[str]] = {}
    for word in words:
        if word:
            by_letter.setdefault(word[0], []).append(word[1:])
    branches = []
    for letter, rests in sorted(by_letter.items()):
        tail = re.escape(letter)
        while len({rest[:1] for rest in rests}) == 1 and rests[0]:  # without recursion
            tail += re.escape(rests[0][0])
            rests = [rest[1:] for rest in rests]
        branches.append(f"{tail}(?:{_pattern(rests)})" + "?" * ("" in rests) if any(rests) else tail)
    return "|".join(branches)


def _renamed(described: dict[str, Any], alias: Mapping[str, str]) -> list[Tokenizer]:
    """Return copies of a tokenizer in which control tokens have other spellings.

    A tokenizer may look for a control token in normalized text (with a space in front, say), and then miss one of the
    template. If there are such tokens, the last copy finds every token before normalization.
    """
    _rename_pieces(described["model"], alias)
    described["post_processor"] = None  # names tokens by their old spelling; `encode` asks the first tokenizer
    described["truncation"] = described["padding"] = None
    renamed = [token for token in described["added_tokens"] if token["content"] in alias]
    for token in renamed:
        token["content"] = alias[token["content"]]
    copies = [Tokenizer.from_str(json.dumps(described))]
    if any(token["normalized"] for token in renamed):
        for token in renamed:
            token["normalized"] = False
        copies.append(Tokenizer.from_str(json.dumps(described)))
    return copies


def _rename_pieces(model: dict[str, Any], alias: Mapping[str, str]) -> None:
    """Rename control tokens that are pieces of the vocabulary as well, so that no typed text makes them."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {alias.get(piece, piece): token_id for piece, token_id in vocabulary.items()}
    else:  # Unigram: pieces with scores
        model["vocab"] = [[alias.get(piece, piece), score] for piece, score in vocabulary]
    if "merges" in model:
        model["merges"] = [merge for merge in model["merges"] if not _of_control(merge, alias)]
    if model.get("unk_token") in alias:
        model["unk_token"] = alias[model["unk_token"]]


def _of_control(merge: str | list[str], alias: Mapping[str, str]) -> bool:
    """Return whether a merge takes or makes a control token. Older files write the two pieces as one text."""
    one, other = merge.split(" ", 1) if isinstance(merge, str) else merge
    return one in alias or other in alias or one + other in alias
