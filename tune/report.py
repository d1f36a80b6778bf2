"""Write the output of a run: a preset for the server, and the report as JSON, Markdown and plots."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec
import yaml

from foveate.tune.measure import BOTH, REDUCER, SCHEDULE, SIGMOID, Measured, wilson
from foveate.tune.plan import Result
from foveate.tune.plots import draw

_MEANING = {
    REDUCER: "a reducer before the decoder",
    SCHEDULE: "a G-Search schedule inside the decoder",
    SIGMOID: "the P-Sigmoid fitted to it",
    BOTH: "a reducer, then a schedule",
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The inputs of a run."""

    model: str
    data: str
    agreement: float
    seed: int
    max_tokens: int
    every: int
    counts: dict[str, int]  # number of pairs by part
    n_pictures: dict[str, int]
    right: dict[str, int | None]  # by part, unpruned answers equal to the user's answers


def write(out: Path, setting: Setting, result: Result) -> list[str]:
    """Write preset.yaml, report.json, report.md and the plots. Return the lines of the summary."""
    plots = draw(out, setting.agreement, result)
    (out / "preset.yaml").write_text(preset(setting, result), "utf-8")
    document = {
        "setting": asdict(setting),
        "chosen": msgspec.to_builtins(result.chosen),
        "confirmed": msgspec.to_builtins(result.confirmed),
        "others": msgspec.to_builtins(result.others),
        "tried": msgspec.to_builtins(result.tried),
        "table": result.table,
        "schedule": msgspec.to_builtins(result.schedule),
        "sigmoid": msgspec.to_builtins(result.sigmoid),
        "reducers": msgspec.to_builtins(result.reducers),
        "both": msgspec.to_builtins(result.both),
        "horizon": result.horizon,
        "changes": msgspec.to_builtins(result.changes),
        "heads": msgspec.to_builtins(result.heads),
        "points": msgspec.to_builtins(result.points),
    }
    (out / "report.json").write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    (out / "report.md").write_text("\n\n".join(sections(setting, result, plots)) + "\n", "utf-8")
    return summary(setting, result)


def preset(setting: Setting, result: Result) -> str:
    """Return YAML for `foveate serve --config`."""
    chosen = result.chosen
    body = {"model": {"path": setting.model}, "budget": {"method": chosen.method, "ratio": chosen.ratio}}
    text: str = yaml.safe_dump(body, sort_keys=False, allow_unicode=True, width=2**31)
    notes = "\n".join(f"# {line}" for line in ["Written by foveate tune.", *summary(setting, result)])
    return f"{notes}\n{text}"


def summary(setting: Setting, result: Result) -> list[str]:
    """Return the choice, its cost and its agreement on the held-out pairs."""
    chosen, confirmed = result.chosen, result.confirmed
    low, high = wilson(confirmed.same, confirmed.asked)
    lines = [
        f"{chosen.method} at ratio {chosen.ratio:g}: {_percent(confirmed.cost)} of the visual token-layers, "
        f"{_percent(confirmed.flops)} of the decoder's prefill FLOPs",
        f"same answer as unpruned on {confirmed.same} of {confirmed.asked} held-out pairs: "
        f"{_percent(confirmed.agreement)} (95 % interval {_percent(low)} to {_percent(high)}), "
        f"asked for {_percent(setting.agreement)}",
    ]
    if chosen.cost == 1:
        lines.append("nothing cheaper than the unpruned model held; ask for less agreement or give more pairs")
    elif confirmed.agreement < setting.agreement:
        lines.append("that is less than was asked for: the pairs searched on were kinder; give more of them")
    return lines


def sections(setting: Setting, result: Result, plots: Sequence[str]) -> list[str]:
    """Return the report as a list of paragraphs, tables and headings."""
    return [
        f"# foveate tune: {setting.model}",
        "\n".join(f"- {line}" for line in summary(setting, result)),
        _setting_lines(setting),
        "## Frontier",
        "On the pairs searched on; the star is the choice, on held-out pairs.",
        *plots,
        _points_table(setting, result.points),
        "## Choice",
        "Of many points a search takes the cheapest that holds on its own pairs, so also the lucky ones. So the choice "
        f"is, from the cheapest on, the first with at least {_percent(setting.agreement)} at 80 % confidence on search "
        "and choice pairs together (or, where those are too few to tell, with every answer the same). The held-out "
        "pairs had no say in anything.",
        _choice_table(setting, result),
        *_schedule_sections(setting, result),
        "## Reducers alone",
        "The fewest visual tokens that enter with which each still holds on the pairs searched on.",
        _table(
            ["reducer", "enter %", "agreement %", "FLOPs %"],
            [[f"`{p.method}`", _share(p.entering), _share(p.agreement), _share(p.flops)] for p in result.reducers],
        ),
        *_fact_sections(setting, result),
    ]


