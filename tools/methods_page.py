"""Write docs/methods.md from the source of the methods: `make docs`.

Every table line comes from a method's file: the first line of the docstring, the class variables, the fields and the
comments beside the fields.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import foveate.engine.prune.methods as prune_family
import foveate.engine.reduce.methods as reduce_family
from foveate.configs.describe import field_comments
from foveate.engine.common import FieldInfo, MethodInfo, load_method, names
from foveate.engine.methods import describe
from foveate.engine.prune.base import Pruner
from foveate.engine.reduce.base import Group, Reducer

PAGE = Path(__file__).resolve().parents[1] / "docs" / "methods.md"
GROUPS: tuple[str, ...] = (*get_args(Group), Pruner.group)
STAGES = {
    "pixels": "before the tower",
    "encoder": "inside the tower",
    "tokens": "after the tower",
    "decoder": "inside the decoder",
}
FITS = {"any": "any", "cls": "with a CLS row", "no_cls": "without a CLS row", "tiles": "any; made for tiles"}
INTRO = """# Methods

<!-- Written by `make docs` from the method files. Edit the files, not this page. -->

A request names a method in `VLM-Visual-Method` or in `vlm.visual.method`, with parameters after semicolons:
`hiprune;alpha=0.2`. A plus sign composes several methods: `pixelprune+foveal`. Each method reduces the tokens that the
method before it left. `keep=0.5` is the share of its tokens that a method leaves, as in `foveal;keep=0.5+fastv;k=2`.
With a method inside the decoder, the budget is the mean over the decoder's layers. `GET /v1/vlm/methods` returns the
same list as JSON.

- **stage** says where the method acts. Methods compose in this order: before the tower, inside the tower, after the
  tower, inside the decoder.
- **question** says whether the method reads the question. If it does, requests with other questions do not share its
  result.
- **fits** names the vision towers that the method is made for. The server refuses the method on other towers.
- A **layer** is an index (an int, negative from the end) or a share of the depth (a float from 0 to 1).
- `compat=true` restores a detail of the released code where our default departs from the code.

Each file in `engine/reduce/methods/` and `engine/prune/methods/` names the paper, the released code and every
departure from them. [quality.md](quality.md) compares the methods at equal budgets.
"""


def page() -> str:
    """Return the whole text of docs/methods.md."""
    methods = describe()
    return "\n".join(
        [INTRO, *(_section(group, [info for info in methods if _class_of(info).group == group]) for group in GROUPS)]
    )


def _section(group: str, methods: Sequence[MethodInfo]) -> str:
    """Return the heading of one group, the table of its methods, and the table of their parameters."""
    rows = [
        (
            f"`{info.name}`",
            _summary(info),
            _paper(info.source),
            STAGES[info.stage],
            "yes" if info.question_aware else "no",
            FITS[info.fits],
        )
        for info in methods
    ]
    parameters = [
        (f"`{info.name}`", f"`{field.name}`", f"`{field.type}`", _default(field), _comments(info).get(field.name, ""))
        for info in methods
        for field in info.fields
    ]
    lines = [f"## {group[0].upper()}{group[1:]}", ""]
    lines += _table(("method", "what the method keeps", "paper", "stage", "question", "fits"), rows)
    if parameters:
        lines += ["", *_table(("method", "parameter", "type", "default", "meaning"), parameters)]
    return "\n".join(lines) + "\n"


def _class_of(info: MethodInfo) -> type[Reducer] | type[Pruner]:
    family = reduce_family if info.name in names(reduce_family) else prune_family
    return load_method(family, info.name)


def _summary(info: MethodInfo) -> str:
    """Return the first line of the docstring: the published name in bold, then the kept tokens."""
    name, _, keeps = info.summary.rstrip(".").partition(": ")
    return f"**{name}**: {keeps}"


def _paper(source: str) -> str:
    number = source.removeprefix("arXiv:")
    return f"[{source}](https://arxiv.org/abs/{number})" if number != source else source


def _default(field: FieldInfo) -> str:
    """Return the default in the format of a request. Floats have four digits."""
    if isinstance(field.default, bool):
        return f"`{str(field.default).lower()}`"
    if isinstance(field.default, float):
        return f"`{field.default:.4g}`" if field.default % 1 else f"`{field.default:.1f}`"
    return f"`{field.default}`" if field.default != "" else ""


def _comments(info: MethodInfo) -> dict[str, str]:
    """Return the comment beside each field, including fields of base classes."""
    found: dict[str, str] = {}
    for base in reversed(_class_of(info).__mro__[:-1]):
        found |= {name: comment for name, comment in field_comments(base).items() if comment}
    return found


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    sys.stdout.write(f"{PAGE.name} written\n")
