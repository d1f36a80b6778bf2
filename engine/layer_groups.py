"""From a budget and a method inside the decoder to what enters it, and to the layer groups of the prompt."""

from collections.abc import Sequence

from foveate.configs.errors import ConfigError
from foveate.engine.cache.groups import LayerGroup
from foveate.engine.cache.prefix import decision_key
from foveate.engine.common.errors import BudgetError
from foveate.engine.common.grid import Grid
from foveate.engine.common.messages import Generate, VisualBudget
from foveate.engine.methods import build_pruner
from foveate.engine.prune.depth import Depth, plan
from foveate.engine.request import Picture


def entering(visual: VisualBudget, grids: Sequence[Grid], budgets: Sequence[int]) -> list[int]:
    """What the reducers may leave of each image. With a pruner behind them the budget is what a layer of the decoder
    holds on average: then all enters where there is no reducer, or the share that is stated."""
    if visual.prune is not None and visual.method == "none":
        return [grid.n_tokens for grid in grids]
    if visual.enter is not None:
        return [max(b, round(visual.enter * grid.n_tokens)) for b, grid in zip(budgets, grids, strict=True)]
    return list(budgets)


def depth_of(
    generate: Generate, pictures: Sequence[Picture], prompt_ids: Sequence[int], allowed: int, root: bytes, n_layers: int
) -> Depth:
    """Which visual tokens go how deep: their counts and layers. Which ones they are is decided when they are there."""
    newlines = [picture.is_whole * (picture.grid.n_tokens - picture.grid.bare.n_tokens) for picture in pictures]
    entered = [picture.n_kept - n for picture, n in zip(pictures, newlines, strict=True)]
    runs = [run for picture in pictures for run in picture.runs]
    flat = Depth(groups=(LayerGroup(range(n_layers), tuple(entered)),), n_newlines=sum(newlines))
    if generate.visual.prune is None or not runs:
        return flat
    try:
        pruner = build_pruner(generate.visual.prune)
        groups = plan(pruner, entered, max(1, allowed - sum(newlines)), n_layers)
    except ConfigError as error:
        raise BudgetError(f"vlm.visual.method: {error}", "vlm.visual.method") from error
    if len(groups) == 1:
        return flat
    stop = len(prompt_ids) if pruner.question_aware else runs[-1].stop
    return Depth(
        groups=groups,
        pruner=pruner,
        start=runs[0].start,
        stop=stop,
        visual_stop=runs[-1].stop,
        n_newlines=sum(newlines),
        key=decision_key(root, prompt_ids[:stop], runs, f"{pruner!r} {groups!r}"),
    )
