"""Small vision-language models in the package, and the procedural images of their training data.

Each model is an ordinary Hugging Face directory beside this file. So server, demo and tests run without a download.
"""

from pathlib import Path

_HERE = Path(__file__).resolve().parent


def names() -> list[str]:
    """Return the sorted names of the bundled models: the directories with a configuration and weights."""
    return sorted(
        entry.parent.name for entry in _HERE.glob("*/config.json") if (entry.parent / "model.safetensors").is_file()
    )


def path(name: str) -> Path | None:
    """Return the directory of the bundled model `name`, or None if no such model exists."""
    return _HERE / name if name in names() else None
