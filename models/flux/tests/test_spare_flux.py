"""A spare process of the Flux worker: the real imports, and what a cold start is without them."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from harness import Worker

ROOT = Path(__file__).parents[3]
SERVER = ROOT / "models/flux/server.py"
PYTHON = ROOT / "models/flux/.venv/bin/python"
LOAD_PATIENCE_S = 150.0
MARK = "dir1:nonce2"


def test_a_spare_process_has_imported_what_a_cold_start_waits_for(
    checkpoints: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(checkpoints / "flux-schnell")
    environment = {"OMP_NUM_THREADS": "1", "ROUNDHOUSE_INSTANCE": MARK}
    started = time.monotonic()
    with Worker(SERVER, "--model", model, python=PYTHON, environment=environment) as worker:
        worker.ready(LOAD_PATIENCE_S)
        cold_s = time.monotonic() - started
    with Worker(SERVER, "--spare", python=PYTHON, environment=environment) as worker:
        worker.wait_log("INFO  spare", patience_s=LOAD_PATIENCE_S)
        words = ["--model", model, "--name", "mine", "--port", worker.url.rpartition(":")[2]]
        started = time.monotonic()
        taken = worker.post("/take_over", {"arguments": words, "environment": {}, "instance": MARK})
        assert taken.status_code == 200, taken.text
        worker.ready(LOAD_PATIENCE_S)
        spare_s = time.monotonic() - started
        answer = worker.post("/v1/images/generations", {"prompt": "a fox", "size": "64x64", "seed": 7})
        assert answer.status_code == 200, answer.text
        worker.signal()
        assert worker.wait_exit() == 0
    with capsys.disabled():
        print(f"\ntiny Flux, from its start: {cold_s:.1f} s; from the take-over of a spare process: {spare_s:.1f} s")
