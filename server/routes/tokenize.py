"""POST /tokenize and /detokenize, in vLLM's format. Clients can count tokens before a request."""

from fastapi import APIRouter, Response

from foveate.server.common.errors import ApiError
from foveate.server.common.protocol import DetokenizeRequest, TokenizeRequest
from foveate.server.common.replies import Detokenized, Reply, Tokens, refusals
from foveate.server.prepare import checks
from foveate.server.prepare.request import conversation
from foveate.server.routes.context import Context
from foveate.server.routes.deliver import bounded, warning_header
from foveate.server.transport.route import ApiRoute


def tokens_router(context: Context) -> APIRouter:
    routes = APIRouter(route_class=ApiRoute, tags=["tokens"], responses={**refusals(400, 401, 404, 413, 415, 503)})

    @routes.post("/tokenize", response_model=Tokens)
    async def tokenize(body: TokenizeRequest) -> Response:
        if body.model is not None:
            context.check_name(body.model)
        checks.check_fields(body)
        model = context.model()
        if (body.prompt is None) == (body.messages is None):
            raise ApiError("prompt: give prompt or messages, one of them", "prompt")
        run = context.media.run
        if body.messages is not None:
            checks.check_messages(body.messages, context.config.limits)
            turns = conversation(body.messages)
            ids = await run(context.prompter.chat, turns, model, body.add_generation_prompt is not False)
        else:
            special = body.add_special_tokens is not False
            ids = await run(context.prompter.complete, body.prompt or "", model, "prompt", special)
        reply = Tokens(count=len(ids), max_model_len=model.max_context, tokens=ids)
        if body.return_token_strs:
            pieces = [context.prompter.tokenizer.id_to_token(token_id) for token_id in ids]
            reply = reply.model_copy(update={"token_strs": pieces})
        return _answer(reply, body)

    @routes.post("/detokenize", response_model=Detokenized)
    async def detokenize(body: DetokenizeRequest) -> Response:
        if body.model is not None:
            context.check_name(body.model)
        checks.check_fields(body)
        ids = body.tokens
        if max(ids, default=0) >= context.model().vocab_size:
            raise ApiError(f"tokens: {max(ids)} is not in the vocabulary", "tokens")
        text = context.prompter.tokenizer.decode(ids, skip_special_tokens=False)
        return _answer(Detokenized(prompt=text), body)

    return routes


def _answer(reply: Reply, body: TokenizeRequest | DetokenizeRequest) -> Response:
    headers = warning_header(bounded(checks.warnings(body)))
    return Response(reply.to_json(), headers=headers, media_type="application/json")
