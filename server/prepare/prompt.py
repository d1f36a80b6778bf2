"""Turn messages into token ids with the model's own tokenizer and chat template.

User text stays text: a message may spell out any special token or placeholder, and `encoding` keeps the characters
ordinary text. So the control tokens of a prompt are those of the template, and its placeholders are our own. The prompt
of a text completion is the caller's own template: there control tokens count, except the image placeholder.
"""

import contextlib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from pydantic import JsonValue
from tokenizers import AddedToken, Tokenizer

from foveate.configs.errors import ConfigError
from foveate.engine.common import ModelInfo, too_long
from foveate.server.common.errors import ApiError
from foveate.server.prepare.conversation import MessageText, PicturePlace, Turn
from foveate.server.prepare.encoding import Encoder
from foveate.server.prepare.template import Template, TemplateFailed, find_source, read_json

_ORDINARY = re.compile(r"[\w\s\u2581]*")
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def _special_tokens(config: Mapping[str, JsonValue]) -> dict[str, str]:
    """Map names of special tokens to texts, for templates. tokenizer_config.json holds each as a text or an object."""
    found: dict[str, str] = {}
    for name in _SPECIAL_NAMES:
        value = config.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            found[name] = value
    return found


def _within(tokens: Iterable[AddedToken], texts: Collection[str]) -> set[str]:
    """Return the spellings, of tokens that are not special, in `texts`. White space and words are ordinary text."""
    spellings = {token.content for token in tokens if not token.special and not _ORDINARY.fullmatch(token.content)}
    return {spelling for spelling in spellings if any(spelling in text for text in texts)}


