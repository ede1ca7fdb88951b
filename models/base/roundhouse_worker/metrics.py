"""The few figures a worker can tell about itself, as Prometheus text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(slots=True)
class _Summary:
    """A sum and a count, enough for a rate and a mean."""

    total: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        self.total += value
        self.count += 1


@dataclass(slots=True)
class Metrics:
    """Counters of one worker. Event loop only."""

    requests: Counter[str] = field(default_factory=Counter[str])
    in_flight: int = 0
    pass_seconds: _Summary = field(default_factory=_Summary)
    pass_size: _Summary = field(default_factory=_Summary)

    def text(self, *, ready: bool) -> str:
        """The Prometheus text exposition of all of it."""
        return "\n".join((*self._lines(ready), ""))

    def _lines(self, ready: bool) -> Iterator[str]:
        yield "# HELP roundhouse_worker_requests_total Requests answered, by outcome (an error's code, or succeeded)."
        yield "# TYPE roundhouse_worker_requests_total counter"
        for outcome, count in sorted(self.requests.items()):
            yield f'roundhouse_worker_requests_total{{outcome="{outcome}"}} {count}'
        yield "# HELP roundhouse_worker_in_flight Requests that have been taken and not answered."
        yield "# TYPE roundhouse_worker_in_flight gauge"
        yield f"roundhouse_worker_in_flight {self.in_flight}"
        yield "# HELP roundhouse_worker_ready Whether requests are taken now."
        yield "# TYPE roundhouse_worker_ready gauge"
        yield f"roundhouse_worker_ready {int(ready)}"
        yield "# HELP roundhouse_worker_pass_seconds Duration of the calls of the model."
        yield "# TYPE roundhouse_worker_pass_seconds summary"
        yield f"roundhouse_worker_pass_seconds_sum {self.pass_seconds.total:.6f}"
        yield f"roundhouse_worker_pass_seconds_count {self.pass_seconds.count}"
        yield "# HELP roundhouse_worker_pass_size Requests that shared one call of the model."
        yield "# TYPE roundhouse_worker_pass_size summary"
        yield f"roundhouse_worker_pass_size_sum {self.pass_size.total:.0f}"
        yield f"roundhouse_worker_pass_size_count {self.pass_size.count}"
