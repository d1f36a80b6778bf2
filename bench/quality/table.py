"""Results of `bench.quality` as tables and as a plot of exact match over visual tokens."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from bench.quality.cells import Cell
from bench.report import NO_PLOT, pyplot, table, wilson
from foveate.bundled.scenes import KINDS
from foveate.configs.config import BudgetConfig

NO_METHODS = ("none", "oracle")  # rows that are no choice
_NAMED = 6  # methods drawn with a name beside random, oracle and the default


def _header(first: str, ratios: Sequence[float]) -> list[str]:
    return [first, *(f"{100 * ratio:g} %" for ratio in ratios)]


def _ratios(cells: Sequence[Cell]) -> list[float]:
    return sorted({cell.ratio for cell in cells}, reverse=True)


def _names(cells: Sequence[Cell]) -> list[str]:
    return list(dict.fromkeys(cell.method for cell in cells))


def _with_interval(cell: Cell) -> str:
    low, high = wilson(*cell.overall)
    return f"{cell.share():.1f} ({100 * low:.0f}-{100 * high:.0f})"


def budget_table(cells: Sequence[Cell], kind: str | None) -> str:
    """Rows: methods. Columns: budgets. Exact match in percent, overall with its interval, or of one kind."""
    by_place = {(cell.method, cell.ratio): cell for cell in cells}
    ratios = _ratios(cells)

    def said(method: str, ratio: float) -> str:
        cell = by_place.get((method, ratio))
        if cell is None:
            return "-"
        return _with_interval(cell) if kind is None else f"{cell.share(kind):.1f}"

    return table(_header("method", ratios), [[name, *(said(name, r) for r in ratios)] for name in _names(cells)])


def best_table(cells: Sequence[Cell]) -> str:
    """Rows: kinds of question. Columns: budgets. The best method, and the number of methods not clearly worse."""
    ratios = [ratio for ratio in _ratios(cells) if ratio < 1.0]
    rows = []
    for kind in (None, *KINDS):
        row = [kind or "all"]
        for ratio in ratios:
            own = [c for c in cells if c.ratio == ratio and c.method not in NO_METHODS and c.of(kind)[1]]
            own.sort(key=lambda c: (-c.share(kind), c.method))
            if not own:
                row.append("-")
                continue
            low = wilson(*own[0].of(kind))[0]
            near = sum(c.of(kind)[0] / c.of(kind)[1] >= low for c in own[1:])
            row.append(f"{own[0].method} {own[0].share(kind):.1f}" + (f" (+{near})" if near else ""))
        rows.append(row)
    return table(_header("kind", ratios), rows)


def below_random(cells: Sequence[Cell]) -> str:
    """Methods that score below random choice, by budget, with the difference in points."""
    lines = []
    for ratio in _ratios(cells):
        chance = next((c for c in cells if c.ratio == ratio and c.method == "random"), None)
        if ratio == 1.0 or chance is None:
            continue
        own = [c for c in cells if c.ratio == ratio and c.method not in (*NO_METHODS, "random")]
        worse = sorted((c for c in own if c.share() < chance.share()), key=lambda c: c.share())
        said = ", ".join(f"{c.method} {c.share() - chance.share():.1f}" for c in worse)
        lines.append(f"{100 * ratio:g} %: {said or 'none'}")
    return "Below random, in points: " + "; ".join(lines) + "."


def time_table(cells: Sequence[Cell]) -> str:
    """Rows: methods. Columns: budgets. TTFT with its encoding and reduction in ms, and KV of the prompt in KB."""
    by_place = {(cell.method, cell.ratio): cell.times for cell in cells}
    ratios = _ratios(cells)

    def said(method: str, ratio: float) -> str:
        times = by_place.get((method, ratio))
        if times is None:
            return "-"
        spent = f"{times.ttft_ms:.1f} ({times.encode_ms:.1f} + {times.reduce_ms:.1f})"
        token = f", {times.token_ms:.1f}" if times.token_ms else ""
        return f"{spent}{token}, {times.kv_bytes / 1024:.0f}"

    return table(_header("method", ratios), [[name, *(said(name, r) for r in ratios)] for name in _names(cells)])


def _kept_line(cells: Sequence[Cell]) -> str:
    rows: dict[str, list[str]] = {}
    for cell in cells:
        if cell.ratio < 1.0:
            rows.setdefault(cell.method, []).append(f"{cell.kept:.0f}")
    usual = Counter(map(tuple, rows.values())).most_common(1)[0][0]
    other = [f"{name} {', '.join(row)}" for name, row in rows.items() if tuple(row) != usual]
    kept = "; ".join([", ".join(usual), *other])
    return f"{cells[0].overall[1]} questions; of {cells[0].offered:.0f} visual tokens, the mean, are kept: {kept}."


def sections(model: str, cells: Sequence[Cell], folder: Path, name: str) -> list[str]:
    """All sections of one model. With three budgets or more, a plot goes into `folder` as `name`-`model`.png."""
    found = [f"## {model}", _kept_line(cells)]
    found += [plot(cells, folder / f"{name}-{model}.png")] if len(_ratios(cells)) > 2 else []
    found += ["Best method by kind of question (how many others lie above the lower end of its 95 % interval):"]
    found += [best_table(cells), below_random(cells)]
    found += ["All kinds, exact match in per cent (95 % Wilson interval):", budget_table(cells, None)]
    for kind in KINDS:
        found += [f"{kind}:", budget_table(cells, kind)]
    if any(cell.times for cell in cells):
        said = "TTFT in ms (encoding + reduction in ms, as the server says), ms a token where it was timed, KV of the "
        said += "prompt in KB; one client:"
        found += [said, time_table(cells)]
    return found


def accuracy_section(cells: Sequence[Cell]) -> str:
    rows = []
    for cell in cells:
        for kind in (None, *KINDS):
            right, asked = cell.of(kind)
            low, high = wilson(right, asked) if asked else (0.0, 1.0)
            share = f"{100 * right / max(asked, 1):.2f}"
            interval = f"{100 * low:.2f} - {100 * high:.2f}"
            rows.append([cell.model, cell.weights, cell.order, kind or "overall", str(asked), share, interval])
    return table(["model", "weights", "order", "kind", "asked", "exact match %", "95 % interval"], rows)


def named(cells: Sequence[Cell]) -> list[str]:
    """The methods with a name in a plot: the best by the mean over all budgets below the full one."""
    shares: dict[str, list[float]] = {}
    for cell in cells:
        if cell.ratio < 1.0 and cell.method not in NO_METHODS:
            shares.setdefault(cell.method, []).append(cell.share())
    return sorted(shares, key=lambda name: -mean(shares[name]))[:_NAMED]


def plot(cells: Sequence[Cell], file: Path) -> str:
    """Draw exact match over kept tokens, for all kinds and each kind. Returns the path, or the reason for no plot."""
    if (plt := pyplot()) is None:
        return NO_PLOT
    shown = [*dict.fromkeys(("oracle", BudgetConfig().method, "random", *named(cells)))]
    figure, axes = plt.subplots(2, math.ceil((1 + len(KINDS)) / 2), figsize=(16, 8), layout="constrained")
    for axis, kind in zip(axes.flat, (None, *KINDS), strict=True):
        for name in sorted(_names(cells), key=lambda name: name in shown):  # the named ones on top
            line = [c for c in cells if c.method == name and c.of(kind)[1]]
            bold = name in shown
            style = {"color": f"C{shown.index(name)}", "marker": "o", "label": name} if bold else {"color": "0.85"}
            axis.plot([c.kept for c in line], [c.share(kind) for c in line], linewidth=1.6 if bold else 0.8, **style)
        axis.set_xscale("log", base=2)
        axis.set_title(kind or "all kinds")
        axis.set_xlabel("visual tokens kept")
        axis.set_ylabel("exact match, %")
        axis.grid(alpha=0.3)
    axes.flat[0].legend(fontsize="small")
    figure.savefig(file, dpi=80)
    plt.close(figure)
    return f"![exact match over visual tokens]({file.name})"
