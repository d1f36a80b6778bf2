"""POST /v1/chat/completions."""

import asyncio
from collections.abc import AsyncGenerator

import orjson
from fastapi import Request, Response
from msgspec.structs import replace

from foveate.engine.common.messages import Generate, ModelInfo, TokenLogprob
from foveate.server import checks
from foveate.server.answer import HOLE, Answer, Head, Plan, cut
from foveate.server.budget import Resolved, resolve
from foveate.server.context import Context, new_id, now, sampling_params
from foveate.server.protocol import ChatRequest, ImagePart, TextPart
from foveate.server.question import caption_ids, question_ids
from foveate.server.replies import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    ChatReply,
    FinishReason,
)
from foveate.server.transport import EventStream, Track
from foveate.server.usage import count, report, resolved_header, spent_headers

LONG_TEXT = 20_000  # characters; tokenizing more would hold up the other requests of the event loop


async def answer_chat(context: Context, request: Request, body: ChatRequest) -> Response:
    """Check, prepare, start, and either stream or collect. Raises ApiError."""
    context.check_name(body.model)
    model = context.model()
    checks.check_chat(body, context.config.limits)
    warnings = checks.warnings(body)
    images = [
        (path, part)
        for number, message in enumerate(body.messages)
        for path, part in checks.parts(message, f"messages[{number}]")
        if isinstance(part, ImagePart)
    ]
    resolved = resolve(
        request.headers, body.vlm, [part for _, part in images], context.config.budget, context.engine.methods
    )
    generate = await _generate(context, model, body, images, resolved, context.salt(request.headers, body.cache_salt))
    track: Track = request.state.track
    plan = Plan(generate, checks.stop_strings(body), "messages")
    answer = Answer(context.engine, context.prompter.tokenizer, plan, track)
    try:
        await answer.start()
        headers = answer_headers(answer, resolved, warnings)
        head = Head(generate.id, now(), context.name, headers)
        if body.stream:
            return EventStream(_stream(context, body, answer, head, track), headers, track, answer.aclose)
        return await _collect(context, body, answer, head, track)
    except BaseException:
        await answer.aclose()
        raise


def answer_headers(answer: Answer, resolved: Resolved, warnings: list[str]) -> dict[str, str]:
    headers = {"VLM-Request-Id": answer.id, "VLM-Resolved": resolved_header(answer, resolved.visual.floor)}
    warnings = [*warnings, *resolved.warnings][: checks.MAX_WARNINGS]
    if warnings:
        headers["VLM-Warning"] = ", ".join(warnings)
    return headers


async def _generate(
    context: Context,
    model: ModelInfo,
    body: ChatRequest,
    images: list[tuple[str, ImagePart]],
    resolved: Resolved,
    salt: bytes,
) -> Generate:
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    sampling = sampling_params(body, checks.max_tokens(body), logprobs, context, model)
    n_chars = sum(
        len(message.content)
        if isinstance(message.content, str)
        else sum(len(part.text) for _, part in checks.parts(message, "") if isinstance(part, TextPart))
        for message in body.messages
    )
    if n_chars > LONG_TEXT:
        ids = await context.media.run(context.prompter.chat, body.messages, model)
    else:
        ids = context.prompter.chat(body.messages, model)
    loads = (
        context.media.load(part.image_url.url, f"{path}.image_url.url", cap, len(images))
        for (path, part), cap in zip(images, resolved.caps, strict=True)
    )
    loaded = list(await asyncio.gather(*loads))
    question: list[int] = []
    if resolved.reads_question:
        question = question_ids(context.prompter.tokenizer, body.messages)
        captions = caption_ids(context.prompter.tokenizer, body.messages)
        loaded = [replace(image, caption_ids=text) for image, text in zip(loaded, captions, strict=True)]
    return Generate(
        id=new_id("chatcmpl"),
        prompt_ids=ids,
        images=loaded,
        visual=resolved.visual,
        sampling=sampling,
        n=body.n or 1,
        salt=salt,
        question_ids=question,
        explain=resolved.explain,
    )


async def _collect(context: Context, body: ChatRequest, answer: Answer, head: Head, track: Track) -> Response:
    texts = [""] * len(answer.choices)
    tokens: list[list[TokenLogprob]] = [[] for _ in answer.choices]
    async for piece in answer.pieces():
        texts[piece.choice] += piece.text
        tokens[piece.choice] += piece.logprobs
    usage = report([answer])
    choices = [
        ChatChoice(
            index=index,
            message=ChatMessage(role="assistant", content=texts[index], refusal=None),
            logprobs=context.texts.chat(tokens[index]) if body.logprobs else None,
            finish_reason=choice.finish or "stop",
        )
        for index, choice in enumerate(answer.choices)
    ]
    reply = ChatReply(
        id=head.id, object="chat.completion", created=head.created, model=head.model, choices=choices, usage=usage
    )
    count(context.metrics, usage)
    track.finish("success", choices[0].finish_reason)
    headers = {**head.headers, **spent_headers([answer], usage)}
    return Response(reply.to_json(), headers=headers, media_type="application/json")


class _Chunks:
    """Builds the chunks of one stream; with include_usage every chunk but the last has `usage: null`.

    Most chunks differ in their text alone: those are cut from a chunk made once per choice.
    """

    def __init__(self, head: Head, with_usage: bool, n_choices: int) -> None:
        self._head = head
        self._with_usage = with_usage
        self._around = [cut(self.event(index, ChatDelta(content=HOLE))) for index in range(n_choices)]

    def text(self, index: int, text: str) -> bytes:
        """The chunk with nothing but text."""
        before, after = self._around[index]
        return before + orjson.dumps(text) + after

    def event(
        self, index: int, delta: ChatDelta, finish: FinishReason | None = None, logprobs: ChatLogprobs | None = None
    ) -> bytes:
        choice = ChatChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=finish)
        chunk = self._chunk([choice])
        return (chunk.model_copy(update={"usage": None}) if self._with_usage else chunk).to_event()

    def last(self, answer: Answer) -> bytes:
        return self._chunk([]).model_copy(update={"usage": report([answer])}).to_event()

    def _chunk(self, choices: list[ChatChunkChoice]) -> ChatChunk:
        head = self._head
        return ChatChunk(
            id=head.id, object="chat.completion.chunk", created=head.created, model=head.model, choices=choices
        )


async def _stream(
    context: Context, body: ChatRequest, answer: Answer, head: Head, track: Track
) -> AsyncGenerator[bytes, None]:
    with_usage = bool(body.stream_options and body.stream_options.include_usage)
    chunks = _Chunks(head, with_usage, len(answer.choices))
    for index in range(len(answer.choices)):
        yield chunks.event(index, ChatDelta(role="assistant", content=""))
    async for piece in answer.pieces():
        logprobs = context.texts.chat(piece.logprobs) if body.logprobs and piece.logprobs else None
        if logprobs is not None:
            yield chunks.event(piece.choice, ChatDelta(content=piece.text), None, logprobs)
        elif piece.text:
            yield chunks.text(piece.choice, piece.text)
        if piece.finish is not None:
            yield chunks.event(piece.choice, ChatDelta(), piece.finish)
    count(context.metrics, report([answer]))
    track.finish("success", answer.choices[0].finish or "stop")
    if with_usage:
        yield chunks.last(answer)
