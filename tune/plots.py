"""Plot the frontier and the schedule, if matplotlib is installed."""

import importlib
from pathlib import Path
from typing import Any

from foveate.tune.measure import BOTH, REDUCER, Measured
from foveate.tune.plan import Result

FRONTIER, LAYERS = "frontier.png", "layers.png"


def draw(out: Path, agreement: float, result: Result) -> list[str]:
    """Write the plots into the folder. Return Markdown with the plots, or with the reason for no plots."""
    try:
        importlib.import_module("matplotlib").use("Agg")
        pyplot = importlib.import_module("matplotlib.pyplot")
    except ImportError:
        return ["No plots: matplotlib is not installed (`pip install foveate[tune]`)."]
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    _frontier(axes, agreement, result)
    figure.savefig(out / FRONTIER, dpi=110)
    pyplot.close(figure)
    figure, axes = pyplot.subplots(figsize=(8, 3.5), layout="constrained")
    _layers(axes, result)
    figure.savefig(out / LAYERS, dpi=110)
    pyplot.close(figure)
    return [f"![agreement over mean visual tokens]({FRONTIER})", f"![visual tokens by layer]({LAYERS})"]


def _frontier(axes: Any, agreement: float, result: Result) -> None:
    lines: dict[str, list[Measured]] = {}
    for point in result.points:
        reducer = point.method.partition(";keep=")[0]
        name = {REDUCER: point.method, BOTH: f"{reducer} + schedule"}.get(point.kind, point.kind)
        lines.setdefault(name, []).append(point)
    for name, points in lines.items():
        ordered = sorted(points, key=lambda p: p.cost)
        style = "-" if points[0].kind == REDUCER else "none"  # a schedule has several numbers, so no line
        x, y = [100 * p.cost for p in ordered], [100 * p.agreement for p in ordered]
        axes.plot(x, y, linestyle=style, marker=".", label=name)
    confirmed = result.confirmed
    axes.plot([100 * confirmed.cost], [100 * confirmed.agreement], "k*", markersize=12, label="chosen, held out")
    axes.axhline(100 * agreement, color="grey", linewidth=0.8)
    axes.set_xlabel("visual tokens in a layer, mean, % of unpruned")
    axes.set_ylabel("same answer as unpruned, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def _layers(axes: Any, result: Result) -> None:
    shown = {"g-search": result.schedule, "p-sigmoid": result.sigmoid, "chosen": result.confirmed}
    for name, point in shown.items():
        held = [100 * x for x in (*point.layers, point.layers[-1])]
        axes.step(range(len(held)), held, where="post", label=name)
    axes.set_xlabel("layer")
    axes.set_ylabel("visual tokens, % of unpruned")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
