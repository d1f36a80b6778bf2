"""litellm."""

import litellm
from attempt import MODEL, URL, attempt, content

asked = {
    "model": f"openai/{MODEL}",
    "api_base": URL,
    "api_key": "none",
    "messages": [{"role": "user", "content": content()}],
}


def stream() -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in litellm.completion(**asked, stream=True))


attempt("picture", lambda: litellm.completion(**asked).choices[0].message.content)
attempt("stream", stream)
