"""Count one request in the metrics, and note its figures for the log."""

import time

from foveate.server.common.errors import ApiError
from foveate.server.common.metrics import Metrics, Outcome
from foveate.server.common.replies import UsageReport


class Track:
    """Counts one request exactly twice: once as received, once as finished.

    Attributes:
        outcome, code: None and empty until the request has finished; see `Metrics.finished`.
        reply_id: id of the reply; empty before the request is prepared.
        resolved: what VLM-Resolved says of the budget; empty before the engine has accepted the request.
        prompt_tokens, n_pictures: 0 before the engine has accepted the request.
        n_tokens: number of tokens received of all choices.
        first_token_s: seconds from the start to the first token.
        usage: of a finished request.
        error: what ended a stream that had begun.
    """

    def __init__(self, metrics: Metrics, route: str) -> None:
        self._metrics = metrics
        self._started = time.monotonic()
        self.outcome: Outcome | None = None
        self.code = self.reply_id = self.resolved = ""
        self.prompt_tokens = self.n_pictures = self.n_tokens = 0
        self.first_token_s: float | None = None
        self.usage: UsageReport | None = None
        self.error: ApiError | None = None
        self._last: dict[int, float] = {}  # time of the last token of each choice
        metrics.received(route)

    def tokens(self, choice: int, n_tokens: int) -> None:
        """Record that `choice` received tokens now."""
        now = time.monotonic()
        self.n_tokens += n_tokens
        if not self._last:
            self.first_token_s = now - self._started
            self._metrics.first_token(self.first_token_s)
        elif choice in self._last and n_tokens:
            gap = (now - self._last[choice]) / n_tokens
            for _ in range(n_tokens):
                self._metrics.token_gap(gap)
        self._last[choice] = now

    def finish(self, outcome: Outcome, code: str) -> None:
        """Count the request as finished. Only the first call counts."""
        if self.outcome is None:
            self.outcome, self.code = outcome, code
            self._metrics.finished(outcome, code)
            self._metrics.latency(time.monotonic() - self._started)
