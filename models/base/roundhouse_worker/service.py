"""`BaseService`: what every worker shares, and the hooks a model fills in.

Two threads: the event loop (HTTP, state, cancellation) and the model thread,
the only one that touches the model. All state below is the event loop's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Hashable, Sequence
from enum import StrEnum
from typing import Any, ClassVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from roundhouse_worker import flags, log, metrics, process, spare
from roundhouse_worker.endpoint import Endpoint
from roundhouse_worker.errors import (
    Cancelled,
    InvalidRequest,
    OutOfMemory,
    Unavailable,
    WorkerError,
    as_worker_error,
)
from roundhouse_worker.items import Item, Output, Progress, Stream
from roundhouse_worker.passes import Gatherer, ModelThread, split

FAILED_LINGER_S = 0.5
"""How long a worker that failed still answers `/health`, so that the reason is read."""
CANCEL_WAIT_S = 1.0
"""How long a cancelled pass may take to notice, before the process ends under it."""
RELEASE_WAIT_S = 0.7
LOGGED_IDS_LIMIT = 16


class Status(StrEnum):
    """What `/health` says."""

    LOADING = "loading"
    READY = "ready"
    ASLEEP = "asleep"
    FAILED = "failed"


class Loading:
    """Handed to `initialize`: call it at the start of every phase of loading."""

    def __init__(self) -> None:
        self.phase = "starting"
        self.percent: float | None = 0.0
        self.stopping = False
        self._took: dict[str, float] = {}
        self._began = time.monotonic()

    def __call__(self, phase: str, percent: float | None = None) -> None:
        """Say what is being done and how much of all loading is behind, in percent.

        Raises:
            Cancelled: the worker was told to end. Let it through.
        """
        if self.stopping:
            raise Cancelled("the worker is stopping")
        fresh = phase != self.phase
        if fresh:
            self.end_phase()
        self.phase, self.percent = phase, percent
        if fresh:
            log.event(logging.INFO, "loading", load_phase=phase)

    def end_phase(self) -> None:
        """Count the time of the running phase; one that comes again adds to its own."""
        now = time.monotonic()
        if self.phase != "starting":
            self._took = self._took | {self.phase: self._took.get(self.phase, 0.0) + now - self._began}
        self._began = now

    def phases(self) -> list[dict[str, Any]]:
        """The phases that are over, in order, with what they took: `[{"phase": "import", "ms": 4210}]`."""
        return [{"phase": phase, "ms": round(1000 * seconds)} for phase, seconds in self._took.items()]


class BaseService:
    """One model behind HTTP. Subclass it, fill in the hooks, call `main`.

    Class attributes to set: `name` (the served name unless `--name` says
    otherwise), `model` (default of `--model`), `endpoints` (the POST paths).

    In the hooks `self.options` holds the parsed flags. Hooks marked *model
    thread* may block; the others run on the event loop and must not.
    """

    name: ClassVar[str] = "model"
    model: ClassVar[str] = ""
    endpoints: ClassVar[tuple[str, ...]] = ()

    # ---- hooks ---------------------------------------------------------------

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add the worker's own flags."""

    @classmethod
    def preload(cls) -> None:
        """Import what is heavy and touch no device, as a spare process that has no model yet. *A thread of its own.*"""

    def check(self) -> dict[str, Any]:
        """Look at the flags without loading anything, for `--check` and before each start.

        Returns:
            What `--check` prints besides the shared facts.

        Raises:
            ValueError: a flag makes no sense; the text names it.
        """
        return {}

    def initialize(self, loading: Loading) -> None:
        """Import what is heavy and load the model. *Model thread.*

        Call `loading` at every phase: "import", "read" (weights from disk), "device" (to the GPU), "warm_up".
        An exception makes `/health` say `failed` with its text, and ends the process.
        """

    def parse(self, item: Item) -> Any:
        """Check `item.body`; what it returns becomes `item.params`.

        Raises:
            InvalidRequest: with the offending value, and the field in `param`.
        """
        return None

    def batch_key(self, item: Item) -> Hashable:
        """Items of one run share a pass if their keys are equal (say size and steps)."""
        return ()

    def generate(self, items: list[Item], progress: Progress) -> Sequence[Output | Exception]:
        """Run one pass. *Model thread.*

        Args:
            items: at least one; same endpoint, same batch key.
            progress: call `progress(step, total)` after every step; it raises
                `Cancelled` when nobody waits for any of the items any more.

        Returns:
            One outcome for each item, in order: a JSON object, a `Binary`, or an
            exception that fails this item only. Raise to fail the whole pass.
        """
        raise NotImplementedError

    async def answer(self, item: Item) -> Output | Stream:
        """Answer one item. Override for a model that batches by itself (text).

        The default waits for the item's run and pass. An override runs on the
        event loop, concurrently for all items, may return a `Stream`, and is
        cancelled (`asyncio.CancelledError`) when the client goes away.
        """
        self._gatherer.add(item)
        return await item.outcome()

    def park(self, level: int) -> None:
        """Give the device's memory back, keep the weights (1) or not (2). *Model thread.*"""

    def wake(self) -> None:
        """Take the device's memory again. *Model thread.*"""

    def reclaim(self) -> None:
        """Tidy up after a pass ran out of memory, say `empty_cache`. *Model thread.*"""

    def release(self) -> None:
        """Free the device before the process ends. *Model thread.*"""

    def create_app(self) -> Starlette:
        """The HTTP application. Override for full control; `Route`s of your own may be added."""
        posts = [Route(path, Endpoint(self, path), methods=["POST"]) for path in self.endpoints]
        verbs = [
            Route("/health", self.health),
            Route("/metrics", self.metrics_text),
            Route("/v1/models", self.models),
            Route("/is_sleeping", self.is_sleeping),
            Route("/sleep", self.sleep, methods=["POST"]),
            Route("/wake_up", self.wake_up, methods=["POST"]),
            Route("/take_over", spare.refuse, methods=["POST"]),
        ]
        return Starlette(
            routes=posts + verbs, exception_handlers={HTTPException: _http_error, WorkerError: _worker_error}
        )

    # ---- the process ---------------------------------------------------------

    @classmethod
    def parser(cls) -> argparse.ArgumentParser:
        """The shared flags and those of the model."""
        parser = flags.parser(cls.__doc__ or cls.__name__, name=cls.name, model=cls.model)
        cls.add_arguments(parser)
        return parser

    @classmethod
    def main(cls, argv: Sequence[str] | None = None) -> int:
        """Parse the flags and serve until a signal; the exit code."""
        arguments = list(sys.argv[1:] if argv is None else argv)
        if "--spare" in arguments:
            return spare.main(cls, arguments)
        parser = cls.parser()
        try:
            service = cls(parser.parse_args(arguments))
            facts = service.check()
        except (flags.FlagError, ValueError) as error:
            if "--check" in arguments:
                print(json.dumps({"ok": False, "error": str(error)}))
                return 1
            parser.print_usage(sys.stderr)
            print(f"{parser.prog}: error: {error}", file=sys.stderr)
            return 2
        if service.options.check:
            shared = {"name": service.served_name, "model": service.options.model, "endpoints": list(cls.endpoints)}
            print(json.dumps({"ok": True} | shared | facts))
            return 0
        log.configure(service.options.log_level)
        return process.run(service.serve, service.options.port, log_level=service.options.log_level)

    def __init__(self, options: argparse.Namespace) -> None:
        """Keep the flags. Nothing heavy belongs here."""
        self.options = options
        self.served_name: str = options.name
        self.status = Status.LOADING
        self.loading = Loading()
        self.model_facts: dict[str, Any] = {}  # what `/v1/models` says besides; `initialize` may fill it
        self._loaded = False  # the model thread's
        self._in_pass: list[Item] = []  # the model thread's; `/health` looks at it
        self._failure: WorkerError | None = None
        self._active: set[Item] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._stopping = asyncio.Event()
        self._hurry = asyncio.Event()
        self._sleep_lock = asyncio.Lock()
        self._metrics = metrics.Metrics()
        self._started_at = int(time.time())
        self._gatherer = Gatherer(self._start_run, options.batch_wait_ms / 1000)

    async def serve(self, server: process.Server) -> int:
        """Load, serve, and stop when told to; the exit code."""
        self._loop = asyncio.get_running_loop()
        self._thread = ModelThread()
        server.on_signal(self.request_shutdown)
        serving = asyncio.create_task(server.serve_app(self.create_app()))
        await server.listening()
        load = asyncio.create_task(self._load())
        await self._stopping.wait()
        clean = await self._drain()
        load.cancel()
        if not clean:
            log.event(logging.WARNING, "the model thread is busy; ending under it")
            server.exit_now(self._exit_code())
        await server.close(serving)
        log.event(logging.INFO, "stopped")
        return self._exit_code()

    def request_shutdown(self, signal_name: str) -> None:
        """Stop taking requests, let what runs finish within `--grace`; the second call skips the grace."""
        log.event(logging.INFO, "stopping", stop_signal=signal_name, stop_in_flight=len(self._active))
        if self._stopping.is_set():
            self._hurry.set()
        self._stopping.set()

    async def _load(self) -> None:
        started = time.monotonic()
        try:
            await self._thread.submit(self._initialize)
        except Cancelled:
            return
        except BaseException as error:
            self._fail("initialize failed", error)
            return
        self.status = Status.READY
        self.loading.phase, self.loading.percent = "ready", 100.0
        log.event(logging.INFO, "ready", load_seconds=time.monotonic() - started)

    def _initialize(self) -> None:
        self.initialize(self.loading)
        self.loading.end_phase()
        self._loaded = True

    def _release(self) -> None:
        """Run the hook, unless there is nothing whole to release."""
        if self._loaded:
            self.release()

    def _fail(self, message: str, error: BaseException) -> None:
        """Become unusable: say why on `/health` for a moment, then end."""
        self.status = Status.FAILED
        self._failure = as_worker_error(error)
        trace = "".join(traceback.format_exception(error))
        log.event(logging.ERROR, message, error_type=type(error).__name__)
        print(trace, end="", file=sys.stderr, flush=True)
        self._loop.call_later(FAILED_LINGER_S, self._stopping.set)

    def _exit_code(self) -> int:
        return 1 if self.status is Status.FAILED else 0

    async def _drain(self) -> bool:
        """Wait for what runs, cancel what is late, free the device; False if a pass would not end."""
        self.loading.stopping = True
        for item in list(self._active):
            item.withdraw(Unavailable("the worker is stopping", code="stopping"))
        if not await _within(self.options.grace, self._idle, self._hurry):
            log.event(logging.WARNING, "grace is over", stop_cancelled=len(self._active))
        for item in list(self._active):
            item.cancel()
        last = self._thread.submit(self._release)
        try:
            await asyncio.wait_for(last, CANCEL_WAIT_S if self._active else RELEASE_WAIT_S + CANCEL_WAIT_S)
            await asyncio.wait_for(self._idle.wait(), CANCEL_WAIT_S)
        except TimeoutError:
            return False
        except Exception as error:
            log.event(logging.ERROR, "release failed", error_type=type(error).__name__, error_at=log.where(error))
        return self._thread.join(RELEASE_WAIT_S)

    # ---- requests and passes -------------------------------------------------

    def require_ready(self) -> None:
        """Raise `Unavailable` unless requests are taken now."""
        if self._stopping.is_set():
            raise Unavailable("the worker is stopping", code="stopping")
        if self.status is not Status.READY:
            raise Unavailable(f"the model is {self.status}", code=self.status.value)

    def enter(self, item: Item) -> None:
        """Admit a request, or raise `Unavailable`."""
        self.require_ready()
        self._active.add(item)
        self._idle.clear()
        self._metrics.in_flight = len(self._active)

    def leave(self, item: Item, outcome: str) -> None:
        """Note that an admitted request was answered."""
        self._active.discard(item)
        self._metrics.in_flight = len(self._active)
        self.count(outcome)
        if not self._active:
            self._idle.set()

    def count(self, outcome: str) -> None:
        """Count a request by its outcome."""
        self._metrics.requests[outcome] += 1

    def _start_run(self, items: list[Item]) -> None:
        for group in split(items):
            self._thread.submit(lambda group=group: self._run_pass(group))

    def _run_pass(self, items: list[Item]) -> None:
        """One call of the model, on the model thread. Never raises."""
        wanted = [item for item in items if item.start()]
        if not wanted:
            return
        self._in_pass = wanted
        started = time.monotonic()
        outcomes: list[Output | Exception]
        try:
            outcomes = [_outcome(value) for value in self.generate(wanted, Progress(wanted, self._loop))]
            if len(outcomes) != len(wanted):
                raise WorkerError(f"generate returned {len(outcomes)} outcomes for {len(wanted)} items")
            failure = None
        except BaseException as error:
            if not isinstance(error, WorkerError):
                log.event(logging.ERROR, "pass raised", error_type=type(error).__name__, error_at=log.where(error))
            failure = as_worker_error(error)
            outcomes = [failure] * len(wanted)
        if any(isinstance(outcome, OutOfMemory) for outcome in outcomes):
            self._reclaim()
        self._in_pass = []
        seconds = time.monotonic() - started
        log.event(
            logging.INFO,
            "pass finished",
            pass_size=len(wanted),
            pass_seconds=seconds,
            pass_outcome=failure.code if failure else "succeeded",
            request_ids=[item.request_id for item in wanted[:LOGGED_IDS_LIMIT]],
        )
        self._loop.call_soon_threadsafe(self._finish_pass, wanted, outcomes, seconds)

    def _given_up_s(self) -> float | None:
        """For how long nobody has waited for the pass that runs, in seconds; None: somebody does, or there is none."""
        items = self._in_pass
        if not items or not all(item.cancelled for item in items):
            return None
        return time.monotonic() - max(item.cancelled_at for item in items)

    def _reclaim(self) -> None:
        try:
            self.reclaim()
        except Exception as error:
            log.event(logging.ERROR, "reclaim failed", error_type=type(error).__name__, error_at=log.where(error))

    def _finish_pass(self, items: list[Item], outcomes: list[Output | Exception], seconds: float) -> None:
        self._metrics.pass_seconds.add(seconds)
        self._metrics.pass_size.add(len(items))
        for item, outcome in zip(items, outcomes, strict=True):
            item.resolve(outcome)

    # ---- verbs ---------------------------------------------------------------

    def device_bytes(self) -> int | None:
        """Device memory that this worker takes on each of its GPUs at most; None: not known.

        The scheduler loads other models beside it in what is left.
        """
        return None

    def parking_facts(self) -> dict[str, Any]:
        """What `/health` says about parking, if it is known.

        `host_bytes`: host memory that the copy of the weights takes now; `can_park`: false if `/sleep` would not give
        the device's memory back; `park_note`: a sentence for a person; `can_reread`: whether `/sleep?level=2` leaves no
        copy, and a wake reads the weights again.
        """
        return {}

    async def health(self, request: Request) -> Response:
        """`GET /health`: 200 when requests are taken, else 503; why is in the body."""
        body: dict[str, Any] = {
            "status": self.status.value,
            "phase": "stopping" if self._stopping.is_set() else self.loading.phase,
            "percent": self.loading.percent,
            "model": self.served_name,
            "instance": os.environ.get("ROUNDHOUSE_INSTANCE"),
        }
        if (size := self.device_bytes()) is not None:
            body["device_bytes"] = size
        if phases := self.loading.phases():
            body["phases"] = phases
        if (given_up_s := self._given_up_s()) is not None:
            body["given_up_ms"] = round(given_up_s * 1000)
        body |= self.parking_facts()
        if self._failure is not None:
            body |= {"error": self._failure.message, "code": self._failure.code}
        ready = self.status is Status.READY and not self._stopping.is_set()
        return JSONResponse(body, 200 if ready else 503)

    async def models(self, request: Request) -> Response:
        """`GET /v1/models`, in OpenAI's shape."""
        model: dict[str, Any] = self.model_facts | {
            "id": self.served_name,
            "object": "model",
            "created": self._started_at,
            "owned_by": "roundhouse",
            "root": self.options.model or self.served_name,
        }
        return JSONResponse({"object": "list", "data": [model]})

    async def metrics_text(self, request: Request) -> Response:
        """`GET /metrics`, Prometheus text."""
        ready = self.status is Status.READY and not self._stopping.is_set()
        return Response(self._metrics.text(ready=ready), media_type=metrics.CONTENT_TYPE)

    async def is_sleeping(self, request: Request) -> Response:
        """`GET /is_sleeping`."""
        return JSONResponse({"is_sleeping": self.status is Status.ASLEEP})

    async def sleep(self, request: Request) -> Response:
        """`POST /sleep?level=1`: refuse new requests, let the running ones finish, then park."""
        level = request.query_params.get("level", "1")
        if level not in ("1", "2"):
            raise InvalidRequest(f"level must be 1 or 2, not {level!r}", param="level")
        async with self._sleep_lock:
            if self.status is not Status.ASLEEP:
                self.require_ready()
                self.status = Status.ASLEEP
                self.loading.phase = "parking"
                self._gatherer.flush()
                await self._idle.wait()
                await self._move("park", "parked", lambda: self.park(int(level)))
        return JSONResponse({"is_sleeping": True})

    async def wake_up(self, request: Request) -> Response:
        """`POST /wake_up?park_bytes=N`: answers when requests are taken again.

        After a sleep of level 2 a copy of the weights may be made again, of at most N bytes if the scheduler says so.
        """
        budget = request.query_params.get("park_bytes")
        if budget is not None and not (budget.isascii() and budget.isdigit()):
            raise InvalidRequest(f"park_bytes must be a number of bytes, not {budget!r}", param="park_bytes")
        async with self._sleep_lock:
            if self.status is Status.ASLEEP:
                self.loading.phase = "waking"
                if budget is not None:
                    os.environ["ROUNDHOUSE_PARK_BYTES"] = budget
                await self._move("wake", "ready", self.wake)
                self.status = Status.READY
            self.require_ready()
        return JSONResponse({"is_sleeping": False})

    async def _move(self, verb: str, phase: str, call: Callable[[], None]) -> None:
        """Park or wake; after a failure nobody knows where the weights are, so the worker ends."""
        started = time.monotonic()
        try:
            await self._thread.submit(call)
        except Exception as error:
            self._fail(f"{verb} failed", error)
            raise as_worker_error(error) from None
        self.loading.phase = phase
        log.event(logging.INFO, phase, **{f"{verb}_seconds": time.monotonic() - started})


def _outcome(value: Output | Exception) -> Output | Exception:
    return as_worker_error(value) if isinstance(value, Exception) else value


async def _within(seconds: float, *events: asyncio.Event) -> bool:
    """Wait for the first of the events; True if the first named is set in time."""
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()
    return events[0].is_set()


async def _worker_error(request: Request, error: Exception) -> Response:
    failure = as_worker_error(error)
    return JSONResponse(failure.body(), failure.status)


async def _http_error(request: Request, error: Exception) -> Response:
    """404 and 405, in the shape of every other error."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    message = f"{request.method} {request.url.path}: {getattr(error, 'detail', 'error')}"
    code = "not_found" if status == 404 else "invalid_request"
    return JSONResponse(WorkerError(message, code=code, type="invalid_request_error").body(), status)
