"""POST /v1/chat/completions."""

from collections.abc import Iterator, Sequence

import orjson
from fastapi import Request, Response

from foveate.server.answer.answer import Piece
from foveate.server.answer.logprobs import TokenTexts
from foveate.server.common.protocol import ChatRequest
from foveate.server.common.replies import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    ChatReply,
    FinishReason,
    UsageReport,
)
from foveate.server.routes.context import Context, now, sender
from foveate.server.routes.deliver import HOLE, Collected, Head, Streaming, cut, deliver


async def answer_chat(context: Context, request: Request, body: ChatRequest) -> Response:
    """Prepare and start the request, then stream or collect the answer. Raises ApiError."""
    context.check_name(body.model)
    model = context.model()
    prepared = await context.preparer.chat(body, model, context.engine.methods, sender(request))
    streaming = Streaming(
        prepared.reply_id,
        bool(body.stream),
        bool(body.stream_options and body.stream_options.include_usage),
    )
    head = Head(prepared.reply_id, now(), context.name)
    formatter = ChatFormatter(head, context.texts if body.logprobs else None, streaming.usage, prepared.generate.n)
    return await deliver(context, request, [prepared], formatter, streaming)


class ChatFormatter:
    """Formats chat completions. With include_usage, every chunk but the last has `usage: null`.

    Most chunks differ only in their text. The formatter encodes one template chunk per choice and inserts the text.

    Args:
        texts: token texts, if the request asks for log-probabilities.
    """

    def __init__(self, head: Head, texts: TokenTexts | None, with_usage: bool, n_choices: int) -> None:
        self._head, self._texts, self._with_usage, self._n_choices = head, texts, with_usage, n_choices
        self._around = [cut(self._event(index, ChatDelta(content=HOLE))) for index in range(n_choices)]

    def opening(self) -> Iterator[bytes]:
        for index in range(self._n_choices):
            yield self._event(index, ChatDelta(role="assistant", content=""))

    def events(self, piece: Piece) -> list[bytes]:
        events = []
        if self._texts is not None and piece.logprobs:
            logprobs = self._texts.chat(piece.logprobs)
            events.append(self._event(piece.choice, ChatDelta(content=piece.text), None, logprobs))
        elif piece.text:
            before, after = self._around[piece.choice]
            events.append(before + orjson.dumps(piece.text) + after)
        if piece.finish is not None:
            events.append(self._event(piece.choice, ChatDelta(), piece.finish))
        return events

    def closing(self, usage: UsageReport | None) -> Iterator[bytes]:
        if usage is not None:
            yield self._chunk([]).model_copy(update={"usage": usage}).to_event()

    def whole(self, choices: Sequence[Collected], usage: UsageReport) -> ChatReply:
        return ChatReply(
            id=self._head.id,
            object="chat.completion",
            created=self._head.created,
            model=self._head.model,
            choices=[
                ChatChoice(
                    index=index,
                    message=ChatMessage(role="assistant", content=choice.text, refusal=None),
                    logprobs=None if self._texts is None else self._texts.chat(choice.tokens),
                    finish_reason=choice.finish,
                )
                for index, choice in enumerate(choices)
            ],
            usage=usage,
        )

    def _event(
        self, index: int, delta: ChatDelta, finish: FinishReason | None = None, logprobs: ChatLogprobs | None = None
    ) -> bytes:
        choice = ChatChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=finish)
        chunk = self._chunk([choice])
        return (chunk.model_copy(update={"usage": None}) if self._with_usage else chunk).to_event()

    def _chunk(self, choices: list[ChatChunkChoice]) -> ChatChunk:
        head = self._head
        return ChatChunk(
            id=head.id, object="chat.completion.chunk", created=head.created, model=head.model, choices=choices
        )
