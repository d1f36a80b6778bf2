"""`foveate tune` prepares requests as the server does, without a type of HTTP."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
HTTP = ("fastapi", "starlette", "uvicorn", "httptools", "httpx")


def test_importing_what_tune_runs_loads_no_http() -> None:
    code = f"import sys, foveate.tune.command, foveate.tune.asking; print([m for m in {HTTP} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_tune_and_prepare_name_no_http_type() -> None:
    found = []
    for path in [*(ROOT / "tune").rglob("*.py"), *(ROOT / "server" / "prepare").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found += [f"{path.name}:{name}" for name in names if name.split(".")[0] in HTTP]
    assert not found
