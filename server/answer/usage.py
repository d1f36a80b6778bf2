"""The cost of a request: `usage`, VLM-Resolved, VLM-Spent and Server-Timing, all from the same figures."""

from collections.abc import Sequence

from foveate.engine.common import Usage, VisualUsage
from foveate.server.answer.answer import Answer
from foveate.server.common.replies import (
    ImageReport,
    KvReport,
    PromptDetails,
    SchedulingReport,
    TimeReport,
    UsageReport,
    VisualReport,
    VlmReport,
)


def _usages(answer: Answer) -> list[Usage]:
    """Return the engine's usage for every choice of a finished answer."""
    found = [choice.usage for choice in answer.choices if choice.usage is not None]
    assert len(found) == len(answer.choices), "usage is asked for once all choices have ended"
    return found


def _milliseconds(seconds: Sequence[float]) -> float:
    return round(max(seconds) * 1000, 2)


def _cached(answers: Sequence[Answer]) -> int:
    """Return the number of cached prompt tokens. Choices share a prompt, so the first choice's number counts."""
    return sum(min(usage.cached_tokens for usage in _usages(answer)) for answer in answers)


def kept_map(kept: Sequence[int], offered: int) -> list[int]:
    """Return run lengths over an image's tokens in reading order: dropped, kept, dropped, ... Their sum is `offered`.

    The first run is 0 if the first token was kept.
    """
    survived = set(kept)
    runs, now = [0], False
    for token in range(offered):
        if (token in survived) is not now:
            runs.append(0)
            now = not now
        runs[-1] += 1
    return runs


def _visual(visual: VisualUsage, kept: Sequence[Sequence[int]]) -> VisualReport:
    """Build the report on visual tokens, with the kept map of each image if the engine sent kept tokens."""
    images = [
        ImageReport(grid=[image.rows, image.cols], offered=image.offered, kept=image.kept) for image in visual.per_image
    ]
    if kept:
        images = [
            image.model_copy(update={"kept_map": kept_map(tokens, image.offered)})
            for image, tokens in zip(images, kept, strict=True)
        ]
    whole = VisualReport(
        offered=visual.offered,
        kept=visual.kept,
        kept_mean=round(visual.mean, 2),
        method=visual.method,
        per_image=images,
    )
    return whole.model_copy(update={"by_layer": visual.layers}) if visual.layers else whole


def report(answers: Sequence[Answer], warnings: Sequence[str]) -> UsageReport:
    """Return the usage of a finished request. A text completion has one answer per prompt; a chat has one answer."""
    n_prompt = sum(answer.accepted.prompt_tokens for answer in answers)
    n_output = sum(choice.n_tokens for answer in answers for choice in answer.choices)
    usages = [usage for answer in answers for usage in _usages(answer)]
    visual = _visual(answers[0].accepted.visual, usages[0].kept)
    vlm = VlmReport(
        visual=visual,
        time_ms=TimeReport(
            queue=_milliseconds([u.queue_s for u in usages]),
            encode=_milliseconds([u.encode_s for u in usages]),
            reduce=_milliseconds([u.reduce_s for u in usages]),
            prefill=_milliseconds([u.prefill_s for u in usages]),
            decode=_milliseconds([u.decode_s for u in usages]),
        ),
        sched=SchedulingReport(preemptions=sum(u.preemptions for u in usages)),
        kv=KvReport(peak_tokens=max(u.peak_kv_tokens for u in usages)),
    )
    if warnings:
        vlm = vlm.model_copy(update={"warnings": list(warnings)})
    return UsageReport(
        prompt_tokens=n_prompt,
        completion_tokens=n_output,
        total_tokens=n_prompt + n_output,
        prompt_tokens_details=PromptDetails(image_tokens=visual.kept, cached_tokens=_cached(answers)),
        vlm=vlm,
    )


def resolved_header(answer: Answer, figures: Sequence[str]) -> str:
    """Return VLM-Resolved, known once the engine has accepted. `figures` were known before."""
    visual = answer.accepted.visual
    mean = f"vis_mean={visual.mean:.2f}, " if visual.layers else ""
    return ", ".join([f"vis={visual.kept}, {mean}method={visual.method}", *figures])


def spent_headers(answers: Sequence[Answer], usage: UsageReport) -> dict[str, str]:
    """Return VLM-Spent and Server-Timing of a finished request."""
    visual, cached = usage.vlm.visual, usage.prompt_tokens_details.cached_tokens
    hits = max(u.encoder_hits for answer in answers for u in _usages(answer))
    spent = f"vis_in={visual.offered}, vis_kept={visual.kept}, enc_hits={hits}, prefix_hit={cached}"
    spent += f", kv_peak={usage.vlm.kv.peak_tokens}, out={usage.completion_tokens}"
    timing = (f"{name};dur={value}" for name, value in usage.vlm.time_ms.model_dump().items())
    return {"VLM-Spent": spent, "Server-Timing": ", ".join(timing)}
