"""Exact binomial bounds: how many pairs say with which confidence that enough answers stay the same.

A bound fails in at most `RISK` of all runs. The bounds take pairs as independent draws. Answers about one picture often
change together, so `effective` first turns pairs into as many independent ones as say the same.
"""

import math

RISK = 0.05  # of writing a preset whose agreement lies below the requested share
CHOICE_RISK = 0.2  # for candidates: a weak one costs time only, as the held-out pairs decide
SURE, CHOICE_SURE = (f"{100 * (1 - risk):.0f} % confidence" for risk in (RISK, CHOICE_RISK))  # in messages


def chance(misses: int, n: int, agreement: float) -> float:
    """Return the chance of at most `misses` changed answers to n pairs where each answer stays with `agreement`."""
    assert 0.0 < agreement < 1.0, "an agreement of 0 or 1 leaves nothing to test"
    if misses >= n:
        return 1.0
    rate, same = math.log1p(-agreement), math.log(agreement)
    log_n = math.lgamma(n + 1)
    terms = [log_n - math.lgamma(k + 1) - math.lgamma(n - k + 1) + k * rate + (n - k) * same for k in range(misses + 1)]
    return min(1.0, sum(map(math.exp, terms)))


def allowed_misses(n: int, agreement: float, risk: float = RISK) -> int:
    """Return the most changed answers to n pairs that still confirm `agreement`; -1 if n pairs are too few."""
    low, high = -1, n  # n misses never confirm
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if chance(middle, n, agreement) <= risk else (low, middle)
    return low


def pairs_needed(agreement: float, misses: int = 0, risk: float = RISK) -> int:
    """Return the fewest pairs of which `misses` may change while `agreement` is still confirmed."""
    low, high = misses, misses + 1
    while chance(misses, high, agreement) > risk:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if chance(misses, middle, agreement) <= risk else (middle, high)
    return high


def pairs_to_confirm(rate: float, agreement: float) -> int | None:
    """Return the pairs that confirm `agreement` if a share `rate` of their answers changes; None beyond 100 changes."""
    if rate >= 1 - agreement:
        return None
    needs = ((misses, pairs_needed(agreement, misses)) for misses in range(101))
    return next((pairs for misses, pairs in needs if misses >= rate * pairs), None)


def lower_bound(same: int, n: int, risk: float = RISK) -> float:
    """Return the highest agreement that `same` of n unchanged answers confirm (Clopper and Pearson, 1934)."""
    if same == 0:
        return 0.0
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if chance(n - same, n, middle) <= risk else (low, middle)
    return low


def effective(misses: int, n: int, effect: float) -> tuple[int, int]:
    """Return the changed answers (rounded up) and the pairs (rounded down) as numbers of independent ones.

    Args:
        effect: the design effect (Kish, 1965), at least 1: how much more the number of changed answers varies than with
            independent answers.
    """
    return math.ceil(misses / effect - 1e-9), math.floor(n / effect + 1e-9)


def confirms(misses: int, n: int, agreement: float, effect: float) -> bool:
    """Return whether the answers to n pairs confirm `agreement` under a design effect."""
    return chance(*effective(misses, n, effect), agreement) <= RISK
