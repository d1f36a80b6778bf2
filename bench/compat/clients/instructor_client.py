"""instructor, without a response model."""

import instructor
from attempt import MODEL, URL, attempt, content
from openai import OpenAI

client = instructor.from_openai(OpenAI(base_url=URL, api_key="none"))
messages = [{"role": "user", "content": content()}]


def ask() -> str:
    reply = client.chat.completions.create(model=MODEL, messages=messages, response_model=None)
    return reply.choices[0].message.content


attempt("picture", ask)
