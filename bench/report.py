"""Results as files: JSON for programs, Markdown for people, both with command, date and machine."""

import importlib
import json
import math
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"

Json = dict[str, "Json"] | list["Json"] | str | int | float | bool | None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def provenance(module: str) -> dict[str, Json]:
    """The command, the date and the machine."""
    return {
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "load_1m": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": version("torch"),
        "foveate": version("foveate"),
    }


def wilson(same: int, asked: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the confidence interval of a proportion (Wilson, 1927). Default: 95 %, two-sided."""
    p = same / asked
    middle, scale = p + z * z / (2 * asked), 1 + z * z / asked
    spread = z * math.sqrt(p * (1 - p) / asked + z * z / (4 * asked * asked))
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table. The first column is text, the others are numbers."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


NO_PLOT = "No plot: matplotlib is not installed (`pip install foveate[bench]`)."


def pyplot() -> Any:
    """Matplotlib's pyplot, drawing into files, or None where matplotlib is not installed."""
    try:
        importlib.import_module("matplotlib").use("Agg")
        return importlib.import_module("matplotlib.pyplot")
    except ImportError:
        return None


def write(
    name: str,
    title: str,
    made_by: dict[str, Json],
    results: Json,
    sections: Sequence[str],
    page: Path | None = None,
) -> None:
    """Write results/`name`.json and the Markdown, to `page` or results/`name`.md, and print the Markdown."""
    RESULTS.mkdir(exist_ok=True)
    document = {"made_by": made_by, "results": results}
    (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
    where = ", ".join(f"{key} {value}" for key, value in made_by.items() if key not in ("command", "date"))
    text = "\n\n".join([f"# {title}", f"`{made_by['command']}`, {made_by['date']}; {where}.", *sections]) + "\n"
    (page or RESULTS / f"{name}.md").write_text(text)
    print(text)
