"""Turn a validated request into the engine's `Generate`. All routes and `tune` share this code."""

import asyncio
import secrets
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

from msgspec.structs import replace

from foveate.configs.config import Config
from foveate.engine.common import Generate, Image, MethodInfo, ModelInfo, SamplingParams
from foveate.server.common.budget_fields import Headers
from foveate.server.common.caller import Caller
from foveate.server.common.errors import ApiError
from foveate.server.common.protocol import ChatRequest, CompletionRequest, ImagePart, Message, Sampling, TextPart
from foveate.server.prepare import checks
from foveate.server.prepare.budget import ImageWish, Resolved, resolve
from foveate.server.prepare.conversation import MessageText, PicturePlace, Turn
from foveate.server.prepare.defaults import SamplingDefaults
from foveate.server.prepare.media import Media
from foveate.server.prepare.prompt import Prompter
from foveate.server.prepare.question import caption_ids, question_ids

LONG_TEXT = 20_000  # characters; tokenizing a longer text would block the event loop
_COLDEST = 1e-4  # below, logits / temperature overflows; sampling is greedy well above this value
_SEED_MASK = 2**63 - 1
_Number = TypeVar("_Number", int, float)


@dataclass(frozen=True, slots=True)
class Sender:
    """The caller of a request, and the request's budget headers in the order received."""

    caller: Caller
    headers: Headers


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request ready for the engine.

    Attributes:
        reply_id: the id of the reply, which several prompts of one request share.
        prompt_param: the route's name for the prompt, which the engine calls "messages".
        warnings: fields that the server ignores, for the client.
    """

    generate: Generate
    reply_id: str
    stop: Sequence[str]
    prompt_param: str
    resolved: Resolved
    warnings: Sequence[str]


class Preparer:
    """Prepares requests for one model.

    Args:
        config: limits and the default budget.
        defaults: sampling where a request leaves it out.
    """

    def __init__(self, config: Config, prompter: Prompter, media: Media, defaults: SamplingDefaults) -> None:
        self._limits, self._budget, self.defaults = config.limits, config.budget, defaults
        self.prompter, self.media = prompter, media

    async def chat(
        self, body: ChatRequest, model: ModelInfo, methods: Sequence[MethodInfo], sender: Sender
    ) -> Prepared:
        """Check a chat, resolve the budget, load the images and tokenize the prompt.

        Raises:
            ApiError: a field is wrong, or an image or the prompt is unusable.
        """
        checks.check_chat(body, self._limits)
        warnings = checks.warnings(body)
        turns, images = conversation(body.messages), list(_images(body.messages))
        resolved = resolve(body.vlm, [wish_of(part) for _, part in images], self._budget, methods, sender.headers)
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        sampling = sampling_params(body, self._max_tokens(body), logprobs, model, self.defaults)
        warnings += _equal_choices(body, sampling)
        ids = await self.media.run(self.prompter.chat, turns, model)  # a template is code of the checkpoint
        loaded = await self._load(images, resolved)
        question: list[int] = []
        if resolved.reads_question:
            loaded, question = await self.media.run(with_question, self.prompter, turns, loaded)
        generate = Generate(
            id=new_id("chatcmpl"),
            prompt_ids=ids,
            images=loaded,
            visual=resolved.visual,
            sampling=sampling,
            n=body.n or 1,
            salt=sender.caller.salt(body.cache_salt),
            question_ids=question,
            explain=resolved.explain,
        )
        return Prepared(generate, generate.id, checks.stop_strings(body), "messages", resolved, warnings)

    async def completion(
        self, body: CompletionRequest, model: ModelInfo, methods: Sequence[MethodInfo], sender: Sender
    ) -> list[Prepared]:
        """Like `chat`, one result per prompt of a text completion. Their ids differ only after the last hyphen."""
        checks.check_completion(body, self._limits)
        warnings = checks.warnings(body)
        resolved = resolve(body.vlm, [], self._budget, methods, sender.headers)
        prompts = await self._prompts(body, model)
        salt = sender.caller.salt(body.cache_salt)
        sampling = sampling_params(body, self._max_tokens(body), body.logprobs, model, self.defaults)
        warnings += _equal_choices(body, sampling)
        reply_id, stop = new_id("cmpl"), checks.stop_strings(body)
        return [
            Prepared(
                Generate(id=f"{reply_id}-{i}", prompt_ids=ids, sampling=sampling, n=body.n or 1, salt=salt),
                reply_id,
                stop,
                "prompt",
                resolved,
                warnings,
            )
            for i, ids in enumerate(prompts)
        ]

    def _max_tokens(self, body: ChatRequest | CompletionRequest) -> int:
        """The upper bound of an answer: what the request asks, else the checkpoint, within limits.output_tokens.

        A text completion has OpenAI's default as well, the lesser of the two. A stated min_tokens lifts the
        checkpoint's default, which the request did not choose.
        """
        most, asked = self._limits.output_tokens, checks.max_tokens(body)
        if checks.states_max_tokens(body) or self.defaults.max_tokens is None:
            return min(asked or most, most)
        return min(max(self.defaults.max_tokens, body.min_tokens or 0), asked or most, most)

    async def _load(self, images: Sequence[tuple[str, ImagePart]], resolved: Resolved) -> list[Image]:
        loads = (
            self.media.load(part.image_url.url, f"{path}.image_url.url", cap, len(images))
            for (path, part), cap in zip(images, resolved.caps, strict=True)
        )
        return list(await asyncio.gather(*loads))

    async def _prompts(self, body: CompletionRequest, model: ModelInfo) -> list[list[int]]:
        prompt, prompter = body.prompt, self.prompter
        if isinstance(prompt, str) or isinstance(prompt[0], str):
            texts = [prompt] if isinstance(prompt, str) else prompt
            params = ["prompt"] if isinstance(prompt, str) else [f"prompt[{i}]" for i in range(len(texts))]
            if sum(map(len, texts)) > LONG_TEXT:
                run = self.media.run
                return [await run(prompter.complete, t, model, p) for t, p in zip(texts, params, strict=True)]
            return [prompter.complete(t, model, p) for t, p in zip(texts, params, strict=True)]
        # Not member by member: a prompt of token ids may have as many members as limits.body_values.
        lists = cast("list[list[int]]", prompt if isinstance(prompt[0], list) else [prompt])
        for ids in lists:
            prompter.check_ids(ids, model, "prompt")
        return lists


def conversation(messages: Sequence[Message]) -> list[Turn]:
    """Turn checked messages into the turns of the prompt."""
    turns = []
    for number, message in enumerate(messages):
        path = f"messages[{number}]"
        content: str | list[MessageText | PicturePlace]
        if isinstance(message.content, list):
            listed = checks.parts(message, path)
            content = [MessageText(p.text, at) if isinstance(p, TextPart) else PicturePlace(at) for at, p in listed]
        else:
            content = message.content or ""
        turns.append(Turn(message.role, content, path))
    return turns


def with_question(prompter: Prompter, turns: Sequence[Turn], images: Sequence[Image]) -> tuple[list[Image], list[int]]:
    """Return the images with captions, and the question's token ids, for a method that reads them."""
    captions = caption_ids(prompter.text_ids, turns)
    captioned = [replace(image, caption_ids=ids) for image, ids in zip(images, captions, strict=True)]
    return captioned, question_ids(prompter.text_ids, turns)


