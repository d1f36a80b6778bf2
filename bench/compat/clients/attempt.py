"""What every client script shares: the server to ask, the picture, and the report of each attempt as a line of JSON."""

import json
import os
from collections.abc import Callable
from pathlib import Path

URL, MODEL = os.environ["COMPAT_URL"] + "/v1", os.environ["COMPAT_MODEL"]
PICTURE = Path(os.environ["COMPAT_PICTURE"]).read_bytes()  # PNG
DATA_URL = os.environ["COMPAT_DATA_URL"]
QUESTION, ANSWER = os.environ["COMPAT_QUESTION"], os.environ["COMPAT_ANSWER"]


def content() -> list[dict[str, object]]:
    """Question and picture as OpenAI's documentation orders them."""
    return [{"type": "text", "text": QUESTION}, {"type": "image_url", "image_url": {"url": DATA_URL}}]


def attempt(name: str, ask: Callable[[], str]) -> None:
    """Run one attempt. The attempt succeeds if the client returns the right answer."""
    try:
        said = ask()
    except Exception as error:  # a client raises what it likes
        said = f"{type(error).__name__}: {error}"
    print(json.dumps({"attempt": name, "ok": said.strip() == ANSWER, "said": said[:300]}), flush=True)
