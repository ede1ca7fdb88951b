"""The fault and load double: every endpoint, no model, and each way to fail on demand.

    python models/echo/server.py --port 8002
    curl 127.0.0.1:8002/v1/chat/completions -d '{"messages":[{"role":"user","content":"hi"}]}'

What a request does is decided by the flags, and by the object `echo` in its body
under the same names: {"echo": {"delay_ms": 200, "fail": true}}. See README.md.
"""

from __future__ import annotations

import argparse
import array
import asyncio
import dataclasses
import hashlib
import heapq
import io
import json
import math
import os
import re
import signal
import struct
import subprocess
import sys
import time
import wave
import zlib
from collections.abc import AsyncIterator, Hashable, Sequence
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

try:
    import roundhouse_worker as rw
except ModuleNotFoundError:  # not installed: use the neighbour
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "base"))
    import roundhouse_worker as rw

from roundhouse_worker.fields import integer, number

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
IMAGES = "/v1/images/generations"
SPEECH = "/v1/audio/speech"
AUDIO = "/v1/audio/generations"
ECHO = "/echo"

TEXT_LIMIT_CHARS = 2000
TOKENS_LIMIT = 100_000
SIDE_LIMIT_PIXELS = 1024
IMAGES_LIMIT = 8
DURATION_LIMIT_S = 30.0
SAMPLE_RATE_HZ = 8000
NAP_S = 0.02
"""How long the model thread sleeps between two looks at the cancel flag."""


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """What one request does. A field is a flag, and a name in the body's `echo` object."""

    delay_ms: float = 0.0
    steps: int = 4
    tokens: int = 0
    tokens_per_s: float = 0.0
    fail: bool | str = False
    crash: bool = False
    hang: bool = False
    oom: bool = False
    status: int = 0
    stream_error_after: int = -1
    no_finish: bool = False

    @property
    def delay_s(self) -> float:
        """The service time, in seconds."""
        return self.delay_ms / 1000

    def changed(self, wishes: Any) -> Plan:
        """This plan with the wishes of a request's `echo` object.

        Raises:
            InvalidRequest: a name is unknown or a value has the wrong type or range.
        """
        if not isinstance(wishes, dict):
            raise rw.InvalidRequest(f"echo must be an object, not {type(wishes).__name__}", param="echo")
        for name, value in wishes.items():
            if name not in _PLAN_DEFAULTS:
                known = ", ".join(sorted(_PLAN_DEFAULTS))
                raise rw.InvalidRequest(f"echo.{name} is unknown; known are {known}", param=f"echo.{name}")
            if not _fits(name, value):
                raise rw.InvalidRequest(f"echo.{name} cannot be {value!r}", param=f"echo.{name}")
        return dataclasses.replace(self, **wishes)


class Cost:
    """What a pass costs: `FIXED+EACH`, in ms."""

    def __init__(self, text: str) -> None:
        fixed_ms, _, each_ms = text.partition("+")
        self._fixed_ms, self._each_ms = float(fixed_ms), float(each_ms)
        if not (0 <= self._fixed_ms < math.inf and 0 <= self._each_ms < math.inf):
            raise ValueError(text)

    def seconds(self, items: int) -> float:
        """How long a pass over so many items takes."""
        return (self._fixed_ms + self._each_ms * items) / 1000


_PLAN_DEFAULTS = {field.name: field.default for field in dataclasses.fields(Plan)}


def _fits(name: str, value: Any) -> bool:
    """Whether a value has the type of its field and is in range."""
    if name == "fail":
        return isinstance(value, bool | str)
    default = _PLAN_DEFAULTS[name]
    if isinstance(default, bool):
        return isinstance(value, bool)
    kinds = (int,) if isinstance(default, int) else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        return False
    low = {"steps": 1, "stream_error_after": -1}.get(name, 0)
    high = {"status": 599, "tokens": TOKENS_LIMIT}.get(name, math.inf)
    return low <= value <= high and (name != "status" or value == 0 or value >= 400)


@dataclasses.dataclass(frozen=True, slots=True)
class Wanted:
    """A checked request: its plan, and what the endpoint reads from the body."""

    plan: Plan
    text: str = ""
    max_tokens: int = TOKENS_LIMIT
    width: int = 0
    height: int = 0
    count: int = 1
    seed: int = 0
    duration_s: float = 0.0


