"""Turn messages into token ids with the model's own tokenizer and chat template.

User text must stay text. A message that spells out a special token or an image placeholder is refused, because the
tokenizer would encode the spelled-out token as the real token.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

from pydantic import JsonValue
from tokenizers import Tokenizer

from foveate.configs.errors import ConfigError
from foveate.engine.common import ModelInfo
from foveate.server.common.errors import ApiError
from foveate.server.prepare.conversation import MessageText, PicturePlace, Turn
from foveate.server.prepare.template import Template, TemplateFailed, find_source, read_json

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


class Prompter:
    """Tokenizer and chat template of one model directory. Safe to use from several threads."""

    def __init__(self, tokenizer: Tokenizer, template: Template | None, bos: str | None) -> None:
        self.tokenizer = tokenizer
        self._template = template
        self._bos = bos
        tokenizer.no_truncation()
        tokenizer.no_padding()
        added = tokenizer.get_added_tokens_decoder().values()
        source = template.source if template is not None else ""
        # Added tokens that are not special (Qwen's <tool_call>) matter only if the template uses them.
        self._control = sorted(token.content for token in added if token.special or token.content in source)

    @classmethod
    def load(cls, model_dir: Path) -> "Prompter":
        """Read tokenizer.json, tokenizer_config.json and the chat template.

        Raises:
            ConfigError: there is no tokenizer.json, or a file is broken.
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
        return cls(tokenizer, None if source is None else Template(source, special), special.get("bos_token"))

    def chat(self, turns: Sequence[Turn], model: ModelInfo, add_generation_prompt: bool = True) -> list[int]:
        """Return the token ids of a conversation, with one image placeholder per image part.

        Raises:
            ApiError: the model has no template, the template refuses, or a message spells out a special token.
        """
        if self._template is None:
            raise ApiError("messages: this model has no chat template; use /v1/completions", "messages")
        placeholder = self._placeholder(model)
        self._check_texts(turns, placeholder)
        try:
            text = self._template.render([self._message(turn, placeholder) for turn in turns], add_generation_prompt)
        except TemplateFailed as error:
            raise ApiError(f"messages: the model's chat template refuses: {error}", "messages") from None
        n_images = sum(isinstance(part, PicturePlace) for turn in turns for part in turn.parts())
        bos_is_there = self._bos is not None and text.startswith(self._bos)
        ids = self._encode(text, not bos_is_there, model, "messages")
        n_places = ids.count(model.image_token_id)
        if n_places != n_images:
            raise ApiError(
                f"messages: the model's chat template makes {n_places} places for {n_images} images; "
                "put images into user messages only",
                "messages",
            )
        return ids

    def complete(self, text: str, model: ModelInfo, param: str, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of a plain prompt. Raises ApiError: empty, too long or with an image placeholder."""
        ids = self._encode(text, add_special_tokens, model, param)
        self.check_ids(ids, model, param)
        return ids

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
        return token

    @cached_property
    def _longest_token(self) -> int:
        return max(len(token) for token in self.tokenizer.get_vocab())

    def _encode(self, text: str, add_special_tokens: bool, model: ModelInfo, param: str) -> list[int]:
        # Even with the longest token everywhere, this text exceeds the context. Tokenizing it would take long.
        if len(text) > 100_000 and len(text) > model.max_context * self._longest_token:
            raise ApiError(
                f"{param}: {len(text)} characters cannot fit the context of {model.max_context} tokens",
                param,
                "context_length_exceeded",
            )
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def _message(self, turn: Turn, placeholder: str) -> dict[str, JsonValue]:
        """Return a message in the format that the template accepts."""
        assert self._template is not None
        role = "system" if turn.role == "developer" else turn.role
        content = turn.content
        if isinstance(content, str):
            plain = self._template.takes_text or not self._template.takes_parts
            return {"role": role, "content": content if plain else [{"type": "text", "text": content}]}
        if not self._template.takes_parts:
            texts = [part.text if isinstance(part, MessageText) else placeholder for part in content]
            return {"role": role, "content": "\n".join(texts)}
        listed: list[JsonValue] = []
        for part in content:
            listed.append({"type": "text", "text": part.text} if isinstance(part, MessageText) else {"type": "image"})
        return {"role": role, "content": listed}

    def _check_texts(self, turns: Sequence[Turn], placeholder: str) -> None:
        for turn in turns:
            where = f"{turn.path}.content"
            if isinstance(turn.content, str):
                self._check_text(turn.content, where, placeholder)
                continue
            joined = ""  # the template joins parts: "<ima" + "ge>" must be refused too
            for part in turn.parts():
                if isinstance(part, MessageText):
                    self._check_text(part.text, f"{part.path}.text", placeholder)
                joined += part.text if isinstance(part, MessageText) else "\0"
            self._check_text(joined, where, placeholder)

    def _check_text(self, text: str, param: str, placeholder: str) -> None:
        for token in (placeholder, *self._control):
            if token in text:
                why = "stands for an image" if token == placeholder else "is a special token of this model"
                raise ApiError(f"{param}: {token} {why} and cannot be typed as text", param, "special_token_in_text")
