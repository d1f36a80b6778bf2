"""POST /v1/completions: text in, text out; one or several prompts, as text or token ids."""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

import orjson
from fastapi import Request, Response

from foveate.engine.common.messages import Generate, ModelInfo, TokenLogprob
from foveate.server import checks
from foveate.server.answer import HOLE, Answer, Head, Plan, close_all, cut, merge, start_all
from foveate.server.budget import resolve
from foveate.server.chat import LONG_TEXT, answer_headers
from foveate.server.context import Context, new_id, now, sampling_params
from foveate.server.protocol import CompletionRequest
from foveate.server.replies import FinishReason, TextChoice, TextLogprobs, TextReply, UsageReport
from foveate.server.transport import EventStream, Track
from foveate.server.usage import count, report, spent_headers


@dataclass(slots=True)
class _Collected:
    """What came of one choice."""

    text: str
    tokens: list[TokenLogprob]


async def answer_completion(context: Context, request: Request, body: CompletionRequest) -> Response:
    """Check, prepare, start every prompt, and either stream or collect. Raises ApiError."""
    context.check_name(body.model)
    model = context.model()
    checks.check_completion(body, context.config.limits)
    warnings = checks.warnings(body)
    resolved = resolve(request.headers, body.vlm, [], context.config.budget, context.engine.methods)
    prompts = await _prompts(context, body, model)
    salt = context.salt(request.headers, body.cache_salt)
    sampling = sampling_params(body, checks.max_tokens(body), body.logprobs, context, model)
    reply_id = new_id("cmpl")
    track: Track = request.state.track
    answers = [
        Answer(
            context.engine,
            context.prompter.tokenizer,
            Plan(
                Generate(id=f"{reply_id}-{i}", prompt_ids=ids, sampling=sampling, n=body.n or 1, salt=salt),
                checks.stop_strings(body),
                "prompt",
            ),
            track,
        )
        for i, ids in enumerate(prompts)
    ]
    await start_all(answers)
    headers = answer_headers(answers[0], resolved, warnings) | {"VLM-Request-Id": reply_id}
    head = Head(reply_id, now(), context.name, headers)
    if body.stream:
        stream = _stream(context, body, answers, head, track)
        return EventStream(stream, headers, track, lambda: close_all(answers))
    return await _collect(context, body, answers, head, track)


async def _prompts(context: Context, body: CompletionRequest, model: ModelInfo) -> list[list[int]]:
    prompt = body.prompt
    texts = [prompt] if isinstance(prompt, str) else [p for p in prompt if isinstance(p, str)]
    prompter = context.prompter
    if texts:
        params = ["prompt"] if isinstance(prompt, str) else [f"prompt[{i}]" for i in range(len(texts))]
        if sum(map(len, texts)) > LONG_TEXT:
            run = context.media.run
            return [await run(prompter.complete, t, model, p) for t, p in zip(texts, params, strict=True)]
        return [prompter.complete(t, model, p) for t, p in zip(texts, params, strict=True)]
    lists = [ids for ids in prompt if isinstance(ids, list)] or [[i for i in prompt if isinstance(i, int)]]
    for ids in lists:
        prompter.check_ids(ids, model, "prompt")
    return lists


def _reply(head: Head, choices: list[TextChoice]) -> TextReply:
    return TextReply(id=head.id, object="text_completion", created=head.created, model=head.model, choices=choices)


async def _collect(
    context: Context, body: CompletionRequest, answers: Sequence[Answer], head: Head, track: Track
) -> Response:
    n = len(answers[0].choices)
    collected = [_Collected("", []) for _ in range(n * len(answers))]
    async for number, piece in merge(answers):
        entry = collected[number * n + piece.choice]
        entry.text += piece.text
        entry.tokens += piece.logprobs
    usage = report(answers)
    finishes: list[FinishReason] = [choice.finish or "stop" for answer in answers for choice in answer.choices]
    choices = [
        TextChoice(
            index=index,
            text=entry.text,
            logprobs=None if body.logprobs is None else context.texts.completion(entry.tokens, 0),
            finish_reason=finish,
        )
        for index, (entry, finish) in enumerate(zip(collected, finishes, strict=True))
    ]
    reply = _with_usage(_reply(head, choices), usage)
    count(context.metrics, usage)
    track.finish("success", finishes[0])
    headers = {**head.headers, **spent_headers(answers, usage)}
    return Response(reply.to_json(), headers=headers, media_type="application/json")


def _with_usage(reply: TextReply, usage: UsageReport | None) -> TextReply:
    return reply.model_copy(update={"usage": usage})


def _event(head: Head, choice: TextChoice, include_usage: bool) -> bytes:
    chunk = _reply(head, [choice])
    return (_with_usage(chunk, None) if include_usage else chunk).to_event()


async def _stream(
    context: Context, body: CompletionRequest, answers: Sequence[Answer], head: Head, track: Track
) -> AsyncGenerator[bytes, None]:
    options = body.stream_options
    include_usage = bool(options and options.include_usage)
    n = len(answers[0].choices)
    around = [
        cut(_event(head, TextChoice(index=i, text=HOLE, logprobs=None, finish_reason=None), include_usage))
        for i in range(n * len(answers))
    ]
    pieces = merge(answers)
    try:
        async for number, piece in pieces:
            index = number * n + piece.choice
            if body.logprobs is None and piece.finish is None:  # most chunks: they differ in their text alone
                before, after = around[index]
                yield before + orjson.dumps(piece.text) + after
                continue
            choice = answers[number].choices[piece.choice]
            logprobs: TextLogprobs | None = None
            if body.logprobs is not None and piece.logprobs:
                logprobs = context.texts.completion(piece.logprobs, choice.offset)
            choice.offset += len(piece.text)
            text = TextChoice(index=index, text=piece.text, logprobs=logprobs, finish_reason=piece.finish)
            yield _event(head, text, include_usage)
        usage = report(answers)
        count(context.metrics, usage)
        track.finish("success", answers[0].choices[0].finish or "stop")
        if include_usage:
            yield _with_usage(_reply(head, []), usage).to_event()
    finally:
        await pieces.aclose()