class EchoService(rw.BaseService):
    """Answers without a model, and fails on demand: the double for tests and load."""

    name = "echo"
    model = "echo"
    endpoints = (CHAT, COMPLETIONS, IMAGES, SPEECH, AUDIO, ECHO)

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """The flags of every request (fields of `Plan`) and those of the process."""
        each = parser.add_argument_group("what each request does (also in the body, under echo)")
        each.add_argument("--delay-ms", type=float, default=0.0, help="service time, in --steps steps")
        each.add_argument("--steps", type=int, default=4, help="progress steps of a pass")
        each.add_argument("--tokens", type=int, default=0, help="length of a text answer; 0: as long as the text")
        each.add_argument("--tokens-per-s", type=float, default=0.0, help="rate of a text answer; 0: at once")
        each.add_argument("--fail", nargs="?", const=True, default=False, metavar="TEXT", help="worker_error")
        each.add_argument("--crash", action="store_true", help="SIGKILL itself half way")
        each.add_argument("--hang", action="store_true", help="never answer, ignore cancelling; health stays well")
        each.add_argument("--oom", action="store_true", help="run out of memory half way")
        each.add_argument("--status", type=int, default=0, help="answer this HTTP status (400-599) at once")
        each.add_argument("--stream-error-after", type=int, default=-1, metavar="N", help="error frame after N pieces")
        each.add_argument("--no-finish", action="store_true", help="leave the finish_reason out")

        whole = parser.add_argument_group("what the process does")
        whole.add_argument("--concurrency", type=int, default=256, help="text requests worked on at once")
        whole.add_argument("--share-alpha", type=float, metavar="A", help="n text requests share: each at 1/(1+A(n-1))")
        whole.add_argument("--import-ms", type=float, default=0.0, help="how long its imports take")
        whole.add_argument("--load-s", type=float, default=0.0, help="how long loading takes")
        whole.add_argument("--load-from-start", action="store_true", help="--load-s counts from the process's start")
        whole.add_argument("--load-fail", metavar="TEXT", help="fail to load, with this text")
        whole.add_argument(
            "--batch-cost",
            type=Cost,
            metavar="FIXED+EACH",
            help="ms that a pass takes, and for each item; for --delay-ms",
        )
        whole.add_argument("--oom-above", type=int, default=0, metavar="N", help="larger passes run out of memory")
        whole.add_argument("--oom-item", type=int, default=0, metavar="K", help="the K-th request runs out of memory")
        whole.add_argument(
            "--load-oom", type=int, default=0, metavar="N", help="the first N (1, 2) tries of a load run out of memory"
        )
        whole.add_argument("--fail-item", type=int, default=0, metavar="K", help="the K-th request fails")
        whole.add_argument("--crash-after", type=int, default=0, metavar="N", help="the N-th request crashes it")
        whole.add_argument("--device-bytes", type=int, metavar="N", help="device memory that /health tells")
        whole.add_argument("--hang-health", action="store_true", help="/health hangs after the first request")
        whole.add_argument("--ignore-sigterm", action="store_true")
        whole.add_argument("--end-at-once", action="store_true", help="no orderly end: gone on the first signal")
        whole.add_argument("--host-bytes", type=int, metavar="N", help="/health tells a copy of N bytes, made at load")
        whole.add_argument(
            "--reread-s",
            type=float,
            metavar="S",
            help="/health tells that it can sleep without a copy; S: how long such a wake takes",
        )
        whole.add_argument("--no-park", metavar="NOTE", help="/health tells that it cannot be parked, with this note")
        whole.add_argument("--park-s", type=float, default=0.0, help="how long /sleep takes")
        whole.add_argument("--wake-s", type=float, default=0.0, help="how long /wake_up takes")
        whole.add_argument("--park-lie", action="store_true", help="say that it sleeps, and keep the device's memory")
        whole.add_argument("--park-crash", action="store_true", help="SIGKILL itself in /sleep")
        whole.add_argument("--park-fail", metavar="TEXT", help="fail to park, with this text")
        whole.add_argument("--wake-fail", metavar="TEXT", help="fail to wake, with this text")
        whole.add_argument("--wake-broken", metavar="TEXT", help="every request after a wake fails, with this text")

        device = parser.add_argument_group("a device's memory, as a directory with a file <pid> for each process")
        device.add_argument("--device-memory-dir", type=Path, metavar="DIR")
        device.add_argument("--device-memory-bytes", type=int, default=0, help="held while loaded")
        device.add_argument("--device-parked-bytes", type=int, default=0, help="held while asleep")
        device.add_argument("--device-total-bytes", type=int, default=0, help="loading beyond this fails; 0: no limit")
        device.add_argument("--release-delay-s", type=float, default=0.0, help="from the process's end to its release")

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        self._plan = Plan(**{name: getattr(options, name) for name in _PLAN_DEFAULTS})
        self._slots = asyncio.Semaphore(max(1, options.concurrency))
        self._share = None if options.share_alpha is None else Share(options.share_alpha)
        self._taken = 0
        self._woken = False
        self._is_bare = False  # asleep without a copy
        self._device = DeviceMemory(options.device_memory_dir, options.release_delay_s)

    def check(self) -> dict[str, Any]:
        """Look at the ranges of the flags."""
        for name in _PLAN_DEFAULTS:
            value = getattr(self.options, name)
            if not _fits(name, value):
                raise ValueError(f"--{name.replace('_', '-')} cannot be {value}")
        if self.options.concurrency < 1:
            raise ValueError(f"--concurrency must be at least 1, not {self.options.concurrency}")
        if self.options.share_alpha is not None and not 0 <= self.options.share_alpha < math.inf:
            raise ValueError(f"--share-alpha must be at least 0, not {self.options.share_alpha}")
        directory = self.options.device_memory_dir
        if directory is not None and not directory.is_dir():
            raise ValueError(f"--device-memory-dir {directory} is no directory")
        return {"plan": dataclasses.asdict(self._plan)}

    # ---- loading, parking, ending --------------------------------------------

    @classmethod
    def preload(cls) -> None:
        """Spend as long as the environment's ECHO_IMPORT_MS says; `--import-ms` is not known yet."""
        _import(float(os.environ.get("ECHO_IMPORT_MS", "0")))

    def initialize(self, loading: rw.Loading) -> None:
        """Import, take the device's memory, spend `--load-s`, fail if told to."""
        loading("import", 0.0)
        _import(self.options.import_ms)
        loading("read", 0.0)
        self._device.hold(self.options.device_memory_bytes, total=self.options.device_total_bytes)
        started = time.monotonic() - (_age_s() if self.options.load_from_start else 0.0)
        while (spent := time.monotonic() - started) < self.options.load_s:
            loading("read", round(100 * spent / self.options.load_s, 1))
            time.sleep(min(NAP_S, self.options.load_s - spent))
        tries = 2 if "ROUNDHOUSE_MEMORY_SCALE" in os.environ else 1
        if tries <= self.options.load_oom:
            raise RuntimeError("CUDA out of memory (not really: it was asked for)")
        if self.options.load_fail is not None:
            raise RuntimeError(self.options.load_fail)

    def park(self, level: int) -> None:
        """Shrink to `--device-parked-bytes`."""
        time.sleep(self.options.park_s)
        if self.options.park_crash:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.options.park_fail is not None:
            raise RuntimeError(self.options.park_fail)
        self._is_bare = level == 2
        if not self.options.park_lie:
            self._device.hold(self.options.device_parked_bytes)

    def wake(self) -> None:
        """Grow back to `--device-memory-bytes`."""
        time.sleep(self.options.wake_s)
        if self._is_bare:
            time.sleep(self.options.reread_s or 0.0)
            self._is_bare = False
        if self.options.wake_fail is not None:
            raise RuntimeError(self.options.wake_fail)
        self._device.hold(self.options.device_memory_bytes, total=self.options.device_total_bytes)
        self._woken = True

    def request_shutdown(self, signal_name: str) -> None:
        """Stop, unless told to ignore SIGTERM; without finishing anything if told so."""
        if self.options.end_at_once:
            os._exit(0)
        if self.options.ignore_sigterm and signal_name == "SIGTERM":
            print(f"ignored stop.signal={signal_name}", file=sys.stderr, flush=True)
        else:
            super().request_shutdown(signal_name)

    def device_bytes(self) -> int | None:
        """As `--device-bytes` says; while it sleeps, `--device-parked-bytes`."""
        asleep = self.status.value == "asleep" and not self.options.park_lie
        if asleep and self.options.device_bytes is not None:
            return self.options.device_parked_bytes
        return self.options.device_bytes

    async def health(self, request: Request) -> Response:
        """Answer, unless told to hang."""
        if self.options.hang_health and self._taken:
            await asyncio.Event().wait()
        reply = await super().health(request)
        return JSONResponse(json.loads(bytes(reply.body)) | self._host_copy(), reply.status_code)

    def _host_copy(self) -> dict[str, Any]:
        """What `/health` tells of the copy in host memory, and of a sleep without one."""
        facts = self._copy_made()
        return facts if self.options.reread_s is None else facts | {"can_reread": True}

    def _copy_made(self) -> dict[str, Any]:
        """The copy: one is made at load if it may be as large as it is."""
        if self.options.no_park is not None:
            return {"host_bytes": 0, "can_park": False, "park_note": self.options.no_park}
        if self._is_bare:
            return {"host_bytes": 0, "can_park": True}
        size = self.options.host_bytes
        if size is None or self.status.value == "loading":
            return {}
        most = os.environ.get("ROUNDHOUSE_PARK_BYTES")
        if most is None:
            return {"host_bytes": 0}
        if size > int(most):
            note = f"the copy takes {size} bytes, and {most} are left for it"
            return {"host_bytes": 0, "can_park": False, "park_note": note}
        return {"host_bytes": size, "can_park": True}

    # ---- requests ------------------------------------------------------------

    def parse(self, item: rw.Item) -> Wanted:
        """Check the body, and let the flags that count requests have their say."""
        self._taken += 1
        plan = self._plan.changed(item.body.get("echo", {}))
        if self._taken == self.options.fail_item:
            plan = dataclasses.replace(plan, fail=f"request {self._taken} fails")
        if self._taken == self.options.oom_item:
            plan = dataclasses.replace(plan, oom=True)
        if self._taken == self.options.crash_after:
            plan = dataclasses.replace(plan, crash=True)
        if self._woken and self.options.wake_broken is not None:
            plan = dataclasses.replace(plan, fail=self.options.wake_broken)
        if plan.status:
            raise rw.WorkerError(f"status {plan.status} was asked for", status=plan.status, code="echo_status")
        return _PARSERS[item.endpoint](item.body, plan)

    def batch_key(self, item: rw.Item) -> Hashable:
        """Images of one size share a pass, everything else of one endpoint does."""
        return (item.params.width, item.params.height)

    async def answer(self, item: rw.Item) -> rw.Output | rw.Stream:
        """Text is answered here, many at a time; the rest goes through passes."""
        if item.endpoint not in (CHAT, COMPLETIONS):
            return await super().answer(item)
        answer = Answer(self._slots, self._share, item)
        chat = item.endpoint == CHAT
        if item.body.get("stream") is True:
            make = rw.chat_stream if chat else rw.completion_stream
            usage = rw.wants_usage(item.body)
            pieces = answer.pieces(streamed=True)
            return rw.Stream(make(item.request_id, self.served_name, pieces, answer.finish, include_usage=usage))
        text = "".join([piece async for piece in answer.pieces(streamed=False)])
        reply = rw.chat_reply if chat else rw.completion_reply
        return reply(item.request_id, self.served_name, text, *answer.finish())

    def generate(self, items: list[rw.Item], progress: rw.Progress) -> Sequence[rw.Output | Exception]:
        """Spend the longest delay of the items, then make their images, sounds or echoes."""
        plans: list[Plan] = [item.params.plan for item in items]
        steps = max(plan.steps for plan in plans)
        cost: Cost | None = self.options.batch_cost
        delay_s = max(plan.delay_s for plan in plans) if cost is None else cost.seconds(len(items))
        for step in range(1, steps + 1):
            _nap(delay_s / steps, progress)
            if step == (steps + 1) // 2:
                if any(plan.hang for plan in plans):
                    _hang_thread()
                for plan in plans:
                    _strike(plan)
                if 0 < self.options.oom_above < len(items):
                    raise RuntimeError(f"CUDA out of memory (not really: {len(items)} items are too many)")
            progress(step, steps)
        return [_failure(item.params.plan) or _make(item, len(items)) for item in items]


