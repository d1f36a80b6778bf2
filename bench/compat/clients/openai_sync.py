"""openai, the synchronous client."""

from attempt import ANSWER, MODEL, URL, attempt, content
from openai import OpenAI

client = OpenAI(base_url=URL, api_key="none")
messages = [{"role": "user", "content": content()}]


def stream() -> str:
    chunks = client.chat.completions.create(
        model=MODEL, messages=messages, stream=True, stream_options={"include_usage": True}
    )
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def budget() -> str:
    reply = client.chat.completions.create(model=MODEL, messages=messages, extra_headers={"VLM-Visual-Ratio": "50%"})
    visual = reply.usage.model_extra["vlm"]["visual"]
    assert 2 * visual["kept"] <= visual["offered"] + 1, visual
    return reply.choices[0].message.content


def models() -> str:
    assert MODEL in [model.id for model in client.models.list()]
    assert client.models.retrieve(MODEL).id == MODEL
    return ANSWER


attempt("picture", lambda: client.chat.completions.create(model=MODEL, messages=messages).choices[0].message.content)
attempt("stream", stream)
attempt("budget", budget)
attempt("models", models)
