"""Count one request in the metrics."""

import time

from foveate.server.common.metrics import Metrics, Outcome


class Track:
    """Counts one request exactly twice: once as received, once as finished."""

    def __init__(self, metrics: Metrics, route: str) -> None:
        self._metrics = metrics
        self._started = time.monotonic()
        self._finished = False
        self._last: dict[int, float] = {}  # time of the last token of each choice
        metrics.received(route)

    def tokens(self, choice: int, n_tokens: int) -> None:
        """Record that `choice` received tokens now."""
        now = time.monotonic()
        if not self._last:
            self._metrics.first_token(now - self._started)
        elif choice in self._last and n_tokens:
            gap = (now - self._last[choice]) / n_tokens
            for _ in range(n_tokens):
                self._metrics.token_gap(gap)
        self._last[choice] = now

    def finish(self, outcome: Outcome, code: str) -> None:
        """Count the request as finished. Only the first call counts."""
        if not self._finished:
            self._finished = True
            self._metrics.finished(outcome, code)
            self._metrics.latency(time.monotonic() - self._started)
