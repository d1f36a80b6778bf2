"""What clients may send, as pydantic models: types, and the bounds that OpenAI's API fixes.

Bounds that are settings (limits.*) are checked in `checks`, and so are fields we know and do not honour. Unknown
fields are kept, since the answer's VLM-Warning lists them. "5" and 5.0 are the number 5, as clients send them; 1 is no
boolean. Every collection has a bound and stops at its first wrong member: an error takes more memory than its value.
"""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    FiniteFloat,
    Tag,
    create_model,
)

from foveate.server.common.budget_fields import FIELDS, BudgetLevel, Stated, body_annotations, sections
from foveate.server.common.budget_kinds import MAX_COUNT
from foveate.server.common.numbers import integer, number

MAX_MESSAGES = 4096
MAX_PARTS = 2048  # of all messages together
MAX_STOP = 1024
MAX_BIASES = 1024
MAX_PROMPTS = 128
MAX_TOKEN_ID = 2**31 - 1
MAX_DETOKENIZED = 100_000  # a tenth of a second in which nothing else is served
Integer = BeforeValidator(integer)
Number = BeforeValidator(number)
TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID), Integer]
TokenCount = Annotated[int, Field(ge=1, le=MAX_COUNT), Integer]
Positive = Annotated[int, Field(ge=1), Integer]
NotNegative = Annotated[int, Field(ge=0), Integer]


class Strict(BaseModel):
    """Base of everything a client sends; unknown fields end up in `model_extra`."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())


if TYPE_CHECKING:  # the fields come from the table

    class VlmFields(Strict): ...

else:
    _NAMES = [section.partition(".")[2] for section in sections() if section != "vlm"]
    _INNER = {
        name: create_model(
            f"{name.title()}Fields",
            __base__=Strict,
            __doc__=f"`vlm.{name}`: the {name} budget of a request. Each has a header, VLM-{name.title()}-*.",
            **body_annotations(f"vlm.{name}"),
        )
        for name in _NAMES
    }
    VlmFields = create_model(
        "VlmFields",
        __base__=Strict,
        **{name: (model | None, None) for name, model in _INNER.items()},
        **body_annotations("vlm"),
    )


def vlm_objects(body: VlmFields | None) -> dict[str, BaseModel | None]:
    """The objects of the body that hold budget fields, by path."""
    inner = {section: getattr(body, section.partition(".")[2], None) for section in sections() if section != "vlm"}
    return {"vlm": body, **inner}


def body_level(body: VlmFields | None) -> BudgetLevel:
    """What the body states of the budget fields. An empty text states nothing, except for the method."""
    objects, stated = vlm_objects(body), {}
    for each in FIELDS:
        value = getattr(objects[each.section], each.key, None)
        if value is not None and not (value == "" and each.path == "vlm.visual.split"):
            stated[each.path] = Stated(value, each.path)
    return BudgetLevel(stated)


def _detail(value: object) -> object:
    """An empty text and OpenAI's "original" ask for nothing of their own."""
    return {"": None, "original": "auto"}.get(value, value) if isinstance(value, str) else value


Detail = Annotated[Literal["low", "high", "auto"] | None, BeforeValidator(_detail)]


class ImageVlmFields(Strict):
    """Beside `image_url` in a content part; goes before everything said of the whole request."""

    tokens: TokenCount | None = None
    detail: Detail = None


class TextPart(Strict):
    type: Literal["text"]
    text: str


class ImageUrl(Strict):
    url: str
    detail: Detail = None


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: ImageUrl
    vlm: ImageVlmFields | None = None


class OtherPart(Strict):
    """Known to OpenAI's API, not honoured here: refused by name in `checks`."""

    type: Literal["input_audio", "file", "video_url", "refusal"]


Part = Annotated[TextPart | ImagePart | OtherPart, Discriminator("type")]


def _content_kind(value: object) -> str:
    """Tell a text from a list, so that an error speaks of what the client sent."""
    return "text" if isinstance(value, str) else "parts"


