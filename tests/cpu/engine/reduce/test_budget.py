"""Sharing a visual budget among images: arithmetic only."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foveate.engine.common import BudgetError, Grid, TooLongError, VisualBudget
from foveate.engine.reduce.budget import apportion, split

weights = st.lists(st.integers(1, 600), min_size=1, max_size=8)


@st.composite
def shares(draw: st.DrawFn) -> tuple[list[int], list[int], int]:
    w = draw(weights)
    caps = [draw(st.integers(1, n)) for n in w]
    return w, caps, draw(st.integers(len(w), sum(caps)))


@given(shares())
def test_shares_sum_to_the_total_within_their_bounds(case: tuple[list[int], list[int], int]) -> None:
    w, caps, total = case
    got = apportion(w, caps, total)
    assert sum(got) == total
    assert all(1 <= share <= cap for share, cap in zip(got, caps, strict=True))
    assert got == apportion(w, caps, total)


@given(shares())
def test_shares_follow_the_weights(case: tuple[list[int], list[int], int]) -> None:
    w, caps, total = case
    got = apportion(w, caps, total)
    for i in range(len(w)):
        for j in range(len(w)):
            if w[i] >= w[j] and got[i] < caps[i]:  # only its own cap limits a larger image
                assert got[i] >= got[j] - 1


@given(shares())
def test_one_more_token_costs_no_image_more_than_one(case: tuple[list[int], list[int], int]) -> None:
    w, caps, total = case
    if total < sum(caps):
        before, after = apportion(w, caps, total), apportion(w, caps, total + 1)
        assert all(b - a <= 1 for b, a in zip(before, after, strict=True))
        assert after[0] >= before[0] or len(w) > 1


@given(st.lists(st.integers(1, 60), min_size=1, max_size=6), st.integers(1, 9))
def test_exact_when_it_divides(unit: list[int], times: int) -> None:
    offered = [u * 10 for u in unit]
    assert apportion(offered, offered, sum(unit) * times) == [u * times for u in unit]


def test_largest_remainder_by_hand() -> None:
    assert apportion([600, 600, 200], [600, 600, 200], 10) == [4, 4, 2]  # 4.29 4.29 1.43: the last fraction is largest
    assert apportion([600, 600, 200], [600, 600, 200], 11) == [5, 5, 1]  # 4.71 4.71 1.57: the last loses one at 11
    assert apportion([100, 100], [100, 100], 3) == [2, 1]
    assert apportion([500, 1, 1], [500, 1, 1], 10) == [8, 1, 1]
    assert apportion([100, 100, 100], [10, 100, 100], 110) == [10, 50, 50]


IMAGE = Grid(12, 12)


@pytest.mark.parametrize(
    ("visual", "caps", "room", "expected"),
    [
        (VisualBudget(), [None], None, [144]),
        (VisualBudget(tokens=36), [None], None, [36]),
        (VisualBudget(tokens=1000), [None], 144, [144]),
        (VisualBudget(ratio=0.25), [None], None, [36]),
        (VisualBudget(ratio=0.11), [None], None, [16]),
        (VisualBudget(ratio=0.5, tokens=100), [None, None], None, [50, 50]),
        (VisualBudget(ratio=0.0001), [None], None, [1]),
        (VisualBudget(ratio=0.1, floor=40), [None], None, [40]),
        (VisualBudget(ratio=0.1, floor=4000), [None], None, [144]),
        (VisualBudget(per_image=20), [None, 7], None, [20, 7]),
        (VisualBudget(tokens=100), [10, None], None, [10, 90]),
        (VisualBudget(), [None, None], 21, [11, 10]),
        (VisualBudget(floor=20), [None, None], 20, [10, 10]),
        (VisualBudget(tokens=36, fit=False), [None], 36, [36]),
        (VisualBudget(method="none"), [None], 144, [144]),
    ],
)
def test_smallest_bound_wins(
    visual: VisualBudget, caps: list[int | None], room: int | None, expected: list[int]
) -> None:
    assert split(visual, [IMAGE] * len(caps), caps, room) == expected


def test_no_images_need_no_tokens() -> None:
    assert split(VisualBudget(tokens=5, floor=3), [], [], -7) == []


@pytest.mark.parametrize(
    ("visual", "caps", "param", "message"),
    [
        (VisualBudget(tokens=2), [None] * 3, "vlm.visual.tokens", "2 visual tokens for 3 images .* allow at least 3"),
        (VisualBudget(ratio=0.001), [None] * 2, "vlm.visual.ratio", "1 visual tokens for 2 images"),
        (VisualBudget(tokens=10, floor=11), [None], "vlm.visual.floor", "at least 11 .* allows 10"),
        (VisualBudget(per_image=4, floor=9), [None, 3], "vlm.visual.floor", "at least 9 .* sum to 7"),
        (VisualBudget(ratio=0.5, method="none"), [None], "vlm.visual.method", "keeps all 144 .* allows 72"),
    ],
)
def test_contradictions_are_named(visual: VisualBudget, caps: list[int | None], param: str, message: str) -> None:
    with pytest.raises(BudgetError, match=message) as caught:
        split(visual, [IMAGE] * len(caps), caps, None)
    assert caught.value.param == param
    assert caught.value.code == "invalid_vlm_parameter"


@pytest.mark.parametrize(
    ("visual", "n_images", "room", "message"),
    [
        (VisualBudget(fit=False), 1, 100, "too long by 44: it reads 144 visual tokens.* room for 100 .* fit is off"),
        (VisualBudget(floor=50), 1, 49, "forbids fewer than 50"),
        (VisualBudget(), 3, 2, "3 images need at least one each"),
        (VisualBudget(), 1, -12, "too long by 156: .* room for 0 "),
        (VisualBudget(method="none"), 1, 143, "method is none"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_arithmetic(
    visual: VisualBudget, n_images: int, room: int, message: str
) -> None:
    with pytest.raises(TooLongError, match=message) as caught:
        split(visual, [IMAGE] * n_images, [None] * n_images, room)
    assert caught.value.code == "context_length_exceeded"


@given(weights, st.integers(1, 4000), st.floats(0.01, 1.0), st.integers(1, 30), st.integers(0, 3000))
def test_split_keeps_every_promise(offered: list[int], tokens: int, ratio: float, floor: int, room: int) -> None:
    visual = VisualBudget(tokens=tokens, ratio=ratio, floor=floor)
    try:
        got = split(visual, [Grid(1, n) for n in offered], [None] * len(offered), room)
    except (BudgetError, TooLongError):
        assert floor > tokens or min(tokens, ratio * sum(offered), room) < max(len(offered), floor)
        return
    assert all(1 <= share <= n for share, n in zip(got, offered, strict=True))
    assert min(floor, sum(offered)) <= sum(got) <= min(tokens, room)
    assert sum(got) <= max(ratio * sum(offered) + 0.5, floor)
