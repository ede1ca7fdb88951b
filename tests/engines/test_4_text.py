"""Text through the server: real vLLM with a real, small model (SmolLM2-135M). The last kills the worker, or a part."""

from __future__ import annotations

import json
import time
from typing import Any

import httpx
import pytest

from roundhouse_server import PATIENCE_S, RoundhouseServer, command_of
from worker_deaths import Victim, kill_worker_at

ENDPOINT = "/v1/chat/completions"
QUESTION = [{"role": "user", "content": "What is 2+2?"}]
STORY = [{"role": "user", "content": "Tell me a long story about a lighthouse."}]
LOAD_PATIENCE_S = 600.0
LONG_TOKENS = 1500
"""A minute of one request alone."""
KILLED_TOKENS = 200
"""Long beside the time from the first output to the kill, and not too long to be made a second time."""


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "text", "messages": QUESTION, "temperature": 0, "max_tokens": 24} | fields


def long_body(tokens: int, **fields: Any) -> dict[str, Any]:
    return body(messages=STORY, max_tokens=tokens, ignore_eos=True, stream=True, **fields)


def content(answer: dict[str, Any]) -> str:
    return answer["choices"][0]["message"]["content"]


def call(server: RoundhouseServer, **fields: Any) -> httpx.Response:
    answer = server.client.post(ENDPOINT, json=body(**fields), timeout=LOAD_PATIENCE_S)
    assert answer.status_code == 200, f"{answer.text}\n{server.log()}"
    return answer


def engine_running(server: RoundhouseServer) -> float:
    """How many requests vLLM itself says it works on."""
    metrics = server.client.get("/metrics").text
    own = 'vllm:num_requests_running{model="text",replica="0",'
    lines = [line for line in metrics.splitlines() if line.startswith(own)]
    assert lines
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def engine_is_idle_soon(server: RoundhouseServer) -> bool:
    """vLLM's gauge follows its work by a moment, and nothing but asking again shows it."""
    end = time.monotonic() + PATIENCE_S
    while engine_running(server) and time.monotonic() < end:
        time.sleep(0.05)
    return engine_running(server) == 0


def test_a_call_is_answered_right(server: RoundhouseServer) -> None:
    answer = call(server)
    assert "4" in content(answer.json())
    assert answer.json()["choices"][0]["finish_reason"] == "stop"
    assert answer.json()["model"] == "text"
    job = server.job(answer.headers["x-roundhouse-job-id"])
    assert (job["state"], job["kind"], job["priority"]) == ("succeeded", "chat", 7)
    assert job["usage"] == answer.json()["usage"]


def test_a_stream_gives_the_same_answer_in_pieces(server: RoundhouseServer) -> None:
    wanted = body(stream=True, stream_options={"include_usage": True})
    with server.client.stream("POST", ENDPOINT, json=wanted, timeout=LOAD_PATIENCE_S) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line and not line.startswith(":")]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    pieces = [choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"]]
    assert len([piece for piece in pieces if piece]) > 3
    assert "".join(pieces) == content(call(server).json())
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] > 3


def test_a_job_tells_its_output_and_keeps_it(server: RoundhouseServer) -> None:
    job = server.submit(ENDPOINT, body(stream=True))
    events = list(server.events(job["id"], patience_s=LOAD_PATIENCE_S))
    assert events[-1].name == "job.succeeded"
    outputs = [event.data for event in events if event.name == "job.output"]
    assert {output["format"] for output in outputs} == {"openai.chunk"}
    choices = [choice for output in outputs for chunk in output["delta"] for choice in chunk["choices"]]
    told = "".join(choice["delta"].get("content") or "" for choice in choices)
    assert told == content(server.response(job["id"]).json()) == content(call(server).json())


def test_completions(server: RoundhouseServer) -> None:
    wanted = {"model": "text", "prompt": "The capital of France is", "max_tokens": 4, "temperature": 0}
    answer = server.client.post("/v1/completions", json=wanted, timeout=LOAD_PATIENCE_S)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["text"].strip()


def test_what_vllm_refuses_comes_back_as_it_said(server: RoundhouseServer) -> None:
    answer = server.client.post(ENDPOINT, json=body(temperature=-1), timeout=LOAD_PATIENCE_S)
    assert answer.status_code == 400
    assert "temperature" in answer.json()["error"]["message"]
    assert "4" in content(call(server).json()), "the queue is not harmed by it"


def test_many_calls_share_the_engine(server: RoundhouseServer) -> None:
    jobs = [server.submit(ENDPOINT, body()) for _ in range(8)]
    answers = [content(server.response(server.succeeded(job["id"])["id"]).json()) for job in jobs]
    assert all("4" in answer for answer in answers)


def test_cancelling_stops_the_work_and_not_the_worker(server: RoundhouseServer) -> None:
    job = server.submit(ENDPOINT, long_body(LONG_TOKENS))
    first = server.first_event(job["id"], "job.output", LOAD_PATIENCE_S)
    before = server.worker("text")
    assert engine_running(server) == 1
    server.cancel(job["id"])
    assert list(server.events(job["id"], after=first.seq or 0))[-1].name == "job.cancelled"
    assert "4" in content(call(server).json())
    assert engine_is_idle_soon(server)
    after = server.worker("text")
    assert (after["pid"], after["starts"]) == (before["pid"], before["starts"])


def test_a_stream_nobody_reads_is_cancelled(server: RoundhouseServer) -> None:
    with server.client.stream("POST", ENDPOINT, json=long_body(LONG_TOKENS), timeout=LOAD_PATIENCE_S) as answer:
        assert answer.status_code == 200
        next(line for line in answer.iter_lines() if line.startswith("data: "))
    job = server.abandoned(answer.headers["x-roundhouse-job-id"])
    assert (job["state"], job["error"]["code"]) == ("cancelled", "client_disconnected")
    assert "4" in content(call(server).json())
    assert engine_is_idle_soon(server)


@pytest.mark.parametrize("victim", ["engine", "group", "leader"])
def test_a_job_outlives_its_worker(server: RoundhouseServer, victim: Victim) -> None:
    call(server)  # so that it is loaded
    assert "EngineCore" in " ".join(command_of(pid) for pid in server.worker_pids("text"))
    job = server.submit(ENDPOINT, long_body(KILLED_TOKENS))
    done = kill_worker_at(server, job, "job.output", LOAD_PATIENCE_S, victim)
    assert done["usage"]["completion_tokens"] == KILLED_TOKENS
    events = server.events(job["id"])
    retrying = next(event for event in events if event.name == "job.retrying")
    assert retrying.data["error"]["code"] == "worker_lost"
    assert retrying.data["discard_output_before_seq"] > 1
    assert "4" in content(call(server).json())
