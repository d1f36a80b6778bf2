"""openai, the asynchronous client."""

import asyncio

from attempt import MODEL, URL, attempt, content
from openai import AsyncOpenAI

messages = [{"role": "user", "content": content()}]


async def ask() -> str:
    async with AsyncOpenAI(base_url=URL, api_key="none") as client:
        reply = await client.chat.completions.create(model=MODEL, messages=messages)
        return reply.choices[0].message.content


async def stream() -> str:
    async with AsyncOpenAI(base_url=URL, api_key="none") as client:
        chunks = await client.chat.completions.create(model=MODEL, messages=messages, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])


attempt("picture", lambda: asyncio.run(ask()))
attempt("stream", lambda: asyncio.run(stream()))