class Answer:
    """One text answer: its pieces, and what is to be said at their end."""

    def __init__(self, slots: asyncio.Semaphore, share: Share | None, item: rw.Item) -> None:
        self._slots = slots
        self._share = share
        self._item = item
        self._wanted: Wanted = item.params
        self._words, self._cut = _words(self._wanted)

    async def pieces(self, *, streamed: bool) -> AsyncIterator[str]:
        """Take a slot, spend the delay, then give the words at the plan's rate."""
        plan = self._wanted.plan
        async with self._slots:
            await self._spend(plan)
            gap_s = 1 / plan.tokens_per_s if plan.tokens_per_s else 0.0
            due = asyncio.get_running_loop().time()
            for index, word in enumerate(self._words):
                if plan.crash and index == len(self._words) // 2:
                    _strike(plan)
                if streamed and index == plan.stream_error_after:
                    raise rw.WorkerError(f"the stream breaks after {index} pieces")
                if gap_s:
                    due += gap_s
                    await asyncio.sleep(due - asyncio.get_running_loop().time())
                yield word
            if streamed and len(self._words) <= plan.stream_error_after:
                raise rw.WorkerError(f"the stream breaks after {len(self._words)} pieces")

    def finish(self) -> tuple[str | None, rw.Usage]:
        """The finish reason and the usage."""
        usage = rw.Usage(len(self._wanted.text.split()), len(self._words))
        if self._wanted.plan.no_finish:
            return None, usage
        return "length" if self._cut else "stop", usage

    async def _spend(self, plan: Plan) -> None:
        """The delay, in steps, and the failures that come before any text."""
        if plan.hang:
            await _hang_task()
        if plan.delay_s and self._share is not None:
            await self._share.spend(plan.delay_s)
        elif plan.delay_s:
            for step in range(1, plan.steps + 1):
                await asyncio.sleep(plan.delay_s / plan.steps)
                self._item.report(step, plan.steps)
        if plan.oom:
            _strike(plan)
        if failure := _failure(plan):
            raise failure


