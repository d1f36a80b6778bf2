"""Unmodified clients against a running server: each is a script of its own in clients/, run by its own interpreter."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.scenes import Item

SCRIPTS = Path(__file__).parent / "clients"
TIMEOUT_S = 120.0
# Script, package whose version is told, further packages it needs.
PYTHON = {
    "openai_sync.py": ("openai",),
    "openai_async.py": ("openai",),
    "litellm_client.py": ("litellm",),
    "langchain_client.py": ("langchain-openai",),
    "llama_index_client.py": ("llama-index-llms-openai-like",),
    "pydantic_ai_client.py": ("pydantic-ai-slim", "pydantic-ai-slim[openai]"),
    "instructor_client.py": ("instructor",),
    "haystack_client.py": ("haystack-ai",),
    "dspy_client.py": ("dspy",),
    "smolagents_client.py": ("smolagents", "smolagents[openai]"),
}
NODE = {
    "openai_node.mjs": ("openai",),
    "ai_sdk.mjs": ("ai", "@ai-sdk/openai-compatible"),
    "langchain_node.mjs": ("@langchain/openai", "@langchain/core"),
}


@dataclass(frozen=True)
class Attempt:
    """What one client made of one request."""

    client: str
    version: str
    attempt: str
    ok: bool
    said: str


def install(folder: Path) -> None:
    """Install every client into `folder`: a virtual environment `env`, and `node_modules`."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-m", "venv", folder / "env"], check=True)
    packages = sorted({package for names in PYTHON.values() for package in names})
    subprocess.run([folder / "env/bin/pip", "install", "-q", *packages], check=True)
    packages = sorted({package for names in NODE.values() for package in names})
    subprocess.run(["npm", "install", "--silent", "--prefix", folder, *packages], check=True)


def run_all(folder: Path, url: str, model: str, item: Item, picture: Path) -> list[Attempt]:
    """Run every client of `folder` against the server at `url`, asking `item`, whose picture is also a file."""
    scripts = folder / "run"  # Node.js looks for packages beside and above a script
    shutil.copytree(SCRIPTS, scripts, dirs_exist_ok=True)
    environment = os.environ | {
        "COMPAT_URL": url,
        "COMPAT_MODEL": model,
        "COMPAT_PICTURE": str(picture),
        "COMPAT_DATA_URL": item.image_url,
        "COMPAT_QUESTION": item.question.text,
        "COMPAT_ANSWER": item.question.answer,
    }
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTHON")}
    found: list[Attempt] = []
    for script, names in (*PYTHON.items(), *NODE.items()):
        command = ["node"] if script in NODE else [str(folder / "env/bin/python")]
        version = _python_version(folder, names[0])
        if script in NODE:
            version = ", ".join(_node_version(folder, name) for name in names)
        client = f"{', '.join(names)} (Node.js)" if script in NODE else names[0]
        client += ", asynchronous" if script == "openai_async.py" else ""
        found += _run([*command, str(scripts / script)], environment, client, version)
    return found


def _run(command: list[str], environment: dict[str, str], client: str, version: str) -> Iterator[Attempt]:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"attempt"')]
    if not lines:
        said = (done.stderr.strip().splitlines() or ["no output"])[-1]
        lines = [{"attempt": "start", "ok": False, "said": said[:300]}]
    for line in lines:
        yield Attempt(client, version, line["attempt"], line["ok"], line["said"])


def _python_version(folder: Path, package: str) -> str:
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    done = subprocess.run([folder / "env/bin/python", "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "not installed"


def _node_version(folder: Path, package: str) -> str:
    file = folder / "node_modules" / package / "package.json"
    return str(json.loads(file.read_text())["version"]) if file.is_file() else "not installed"
