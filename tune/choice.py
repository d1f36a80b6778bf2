"""Choose a point that fresh pairs confirm: candidates by their lower bound, then tests on held-out pairs.

The cheapest of fifty points that hold on the search pairs is often a lucky one. So the points that hold answer the
choice pairs, and stay candidates while the pairs of both parts together give a good lower bound. The held-out pairs
then test the candidates from the safest to the cheapest. The tests end at the first one that fails. With this order,
fixed before any held-out pair is asked, the chance that the chosen point lies below the requested agreement is at most
`RISK` for all tests together (fixed-sequence testing; Angelopoulos et al., 2021, arXiv:2110.01052).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from foveate.tune.confidence import CHOICE_RISK, allowed_misses
from foveate.tune.data import CHOICE, HELD_OUT
from foveate.tune.measure import Measured

Ask = Callable[[Measured, str, int], Measured]  # a point, a part, the most changed answers that are of interest


@dataclass(frozen=True, slots=True)
class Candidate:
    """A point on the search pairs and on the choice pairs."""

    search: Measured
    choice: Measured

    @property
    def misses(self) -> int:
        return self.search.misses + self.choice.misses


def most_misses(n_known: int, agreement: float) -> int:
    """Return the changed answers that a candidate may have on the pairs of search and choice together.

    With too few pairs for a bound, no answer may change; the held-out pairs decide in any case.
    """
    return max(0, allowed_misses(n_known, agreement, CHOICE_RISK))


def candidates(points: Sequence[Measured], limit: int, ask: Ask) -> list[Candidate]:
    """Return the points worth a test, cheapest first.

    Each candidate has fewer misses than all cheaper candidates. Only the last one may have equally many: a point at
    least halfway between the candidate before it and the full cost. The last one is the safest, and the tests begin
    with the safest, so its failure by bad luck would end them.

    Args:
        points: points that hold on all search pairs.
        limit: from `most_misses`.
    """
    ordered = sorted((p for p in points if p.cost < 1), key=lambda p: (p.cost, p.flops, p.misses))
    found: list[Candidate] = []

    def add(point: Measured, most: int) -> None:
        if point.misses > most:
            return
        tried = Candidate(point, ask(point, CHOICE, most - point.misses))
        if tried.misses <= most:
            found.append(tried)

    for point in ordered:
        add(point, found[-1].misses - 1 if found else limit)
    if found:
        last = found[-1]
        for point in (p for p in ordered if p.cost >= (1 + last.search.cost) / 2 and p != last.search):
            if found[-1] is last:
                add(point, last.misses)
    return found


def confirm(
    tried: Sequence[Candidate], n_held_out: int, ask: Ask, passes: Callable[[Measured], bool]
) -> list[Measured]:
    """Test candidates on the held-out pairs, from the safest to the cheapest. Only the last result can be a failure.

    A failure too answers every pair: a test that stops at the last allowed change would overstate the share of changes.
    """
    tests: list[Measured] = []
    for candidate in reversed(tried):
        tests.append(ask(candidate.search, HELD_OUT, n_held_out))
        if not passes(tests[-1]):
            break
    return tests
