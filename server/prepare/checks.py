"""Check configurable bounds, known but unsupported fields, and unknown fields."""

from collections.abc import Iterator

from pydantic import BaseModel, JsonValue

from foveate.configs.config import LimitsConfig
from foveate.server.common.errors import VLM_PARAMETER, ApiError, printable, unsupported
from foveate.server.common.protocol import (
    ChatRequest,
    CompletionRequest,
    ImagePart,
    Message,
    OtherPart,
    Sampling,
    TextPart,
    body_level,
    vlm_objects,
)

MAX_WARNINGS = 8
COMPLETION_TOKENS = 16

# Values with no effect. Any other value of these fields would change the answer, so the server refuses the request.
_NEUTRAL: dict[str, list[JsonValue]] = {
    "tools": [[]],
    "tool_choice": ["none", "auto"],
    "functions": [[]],
    "function_call": ["none", "auto"],
    "response_format": [{"type": "text"}],
    "audio": [],
    "modalities": [["text"]],
    "web_search_options": [],
    "prompt_logprobs": [],
    "chat_template": [],
    "chat_template_kwargs": [{}],
    "continue_final_message": [False],
    "mm_processor_kwargs": [{}],
    "structured_outputs": [],
    "guided_json": [],
    "guided_regex": [],
    "guided_choice": [],
    "guided_grammar": [],
    "use_beam_search": [False],
    "length_penalty": [1, 1.0],
    "echo": [False],
    "suffix": [""],
    "include_stop_str_in_output": [False],
    "skip_special_tokens": [True],
    "bad_words": [[]],
}
# Ignored fields: storage, billing, effort, or hints that do not change the answer.
_IGNORED = {
    "store",
    "metadata",
    "service_tier",
    "parallel_tool_calls",
    "prediction",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "reasoning_effort",
    "verbosity",
    "priority",
    "request_id",
    "add_generation_prompt",
    "add_special_tokens",
    "spaces_between_special_tokens",
}
_UNSUPPORTED_MESSAGE_FIELDS = ("tool_calls", "function_call", "tool_call_id", "audio")


def _at_most(param: str, value: int | None, limit: int, setting: str, unit: str = "") -> None:
    if value is not None and value > limit:
        raise ApiError(f"{param}: {value}{unit} is more than {setting} {limit}", param)


def check_sampling(request: Sampling, limits: LimitsConfig) -> None:
    """Raise ApiError if a count is above its limit or fields contradict each other."""
    _at_most("n", request.n, limits.choices, "limits.choices")
    # max_tokens is an upper bound, and lowering it breaks no promise; min_tokens is a promise.
    _at_most("min_tokens", request.min_tokens, limits.output_tokens, "limits.output_tokens")
    if request.stream_options is not None and not request.stream:
        raise ApiError("stream_options: only together with stream: true", "stream_options")
    stop = stop_strings(request)
    _at_most("stop", len(stop), limits.stop_strings, "limits.stop_strings", " strings")
    for number, text in enumerate(stop):
        param = "stop" if isinstance(request.stop, str) else f"stop[{number}]"
        if not text:
            raise ApiError(f"{param}: an empty string stops nothing; leave it out", param)
        _at_most(param, len(text), limits.stop_chars, "limits.stop_chars", " characters")


def check_chat(request: ChatRequest, limits: LimitsConfig) -> None:
    """Like `check_sampling`, plus the fields that only a chat has."""
    check_sampling(request, limits)
    _check_fields(request)
    _at_most("top_logprobs", request.top_logprobs, limits.logprobs, "limits.logprobs")
    if request.top_logprobs is not None and not request.logprobs:
        raise ApiError("top_logprobs: only together with logprobs: true", "top_logprobs")
    _check_min_tokens(request, max_tokens(request))
    check_messages(request.messages, limits)


def check_completion(request: CompletionRequest, limits: LimitsConfig) -> None:
    """Like `check_sampling`, plus the fields that only a text completion has."""
    check_sampling(request, limits)
    _check_fields(request)
    _at_most("logprobs", request.logprobs, limits.logprobs, "limits.logprobs")
    _check_min_tokens(request, max_tokens(request))
    best_of = (request.model_extra or {}).get("best_of")
    if best_of is not None and best_of != (request.n or 1):
        raise unsupported("best_of", "only the same number as n is supported")


def check_messages(messages: list[Message], limits: LimitsConfig) -> None:
    """Raise ApiError for unsupported roles and parts, and for too many images."""
    n_images = 0
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if message.role in ("tool", "function"):
            raise unsupported(f"{where}.role", f"{message.role} messages are not supported")
        for name in _UNSUPPORTED_MESSAGE_FIELDS:
            if (message.model_extra or {}).get(name):
                raise unsupported(f"{where}.{name}", "not supported")
        if message.content is None:
            if message.role != "assistant":
                raise ApiError(f"{where}.content: this field is required", f"{where}.content")
            continue
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
    return [request.stop] if isinstance(request.stop, str) else request.stop or []


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


def _check_fields(request: Sampling) -> None:
    for name, value in (request.model_extra or {}).items():
        if name in _NEUTRAL and value is not None and value not in _NEUTRAL[name]:
            raise unsupported(name, "this server does not support it; leave it out")


def warnings(request: Sampling) -> list[str]:
    """Return the paths of unknown fields for VLM-Warning. With `vlm.strict`, an unknown field in `vlm` is an error.

    Raises:
        ApiError: `vlm.strict` is set and `vlm` holds an unknown field.
    """
    known = _NEUTRAL.keys() | _IGNORED | {"best_of"}
    found = [name for name in request.model_extra or {} if name not in known]
    in_vlm: list[str] = []
    if request.vlm is not None:
        for where, fields in vlm_objects(request.vlm).items():
            in_vlm += _unknown(fields, where)
        if in_vlm and body_level(request.vlm).value("vlm.strict"):
            name = printable(in_vlm[0])
            raise ApiError(f"{name}: no such field", name, VLM_PARAMETER)
    return [f"unknown field {printable(name)}" for name in found + in_vlm]


def _unknown(model: BaseModel | None, where: str) -> list[str]:
    return [f"{where}.{name}" for name in (model.model_extra or {})] if model is not None else []
