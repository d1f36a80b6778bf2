"""POST /v1/completions: text completions for one or several prompts, given as text or token ids."""

from collections.abc import Iterator, Sequence

import orjson
from fastapi import Request, Response

from foveate.server.answer.answer import Piece
from foveate.server.answer.logprobs import TokenTexts
from foveate.server.common.protocol import CompletionRequest
from foveate.server.common.replies import TextChoice, TextReply, UsageReport
from foveate.server.routes.context import Context, now, sender
from foveate.server.routes.deliver import HOLE, Collected, Head, Streaming, cut, deliver


async def answer_completion(context: Context, request: Request, body: CompletionRequest) -> Response:
    """Prepare and start every prompt, then stream or collect the answers. Raises ApiError."""
    context.check_name(body.model)
    model = context.model()
    prepared = await context.preparer.completion(body, model, context.engine.methods, sender(request))
    streaming = Streaming(
        prepared[0].reply_id,
        bool(body.stream),
        bool(body.stream_options and body.stream_options.include_usage),
    )
    head = Head(streaming.reply_id, now(), context.name)
    n_choices = len(prepared) * prepared[0].generate.n
    texts = None if body.logprobs is None else context.texts
    return await deliver(context, request, prepared, TextFormatter(head, texts, streaming.usage, n_choices), streaming)


class TextFormatter:
    """Formats text completions. With include_usage, every chunk but the last has `usage: null`.

    Args:
        texts: token texts, if the request asks for log-probabilities.
    """

    def __init__(self, head: Head, texts: TokenTexts | None, with_usage: bool, n_choices: int) -> None:
        self._head, self._texts, self._with_usage = head, texts, with_usage
        self._offsets = [0] * n_choices  # number of characters sent, for the offsets in log-probabilities
        choices = (TextChoice(index=i, text=HOLE, logprobs=None, finish_reason=None) for i in range(n_choices))
        self._around = [cut(self._event(choice)) for choice in choices]

    def opening(self) -> Iterator[bytes]:
        return iter(())

    def events(self, piece: Piece) -> list[bytes]:
        index = piece.choice
        if self._texts is None and piece.finish is None:  # most chunks differ only in their text
            before, after = self._around[index]
            return [before + orjson.dumps(piece.text) + after]
        logprobs = None
        if self._texts is not None and piece.logprobs:
            logprobs = self._texts.completion(piece.logprobs, self._offsets[index])
        self._offsets[index] += len(piece.text)
        choice = TextChoice(index=index, text=piece.text, logprobs=logprobs, finish_reason=piece.finish)
        return [self._event(choice)]

    def closing(self, usage: UsageReport | None) -> Iterator[bytes]:
        if usage is not None:
            yield self._reply([]).model_copy(update={"usage": usage}).to_event()

    def whole(self, choices: Sequence[Collected], usage: UsageReport) -> TextReply:
        texts = [
            TextChoice(
                index=index,
                text=choice.text,
                logprobs=None if self._texts is None else self._texts.completion(choice.tokens, 0),
                finish_reason=choice.finish,
            )
            for index, choice in enumerate(choices)
        ]
        return self._reply(texts).model_copy(update={"usage": usage})

    def _event(self, choice: TextChoice) -> bytes:
        chunk = self._reply([choice])
        return (chunk.model_copy(update={"usage": None}) if self._with_usage else chunk).to_event()

    def _reply(self, choices: list[TextChoice]) -> TextReply:
        head = self._head
        return TextReply(id=head.id, object="text_completion", created=head.created, model=head.model, choices=choices)
