"""Starts real workers and speaks real HTTP to them; shared by the tests of all workers.

Nothing here sleeps for a guessed time: what a test waits for is a line on
stderr, an HTTP answer or the end of the process, each within `PATIENCE_S`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self, TypeVar

import httpx

PATIENCE_S = 20.0
"""How long a test waits for what must happen; long, for machines that are busy."""

LOAD_PATIENCE_S = 150.0
"""How long a test waits for a worker that imports torch."""

NDJSON = {"accept": "application/x-ndjson"}

T = TypeVar("T")


class Worker:
    """A worker process on a free port, ended with the `with` block."""

    def __init__(
        self,
        script: Path,
        *flags: str,
        environment: dict[str, str] | None = None,
        python: str | Path = sys.executable,
    ) -> None:
        self.process = subprocess.Popen(
            [str(python), str(script), "--port", "0", *flags],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env=os.environ | (environment or {}),
            text=True,
        )
        self._lines: list[str] = []
        self._changed = threading.Condition()
        self._closed = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._clients: list[httpx.Client] = []
        self._of_thread = threading.local()

    def __enter__(self) -> Self:
        port = self.wait_log("listening").rpartition("http.port=")[2]
        self.url = f"http://127.0.0.1:{port}"
        return self

    def __exit__(self, *_: object) -> None:
        for client in self._clients:
            client.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(PATIENCE_S)
        self._reader.join(PATIENCE_S)
        assert self.process.stderr is not None
        self.process.stderr.close()

    def ready(self, patience_s: float = PATIENCE_S) -> Self:
        """Wait until loading is over."""
        self.wait_log("INFO  ready", patience_s=patience_s)
        return self

    # ---- HTTP ----------------------------------------------------------------

    @property
    def client(self) -> httpx.Client:
        """This thread's own.

        Threads that share one break each other's calls now and then: its pool closes a connection that has been idle
        for 5 s also if another thread has just been given it, whose call then ends with "Bad file descriptor".
        """
        if not hasattr(self._of_thread, "client"):
            # Nothing here is TLS; reading the certificates takes longer than a call.
            self._of_thread.client = httpx.Client(timeout=PATIENCE_S, verify=False)
            self._clients.append(self._of_thread.client)
        return self._of_thread.client

    def get(self, path: str) -> httpx.Response:
        return self.client.get(self.url + path)

    def post(self, path: str, body: Any = None, **headers: str) -> httpx.Response:
        """POST a JSON body; `x_request_id="a"` is a header."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.client.post(self.url + path, json={} if body is None else body, headers=named)

    def lines(self, path: str, body: Any = None, **headers: str) -> list[dict[str, Any]]:
        """POST for NDJSON; all lines of the answer."""
        answer = self.post(path, body, **NDJSON, **headers)
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"] == "application/x-ndjson"
        return [json.loads(line) for line in answer.text.splitlines()]

    def at_once(self, calls: Sequence[Callable[[], T]]) -> list[T]:
        """Make the calls concurrently; their results in order."""
        with ThreadPoolExecutor(len(calls)) as pool:
            return [done.result(PATIENCE_S) for done in [pool.submit(call) for call in calls]]

    def stream(self, path: str, body: Any = None, **headers: str) -> Any:
        """POST and read while it comes: a context manager of a response. Closing it closes the connection."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.client.stream("POST", self.url + path, json=body or {}, headers=named)

    def metric(self, name: str) -> float:
        """A value of `/metrics`; 0 if it is not there."""
        found = [line.rpartition(" ") for line in self.get("/metrics").text.splitlines()]
        return next((float(value) for key, _, value in found if key == name), 0.0)

    # ---- the process ---------------------------------------------------------

    def signal(self, number: signal.Signals = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def wait_exit(self) -> int:
        """The exit code."""
        return self.process.wait(PATIENCE_S)

    def log(self) -> str:
        """All of stderr so far; all there will be, once the process has ended."""
        if self.process.poll() is not None:
            self._reader.join(PATIENCE_S)
        with self._changed:
            return "".join(self._lines)

    def wait_log(self, text: str, count: int = 1, *, patience_s: float = PATIENCE_S) -> str:
        """Wait for the `count`-th line with `text` in it."""

        def found() -> list[str]:
            return [line for line in self._lines if text in line]

        with self._changed:
            self._changed.wait_for(lambda: len(found()) >= count or self._closed, patience_s)
            assert len(found()) >= count, f"no {text!r} in {''.join(self._lines)}"
            return found()[count - 1].rstrip("\n")

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._changed:
                self._lines.append(line)
                self._changed.notify_all()
        with self._changed:
            self._closed = True
            self._changed.notify_all()


def until(condition: Callable[[], T]) -> T:
    """Ask until the answer is true. Only for what cannot be awaited, such as another process's file."""
    end = time.monotonic() + PATIENCE_S
    while not (value := condition()):
        assert time.monotonic() < end, "it never became true"
        time.sleep(0.005)
    return value


def frames(text: str) -> Iterator[Any]:
    """The events of an SSE body; `[DONE]` as it is."""
    for event in text.split("\n\n"):
        if event:
            data = event.removeprefix("data: ")
            yield data if data == "[DONE]" else json.loads(data)


def torch_worker(model: str, *flags: str, parks: bool = True, **environment: str) -> Worker:
    """The worker of models/`model` as the scheduler starts it; `parks`: as on a GPU, with `parking_on_cpu.py`."""
    folder = Path(__file__).parents[2] / model
    server = folder / "server.py"
    script = Path(__file__).parent / "parking_on_cpu.py" if parks else server
    usual = {"ROUNDHOUSE_INSTANCE": "dir:nonce", "SERVER": str(server), "OMP_NUM_THREADS": "1"}
    python = folder / ".venv/bin/python"
    return Worker(script, "--batch-wait-ms", "10000", *flags, python=python, environment=usual | environment)