def _images(messages: Sequence[Message]) -> Iterator[tuple[str, ImagePart]]:
    """Yield the image parts with their paths."""
    for number, message in enumerate(messages):
        for path, part in checks.parts(message, f"messages[{number}]"):
            if isinstance(part, ImagePart):
                yield path, part


def wish_of(part: ImagePart) -> ImageWish:
    """Read the budget fields of one image. The part's own `vlm` overrides `image_url.detail`."""
    own = part.vlm
    detail = own.detail if own is not None and own.detail is not None else part.image_url.detail
    return ImageWish(tokens=None if own is None else own.tokens, detail=detail)


def new_id(prefix: str) -> str:
    """Create a request id. Clients never choose ids, because an id is enough to abort a request."""
    return f"{prefix}-{uuid.uuid4().hex}"


def sampling_params(
    request: Sampling, max_tokens: int, logprobs: int | None, model: ModelInfo, defaults: SamplingDefaults
) -> SamplingParams:
    """Build the sampling parameters of a request.

    Args:
        max_tokens: upper bound of the answer. The engine lowers the bound to what the context leaves.
        logprobs: number of alternatives per token. 0: only the chosen token. None: no log-probabilities.
        defaults: of the fields that the request omits, or states as null.
    """
    bias = {int(token): value for token, value in (request.logit_bias or {}).items()}
    for param, ids in (("logit_bias", bias), ("stop_token_ids", request.stop_token_ids or [])):
        worst = max(ids, default=0)
        if worst >= model.vocab_size:
            raise ApiError(f"{param}: token {worst} is not in the vocabulary of {model.vocab_size} tokens", param)
    temperature = _or(request.temperature, defaults.temperature)
    seed = secrets.randbits(63) if request.seed is None else request.seed & _SEED_MASK
    return SamplingParams(
        temperature=0.0 if temperature < _COLDEST else temperature,
        top_p=_or(request.top_p, defaults.top_p),
        top_k=min(max(_or(request.top_k, defaults.top_k), 0), model.vocab_size),
        min_p=_or(request.min_p, defaults.min_p),
        seed=seed,
        repetition_penalty=_or(request.repetition_penalty, defaults.repetition_penalty),
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        logit_bias=bias,
        stop_token_ids=tuple(request.stop_token_ids or ()),
        min_tokens=request.min_tokens or 0,
        max_tokens=max_tokens,
        ignore_eos=bool(request.ignore_eos),
        logprobs=logprobs,
    )


def _or(stated: _Number | None, default: _Number) -> _Number:
    return default if stated is None else stated


def _equal_choices(request: Sampling, sampling: SamplingParams) -> list[str]:
    """The warning that greedy choices are equal, where the checkpoint and not the request chose greedy."""
    if (request.n or 1) == 1 or sampling.temperature > 0 or request.temperature is not None:
        return []
    return [f"n: the {request.n} choices are equal since this checkpoint samples greedily; state a temperature"]