class Share:
    """A device that its requests share: each of n runs at 1 / (1 + alpha (n - 1)) of the speed that it has alone.

    All go equally fast, so one clock is enough: it counts the work that each of
    those on the device has had, and a request ends when it has had its own.
    """

    def __init__(self, alpha: float) -> None:
        self._alpha = alpha
        self._done_s = 0.0
        self._looked_at = 0.0
        self._ends: list[tuple[float, int, asyncio.Future[None]]] = []
        self._count = 0
        self._timer: asyncio.TimerHandle | None = None

    async def spend(self, work_s: float) -> None:
        """Come back when this much work was done."""
        self._look()
        self._count += 1
        end = (self._done_s + work_s, self._count, asyncio.get_running_loop().create_future())
        heapq.heappush(self._ends, end)
        self._wait()
        try:
            await end[2]
        finally:
            if end in self._ends:  # cancelled
                self._look()
                self._ends.remove(end)
                heapq.heapify(self._ends)
                self._wait()

    @property
    def _slowness(self) -> float:
        return 1 + self._alpha * max(0, len(self._ends) - 1)

    def _look(self) -> None:
        now = asyncio.get_running_loop().time()
        self._done_s += (now - self._looked_at) / self._slowness
        self._looked_at = now

    def _wait(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._ends:
            left_s = (self._ends[0][0] - self._done_s) * self._slowness
            self._timer = asyncio.get_running_loop().call_later(max(0.0, left_s), self._end_some)

    def _end_some(self) -> None:
        self._look()
        while self._ends and self._ends[0][0] <= self._done_s + 1e-6:
            _, _, end = heapq.heappop(self._ends)
            if not end.done():
                end.set_result(None)
        self._wait()


_imported = False


def _import(ms: float) -> None:
    """What is imported stays so: only the first time takes any."""
    global _imported
    if not _imported:
        time.sleep(ms / 1000)
    _imported = True


def _age_s() -> float:
    """How long ago this process was started, or took another's place by exec."""
    after_name = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    ticks = int(after_name[19])  # starttime, field 22
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


class DeviceMemory:
    """The memory of a device that is a directory: the file `<pid>` says how many bytes a process holds.

    A driver frees the memory of a process some time after it has died, however
    it died. A shell plays the driver here: it notices our end because its stdin
    closes, waits `release_delay_s`, and removes the file. It leaves our process
    group and our environment, which whoever ends us may sweep.
    """

    def __init__(self, directory: Path | None, release_delay_s: float) -> None:
        self._directory = directory
        self._release_delay_s = release_delay_s
        self._driver: subprocess.Popen[bytes] | None = None

    def hold(self, size_bytes: int, *, total: int = 0) -> None:
        """Hold exactly `size_bytes` from now on.

        Raises:
            RuntimeError: all processes together would hold more than `total` bytes.
        """
        if self._directory is None:
            return
        path = self._directory / str(os.getpid())
        if self._driver is None:
            self._driver = _start_driver(path, self._release_delay_s)
        others = sum(_held(file) for file in self._directory.iterdir() if file != path)
        if total and others + size_bytes > total:
            raise RuntimeError(f"out of memory: {size_bytes} bytes wanted, {total - others} of {total} free")
        fresh = path.with_name(f".{path.name}.new")
        fresh.write_text(str(size_bytes))
        fresh.replace(path)


def _held(file: Path) -> int:
    try:
        return int(file.read_text()) if file.name.isdecimal() else 0
    except FileNotFoundError:  # released since the directory was listed
        return 0


def _start_driver(path: Path, delay_s: float) -> subprocess.Popen[bytes]:
    environment = {name: value for name, value in os.environ.items() if name != "ROUNDHOUSE_INSTANCE"}
    return subprocess.Popen(  # noqa: S603 - a fixed script, our own pid and path
        ["/bin/sh", "-c", 'cat >/dev/null; sleep "$1"; rm -f "$2"', "sh", str(delay_s), str(path.resolve())],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
        cwd="/",
        start_new_session=True,
    )


# ---- failures ----------------------------------------------------------------


def _strike(plan: Plan) -> None:
    """The failures that hit a pass half way."""
    if plan.crash:
        os.kill(os.getpid(), signal.SIGKILL)
    if plan.oom:
        raise RuntimeError("CUDA out of memory (not really: it was asked for)")


def _failure(plan: Plan) -> rw.WorkerError | None:
    """The failure of this item alone, if it was asked for."""
    if not plan.fail:
        return None
    return rw.WorkerError(plan.fail if isinstance(plan.fail, str) else "a failure was asked for")


def _nap(seconds: float, progress: rw.Progress) -> None:
    """Sleep on the model thread, and notice that nobody waits any more."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(NAP_S, left))
        progress.check()


def _hang_thread() -> None:
    while True:
        time.sleep(3600)


async def _hang_task() -> None:
    while True:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            continue  # a hanging worker does not hear that it was cancelled


# ---- bodies ------------------------------------------------------------------


def _chat(body: dict[str, Any], plan: Plan) -> Wanted:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise rw.InvalidRequest("messages must be a list that is not empty", param="messages")
    users = [message for message in messages if isinstance(message, dict) and message.get("role") == "user"]
    text = _content(users[-1].get("content")) if users else ""
    return Wanted(plan, text=text, max_tokens=_max_tokens(body))


def _content(content: Any) -> str:
    """A message's text, also if it comes in parts."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return " ".join(
            part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)
        )
    raise rw.InvalidRequest(f"content must be text or parts, not {type(content).__name__}", param="messages")


