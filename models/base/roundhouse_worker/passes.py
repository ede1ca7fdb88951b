"""From concurrent requests to passes: the gathering of runs and the model thread."""

from __future__ import annotations

import asyncio
import concurrent.futures
import queue
import threading
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from roundhouse_worker.items import Item

T = TypeVar("T")


class ModelThread:
    """The one thread that touches the model; torch is not re-entrant.

    It is a daemon, so that a call that never returns cannot keep the process alive.
    """

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    def submit(self, call: Callable[[], T]) -> asyncio.Future[T]:
        """Run `call` after everything submitted before it. Event loop only."""
        done: concurrent.futures.Future[T] = concurrent.futures.Future()

        def work() -> None:
            if not done.set_running_or_notify_cancel():
                return
            try:
                done.set_result(call())
            except BaseException as error:  # a SystemExit must not end the thread
                done.set_exception(error)

        self._calls.put(work)
        return asyncio.wrap_future(done)

    def join(self, timeout_s: float) -> bool:
        """End the thread after what was submitted; False if it is still busy then."""
        self._calls.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
            del call  # what it holds must not outlive it while we wait


@dataclass(slots=True)
class _Gathering:
    """The requests of one run that have arrived."""

    timer: asyncio.TimerHandle
    items: list[Item] = field(default_factory=list[Item])


class Gatherer:
    """Collects the concurrent requests of a run, then starts it. Event loop only.

    A run starts when all its requests have arrived, or `wait_s` after the first
    one: a client that died half way must not hold up the others.
    """

    def __init__(self, start: Callable[[list[Item]], None], wait_s: float) -> None:
        self._start = start
        self._wait_s = wait_s
        self._gatherings: dict[str, _Gathering] = {}

    def add(self, item: Item) -> None:
        """Take a request; a request without a run is a run of its own."""
        if item.run_id is None or item.run_size <= 1:
            self._start([item])
            return
        gathering = self._gatherings.get(item.run_id)
        if gathering is None:
            timer = asyncio.get_running_loop().call_later(self._wait_s, self._close, item.run_id)
            gathering = self._gatherings[item.run_id] = _Gathering(timer)
        gathering.items.append(item)
        if len(gathering.items) >= item.run_size:
            self._close(item.run_id)

    def flush(self) -> None:
        """Start every run with what has arrived of it."""
        for run_id in list(self._gatherings):
            self._close(run_id)

    def _close(self, run_id: str) -> None:
        gathering = self._gatherings.pop(run_id)
        gathering.timer.cancel()
        self._start(gathering.items)


def split(items: Iterable[Item]) -> list[list[Item]]:
    """Group items that can share a pass: same endpoint, same batch key; order kept."""
    groups: dict[tuple[str, Hashable], list[Item]] = {}
    for item in items:
        groups.setdefault((item.endpoint, item.batch_key), []).append(item)
    return list(groups.values())
