"""One request as the model sees it, and how a pass reports on its requests.

Everything here is touched by two threads: the event loop owns an item, the model
thread reads its fields and its cancel flag and reports through `Progress`.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from roundhouse_worker.errors import Cancelled

PROGRESS_INTERVAL_S = 0.5
"""As often as the scheduler stores it. Each line of each item takes time from the thread that computes."""


@dataclass(frozen=True, slots=True)
class Binary:
    """A result that is bytes, for example `Binary("audio/wav", wav)`."""

    content_type: str
    data: bytes


@dataclass(frozen=True, slots=True)
class Stream:
    """A result that is sent while it is made; `chunks` are whole SSE frames.

    An exception out of `chunks` ends the stream with an error frame.
    """

    chunks: AsyncIterator[bytes]
    content_type: str = "text/event-stream"


Output = dict[str, Any] | Binary
"""What one request yields: a JSON object or bytes."""


@dataclass(slots=True, eq=False)
class Item:
    """One request.

    Attributes:
        request_id: `x-request-id`, sent back as it came; made up if there was none.
        endpoint: the path that was called.
        body: the JSON object that was sent.
        headers: the request's headers, names in lower case.
        params: what `BaseService.parse` made of the body.
        run_id: the run the scheduler put the request in, or None.
        run_size: how many requests that run has.
        batch_key: what `BaseService.batch_key` said.
        cancelled_at: `time.monotonic()` of its `cancel`.
    """

    request_id: str
    endpoint: str
    body: dict[str, Any]
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    params: Any = None
    run_id: str | None = None
    run_size: int = 1
    batch_key: Hashable = ()
    cancelled_at: float = 0.0
    _cancelled: threading.Event = field(default_factory=threading.Event)
    _on_cancel: Callable[[], object] | None = None
    _started: bool = False
    _outcome: asyncio.Future[Output] | None = None
    _latest: tuple[int, int] | None = None
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for this item any more; safe in any thread."""
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """Say that nobody waits for this item any more. Event loop only."""
        if not self.cancelled:
            self.cancelled_at = time.monotonic()
            self._cancelled.set()
            if self._on_cancel is not None:
                self._on_cancel()

    def on_cancel(self, call: Callable[[], object] | None) -> None:
        """What `cancel` calls, once; None once it is too late to cancel. Event loop only."""
        self._on_cancel = call

    async def outcome(self) -> Output:
        """Wait for what the item's pass makes of it. Event loop only."""
        self._outcome = asyncio.get_running_loop().create_future()
        return await self._outcome

    def start(self) -> bool:
        """Enter a pass; False if nobody waits any more. Model thread only."""
        self._started = not self.cancelled
        return self._started

    def resolve(self, outcome: Output | Exception) -> None:
        """End the wait for the outcome, unless it has ended. Event loop only."""
        if self._outcome is None or self._outcome.done():
            return
        if isinstance(outcome, Exception):
            self._outcome.set_exception(outcome)
        else:
            self._outcome.set_result(outcome)

    def withdraw(self, error: Exception) -> None:
        """Fail the item if it waits for a pass that has not started. Event loop only."""
        if self._outcome is not None and not self._started:
            self._cancelled.set()
            self.resolve(error)

    def report(self, step: int, total: int) -> None:
        """Remember the newest progress; an older one not sent yet is dropped. Event loop only."""
        self._latest = (step, total)
        self._news.set()

    def take_report(self) -> tuple[int, int] | None:
        """The newest progress that was not taken yet. Event loop only."""
        latest, self._latest = self._latest, None
        self._news.clear()
        return latest

    async def wait_report(self) -> None:
        """Wait until there is progress to take. Event loop only."""
        await self._news.wait()


class Progress:
    """Handed to `generate`: call it after every step of the pass, from any thread.

    It tells the waiting clients (at most twice a second each, the first and
    the last step always) and is the point at which a pass can be cancelled.
    """

    def __init__(self, items: Sequence[Item], loop: asyncio.AbstractEventLoop) -> None:
        self._items = items
        self._loop = loop
        self._sent_at = float("-inf")

    def __call__(self, step: int, total: int) -> None:
        """Report that `step` of `total` steps are done.

        Raises:
            Cancelled: no item of the pass is wanted any more. Let it through.
        """
        self.check()
        now = time.monotonic()
        if step >= total or now - self._sent_at >= PROGRESS_INTERVAL_S:
            self._sent_at = now
            self._loop.call_soon_threadsafe(self._tell, step, total)

    def check(self) -> None:
        """Raise `Cancelled` if no item of the pass is wanted any more."""
        if all(item.cancelled for item in self._items):
            raise Cancelled

    def _tell(self, step: int, total: int) -> None:
        for item in self._items:
            item.report(step, total)