class Prompter:
    """Tokenizer and chat template of one model directory. Safe to use from several threads."""

    def __init__(self, tokenizer: Tokenizer, template: Template | None, bos: str | None) -> None:
        self.tokenizer = tokenizer
        self._template = template
        self._bos = bos
        tokenizer.no_truncation()
        tokenizer.no_padding()
        added = tokenizer.get_added_tokens_decoder()
        self._added = frozenset(added)
        # Added tokens that are not special (Qwen's <tool_call>) matter only if the template uses them.
        used = _within(added.values(), template.writes if template is not None else ())
        self._encoder = Encoder(tokenizer, used | {token.content for token in added.values() if token.special})
        # Those that the template looks for are for the template to read, in the answers of its model.
        self._visible = _within(added.values(), template.looks_for if template is not None else ())

    @classmethod
    def load(cls, model_dir: Path) -> "Prompter":
        """Read tokenizer.json, tokenizer_config.json and the chat template.

        Raises:
            ConfigError: there is no tokenizer.json, a file is broken, or the template does not end on a short message.
        """
        path = model_dir / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(f"model.path: {model_dir} has no tokenizer.json")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ConfigError(f"model.path: {path} is broken: {error}") from None
        special = _special_tokens(read_json(model_dir / "tokenizer_config.json"))
        source = find_source(model_dir)
        template = None if source is None else Template(source, special)
        if template is not None and template.endless is not None:
            raise ConfigError(
                f"model.path: the chat template of {model_dir} does not end on a short message: {template.endless}"
            )
        return cls(tokenizer, template, special.get("bos_token"))

    def chat(self, turns: Sequence[Turn], model: ModelInfo, add_generation_prompt: bool = True) -> list[int]:
        """Return the token ids of a conversation, with one image placeholder per image part.

        Raises:
            ApiError: the model has no template, or the template refuses.
        """
        if self._template is None:
            raise ApiError("messages: this model has no chat template; use /v1/completions", "messages")
        self._check_length(sum(map(len, _texts(turns))), model, "messages")
        try:
            text = self._render(self._template, turns, self._placeholder(model), add_generation_prompt)
        except TemplateFailed as error:
            why = self._encoder.unmark(str(error))
            raise ApiError(f"messages: the model's chat template refuses: {why}", "messages") from None
        n_images = sum(isinstance(part, PicturePlace) for turn in turns for part in turn.parts())
        bos_is_there = self._bos is not None and text.startswith(self._bos)
        self._check_length(len(text), model, "messages")
        ids = self._encoder.encode(text, not bos_is_there)
        n_places = ids.count(model.image_token_id)
        if n_places != n_images:
            raise ApiError(
                f"messages: the model's chat template makes {n_places} places for {n_images} images; "
                "put images into user messages only",
                "messages",
            )
        return ids

    def complete(self, text: str, model: ModelInfo, param: str, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of a plain prompt, in which a typed image placeholder is text.

        Raises:
            ApiError: the prompt is empty or too long.
        """
        self._check_length(len(text), model, param)
        placeholder = self._placeholder(model)
        marked = text.replace(placeholder, self._encoder.hide(placeholder))
        ids = self._encoder.encode(marked, add_special_tokens)
        self.check_ids(ids, model, param)
        return ids

    def text_ids(self, text: str) -> list[int]:
        """Return the token ids of text alone, without any control token."""
        return self._encoder.plain(text)

    def check_ids(self, ids: Sequence[int], model: ModelInfo, param: str) -> None:
        """Raise ApiError for an empty prompt, an image placeholder, or an id outside the vocabulary."""
        if not ids:
            raise ApiError(f"{param}: the prompt is empty; send at least one token", param)
        if model.image_token_id in ids:
            raise ApiError(
                f"{param}: {self._placeholder(model)} stands for an image; use /v1/chat/completions to send images",
                param,
            )
        if max(ids) >= model.vocab_size:
            raise ApiError(f"{param}: token {max(ids)} is not in the vocabulary of {model.vocab_size}", param)

    def _placeholder(self, model: ModelInfo) -> str:
        token = self.tokenizer.id_to_token(model.image_token_id)
        assert token is not None, "the model's image token is one of its tokenizer"
        if model.image_token_id in self._added - self._encoder.control_ids:  # neither special nor in the template
            self._encoder = Encoder(self.tokenizer, {*self._encoder.control, token})
        return token

    @cached_property
    def _longest_token(self) -> int:
        return max(len(token) for token in self.tokenizer.get_vocab())

    def _check_length(self, n_chars: int, model: ModelInfo, param: str) -> None:
        # Even with the longest token everywhere, this text exceeds the context. Tokenizing it would take long.
        if n_chars > 100_000 and n_chars > model.max_context * self._longest_token:
            raise ApiError(
                too_long(f"{param}: {n_chars} characters cannot fit {model.max_context} tokens"),
                param,
                "context_length_exceeded",
            )

    def _render(self, template: Template, turns: Sequence[Turn], placeholder: str, add_generation_prompt: bool) -> str:
        """Return the prompt as text, with marks in the users' text. Raises TemplateFailed."""

        def rendered(write: Callable[[Turn, str], str]) -> str:
            messages = [self._message(turn, placeholder, write) for turn in turns]
            return template.render(messages, add_generation_prompt)

        with contextlib.suppress(TemplateFailed):  # for a text that the template looks into
            hidden = rendered(lambda turn, text: self._encoder.hide(text))
            if self._encoder.unmark(hidden) == rendered(lambda turn, text: text):
                return hidden
        return rendered(lambda turn, text: self._encoder.mark(text, self._visible if turn.role == "assistant" else ()))

    def _message(self, turn: Turn, placeholder: str, write: Callable[[Turn, str], str]) -> dict[str, JsonValue]:
        """Return a message in the format that the template accepts, with texts as `write` writes them."""
        assert self._template is not None
        role = "system" if turn.role == "developer" else turn.role
        if isinstance(turn.content, str):
            text = write(turn, turn.content)
            plain = self._template.takes_text or not self._template.takes_parts
            return {"role": role, "content": text if plain else [{"type": "text", "text": text}]}
        texts = [write(turn, part.text) if isinstance(part, MessageText) else None for part in turn.content]
        if not self._template.takes_parts:
            return {"role": role, "content": "\n".join(placeholder if text is None else text for text in texts)}
        listed: list[JsonValue] = [
            {"type": "image"} if text is None else {"type": "text", "text": text} for text in texts
        ]
        return {"role": role, "content": listed}


def _texts(turns: Sequence[Turn]) -> Iterator[str]:
    for turn in turns:
        if isinstance(turn.content, str):
            yield turn.content
        yield from (part.text for part in turn.parts() if isinstance(part, MessageText))
