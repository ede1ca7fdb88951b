"""`roundhouse serve` as tests start it: with a config, a data folder and a port of its own.

Ended with the `with` block. Nothing here sleeps for a guessed time. What a test waits for is a line on
stdout, an HTTP answer, an event of a job or the end of a process, each within a
patience that is long, for machines that are busy.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import httpx

ROOT = Path(__file__).parents[2]
BINARY = Path(os.environ.get("ROUNDHOUSE_BIN") or ROOT / "target/debug/roundhouse")
MODELS = ROOT / "models"
PATIENCE_S = 60.0
TERMINAL = ("succeeded", "failed", "cancelled", "expired")
LOG_TAIL_CHARS = 6000
KEY = "sk-tests-0123456789abcdef"
"""The API key of the servers that have one."""

Json = dict[str, Any]


def echo(kind: str = "text", *flags: str, **settings: Any) -> Json:
    """An entry of models.yaml for the echo worker, run by the Python that runs the tests."""
    return {
        "type": kind,
        "service_script": str(MODELS / "echo/server.py"),
        "python": sys.executable,
        "gpus": 0,
        "startup_time": 1,
        "args": list(flags),
    } | settings


@dataclass(frozen=True, slots=True)
class Event:
    """One frame of a job's event stream."""

    seq: int | None
    name: str
    data: Json

    @property
    def is_terminal(self) -> bool:
        """Whether the stream ends with it."""
        return self.name.removeprefix("job.") in TERMINAL


class Processes:
    """Living processes, held so that a later process of the same number is not taken for one of them."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._held: dict[int, tuple[int, str]] = {}
        for pid in sorted(set(pids)):
            try:
                self._held[pid] = (os.pidfd_open(pid), command_of(pid))
            except OSError:  # ended since it was listed
                continue

    @property
    def commands(self) -> dict[int, str]:
        """Command lines by pid, as they were."""
        return {pid: command for pid, (_, command) in self._held.items()}

    def still_there(self, patience_s: float) -> dict[int, str]:
        """Wait for all to end; those that have not, with their command lines."""
        end = time.monotonic() + patience_s
        return {
            pid: command
            for pid, (handle, command) in self._held.items()
            if not select.select([handle], [], [], max(0.0, end - time.monotonic()))[0]
        }

    def close(self) -> None:
        """Let go of them."""
        for handle, _ in self._held.values():
            os.close(handle)
        self._held.clear()


def command_of(pid: int) -> str:
    """The command line of a living process."""
    return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").replace("\0", " ").strip()


def descendants(pid: int) -> list[int]:
    """The process and all that descend from it, it first."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # ended meanwhile
            continue
        children.setdefault(parent, []).append(int(folder.name))
    found = [pid]
    for one in found:
        found.extend(children.get(one, ()))
    return found


def shared_memory(pids: Iterable[int]) -> set[str]:
    """The files under /dev/shm that these processes have mapped."""
    found: set[str] = set()
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
        except OSError:
            continue
        found |= {line.split(maxsplit=5)[5] for line in lines if "/dev/shm/" in line}
    return {path for path in found if not path.endswith(" (deleted)")}


