"""A spare process: everything heavy is imported, no model is chosen. It becomes the next worker when it is told which.

    python models/flux/server.py --spare --port 8009

`POST /take_over` brings the arguments and the environment of the worker that is wanted. From then on the process is
that worker, on the port where it listens already; only the imports are behind it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from roundhouse_worker import flags, log, process
from roundhouse_worker.errors import WorkerError, as_worker_error

if TYPE_CHECKING:
    from roundhouse_worker.service import BaseService

NICENESS = 10
"""Of the thread that imports: what runs on the box comes first."""
DEVICE_FILE = "/dev/nvidia-uvm"
"""Held open by a process that has initialised CUDA, which fixes the GPUs that it sees."""
FAILED_LINGER_S = 0.5


def main(service: type[BaseService], arguments: Sequence[str]) -> int:
    """Be a spare process of `service` until it is taken over or ended; the exit code."""
    parser = flags.parser(f"A spare process: {service.__doc__}", name=service.name, model=service.model)
    parser.add_argument("--spare", action="store_true")
    try:
        options = parser.parse_args(list(arguments))
    except flags.FlagError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    log.configure(options.log_level)
    return process.run(Spare(service).serve, options.port, log_level=options.log_level)


async def refuse(request: Request) -> Response:
    """`POST /take_over` of a worker that is no spare."""
    return _error(409, "this worker is no spare: it has a model")


class Spare:
    """Imports, waits, and hands its server over."""

    def __init__(self, service: type[BaseService]) -> None:
        self._class = service
        self._imported = False
        self._failure: BaseException | None = None
        self._taken: BaseService | None = None
        self._wake = asyncio.Event()
        self._stopping = False

    async def serve(self, server: process.Server) -> int:
        """Import, wait for a model, and serve it; the exit code."""
        self._server = server
        server.on_signal(self._stop)
        routes = [Route("/health", self.health), Route("/take_over", self.take_over, methods=["POST"])]
        front = _Front(Starlette(routes=routes))
        serving = asyncio.create_task(server.serve_app(front))
        await server.listening()
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._import, args=(loop,), name="imports", daemon=True).start()
        while not (self._stopping or self._failure or (self._taken and self._imported)):
            self._wake.clear()
            await self._wake.wait()
        if self._taken is not None and self._failure is None and not self._stopping:
            return await self._taken.serve(_Running(server, front, serving))
        if self._failure is not None:
            await asyncio.sleep(FAILED_LINGER_S)
        if not self._imported:
            server.exit_now(1 if self._failure else 0)  # an import cannot be broken off
        await server.close(serving)
        log.event(logging.INFO, "stopped")
        return 0

    def _stop(self, signal_name: str) -> None:
        log.event(logging.INFO, "stopping", stop_signal=signal_name)
        self._stopping = True
        self._wake.set()

    def _import(self, loop: asyncio.AbstractEventLoop) -> None:
        with contextlib.suppress(OSError):
            # Of this thread alone: what is niced stays so, and a worker must not.
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        failure: BaseException | None = None
        try:
            self._class.preload()
        except BaseException as error:
            failure = error
            print("".join(traceback.format_exception(error)), end="", file=sys.stderr, flush=True)
        with contextlib.suppress(RuntimeError):  # the loop is closed: we are ending
            loop.call_soon_threadsafe(self._note_imported, failure)

    def _note_imported(self, failure: BaseException | None) -> None:
        self._imported, self._failure = failure is None, failure
        log.event(logging.INFO if self._imported else logging.ERROR, "spare" if self._imported else "preload failed")
        self._wake.set()

    # ---- verbs ---------------------------------------------------------------

    async def health(self, request: Request) -> Response:
        """`GET /health`: never ready, since there is no model."""
        status, phase = ("spare", "spare") if self._imported and self._taken is None else ("loading", "import")
        body = {"status": status, "phase": phase, "percent": None, "instance": os.environ.get("ROUNDHOUSE_INSTANCE")}
        if not self._imported:
            body["importing"] = True  # also once it is taken over: its load has not begun
        if self._failure is not None:
            body |= {"status": "failed", "error": f"{type(self._failure).__name__}: {self._failure}"}
        return JSONResponse(body, 503)

    async def take_over(self, request: Request) -> Response:
        """`POST /take_over`: become the worker of `arguments`, in `environment`; a null there unsets a variable."""
        try:
            body = await request.json()
        except (ValueError, RecursionError):
            body = None
        if not isinstance(body, dict) or body.get("instance") != os.environ.get("ROUNDHOUSE_INSTANCE"):
            return _error(403, "instance: not that of this process")
        if self._taken is not None or self._stopping or self._failure is not None:
            return _error(409, "this process is no spare any more")
        arguments, environment = body.get("arguments"), body.get("environment", {})
        if not isinstance(arguments, list) or not all(isinstance(word, str) for word in arguments):
            return _error(400, "arguments must be a list of texts")
        if not isinstance(environment, dict) or not all(v is None or isinstance(v, str) for v in environment.values()):
            return _error(400, "environment must be an object of texts")
        if wrong := [name for name, value in environment.items() if not _can_be_set(name, value)]:
            return _error(400, f"environment: {wrong[0]!r} is no name of a variable, or what it is set to is no value")
        before = dict(os.environ)
        try:
            _check_devices(before, environment)
            _apply(environment)
            self._taken = self._become(arguments)
        except (Exception, SystemExit) as error:
            _apply({name: before.get(name) for name in environment})
            return _refusal(error)
        log.event(logging.INFO, "taken over", model_name=self._taken.served_name)
        self._wake.set()
        return JSONResponse({"instance": body["instance"]})

    def _become(self, arguments: list[str]) -> BaseService:
        parser = self._class.parser()
        options: argparse.Namespace = parser.parse_args(arguments)
        if options.port != self._server.port:
            raise ValueError(f"--port is {options.port}, but this process listens on {self._server.port}")
        service = self._class(options)
        service.check()
        log.configure(options.log_level)
        return service


class _Front:
    """The application behind the socket; another can take its place."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.app(scope, receive, send)


