"""Claims of the papers beside the results of `bench.quality` at the nearest budget."""

from collections.abc import Sequence
from dataclasses import dataclass

from bench.quality.cells import Cell
from bench.report import table


@dataclass(frozen=True)
class Reported:
    """A paper's claim: the share of tokens kept, and the accuracy in percent of the unreduced model's accuracy."""

    method: str
    ratio: float
    retained: str
    of: str


REPORTED = (
    Reported("hiprune", 0.333, "99.3", "Qwen2.5-VL"),
    Reported("hiprune", 0.111, "99.5", "Qwen2.5-VL"),
    Reported("duet", 0.33, "> 99", "LLaVA-1.5"),
    Reported("duet", 0.11, "> 97", "LLaVA-1.5"),
    Reported("catp", 0.333, "100.7", "LLaVA-NeXT-7B, 4 examples"),
    Reported("catp", 0.222, "100.1", "LLaVA-NeXT-7B, 4 examples"),
    Reported("catp", 0.101, "98.6", "LLaVA-NeXT-7B, 4 examples"),
    Reported("fopru", 0.25, "close to 100", "LLaVA"),
    Reported("holov", 0.111, "95.8", "LLaVA-1.5"),
    Reported("zoo_prune", 0.111, "95.5", "LLaVA-1.5"),
    Reported("zoo_prune", 0.055, "95.4", "LLaVA-NeXT"),
    Reported("visionzip", 0.10, "about 95", "LLaVA-1.5"),
    Reported("todre", 0.10, "about 95", "LLaVA"),
    Reported("vflowopt", 0.10, "comparable", "LLaVA-OneVision"),
    Reported("mustdrop", 0.078, "-", "88.5 % of the FLOPs cut"),
    Reported("visiondrop", 0.055, "95.7", "LLaVA-NeXT-7B, over all stages"),
    Reported("fastervlm", 0.05, "90", "LLaVA-1.5-7B"),
    Reported("prumerge", 0.055, "comparable", "LLaVA-1.5"),
    Reported("fourier", 0.16, "competitive", "trained; 83.8 % of the FLOPs cut"),
    Reported("dymu", 0.32, "comparable", "32 to 85 % fewer tokens"),
)


def reported_table(models: dict[str, Sequence[Cell]]) -> str:
    """Rows: claims. Columns: the share that each model retains at the nearest measured budget.

    Args:
        models: the cells of each model, by name.
    """
    rows = []
    for claim in REPORTED:
        row = [claim.method, f"{100 * claim.ratio:.3g} %", claim.retained, claim.of]
        for cells in models.values():
            own = [cell for cell in cells if cell.method == claim.method and cell.ratio < 1.0]
            full = next((cell for cell in cells if cell.method == "none"), None)
            if not own or full is None:
                row.append("-")
                continue
            near = min(own, key=lambda cell: abs(cell.ratio - claim.ratio))
            row.append(f"{100 * near.share() / full.share():.1f} ({100 * near.ratio:g} %)")
        rows.append(row)
    header = ["method", "paper's budget", "retained, %", "of", *(f"{model}, % (at)" for model in models)]
    return table(header, rows)
