"""The real server: started, asked, read from, stopped, killed."""

from __future__ import annotations

import http.client
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import time
from typing import Any

from gpu import box
from gpu.common import Failed, Json, epoch, until

START_LIMIT_S = 60
STOP_LIMIT_S = 60
COLD_LIMIT_S = 420
"""Longest time of a job whose model is loaded from nothing."""
LOOK_EVERY_S = 10
"""While a job is waited for."""
FAILED_LOADS_MAX = 2
TERMINAL = ("succeeded", "failed", "cancelled", "expired")
TAIL_LINES = 15
PASS = re.compile(r" pass finished pass\.size=([0-9]+) pass\.seconds=([0-9.e+-]+)")
MOVED = re.compile(r" (park|wake)\.(copy_)?seconds=([0-9.e+-]+)")


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


class Server:
    """One run of `roundhouse serve`."""

    def __init__(self, binary: pathlib.Path, config: pathlib.Path, data: pathlib.Path, env: dict[str, str]) -> None:
        self.data = data
        data.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self.ports = {self.port}
        self.log_path = data / "server.log"
        self._read_to = 0
        command = [str(binary), "--log-format", "json", "serve", "--config", str(config)]
        command += ["--data-dir", str(data), "--listen", f"127.0.0.1:{self.port}"]
        with self.log_path.open("w") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log, env=env
            )
        try:
            until("the server's start", START_LIMIT_S, 0.05, self._is_up)
        except Failed as error:
            self.kill()
            raise Failed(f"{error}\n{self.tails()}") from None

    def _is_up(self) -> bool:
        if self.process.poll() is not None:
            raise Failed(f"the server ended with {self.process.returncode}")
        try:
            return self.ask("GET", "/health") is not None
        except OSError:
            return False

    # ---- asking --------------------------------------------------------------

    def ask(self, method: str, path: str, body: Any = None, limit_s: float = 120) -> Any:
        """One call.

        Raises:
            Failed: it was refused; the text has the answer.
        """
        line = http.client.HTTPConnection("127.0.0.1", self.port, timeout=limit_s)
        try:
            data = None if body is None else json.dumps(body)
            line.request(method, path, data, {"content-type": "application/json"})
            answer = line.getresponse()
            raw = answer.read()
        finally:
            line.close()
        if answer.status >= 300:
            raise Failed(f"{method} {path}: {answer.status} {raw[:600].decode(errors='replace')}")
        is_json = "json" in (answer.getheader("content-type") or "")
        return json.loads(raw) if is_json and raw else raw

    def submit(self, request: Json) -> str:
        """Its job's id."""
        return self.ask("POST", "/v1/jobs", request)["id"]

    def finished(self, job: str, limit_s: float) -> Json:
        """The job, once it has succeeded.

        Raises:
            Failed: it did not, or not in time, or its model cannot be loaded.
        """
        end = time.monotonic() + limit_s
        while True:
            left = max(1, min(LOOK_EVERY_S, int(end - time.monotonic())))
            shown = self.ask("GET", f"/v1/jobs/{job}?wait={left}")
            if shown["state"] == "succeeded":
                return shown
            if shown["state"] in TERMINAL:
                raise Failed(f"job {job} of {shown['model']} {shown['state']}: {shown['error']}")
            self.can_load(shown["model"])
            if time.monotonic() > end:
                why = f"{shown['state']}, {shown['state_reason']}, {(shown['queue'] or {}).get('reason')}"
                raise Failed(f"job {job} of {shown['model']} has not ended within {limit_s:.0f} s: {why}")

    def can_load(self, model: str) -> None:
        """That its loads did not fail twice in a row, and it fits: the server goes on trying, and nobody here mends it.

        Raises:
            Failed: they did; the text has the reason.
        """
        worker = self.worker(model)
        if (worker.get("failed_loads") or 0) >= FAILED_LOADS_MAX or worker.get("state") == "blocked":
            raise Failed(f"{model} cannot be loaded: {worker.get('reason')}")

    def worker(self, model: str) -> Json:
        """Its line in /v1/workers; the one that runs, if there are several."""
        workers = [w for w in self.ask("GET", "/v1/workers")["data"] if w["model"] == model]
        self.ports |= {w["port"] for w in workers if w.get("port")}
        return sorted(workers, key=lambda w: w.get("pid") is None)[0]

    def health(self, model: str) -> Json:
        """What its worker itself says of how it is; nothing if it does not answer in JSON."""
        port = self.worker(model).get("port")
        line = http.client.HTTPConnection("127.0.0.1", port or 1, timeout=10)
        try:
            line.request("GET", "/health")
            return json.loads(line.getresponse().read() or b"{}")
        except (OSError, ValueError):
            return {}
        finally:
            line.close()

    def decision(self, model: str, since: float) -> Json | None:
        """The first decision to load a model after a time; None: there was none."""
        listed = self.ask("GET", f"/v1/queue/decisions?model={model}&limit=100")["data"]
        loads = [d for d in listed if d["action"] in ("load", "swap") and d["model"] == model]
        later = [d for d in loads if epoch(d["at"]) >= since]
        return min(later, key=lambda d: d["id"]) if later else None

    # ---- its record ----------------------------------------------------------

    def events(self) -> list[Json]:
        """Lines of its log since the last look: message and fields in one object."""
        with self.log_path.open("rb") as file:
            file.seek(self._read_to)
            data = file.read()
        whole, _, _ = data.rpartition(b"\n")
        self._read_to += len(whole) + 1 if whole else 0
        found = []
        for line in whole.splitlines():
            try:
                event = json.loads(line)
            except ValueError:
                continue
            found.append({**event, **event.get("fields", {})})
        return found

    def moved_s(self, model: str, verb: str) -> float | None:
        """How long the worker itself took for its latest park or wake, in seconds; None if it does not say (vLLM).

        Of the copy alone if it tells that apart from the check that follows.
        """
        path = self.data / "log" / f"{model}.log"
        if not path.is_file():
            return None
        found = [match for match in MOVED.finditer(path.read_text(errors="replace")) if match[1] == verb]
        found = [match for match in found if match[2]] or found
        return float(found[-1][3]) if found else None

    def passes(self, model: str) -> list[list[float]]:
        """Size and length in seconds of each pass that its worker has made, by its log."""
        path = self.data / "log" / f"{model}.log"
        found = PASS.findall(path.read_text(errors="replace")) if path.is_file() else []
        return [[int(size), float(seconds)] for size, seconds in found]

    def tails(self) -> str:
        """The last lines of its log and its workers'."""
        parts = []
        for path in [self.log_path, *sorted((self.data / "log").glob("*.log"))]:
            if path.is_file():
                lines = path.read_text(errors="replace").splitlines()[-TAIL_LINES:]
                parts.append(f"--- {path.name}\n" + "\n".join(line[:300] for line in lines))
        return "\n".join(parts)

    # ---- ends ----------------------------------------------------------------

    def stop(self) -> float:
        """SIGTERM, as an operator stops it; how long it took, in seconds.

        Raises:
            Failed: it had to be killed.
        """
        began = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise Failed(f"the server did not stop within {STOP_LIMIT_S} s of SIGTERM\n{self.tails()}") from None
        return time.monotonic() - began

    def kill(self) -> None:
        """SIGKILL; its guards end the workers."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)


def environment(mark: str, cache: pathlib.Path) -> dict[str, str]:
    """What the server and its workers are started with."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("ROUNDHOUSE_")}
    env |= {box.MARK: mark, "HF_HUB_OFFLINE": "1"}
    # Caches are no leftovers: kept apart from what must be gone at the end.
    for name, folder in {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}.items():
        env.setdefault(name, str(cache / folder))
    env.setdefault("VLLM_CACHE_ROOT", str(cache / "vllm"))
    if "ROUNDHOUSE_FAKE_GPUS" in os.environ:
        env["ROUNDHOUSE_FAKE_GPUS"] = os.environ["ROUNDHOUSE_FAKE_GPUS"]
    return env
