"""A stock engine by nothing but a `command:`: llama.cpp's own server, as PyPI's xllamacpp has it, with a real model.

It has a server of its own: it starts in seconds and shares nothing with the engines of the other files.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from roundhouse_server import ROOT, Json, RoundhouseServer
from worker_deaths import kill_worker_at

ENDPOINT = "/v1/chat/completions"
PYTHON = Path(os.environ.get("ROUNDHOUSE_LLAMACPP") or ROOT / ".cache/llamacpp/bin/python")
CHECKPOINTS = Path(os.environ.get("ROUNDHOUSE_CHECKPOINTS") or ROOT / ".cache/checkpoints")
# The entry of docs/ADDING_MODELS.md. One thread: on a busy machine its threads would wait for each other.
SERVE = """
import signal, sys, xllamacpp
p = xllamacpp.CommonParams()
p.model.path, p.port, p.hostnames = sys.argv[1], int(sys.argv[2]), ["127.0.0.1"]
p.n_parallel, p.n_ctx, p.cpuparams.n_threads = 8, 8192, 1
server = xllamacpp.Server(p)
signal.pause()
"""
QUESTION = [{"role": "user", "content": "What is the capital of France? Complete: The capital of France is"}]
PATIENCE_S = 180.0


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RoundhouseServer]:
    model = next((CHECKPOINTS / "smollm2-gguf").glob("*.gguf"), None)
    assert model, f"no checkpoint smollm2-gguf in {CHECKPOINTS}; scripts/test-engines.sh makes it"
    assert PYTHON.exists(), f"missing: {PYTHON}; scripts/test-engines.sh makes it"
    entry: Json = {
        "type": "text",
        "command": [str(PYTHON), "-c", SERVE, "{model}", "{port}"],
        "model": str(model),
        "limit": 8,
        "gpus": 0,
        "startup_time": 5,
    }
    with RoundhouseServer(tmp_path_factory.mktemp("llamacpp"), {"text": entry}) as server:
        yield server


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "text", "messages": QUESTION, "temperature": 0, "max_tokens": 24} | fields


def long_body(tokens: int) -> dict[str, Any]:
    story = [{"role": "user", "content": "Tell me a long story about a lighthouse."}]
    return body(messages=story, max_tokens=tokens, ignore_eos=True, stream=True)


def content(answer: dict[str, Any]) -> str:
    return answer["choices"][0]["message"]["content"]


def test_a_call_is_answered_right(llama: RoundhouseServer) -> None:
    answer = llama.client.post(ENDPOINT, json=body(), timeout=PATIENCE_S)
    assert answer.status_code == 200, f"{answer.text}\n{llama.log()}"
    assert "Paris" in content(answer.json())
    job = llama.job(answer.headers["x-roundhouse-job-id"])
    assert (job["state"], job["attempt"]) == ("succeeded", 1)
    assert job["usage"]["completion_tokens"] > 3


def test_a_stream_comes_in_pieces(llama: RoundhouseServer) -> None:
    job = llama.submit(ENDPOINT, body(stream=True))
    outputs = [event.data for event in llama.events(job["id"], patience_s=PATIENCE_S) if event.name == "job.output"]
    choices = [choice for output in outputs for chunk in output["delta"] for choice in chunk["choices"]]
    pieces = [choice["delta"].get("content") or "" for choice in choices]
    assert len([piece for piece in pieces if piece]) > 3
    assert "Paris" in "".join(pieces)
    assert "Paris" in content(llama.response(job["id"]).json())


def test_eight_calls_are_on_it_at_once(llama: RoundhouseServer) -> None:
    # Of the lower class, one place would be kept free.
    jobs = [llama.submit(ENDPOINT, long_body(40), priority=7) for _ in range(8)]
    end = time.monotonic() + PATIENCE_S
    while (running := llama.queue()["running"]) < 8 and time.monotonic() < end:
        time.sleep(0.05)
    assert running == 8, llama.log()
    for job in jobs:
        assert llama.succeeded(job["id"], PATIENCE_S)["usage"]["completion_tokens"] == 40


def test_a_job_outlives_its_worker(llama: RoundhouseServer) -> None:
    job = llama.submit(ENDPOINT, long_body(200))
    done = kill_worker_at(llama, job, "job.output", PATIENCE_S)
    assert done["usage"]["completion_tokens"] == 200
