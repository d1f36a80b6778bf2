"""What was tried, with its result: clients, checkpoints, picture formats. Writes docs/compatibility.md.

    python -m bench.compat --install     install the clients into .clients first (needs pip, npm and a network)
    python -m bench.compat               all three tables

A client is a script in bench/compat/clients that uses a library as the documentation of the library says. The script
asks a bundled model one question about a picture, text first; the answer must be right. Layouts are random small
checkpoints; the greedy tokens of the whole engine must equal the tokens of `transformers`. Formats are files and data
URLs of one picture.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch

from bench.compat import clients, pictures, refused
from bench.report import Json, provenance, table, write
from bench.scenes import Item, held_out
from bench.server import serving
from foveate.bundled.scenes import render

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "compatibility.md"
MODEL = "tiny-llava"
SETTINGS = ("limits.image_formats=[png,jpeg,webp,gif,bmp,tiff]",)

CLIENTS = "Each unmodified client asks one question about a picture, the text before the picture:"
LAYOUTS = """\
Random small checkpoints, loaded as published, in float32, with two pictures in the prompt: the greedy tokens of the
whole engine against `transformers` {version}, and the largest difference of log-probabilities over the largest one:"""
REFUSED = "Before any weights are read or fetched, in one line:"
FORMATS = "One picture in each form, over HTTP. BMP and TIFF are off by default; here `{setting}`."


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "/").split())[:200]


def _clients_table(found: Sequence[clients.Attempt]) -> str:
    rows = [[a.client, a.version, a.attempt, "yes" if a.ok else f"no: {_cell(a.said)}"] for a in found]
    return table(["client", "version", "attempt", "right answer"], rows)


def _formats_table(found: Sequence[pictures.Format]) -> str:
    rows = []
    for each in found:
        said = ("right answer" if each.right else f"wrong answer: {_cell(each.said)}") if each.status == 200 else ""
        rows.append([each.name, str(each.status), said or _cell(each.said)])
    return table(["form", "status", "result"], rows)


def _refused_table(found: Sequence[refused.Refused]) -> str:
    return table(["checkpoint", "refused with"], [[each.name, _cell(each.said) or "NOT REFUSED"] for each in found])


def _layouts() -> tuple[list[Json], str]:
    sys.path.insert(0, str(ROOT / "tests" / "support"))  # the writers of random checkpoints
    from bench.compat.layouts import REWRITTEN, compare, layouts

    torch.set_num_threads(1)
    found = [compare(name, save, seed) for seed, (name, save) in enumerate(layouts().items())]
    found += [compare(name, save, 50, rewrite) for name, (save, rewrite) in REWRITTEN.items()]
    rows = [[each.name, "equal" if each.tokens_equal else "DIFFERENT", f"{each.error:.1e}"] for each in found]
    return [asdict(each) for each in found], table(["layout", "32 greedy tokens", "log-probabilities"], rows)


def _item() -> Item:
    """A held-out question about a written word, which no guess hits."""
    return held_out(20, kinds=("read",))[0]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.compat", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--install", action="store_true", help="install the clients first")
    parser.add_argument("--clients", type=Path, default=ROOT / ".clients", help="their environments")
    args = parser.parse_args()
    folder = args.clients.resolve()
    if args.install:
        clients.install(folder)
    made_by, item = provenance("bench.compat"), _item()
    with tempfile.TemporaryDirectory() as scratch, serving(MODEL, SETTINGS) as server:
        picture, file = render(item.scene), Path(scratch) / "picture.png"
        picture.save(file)
        formats = list(pictures.try_all(server.url, server.model, item, picture))
        attempts = clients.run_all(folder, server.url, server.model, item, file)
    layouts, layouts_table = _layouts()
    refusals = list(refused.try_all())
    sections = [
        "## Clients", CLIENTS, _clients_table(attempts),
        "## Checkpoint layouts", LAYOUTS.format(version=version("transformers")), layouts_table,
        "## Checkpoints that are refused", REFUSED, _refused_table(refusals),
        "## Picture formats", FORMATS.format(setting=SETTINGS[0]), _formats_table(formats),
    ]  # fmt: skip
    found: dict[str, Json] = {
        "clients": [asdict(a) for a in attempts],
        "layouts": layouts,
        "refused": [asdict(r) for r in refusals],
        "formats": [asdict(f) for f in formats],
    }
    write("compat", "Compatibility", made_by, found, sections, page=PAGE)


if __name__ == "__main__":
    main()
