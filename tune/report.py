"""Write the output of a run: a preset for the server, and the report as JSON, Markdown and plots."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec
import yaml

from foveate.tune.confidence import (
    CHOICE_SURE,
    SURE,
    allowed_misses,
    effective,
    lower_bound,
    pairs_needed,
    pairs_to_confirm,
)
from foveate.tune.data import CHOICE, HELD_OUT, HELD_OUT_SHARE, SEARCH
from foveate.tune.measure import BOTH, REDUCER, SCHEDULE, SIGMOID
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
        "target": result.target,
        "design_effect": round(result.effect, 4),
        "confirmed": msgspec.to_builtins(result.confirmed),
        "lower_bound": round(_bound(result), 6),
        "candidates": msgspec.to_builtins(result.candidates),
        "tests": msgspec.to_builtins(result.tests),
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
    chosen = result.confirmed
    body = {"model": {"path": setting.model}, "budget": {"method": chosen.method, "ratio": chosen.ratio}}
    text: str = yaml.safe_dump(body, sort_keys=False, allow_unicode=True, width=2**31)
    notes = "\n".join(f"# {line}" for line in ["Written by foveate tune.", *summary(setting, result)])
    return f"{notes}\n{text}"


def summary(setting: Setting, result: Result) -> list[str]:
    """Return the choice, its cost, its agreement on the held-out pairs, and what a cheaper point would need."""
    chosen = result.confirmed
    if chosen.cost == 1:
        lines = [
            f"no saving could be confirmed to keep {_percent(setting.agreement)} of the answers; the preset keeps all "
            "visual tokens"
        ]
    else:
        low = _bound(result)
        lines = [
            f"{chosen.method} at ratio {chosen.ratio:g}: {_percent(chosen.cost)} of the visual token-layers, "
            f"{_percent(chosen.flops)} of the decoder's prefill FLOPs",
            f"same answer as unpruned on {chosen.same} of {chosen.asked} held-out pairs: at least {_percent(low)} with "
            f"{SURE}, asked for {_percent(setting.agreement)}",
        ]
    return [*lines, *_missed(setting, result)]


def _bound(result: Result) -> float:
    """Return the lower bound of the choice's agreement."""
    misses, n = effective(result.confirmed.misses, result.confirmed.asked, result.effect)
    return lower_bound(n - misses, n)


def _missed(setting: Setting, result: Result) -> list[str]:
    """Say which test failed first, and how many pairs could confirm the point."""
    failed = result.failed
    if failed is None:
        if result.candidates:
            return []
        return ["no cheaper point held on the search and choice pairs; ask for less agreement or give more pairs"]
    line = (
        f"not confirmed: {failed.method} at ratio {failed.ratio:g} ({_percent(failed.cost)} of the visual token-layers)"
        f" changed {failed.misses} of {failed.asked} held-out answers"
    )
    independent = pairs_to_confirm(failed.misses / failed.asked, setting.agreement)
    if independent is None:
        return [f"{line}; more pairs would hardly help, less agreement would"]
    pairs = independent * result.effect / HELD_OUT_SHARE
    return [f"{line}; if it changes no larger share of {pairs:.0f} pairs, they confirm it"]


def sections(setting: Setting, result: Result, plots: Sequence[str]) -> list[str]:
    """Return the report as a list of paragraphs, tables and headings."""
    return [
        f"# foveate tune: {setting.model}",
        "\n".join(f"- {line}" for line in summary(setting, result)),
        _setting_lines(setting, result),
        "## Frontier",
        "On the pairs searched on; the star is the choice, on held-out pairs. A point that changed too many answers "
        "was not asked the other pairs.",
        *plots,
        _points_table(result),
        "## Choice",
        _choice_text(setting, result),
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


def _setting_lines(setting: Setting, result: Result) -> str:
    parts = ", ".join(f"{n} pairs ({setting.n_pictures[part]} pictures) {part}" for part, n in setting.counts.items())
    lines = [
        f"Data: `{setting.data}`: {parts}; no picture is in two parts. Seed {setting.seed}, answers up to "
        f"{setting.max_tokens} tokens, greedy. Agreement is the share of answers that are those of the unpruned model, "
        f"token by token. A point holds if it is at least {_percent(result.target)} on the pairs searched on: that "
        f"much the held-out pairs must show to confirm {_percent(setting.agreement)}.",
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


def _points_table(result: Result) -> str:
    rows = [
        [
            f"`{p.method}`", f"{p.ratio:g}", _MEANING[p.kind], _share(p.cost), _share(p.flops), _share(p.agreement),
            "-" if p.right is None else _share(p.right / p.asked), "yes" if p.holds(result.target) else "no",
        ]
        for p in sorted(result.points, key=lambda p: (p.cost, p.method))
    ]  # fmt: skip
    header = ["method", "ratio", "is", "token-layers %", "FLOPs %", "agreement %", "right %", "holds"]
    return _table(header, rows)


def _choice_text(setting: Setting, result: Result) -> str:
    n, wish = setting.counts[HELD_OUT], _percent(setting.agreement)
    return (
        "Of many points a search takes the cheapest that holds on its own pairs, so also the lucky ones. So points "
        f"that hold answered the choice pairs, and were candidates if at most {result.limit} answers of search and "
        f"choice pairs together changed ({wish} at {CHOICE_SURE}) and fewer than those of every "
        "cheaper candidate. The held-out pairs had no part in this. They tested the candidates from the safest on, up "
        f"to the first failure: {wish} is confirmed with {SURE} if at most "
        f"{allowed_misses(n, setting.agreement)} of {n} answers change ({pairs_needed(setting.agreement)} pairs are "
        "the fewest that can confirm). Answers about one picture change together, so the bound takes both numbers "
        f"divided by {result.effect:.2f} (the design effect on the search pairs)."
    )


def _choice_table(setting: Setting, result: Result) -> str:
    parts = (
        (SEARCH, [c.search for c in result.candidates]),
        (CHOICE, [c.choice for c in result.candidates]),
        (HELD_OUT, result.tests),
    )
    rows = [
        [
            f"`{p.method}`", f"{p.ratio:g}", part, _share(p.cost), f"{p.same} of {p.asked}", _share(p.agreement),
            "-" if part != HELD_OUT else "no" if p == result.failed else "yes",
        ]
        for part, points in parts
        for p in points
    ]  # fmt: skip
    return _table(["method", "ratio", "on", "token-layers %", "same answer", "agreement %", "confirmed"], rows)


def _schedule_sections(setting: Setting, result: Result) -> list[str]:
    found, fit = result.schedule, result.sigmoid
    every = f", changing at every layer {setting.every} apart" if setting.every > 1 else ""
    header = ["layer", *(str(i) for i in range(len(result.table)))]
    rows = [
        ["searched %", *(_share(x) for x in result.table)],
        ["served %", *(_share(x) for x in found.layers)],
        ["P-Sigmoid %", *(_share(x) for x in fit.layers)],
    ]
    word = "holds" if fit.holds(result.target) else "does not hold"
    return [
        "## Schedule inside the decoder",
        f"G-Search{every}: the fewest visual tokens per layer, in per cent of those that enter. What is served joins "
        "the table's falls to at most four points, and no layer then holds less than the table says.",
        _table(header, rows),
        f"The table costs {_percent(found.cost)} of the token-layers. `{fit.method}`, fitted to it, costs "
        f"{_percent(fit.cost)} and {word} on the pairs searched on.",
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