class _Running(process.Server):
    """A server that listens already."""

    def __init__(self, server: process.Server, front: _Front, serving: asyncio.Task[None]) -> None:
        self._server, self._front, self._serving = server, front, serving

    async def serve_app(self, app: Any) -> None:
        self._front.app = app
        await asyncio.shield(self._serving)

    async def listening(self) -> None:
        """It is."""

    def on_signal(self, call: Callable[[str], None]) -> None:
        self._server.on_signal(call)

    async def close(self, serving: asyncio.Task[None]) -> None:
        await self._server.close(self._serving)
        await serving

    def exit_now(self, code: int) -> NoReturn:
        self._server.exit_now(code)


def _can_be_set(name: str, value: str | None) -> bool:
    """Whether the system takes a variable, as far as can be told without setting it."""
    try:
        encoded = os.fsencode(name), os.fsencode(value or "")
    except UnicodeEncodeError:
        return False
    return bool(name) and "=" not in name and not any(b"\0" in text for text in encoded)


def _apply(environment: Mapping[str, str | None]) -> None:
    for name, value in environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _check_devices(before: Mapping[str, str], wanted: Mapping[str, str | None]) -> None:
    """Whether other GPUs can still be chosen.

    Raises:
        ValueError: an import has initialised CUDA, and now it is too late.
    """
    name = "CUDA_VISIBLE_DEVICES"
    if wanted.get(name, before.get(name)) != before.get(name) and _holds_device():
        raise ValueError(f"{name}: an import has initialised CUDA already, so other GPUs cannot be chosen")


def _holds_device() -> bool:
    for entry in os.scandir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(entry.path).startswith(DEVICE_FILE):
                return True
    return False


def _refusal(error: BaseException) -> Response:
    """Why it did not become a worker: 400 if that is what was asked for, 500 if its own check broke."""
    if isinstance(error, SystemExit):  # argparse's --help
        return _error(400, "arguments: one of them makes a worker print something and end")
    if isinstance(error, flags.FlagError | ValueError | OSError):
        return _error(400, str(error))
    log.event(logging.ERROR, "not taken over", error=type(error).__name__)
    told = as_worker_error(error)
    return _error(told.status, told.message, told.type)


def _error(status: int, message: str, kind: str = "invalid_request_error") -> Response:
    code = "invalid_request" if status < 500 else None
    text = message.encode(errors="backslashreplace").decode()  # it may quote what is no text
    return JSONResponse(WorkerError(text, code=code, type=kind).body(), status)