Parts = Annotated[list[Part], Field(fail_fast=True, max_length=MAX_PARTS)]
Content = Annotated[Annotated[str, Tag("text")] | Annotated[Parts, Tag("parts")], Discriminator(_content_kind)]


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Content | None = None
    name: str | None = None


def _few_parts(messages: object) -> object:
    """Refuse too many parts before any is validated: each becomes an object of some hundred bytes."""
    listed = messages if isinstance(messages, list) else []
    contents = (message.get("content") for message in listed if isinstance(message, dict))
    n_parts = sum(len(content) for content in contents if isinstance(content, list))
    if n_parts > MAX_PARTS:
        raise ValueError(f"the messages have {n_parts} content parts; there may be {MAX_PARTS}")
    return messages


Messages = Annotated[
    list[Message], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES), BeforeValidator(_few_parts)
]


class StreamOptions(Strict):
    include_usage: bool | None = None


def _few_biases(value: object) -> object:
    """Refuse too many entries before any is validated: pydantic counts the entries of an object afterwards."""
    if isinstance(value, dict) and len(value) > MAX_BIASES:
        raise ValueError(f"{len(value)} entries; there may be {MAX_BIASES}")
    return value


Biases = Annotated[
    dict[
        Annotated[str, Field(pattern=r"^\d{1,10}$")],
        Annotated[FiniteFloat, Field(ge=-100, le=100), Number],
    ],
    Field(max_length=MAX_BIASES),
    BeforeValidator(_few_biases),
]


Stops = Annotated[list[str], Field(fail_fast=True, max_length=MAX_STOP)]
Stop = Annotated[Annotated[str, Tag("text")] | Annotated[Stops, Tag("parts")], Discriminator(_content_kind)]


class Sampling(Strict):
    """Fields that chat and text completions share."""

    model: Annotated[str, Field(max_length=1024, description="empty or absent: the served model")] | None = None
    temperature: Annotated[FiniteFloat, Field(ge=0, le=2), Number] | None = None
    top_p: Annotated[FiniteFloat, Field(gt=0, le=1), Number] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_TOKEN_ID, description="0 or -1: off"), Integer] | None = None
    min_p: Annotated[FiniteFloat, Field(ge=0, le=1), Number] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1), Integer] | None = None
    repetition_penalty: Annotated[FiniteFloat, Field(ge=0.1, le=10), Number] | None = None
    presence_penalty: Annotated[FiniteFloat, Field(ge=-2, le=2), Number] | None = None
    frequency_penalty: Annotated[FiniteFloat, Field(ge=-2, le=2), Number] | None = None
    logit_bias: Biases | None = None
    stop: Stop | None = None
    stop_token_ids: Annotated[list[TokenId], Field(fail_fast=True, max_length=64)] | None = None
    min_tokens: NotNegative | None = None
    max_tokens: Positive | None = None
    ignore_eos: bool | None = None
    n: Positive | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=512)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    vlm: VlmFields | None = None


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: Positive | None = None
    logprobs: bool | None = None
    top_logprobs: NotNegative | None = None


def _prompt_kind(value: object) -> str:
    if not isinstance(value, list):
        return "text"
    first = value[0] if value else ""
    return "ids" if isinstance(first, int) else "id_lists" if isinstance(first, list) else "texts"


# The length of the longest prompt is the model's business; limits.body_values bounds the list.
Ids = Annotated[list[TokenId], Field(fail_fast=True, min_length=1)]
Prompts = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS), Tag("texts")]
    | Annotated[Ids, Tag("ids")]
    | Annotated[list[Ids], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS), Tag("id_lists")],
    Discriminator(_prompt_kind),
]


def _off(value: object) -> object:
    """A chat says `logprobs: false`; in a text completion the same means none."""
    return None if value is False else value


class CompletionRequest(Sampling):
    """POST /v1/completions: text only."""

    prompt: Prompts
    logprobs: Annotated[NotNegative | None, BeforeValidator(_off)] = None


class TokenizeRequest(Strict):
    """POST /tokenize: of `prompt` and `messages` exactly one. An image counts as its one placeholder."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Strict):
    model: str | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True, max_length=MAX_DETOKENIZED)]