def _completion(body: dict[str, Any], plan: Plan) -> Wanted:
    prompt = body.get("prompt", "")
    if isinstance(prompt, list) and prompt:
        prompt = prompt[-1]
    return Wanted(plan, text=_text(prompt, "prompt"), max_tokens=_max_tokens(body))


def _image(body: dict[str, Any], plan: Plan) -> Wanted:
    size = body.get("size", "64x64")
    match = re.fullmatch(r"([0-9]{1,4})x([0-9]{1,4})", size) if isinstance(size, str) else None
    width, height = (int(match[1]), int(match[2])) if match else (0, 0)
    if not (1 <= width <= SIDE_LIMIT_PIXELS and 1 <= height <= SIDE_LIMIT_PIXELS):
        raise rw.InvalidRequest(f"size must be <width>x<height> up to {SIDE_LIMIT_PIXELS}, not {size!r}", param="size")
    count = integer(body, "n", 1, 1, IMAGES_LIMIT)
    seed = integer(body, "seed", 0, 0, 2**63)
    prompt = _text(body.get("prompt"), "prompt")
    return Wanted(plan, text=prompt, width=width, height=height, count=count, seed=seed)


def _speech(body: dict[str, Any], plan: Plan) -> Wanted:
    _wav_only(body)
    return Wanted(plan, text=_text(body.get("input"), "input"), duration_s=0.5)