def _setting_lines(setting: Setting) -> str:
    parts = ", ".join(f"{n} pairs ({setting.n_pictures[part]} pictures) {part}" for part, n in setting.counts.items())
    lines = [
        f"Data: `{setting.data}`: {parts}; no picture is in two parts. Seed {setting.seed}, answers up to "
        f"{setting.max_tokens} tokens, greedy. Agreement is the share of answers that are those of the unpruned model, "
        f"token by token. A point holds if it is at least {_percent(setting.agreement)} on the pairs searched on.",
    ]
    known = [(n, setting.counts[part]) for part, n in setting.right.items() if n is not None]
    if len(known) == len(setting.counts):
        share = sum(n for n, _ in known) / sum(n for _, n in known)
        lines.append(f"Of the unpruned answers {_percent(share)} are the data's own.")
    lines.append(
        "Cost is in visual token-layers: what the decoder's layers hold of visual tokens, added up, as a share of what "
        "they hold unpruned. FLOPs are those of prefill in the decoder's layers, text included."
    )
    return " ".join(lines)


def _points_table(setting: Setting, points: Sequence[Measured]) -> str:
    rows = [
        [
            f"`{p.method}`", f"{p.ratio:g}", _MEANING[p.kind], _share(p.cost), _share(p.flops), _share(p.agreement),
            "-" if p.right is None else _share(p.right / p.asked), "yes" if p.holds(setting.agreement) else "no",
        ]
        for p in sorted(points, key=lambda p: (p.cost, p.method))
    ]  # fmt: skip
    header = ["method", "ratio", "is", "token-layers %", "FLOPs %", "agreement %", "right %", "holds"]
    return _table(header, rows)


def _choice_table(setting: Setting, result: Result) -> str:
    rows = [
        [f"`{p.method}`", f"{p.ratio:g}", part, _share(p.cost), f"{p.same} of {p.asked}", _share(p.agreement)]
        for part, points in (("choice", result.tried), ("held out", [result.confirmed, *result.others]))
        for p in points
    ]
    return _table(["method", "ratio", "on", "token-layers %", "same answer", "agreement %"], rows)


def _schedule_sections(setting: Setting, result: Result) -> list[str]:
    found, fit = result.schedule, result.sigmoid
    every = f", changing at every layer {setting.every} apart" if setting.every > 1 else ""
    header = ["layer", *(str(i) for i in range(len(result.table)))]
    rows = [
        ["searched %", *(_share(x) for x in result.table)],
        ["served %", *(_share(x) for x in found.layers)],
        ["P-Sigmoid %", *(_share(x) for x in fit.layers)],
    ]
    word = "holds" if fit.holds(setting.agreement) else "does not hold"
    return [
        "## Schedule inside the decoder",
        f"G-Search{every}: the fewest visual tokens per layer, in per cent of those that enter. What is served joins "
        "the table's falls to at most four points, and no layer then holds less than the table says.",
        _table(header, rows),
        f"The table costs {_percent(found.cost)} of the token-layers. `{fit.method}`, fitted to it, costs "
        f"{_percent(fit.cost)} and {word}. The table above has both on held-out pairs.",
    ]


def _fact_sections(setting: Setting, result: Result) -> list[str]:
    n_layers, heads, changes = len(result.table), result.heads, result.changes
    where = (
        f"Every layer of the {n_layers} needs visual tokens: removed before the last one, too many answers change."
        if result.horizon == n_layers
        else f"From layer {result.horizon} of {n_layers} on no visual token is needed for the agreement asked for."
    )
    header = ["all gone from layer", *(str(i) for i in range(1, n_layers))]
    return [
        "## Information horizon",
        f"{where} Below, how far the first answer token's distribution moves when all visual tokens are gone from a "
        f"layer on (total variation, mean over {changes.n_pairs} pairs; 0: not at all).",
        _table(header, [["moves", *(f"{x:.3f}" for x in changes.by_layer)]]),
        "## Retrieval heads",
        f"A block of {heads.block} random tokens, repeated, shows which key heads look up earlier copies of a token "
        f"(echo) or what came after them (induction). A head that looks everywhere alike scores {1 / heads.block:.4f}. "
        "For methods that drop cached tokens; `report.json` has all scores. Chosen, the best 1 % by echo and 14 % by "
        "induction: "
        + ", ".join(f"layer {layer} head {head}" for layer, head in heads.retrieval) + ".",
        _table(
            ["layer", "best echo", "best induction"],
            [[str(i), f"{max(heads.echo[i]):.4f}", f"{max(heads.induction[i]):.4f}"] for i in range(n_layers)],
        ),
    ]  # fmt: skip


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _share(share: float) -> str:
    return f"{100 * share:.1f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table. The first column is text; the other columns are numbers."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
