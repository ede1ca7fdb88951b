"""The process around a service: its socket, its event loop, its signals, its end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Generator
from typing import Any, NoReturn

import uvicorn

from roundhouse_worker import log

HOST = "127.0.0.1"
BACKLOG = 2048
# A client's pool drops an idle connection after 90 s at most; if we closed it
# first, a request could meet the closing and be lost.
KEEP_ALIVE_S = 120
SLOW_READER_S = 1


class Server:
    """uvicorn on a socket that is already open, with the signals left to the service."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._listening = asyncio.Event()
        self._uvicorn: _Uvicorn | None = None

    @property
    def port(self) -> int:
        """Where it listens."""
        return self._sock.getsockname()[1]

    async def serve_app(self, app: Any) -> None:
        """Serve until `close`."""
        config = uvicorn.Config(
            app,
            lifespan="off",
            ws="none",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            date_header=False,
            backlog=BACKLOG,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=SLOW_READER_S,
        )
        self._uvicorn = _Uvicorn(config, self._listening)
        await self._uvicorn.serve(sockets=[self._sock])

    async def listening(self) -> None:
        """Wait until requests are answered."""
        await self._listening.wait()
        log.event(logging.INFO, "listening", http_host=HOST, http_port=self._sock.getsockname()[1])

    def on_signal(self, call: Callable[[str], None]) -> None:
        """Call `call` with the name of each SIGTERM and SIGINT."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, call, number.name)

    async def close(self, serving: asyncio.Task[None]) -> None:
        """Close the connections and end `serve_app`."""
        if self._uvicorn is not None:
            self._uvicorn.should_exit = True
        await serving

    def exit_now(self, code: int) -> NoReturn:
        """End the process although a thread of it is busy."""
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class _Uvicorn(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, listening: asyncio.Event) -> None:
        super().__init__(config)
        self._announce = listening

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._announce.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


def run(serve: Callable[[Server], Awaitable[int]], port: int, *, log_level: str) -> int:
    """Open the port and run `serve` on an event loop; the exit code.

    The port opens before anything else happens, so that a client waits on
    `/health` instead of guessing.
    """
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((HOST, port))
    except OSError as error:
        log.event(logging.ERROR, "cannot bind", http_host=HOST, http_port=port, error_text=error.strerror or str(error))
        return 1
    sock.listen(BACKLOG)

    async def main() -> int:
        return await serve(Server(sock))

    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(main())


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop
