"""Spare processes: importing, waiting, and becoming a worker."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import httpx
from harness import Worker, until

PROBE = Path(__file__).with_name("probe.py")
MARK = "dir1:nonce2"


def spare(**environment: str) -> Worker:
    """A spare process of the probe."""
    return Worker(PROBE, "--spare", environment={"ROUNDHOUSE_INSTANCE": MARK} | environment)


def port(worker: Worker) -> str:
    return worker.url.rpartition(":")[2]


def take_over(worker: Worker, *flags: str, instance: str = MARK, **environment: Any) -> httpx.Response:
    words = ["--name", "mine", "--port", port(worker), *flags]
    return worker.post("/take_over", {"arguments": words, "environment": environment, "instance": instance})


def test_it_becomes_the_worker_that_it_is_told_to_be():
    with spare(PROBE_COLOUR="green", PROBE_OLD="there") as worker:
        worker.wait_log("INFO  spare")
        health = worker.get("/health")
        assert health.status_code == 503
        assert health.json() == {"status": "spare", "phase": "spare", "percent": None, "instance": MARK}
        taken = take_over(worker, "--size", "3", PROBE_COLOUR="red", PROBE_OLD=None)
        assert taken.status_code == 200, taken.text
        worker.ready()
        health = worker.get("/health")
        assert health.status_code == 200
        told = health.json()
        assert (told["status"], told["model"], told["instance"]) == ("ready", "mine", MARK)
        assert [phase["phase"] for phase in told["phases"]] == ["imports", "weights", "read", "device"]
        assert ["environment", "red", None] in worker.get("/seen").json()
        assert worker.post("/run", {"text": "hi"}).json() == {"text": "hi", "run": None}
        assert take_over(worker).status_code == 409, "it has a model now"
        worker.signal()
        assert worker.wait_exit() == 0
        assert "released" in worker.log()


def test_a_refused_one_stays_a_spare():
    with spare(PROBE_COLOUR="green") as worker:
        worker.wait_log("INFO  spare")
        assert take_over(worker, instance="dir1:other").status_code == 403
        for flags, named in [(["--size", "0"], "--size"), (["--nonsense"], "--nonsense"), (["--port", "1"], "--port")]:
            refused = take_over(worker, *flags, PROBE_COLOUR="red")
            assert refused.status_code == 400
            assert named in refused.json()["error"]["message"]
        assert worker.post("/take_over", {"arguments": "x", "instance": MARK}).status_code == 400
        assert worker.get("/health").json()["status"] == "spare"
        assert take_over(worker).status_code == 200
        worker.ready()
        assert ["environment", "green", None] in worker.get("/seen").json()


def test_whatever_it_is_sent_it_refuses_with_the_reason_and_stays_as_it_was():
    with spare(PROBE_COLOUR="green") as worker:
        worker.wait_log("INFO  spare")
        deep = worker.client.post(worker.url + "/take_over", content=b"[" * 100_000)
        assert deep.status_code == 403
        words = ["--name", "mine", "--port", port(worker)]
        red = {"PROBE_COLOUR": "red"}
        for more, environment, status, named in [
            (["--help"], red, 400, "arguments"),
            (["\ud800"], red, 400, "\\ud800"),
            (["--break", "os"], red, 400, "no disk"),
            (["--break", "other"], red, 500, "RuntimeError: broken"),
            ([], red | {"": "x"}, 400, "environment: ''"),
            ([], red | {"A=B": "x"}, 400, "environment: 'A=B'"),
            ([], red | {"A\0": None}, 400, "environment"),
            ([], red | {"A": "\0"}, 400, "environment: 'A'"),
            ([], red | {"A": "\ud800"}, 400, "environment: 'A'"),
        ]:
            body = {"arguments": words + more, "environment": environment, "instance": MARK}
            refused = worker.client.post(worker.url + "/take_over", content=json.dumps(body))
            assert (refused.status_code, named in refused.json()["error"]["message"]) == (status, True), refused.text
        assert worker.get("/health").json()["status"] == "spare"
        assert take_over(worker).status_code == 200
        worker.ready()
        assert ["environment", "green", None] in worker.get("/seen").json()


def test_one_that_imports_still_loads_when_it_has_imported(tmp_path: Path):
    gate = tmp_path / "gate"
    with spare(PROBE_GATE=str(gate)) as worker:
        own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        niceness = int(worker.wait_log("importing niceness").rpartition("=")[2])
        assert niceness == min(19, own if own > 10 else 10)
        importing = {"status": "loading", "phase": "import", "percent": None, "instance": MARK, "importing": True}
        assert worker.get("/health").json() == importing
        assert take_over(worker).status_code == 200
        assert take_over(worker).status_code == 409, "somebody else has it"
        assert worker.get("/health").json() == importing
        assert os.getpriority(os.PRIO_PROCESS, worker.process.pid) == own, "only the imports are niced"
        gate.touch()
        worker.ready()
        assert "importing" not in worker.get("/health").json()


def test_imports_that_fail_after_it_was_taken_over_are_told_as_such(tmp_path: Path):
    gate = tmp_path / "gate"
    with spare(PROBE_GATE=str(gate), PROBE_IMPORT_ERROR="no such wheel") as worker:
        worker.wait_log("importing niceness")
        assert take_over(worker).status_code == 200
        gate.touch()
        worker.wait_log("preload failed")
        told = worker.get("/health").json()
        assert (told["status"], told["importing"], told["error"]) == ("failed", True, "ImportError: no such wheel")
        assert worker.wait_exit() == 1


def test_imports_that_fail_end_it_with_the_reason():
    with spare(PROBE_IMPORT_ERROR="no such wheel") as worker:
        assert worker.wait_exit() == 1
        assert "no such wheel" in worker.log()


def test_it_ends_when_it_is_told_to(tmp_path: Path):
    with spare(PROBE_GATE=str(tmp_path / "never")) as importing, spare() as waiting:
        waiting.wait_log("INFO  spare")
        for worker in (importing, waiting):
            worker.signal(signal.SIGTERM)
            assert worker.wait_exit() == 0
            until(lambda worker=worker: worker.process.poll() is not None)


def test_a_worker_that_was_started_with_a_model_is_no_spare():
    with Worker(PROBE, environment={"ROUNDHOUSE_INSTANCE": MARK}) as worker:
        assert take_over(worker.ready()).status_code == 409
