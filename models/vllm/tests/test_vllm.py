"""The text worker: the real `vllm serve` on a real small model (SmolLM2-135M), started once."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

ROOT = Path(__file__).parents[3]
SERVER = ROOT / "models/vllm/server.py"
PYTHON = ROOT / "models/vllm/.venv/bin/python"
LOAD_PATIENCE_S = 300.0
PATIENCE_S = 60.0
QUESTION = [{"role": "user", "content": "What is 2+2?"}]


class Engine:
    """`vllm serve` in a process group of its own."""

    def __init__(self, model: Path, log: Path, temporary: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._log = log
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [PYTHON, SERVER, "--model", model, "--name", "smol", "--port", str(self.port), "--grace", "5"],
                stdout=out,
                stderr=subprocess.STDOUT,
                env=os.environ | {"TMPDIR": temporary},
                start_new_session=True,
            )
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=PATIENCE_S)

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def healthy(self) -> bool:
        assert self.process.poll() is None, self.log()[-4000:]
        try:
            return self.client.get("/health").status_code == 200
        except httpx.TransportError:
            return False

    def group(self) -> dict[int, str]:
        """The living processes of the group, and their command lines."""
        found: dict[int, str] = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                if int(fields[2]) == self.process.pid and fields[0] != "Z":
                    found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
            except OSError:  # it ended meanwhile
                continue
        return found

    def chat(self, **fields: Any) -> dict[str, Any]:
        body = {"model": "smol", "messages": QUESTION, "temperature": 0, "max_tokens": 24} | fields
        answer = self.client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def running(self) -> float:
        lines = self.client.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith("vllm:num_requests_running{"))


def until(condition: Callable[[], object], patience_s: float) -> None:
    end = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < end, "it never became true"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def engine(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    # vLLM leaves sockets behind even when it ends in good order. A short path: a socket's may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="vllm-") as temporary:
        engine = Engine(checkpoints / "smollm2", tmp_path_factory.mktemp("vllm") / "log", temporary)
        try:
            until(engine.healthy, LOAD_PATIENCE_S)
            yield engine
        finally:
            engine.client.close()
            if engine.group():
                os.killpg(engine.process.pid, signal.SIGKILL)
            engine.process.wait(PATIENCE_S)


def test_it_answers_a_question(engine: Engine) -> None:
    answer = engine.chat()
    (choice,) = answer["choices"]
    assert "4" in choice["message"]["content"]
    assert choice["finish_reason"] == "stop"
    assert answer["model"] == "smol"
    assert answer["usage"]["completion_tokens"] > 3


def test_a_stream_gives_the_same_text_in_pieces(engine: Engine) -> None:
    body = {"model": "smol", "messages": QUESTION, "temperature": 0, "max_tokens": 24, "stream": True}
    body["stream_options"] = {"include_usage": True}
    with engine.client.stream("POST", "/v1/chat/completions", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        data = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert data[-1] == "[DONE]"
    events = [json.loads(one) for one in data[:-1]]
    pieces = [choice["delta"].get("content") or "" for event in events for choice in event["choices"]]
    assert len([piece for piece in pieces if piece]) > 3
    assert "".join(pieces) == engine.chat()["choices"][0]["message"]["content"]
    assert [choice["finish_reason"] for event in events for choice in event["choices"]][-1] == "stop"
    assert events[-1]["usage"]["completion_tokens"] > 3


def test_closing_the_connection_ends_the_request(engine: Engine) -> None:
    body = {"model": "smol", "prompt": "Once upon a time", "max_tokens": 1900, "ignore_eos": True, "stream": True}
    with engine.client.stream("POST", "/v1/completions", json=body) as answer:
        next(answer.iter_lines())
        assert engine.running() == 1
    until(lambda: engine.running() == 0, PATIENCE_S)
    assert "4" in engine.chat()["choices"][0]["message"]["content"]


def test_the_sleep_calls_are_there(engine: Engine) -> None:
    assert engine.client.get("/is_sleeping").json() == {"is_sleeping": False}


def test_the_process_that_was_started_leads_the_group_of_all(engine: Engine) -> None:
    group = engine.group()
    assert "vllm serve" in group[engine.process.pid]
    assert any("EngineCore" in command for command in group.values())
    assert os.getsid(engine.process.pid) == engine.process.pid


def test_prompts_and_probes_are_not_logged(engine: Engine) -> None:
    engine.chat(messages=[{"role": "user", "content": "zebra-zeppelin"}], max_tokens=2)
    engine.healthy()
    assert "zeppelin" not in engine.log()
    assert "/health HTTP" not in engine.log()


def test_sigterm_ends_every_process_of_the_group(engine: Engine) -> None:
    engine.process.send_signal(signal.SIGTERM)
    assert engine.process.wait(PATIENCE_S) == 0
    until(lambda: not engine.group(), PATIENCE_S)
