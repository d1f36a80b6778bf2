"""`foveate tune` prepares requests as the server does, without a type of HTTP."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
HTTP = ("fastapi", "starlette", "uvicorn", "httptools", "httpx")


# Imports inside functions count too, so one pair goes the whole way: picture, prompt, budget and engine.
RUN = f"""
import sys
import foveate.tune.command
from foveate.configs.config import CacheConfig, Config, ModelConfig
from foveate.server.find_model import find_model
from foveate.tune.asking import Asker
from foveate.tune.data import scenes

asker = Asker(*find_model(Config(model=ModelConfig(path="tiny-llava"), cache=CacheConfig(memory_mb=16))))
(answer,) = asker.ask(asker.prepare(scenes(1)[:1]), "foveal", 0.5, max_tokens=2)
print(0 < answer.visual.kept < answer.visual.offered, [name for name in {HTTP} if name in sys.modules])
"""


def test_tune_asks_about_a_picture_without_http() -> None:
    done = subprocess.run([sys.executable, "-P", "-c", RUN], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True []"


def test_tune_and_prepare_name_no_http_type() -> None:
    found = []
    for path in [*(ROOT / "tune").rglob("*.py"), *(ROOT / "server" / "prepare").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found += [f"{path.name}:{name}" for name in names if name.split(".")[0] in HTTP]
    assert not found
