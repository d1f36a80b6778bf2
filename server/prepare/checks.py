"""Check configurable bounds, known but unsupported fields, and unknown fields."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pydantic import BaseModel, JsonValue

from foveate.configs.config import LimitsConfig
from foveate.server.common import known_fields
from foveate.server.common.budget_names import body_names, did_you_mean, is_budget_name
from foveate.server.common.errors import ApiError, invalid_vlm, printable, unsupported
from foveate.server.common.known_fields import KnownFields
from foveate.server.common.numbers import integer
from foveate.server.common.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    ImagePart,
    Message,
    OtherPart,
    Sampling,
    TextPart,
    TokenizeRequest,
    vlm_objects,
)

Checked = ChatRequest | CompletionRequest | TokenizeRequest | DetokenizeRequest
MAX_WARNINGS = 8
COMPLETION_TOKENS = 16
_NAME_CHARS = 64  # of an unknown field; a name may have megabytes


def _at_most(param: str, value: int | None, limit: int, setting: str, unit: str = "") -> None:
    if value is not None and value > limit:
        raise ApiError(f"{param}: {value}{unit} is more than {setting} {limit}", param)


def check_sampling(request: Sampling, limits: LimitsConfig) -> None:
    """Raise ApiError if a count is above its limit or fields contradict each other."""
    _at_most("n", request.n, limits.choices, "limits.choices")
    # max_tokens is an upper bound, and lowering it breaks no promise; min_tokens is a promise.
    _at_most("min_tokens", request.min_tokens, limits.output_tokens, "limits.output_tokens")
    options = request.stream_options
    if options is not None and options.include_usage and not request.stream:
        raise ApiError("stream_options: only together with stream: true", "stream_options")
    _at_most("stop", len(stop_strings(request)), limits.stop_strings, "limits.stop_strings", " strings")
    for number, text in enumerate([request.stop] if isinstance(request.stop, str) else request.stop or ()):
        param = "stop" if isinstance(request.stop, str) else f"stop[{number}]"
        _at_most(param, len(text), limits.stop_chars, "limits.stop_chars", " characters")


def check_chat(request: ChatRequest, limits: LimitsConfig) -> None:
    """Like `check_sampling`, plus the fields that only a chat has."""
    check_sampling(request, limits)
    check_fields(request)
    _at_most("top_logprobs", request.top_logprobs, limits.logprobs, "limits.logprobs")
    if request.top_logprobs and not request.logprobs:
        raise ApiError("top_logprobs: only together with logprobs: true", "top_logprobs")
    _check_min_tokens(request, max_tokens(request))
    check_messages(request.messages, limits)


def check_completion(request: CompletionRequest, limits: LimitsConfig) -> None:
    """Like `check_sampling`, plus the fields that only a text completion has."""
    check_sampling(request, limits)
    check_fields(request)
    _at_most("logprobs", request.logprobs, limits.logprobs, "limits.logprobs")
    _check_min_tokens(request, max_tokens(request))
    best_of = integer((request.model_extra or {}).get("best_of"))
    if best_of is not None and best_of != (request.n or 1):
        raise unsupported("best_of", "only the same number as n is supported")


def check_messages(messages: list[Message], limits: LimitsConfig) -> None:
    """Raise ApiError for unsupported roles and parts, and for too many images."""
    n_images = 0
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if message.role in ("tool", "function"):
            raise unsupported(f"{where}.role", f"{message.role} messages are not supported")
        if message.content is None and message.role != "assistant" and "content" not in message.model_fields_set:
            raise ApiError(f"{where}.content: this field is required", f"{where}.content")
        for path, part in parts(message, where):
            if isinstance(part, OtherPart):
                raise unsupported(path, f"content parts of type {part.type} are not supported")
            if isinstance(part, ImagePart):
                n_images += 1
                if message.role != "user":
                    raise unsupported(path, f"images belong in user messages, not in {message.role} messages")
    if n_images > limits.images:
        raise ApiError(f"messages: {n_images} images are more than limits.images {limits.images}", "messages")


def parts(message: Message, where: str) -> Iterator[tuple[str, TextPart | ImagePart | OtherPart]]:
    """Yield the content parts of a message with their paths. Plain text has no parts."""
    if isinstance(message.content, list):
        yield from ((f"{where}.content[{i}]", part) for i, part in enumerate(message.content))


def stop_strings(request: Sampling) -> list[str]:
    """Return the stop strings. An empty string stops nothing and is left out."""
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    return [text for text in stop if text]


def max_tokens(request: ChatRequest | CompletionRequest) -> int | None:
    """Return the requested maximum. In a chat, OpenAI's newer name wins. In a completion, the default is OpenAI's."""
    if isinstance(request, CompletionRequest):
        return request.max_tokens if request.max_tokens is not None else COMPLETION_TOKENS
    return request.max_completion_tokens if request.max_completion_tokens is not None else request.max_tokens


def states_max_tokens(request: ChatRequest | CompletionRequest) -> bool:
    """Whether the request itself bounds its answer."""
    return request.max_tokens is not None or getattr(request, "max_completion_tokens", None) is not None


def _check_min_tokens(request: Sampling, most: int | None) -> None:
    if most is not None and (request.min_tokens or 0) > most:
        raise ApiError(f"min_tokens: {request.min_tokens} is more than max_tokens {most}", "min_tokens")


@dataclass(frozen=True, slots=True)
class _Extra:
    """A field of a request that the protocol does not have.

    Attributes:
        known: what is known of other servers' fields at this place; None: every field here is one of a budget.
        among: the budget fields that can be meant at this place, by short names.
    """

    where: str
    name: str
    value: JsonValue
    known: KnownFields | None
    among: Mapping[str, str]

    @property
    def path(self) -> str:
        return f"{self.where}.{self.name[:_NAME_CHARS]}" if self.where else self.name[:_NAME_CHARS]

    @property
    def means_budget(self) -> bool:
        misplaced = self.where != "" and self.name in self.among
        return self.known is None or misplaced or is_budget_name(self.name)


def check_fields(request: Checked) -> None:
    """Check the fields that the protocol does not have.

    Raises:
        ApiError: a field would change the answer and is not honoured, or a field that means a budget has a wrong name
            or place. A wrong budget would cost the full price.
    """
    for extra in _extras(request):
        if extra.means_budget:
            path = printable(extra.path)
            raise invalid_vlm(path, f"no such field; {did_you_mean(extra.name, extra.among)}")
        assert extra.known is not None, "a field of a budget object means a budget"
        if extra.known.refuses(extra.name, extra.value):
            instead = extra.known.instead.get(extra.name)
            remedy = "leave it out" if instead is None else f"use {instead}"
            raise unsupported(extra.path, f"this server does not support it; {remedy}")


def warnings(request: Checked) -> list[str]:
    """Return a sentence for every field that the server ignores, in the order of the request."""
    found = [e for e in _extras(request) if e.known is not None and e.known.ignores(e.name, e.value)]
    told = [f"unknown field {printable(extra.path)}" for extra in found]
    for number, message in enumerate(_messages(request)):
        if message.name:
            told.append(f"ignored field messages[{number}].name")
    return told


def _messages(request: Checked) -> list[Message]:
    return (request.messages or []) if isinstance(request, ChatRequest | TokenizeRequest) else []


def _known(request: Checked) -> KnownFields:
    match request:
        case ChatRequest():
            return known_fields.CHAT
        case CompletionRequest():
            return known_fields.COMPLETION
        case TokenizeRequest():
            return known_fields.TOKENIZE
    return known_fields.DETOKENIZE


def _extras(request: Checked) -> Iterator[_Extra]:
    """Yield every field that the protocol does not have: of the request, its budget, its messages and their parts."""
    names = body_names()
    yield from _of(request, "", _known(request), names)
    if isinstance(request, Sampling):
        for where, fields in vlm_objects(request.vlm).items():
            yield from _of(fields, where, None, names)
        yield from _of(request.stream_options, "stream_options", known_fields.STREAM_OPTIONS, {})
    for number, message in enumerate(_messages(request)):
        where = f"messages[{number}]"
        yield from _of(message, where, known_fields.MESSAGE, {})
        for path, part in parts(message, where):
            if isinstance(part, ImagePart):
                yield from _of_image(part, path)
            elif isinstance(part, TextPart):
                yield from _of(part, path, known_fields.TEXT_PART, {})


def _of_image(part: ImagePart, path: str) -> Iterator[_Extra]:
    own = {name: f"{path}.vlm.{name}" for name in ("tokens", "detail")}
    among = dict.fromkeys(body_names(), own["tokens"]) | own
    yield from _of(part, path, known_fields.IMAGE_PART, among)
    yield from _of(part.image_url, f"{path}.image_url", known_fields.IMAGE_URL, among)
    yield from _of(part.vlm, f"{path}.vlm", None, own)


def _of(model: BaseModel | None, where: str, known: KnownFields | None, among: Mapping[str, str]) -> Iterator[_Extra]:
    for name, value in (model.model_extra or {}).items() if model is not None else ():
        yield _Extra(where, name, value, known, among)
