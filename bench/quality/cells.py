"""A cell of `bench.quality`: one model, method and budget, scored and timed. Cells outlive a run."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import foveate.bundled
from bench.report import RESULTS, Json, wilson
from bench.scenes import Item

ROOT = Path(__file__).parents[2]
METHOD_FOLDERS = ("engine/reduce/methods", "engine/prune/methods", "bench/reducers")


@dataclass(frozen=True)
class Times:
    """Medians over a few pictures, one client, nothing cached. The client measures TTFT, the server the other times."""

    n: int
    ttft_ms: float
    encode_ms: float
    reduce_ms: float
    prefill_ms: float  # from its first batch to its first token, encoding and reduction included
    kv_bytes: int  # of the prompt, mean
    token_ms: float = 0.0  # of decoding; 0: not timed


@dataclass(frozen=True)
class Cell:
    """One model, method and budget, scored."""

    model: str
    method: str
    ratio: float
    offered: float  # visual tokens per picture, mean
    kept: float
    right: dict[str, int]  # by kind
    asked: dict[str, int]
    weights: str = "auto"  # as model.weights was set
    order: str = "picture first"  # or "text first": the order of question and picture in the message
    code: str = ""  # digest of the method's own files, the model and the questions
    times: Times | None = None

    @property
    def overall(self) -> tuple[int, int]:
        return sum(self.right.values()), sum(self.asked.values())

    def of(self, kind: str | None) -> tuple[int, int]:
        """Right answers and questions, of one kind or of all kinds."""
        return self.overall if kind is None else (self.right.get(kind, 0), self.asked.get(kind, 0))

    def share(self, kind: str | None = None) -> float:
        """Exact match in percent."""
        right, asked = self.of(kind)
        return 100 * right / asked if asked else math.nan


@dataclass(frozen=True)
class Answer:
    item: Item
    text: str
    offered: int
    kept: float  # in a layer of the decoder, on average

    @property
    def right(self) -> bool:
        return self.text.strip() == self.item.question.answer


def score(model: str, method: str, ratio: float, answers: Sequence[Answer]) -> Cell:
    return Cell(
        model=model,
        method=method,
        ratio=ratio,
        offered=sum(a.offered for a in answers) / len(answers),
        kept=sum(a.kept for a in answers) / len(answers),
        right=dict(Counter(a.item.question.kind for a in answers if a.right)),
        asked=dict(Counter(a.item.question.kind for a in answers)),
    )


def code_of(model: str, method: str, n_scenes: int) -> str:
    """Digest of the files that one cell depends on: the method, the model and the questions.

    The digest leaves out code that all methods share. After a change of such code, start anew.
    """
    found = hashlib.sha256(f"{model} {method} {n_scenes}".encode())
    files = [ROOT / "foveate" / "bundled" / "scenes.py"]
    if (bundled := foveate.bundled.path(model)) is not None:
        files.append(bundled / "model.safetensors")
    for stage in method.split("+"):
        name = stage.partition(";")[0]
        files += [file for folder in METHOD_FOLDERS if (file := ROOT / folder / f"{name}.py").is_file()]
    for file in files:
        found.update(file.read_bytes())
    return found.hexdigest()[:16]


def as_json(cell: Cell) -> dict[str, Json]:
    right, asked = cell.overall
    low, high = wilson(right, asked)
    return {**asdict(cell), "exact_match": right / asked, "low": low, "high": high}


class Kept:
    """The cells of a results file. The file is written after each new cell, so that a stopped run can be resumed."""

    def __init__(self, name: str, made_by: dict[str, Json], resume: bool) -> None:
        self._file, self.made_by = RESULTS / f"{name}.json", made_by
        self.cells: list[Cell] = []
        if resume and self._file.is_file():
            document = json.loads(self._file.read_text())
            self.cells = [_cell(entry) for entry in document["results"]]
            self.made_by = made_by | {k: v for k, v in document["made_by"].items() if k not in made_by}

    def find(self, model: str, method: str, ratio: float, code: str) -> Cell | None:
        same = (c for c in self.cells if (c.model, c.method, c.ratio, c.code) == (model, method, ratio, code))
        return next(same, None)

    def put(self, cell: Cell) -> None:
        """Add or replace a cell. If the replaced cell has the same code, its times stay."""
        place = (cell.model, cell.method, cell.ratio, cell.weights)
        old = next((c for c in self.cells if (c.model, c.method, c.ratio, c.weights) == place), None)
        if old is not None and old.code == cell.code and cell.times is None:
            cell = replace(cell, times=old.times)
        self.cells = [c for c in self.cells if c is not old] + [cell]
        self.save()

    def save(self) -> None:
        RESULTS.mkdir(exist_ok=True)
        document = {"made_by": self.made_by, "results": [as_json(cell) for cell in self.cells]}
        new = self._file.with_suffix(".new")
        new.write_text(json.dumps(document, indent=1) + "\n")
        new.replace(self._file)

    def of(self, model: str) -> list[Cell]:
        """In the order of methods and budgets; the dense model first."""
        own = [cell for cell in self.cells if cell.model == model]
        return sorted(own, key=lambda c: (c.method != "none", "+" in c.method, c.method, -c.ratio))


def _cell(entry: dict[str, Json]) -> Cell:
    known = {f.name for f in fields(Cell)}
    values = {key: value for key, value in entry.items() if key in known}
    times = values.pop("times", None)
    return Cell(**values, times=None if times is None else Times(**times))  # type: ignore[arg-type]


def models(cells: Iterable[Cell]) -> list[str]:
    return list(dict.fromkeys(cell.model for cell in cells))
