"""Reply bodies as pydantic models, which also define /openapi.json. `to_json` omits fields that were not set."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

FinishReason = Literal["stop", "length"]


class Reply(BaseModel):
    model_config = ConfigDict(protected_namespaces=(), frozen=True)

    def to_json(self) -> bytes:
        """Return JSON. Fields that were not set are omitted; fields set to None are null."""
        return self.model_dump_json(exclude_unset=True).encode()

    def to_event(self) -> bytes:
        """Return the JSON as one server-sent event."""
        return b"data: " + self.to_json() + b"\n\n"


class ErrorDetail(Reply):
    message: str
    type: str
    param: str | None
    code: str


class ErrorReply(Reply):
    error: ErrorDetail


def refusals(*statuses: int) -> dict[int | str, dict[str, type[ErrorReply]]]:
    """Return the error replies of a route, for /openapi.json."""
    return {status: {"model": ErrorReply} for status in statuses}


class ImageReport(Reply):
    grid: list[int]  # rows, columns
    offered: int
    kept: int
    kept_map: list[int] | None = None  # run lengths in reading order: dropped, kept, dropped, ...


class VisualReport(Reply):
    offered: int
    kept: int  # tokens that enter the decoder
    kept_mean: float  # tokens in a decoder layer, mean over the layers
    by_layer: list[tuple[int, int]] | None = None  # (first layer, tokens from there on), if the decoder drops tokens
    method: str
    per_image: list[ImageReport]


class TimeReport(Reply):
    queue: float
    encode: float
    reduce: float
    prefill: float
    decode: float


class SchedulingReport(Reply):
    preemptions: int


class KvReport(Reply):
    peak_tokens: int


class VlmReport(Reply):
    """`usage.vlm`."""

    visual: VisualReport
    time_ms: TimeReport
    sched: SchedulingReport
    kv: KvReport
    warnings: list[str] | None = None  # as in VLM-Warning; absent if there are none


class PromptDetails(Reply):
    image_tokens: int
    cached_tokens: int


class UsageReport(Reply):
    prompt_tokens: int  # after reduction
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    vlm: VlmReport


class TopLogprob(Reply):
    token: str
    logprob: float
    bytes: list[int] | None


class ContentLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Reply):
    content: list[ContentLogprob]
    refusal: None = None


class ChatMessage(Reply):
    role: Literal["assistant"]
    content: str
    refusal: None = None


class ChatChoice(Reply):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatReply(Reply):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageReport


class ChatDelta(Reply):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(Reply):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatChunk(Reply):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: UsageReport | None = None


class TextLogprobs(Reply):
    text_offset: list[int]
    token_logprobs: list[float]
    tokens: list[str]
    top_logprobs: list[dict[str, float]]


class TextChoice(Reply):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason | None


class TextReply(Reply):
    """The whole answer. A chunk of a stream has fewer fields."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: UsageReport | None = None


class SamplingCard(Reply):
    """Sampling of requests that leave it out."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    max_tokens: int | None


class ModelCard(Reply):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    max_model_len: int
    sampling_defaults: SamplingCard


class ModelList(Reply):
    object: Literal["list"]
    data: list[ModelCard]


class MethodField(Reply):
    name: str
    type: str
    default: bool | int | float | str


class Method(Reply):
    name: str
    summary: str
    source: str
    question_aware: bool
    shared: bool
    fits: str
    stage: str
    first_only: bool
    fields: list[MethodField]


class MethodList(Reply):
    object: Literal["list"]
    default: str
    data: list[Method]


class Tokens(Reply):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(Reply):
    prompt: str
