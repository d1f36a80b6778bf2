"""Small vision-language models that ship with the package, and the procedural pictures they were trained on.

Each model is an ordinary Hugging Face directory beside this file, so that the server, its demo and its tests run
without a download.
"""

from pathlib import Path

_HERE = Path(__file__).resolve().parent


def names() -> list[str]:
    """Names of the bundled models, sorted: the directories that hold a configuration and weights."""
    return sorted(
        entry.parent.name for entry in _HERE.glob("*/config.json") if (entry.parent / "model.safetensors").is_file()
    )


def path(name: str) -> Path | None:
    """Directory of the bundled model of that name, or None if there is no such model."""
    return _HERE / name if name in names() else None