def _audio(body: dict[str, Any], plan: Plan) -> Wanted:
    _wav_only(body)
    duration_s = number(body, "duration", 1.0, 0.1, DURATION_LIMIT_S)
    seed = integer(body, "seed", 0, 0, 2**63)
    return Wanted(plan, text=_text(body.get("prompt"), "prompt"), duration_s=duration_s, seed=seed)


def _wav_only(body: dict[str, Any]) -> None:
    if body.get("response_format", "wav") != "wav":
        raise rw.InvalidRequest(f"only wav is made, not {body['response_format']!r}", param="response_format")


def _plain(body: dict[str, Any], plan: Plan) -> Wanted:
    return Wanted(plan)


_PARSERS = {CHAT: _chat, COMPLETIONS: _completion, IMAGES: _image, SPEECH: _speech, AUDIO: _audio, ECHO: _plain}


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise rw.InvalidRequest(f"{name} must be text, not {type(value).__name__}", param=name)
    return value


def _max_tokens(body: dict[str, Any]) -> int:
    name = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
    return integer(body, name, TOKENS_LIMIT, 1, 2**31)


# ---- what is made ------------------------------------------------------------


def _words(wanted: Wanted) -> tuple[list[str], bool]:
    """The answer's tokens, each with the space before it, and whether `max_tokens` cut it."""
    words = f"echo: {wanted.text[-TEXT_LIMIT_CHARS:]}".split()
    count = wanted.plan.tokens or len(words)
    words = (words * (count // len(words) + 1))[: min(count, wanted.max_tokens)]
    return [words[0], *(f" {word}" for word in words[1:])], count > wanted.max_tokens


def _make(item: rw.Item, pass_size: int) -> rw.Output:
    """The result of one item of a pass."""
    wanted: Wanted = item.params
    if item.endpoint == IMAGES:
        seeds = range(wanted.seed, wanted.seed + wanted.count)
        return rw.images_reply(png(wanted.text, seed, wanted.width, wanted.height) for seed in seeds)
    if item.endpoint == ECHO:
        return {
            "request_id": item.request_id,
            "run": item.run_id,
            "pass_size": pass_size,
            "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"),
            "pid": os.getpid(),
            "body": item.body,
        }
    return rw.Binary("audio/wav", wav(wanted.text, wanted.seed, wanted.duration_s))


def png(prompt: str, seed: int, width: int, height: int) -> bytes:
    """An RGB image whose stripes depend on the prompt and the seed."""
    pattern = hashlib.sha256(f"{seed}:{prompt}".encode()).digest() * (3 * width // 32 + 2)
    rows = b"".join(b"\0" + pattern[y % 32 : y % 32 + 3 * width] for y in range(height))

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows, 1)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def wav(prompt: str, seed: int, duration_s: float) -> bytes:
    """A tone of 16-bit mono whose pitch depends on the prompt and the seed."""
    digest = hashlib.sha256(f"{seed}:{prompt}".encode()).digest()
    period = 16 + digest[0] % 48  # samples: 125-500 Hz
    wave_form = array.array("h", (round(12000 * math.sin(2 * math.pi * i / period)) for i in range(period)))
    if sys.byteorder == "big":
        wave_form.byteswap()
    frames = round(duration_s * SAMPLE_RATE_HZ)
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE_HZ)
        file.writeframes((wave_form.tobytes() * (frames // period + 1))[: 2 * frames])
    return out.getvalue()


if __name__ == "__main__":
    raise SystemExit(EchoService.main())
