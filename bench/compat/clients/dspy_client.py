"""dspy."""

import dspy
from attempt import MODEL, URL, attempt, content

lm = dspy.LM(f"openai/{MODEL}", api_base=URL, api_key="none", cache=False)


def ask() -> str:
    (said,) = lm(messages=[{"role": "user", "content": content()}])
    return said if isinstance(said, str) else said["text"]


attempt("picture", ask)