class RoundhouseServer:
    """The server, its native API, and a view of its processes."""

    def __init__(
        self,
        folder: Path,
        models: dict[str, Json],
        *,
        key: str | None = None,
        environment: dict[str, str] | None = None,
        **sections: Json,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.log_path = folder / "server.log"
        config = folder / "models.yaml"  # JSON is YAML
        config.write_text(json.dumps({"models": models} | sections, indent=2))
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("ROUNDHOUSE_")}
        if key:
            inherited["ROUNDHOUSE_API_KEYS"] = f"tests:{key}"
        argv = [BINARY, "serve", "--config", config, "--data-dir", folder / "data", "--listen", "127.0.0.1:0"]
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                argv,
                stdout=subprocess.PIPE,
                stderr=log,
                env=inherited | (environment or {}),
                text=True,
            )
        self.url = ""
        self.client = httpx.Client(
            timeout=httpx.Timeout(PATIENCE_S, connect=5.0),
            headers={"authorization": f"Bearer {key}"} if key else {},
            follow_redirects=True,
        )

    def __enter__(self) -> Self:
        try:
            line = self._first_line()
            assert "http://" in line, f"no address in {line!r}:\n{self.log()}"
            self.url = "http://" + line.partition("http://")[2].split()[0]
            self.client.base_url = self.url
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        processes = Processes(descendants(self.process.pid))
        code: int | None = None
        try:
            if self.process.poll() is None:
                self.process.send_signal(signal.SIGTERM)
            code = self.process.wait(PATIENCE_S)
        finally:
            left = processes.still_there(0 if code is None else 15)
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            processes.close()
            self._end()
        if kind is None:
            assert code == 0, f"the server ended with {code}:\n{self.log()}"
            assert not left, f"processes outlived the server: {left}"

    def _first_line(self) -> str:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], PATIENCE_S)
        assert ready, f"the server says nothing:\n{self.log()}"
        return self.process.stdout.readline()

    def _end(self) -> None:
        self.client.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(PATIENCE_S)
        assert self.process.stdout is not None
        self.process.stdout.close()

    def log(self) -> str:
        """The end of what it logged, and of what its workers did."""
        paths = [self.log_path, *sorted((self.folder / "data/log").glob("*"))]
        tails = [f"--- {path.name}\n{path.read_text(errors='replace')[-LOG_TAIL_CHARS:]}" for path in paths]
        return "\n".join(tails)

    # ---- the native API ------------------------------------------------------

    def get(self, path: str, **fields: Any) -> httpx.Response:
        """GET under /v1."""
        return self.client.get(f"/v1{path}", **fields)

    def post(self, path: str, body: Any = None, **fields: Any) -> httpx.Response:
        """POST JSON under /v1."""
        return self.client.post(f"/v1{path}", json=body, **fields)

    def submit(self, endpoint: str, body: Json, **fields: Any) -> Json:
        """`POST /v1/jobs`; the accepted job."""
        answer = self.post("/jobs", {"endpoint": endpoint, "body": body} | fields)
        assert answer.status_code == 202, answer.text
        return answer.json()

    def job(self, job_id: str) -> Json:
        """The job as it is now."""
        answer = self.get(f"/jobs/{job_id}")
        assert answer.status_code == 200, answer.text
        return answer.json()

    def finished(self, job_id: str, patience_s: float = PATIENCE_S) -> Json:
        """The job once it is terminal, by long polls."""
        end = time.monotonic() + patience_s
        while True:
            answer = self.get(f"/jobs/{job_id}", params={"wait": 20, "until": "terminal"})
            assert answer.status_code == 200, answer.text
            job = answer.json()
            if job["state"] in TERMINAL:
                return job
            assert time.monotonic() < end, f"never finished: {job}\n{self.log()}"

    def abandoned(self, job_id: str) -> Json:
        """The job once it is terminal, without waiting for it: who waits keeps a synchronous job alive."""
        end = time.monotonic() + PATIENCE_S
        while (job := self.job(job_id))["state"] not in TERMINAL:
            assert time.monotonic() < end, f"never finished: {job}\n{self.log()}"
            time.sleep(0.05)
        return job

    def succeeded(self, job_id: str, patience_s: float = PATIENCE_S) -> Json:
        """The job, which must have succeeded."""
        job = self.finished(job_id, patience_s)
        assert job["state"] == "succeeded", f"{job}\n{self.log()}"
        return job

    def response(self, job_id: str) -> httpx.Response:
        """The stored answer of a job that is terminal."""
        return self.get(f"/jobs/{job_id}/response")

    def cancel(self, job_id: str) -> Json:
        """Ask to cancel; the job afterwards."""
        answer = self.post(f"/jobs/{job_id}/cancel")
        assert answer.status_code == 200, answer.text
        return answer.json()

    def events(self, job_id: str, after: int = 0, patience_s: float = PATIENCE_S) -> Iterator[Event]:
        """The job's events as they come, up to its end."""
        end = time.monotonic() + patience_s
        with self.client.stream("GET", f"/v1/jobs/{job_id}/events", params={"after": after}) as answer:
            assert answer.status_code == 200, answer.read()
            fields: dict[str, str] = {}
            for line in answer.iter_lines():
                assert time.monotonic() < end, f"no end of the events of {job_id}\n{self.log()}"
                name, _, value = line.partition(":")
                if name:
                    fields[name] = value.removeprefix(" ")
                    continue
                if "data" in fields:
                    seq = int(fields["id"]) if "id" in fields else None
                    event = Event(seq, fields.get("event", "message"), json.loads(fields["data"]))
                    yield event
                    if event.is_terminal:
                        return
                if not line:
                    fields = {}

    def first_event(self, job_id: str, name: str, patience_s: float = PATIENCE_S) -> Event:
        """The first event of that name; the job must not end before."""
        for event in self.events(job_id, patience_s=patience_s):
            if event.name == name:
                return event
            assert not event.is_terminal, f"{event} came before any {name}\n{self.log()}"
        raise AssertionError(f"the events of {job_id} ended without {name}\n{self.log()}")

    def queue(self) -> Json:
        """`GET /v1/queue`."""
        answer = self.get("/queue")
        assert answer.status_code == 200, answer.text
        return answer.json()

    def worker(self, model: str) -> Json:
        """What `GET /v1/workers` says about one."""
        answer = self.get("/workers")
        assert answer.status_code == 200, answer.text
        return next(worker for worker in answer.json()["data"] if worker["model"] == model)

    def worker_pids(self, model: str) -> list[int]:
        """The worker's guard, then the worker's leader, then the rest."""
        guard = self.worker(model)["pid"]
        assert guard, f"no process of {model}:\n{self.log()}"
        return descendants(guard)
