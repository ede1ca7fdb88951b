"""The double does what it is told: each endpoint, each fault, in a real process."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import importlib.util
import io
import json
import os
import selectors
import signal
import struct
import subprocess
import sys
import time
import wave
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from harness import NDJSON, Worker, frames, until

SERVER = Path(__file__).resolve().parent.parent / "server.py"
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def echo() -> Iterator[Worker]:
    """One worker for the tests that leave it as it was."""
    with Worker(SERVER) as worker:
        yield worker.ready()


def said(text: str, **more: object) -> dict:
    """The body of a chat request."""
    return {"model": "echo", "messages": [{"role": "user", "content": text}], **more}


def pixels(png: bytes) -> tuple[int, int, bytes]:
    """Width, height and the RGB rows of a PNG; every checksum is looked at."""
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    chunks, at = {}, 8
    while at < len(png):
        length, kind = struct.unpack(">I4s", png[at : at + 8])
        data = png[at + 8 : at + 8 + length]
        assert struct.unpack(">I", png[at + 8 + length : at + 12 + length])[0] == zlib.crc32(kind + data)
        chunks[kind] = data
        at += 12 + length
    width, height = struct.unpack(">II", chunks[b"IHDR"][:8])
    rows = zlib.decompress(chunks[b"IDAT"])
    assert len(rows) == height * (1 + 3 * width)
    return width, height, rows


# ---- text --------------------------------------------------------------------


def test_chat_echoes_the_last_user_message(echo: Worker):
    body = said("one")
    body["messages"] += [{"role": "assistant", "content": "two"}, {"role": "user", "content": "three four"}]
    answer = echo.post(CHAT, body, x_request_id="job_1.1").json()
    assert answer["id"] == "chatcmpl-job_1.1"
    assert (answer["object"], answer["model"]) == ("chat.completion", "echo")
    assert answer["choices"] == [
        {"index": 0, "message": {"role": "assistant", "content": "echo: three four"}, "finish_reason": "stop"}
    ]
    assert answer["usage"] == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}


def test_content_may_come_in_parts(echo: Worker):
    parts = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}, {"type": "text", "text": "b"}]
    answer = echo.post(CHAT, {"messages": [{"role": "user", "content": parts}]}).json()
    assert answer["choices"][0]["message"]["content"] == "echo: a b"


def test_max_tokens_cuts(echo: Worker):
    choice = echo.post(CHAT, said("a b c", max_tokens=2)).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("echo: a", "length")
    choice = echo.post("/v1/completions", {"prompt": "a b", "max_tokens": 3}).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("echo: a b", "stop")


def test_a_stream_has_the_frames_of_openai(echo: Worker):
    answer = echo.post(CHAT, said("hello", stream=True), x_request_id="s")
    assert answer.headers["content-type"] == "text/event-stream"
    assert answer.headers["x-request-id"] == "s"
    *chunks, done = frames(answer.text)
    assert done == "[DONE]"
    assert {(chunk["id"], chunk["object"]) for chunk in chunks} == {("chatcmpl-s", "chat.completion.chunk")}
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [choice["delta"] for choice in choices] == [
        {"role": "assistant", "content": ""},
        {"content": "echo:"},
        {"content": " hello"},
        {},
    ]
    assert [choice["finish_reason"] for choice in choices] == [None, None, None, "stop"]


def test_usage_is_streamed_only_if_asked_for(echo: Worker):
    body = said("hello", stream=True, stream_options={"include_usage": True})
    *_, usage, done = frames(echo.post(CHAT, body).text)
    assert done == "[DONE]"
    assert usage["choices"] == []
    assert usage["usage"] == {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}


def test_completions_stream_the_text_they_answer(echo: Worker):
    whole = echo.post("/v1/completions", {"prompt": "x y z"}).json()["choices"][0]
    *chunks, done = frames(echo.post("/v1/completions", {"prompt": "x y z", "stream": True}).text)
    assert done == "[DONE]"
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["text"] == "echo: x y z"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_tokens_come_at_the_rate(echo: Worker):
    plan = {"tokens": 40, "tokens_per_s": 200}
    started = time.monotonic()
    answer = echo.post(CHAT, said("a", echo=plan)).json()
    assert time.monotonic() - started >= 40 / 200
    assert answer["usage"]["completion_tokens"] == 40
    *chunks, _ = frames(echo.post(CHAT, said("a", stream=True, echo=plan)).text)
    streamed = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert streamed == answer["choices"][0]["message"]["content"]


def test_text_requests_run_side_by_side(echo: Worker):
    started = time.monotonic()
    calls = [functools.partial(echo.post, CHAT, said("x", echo={"delay_ms": 1000, "steps": 1})) for _ in range(50)]
    assert {answer.status_code for answer in echo.at_once(calls)} == {200}
    assert time.monotonic() - started < 25  # one after the other: 50 s


def test_concurrency_bounds_what_runs():
    with Worker(SERVER, "--concurrency", "1", "--log-level", "info") as worker, ThreadPoolExecutor() as pool:
        worker.ready()
        with worker.stream(CHAT, said("x", stream=True, echo={"tokens": 1000, "tokens_per_s": 1})) as first:
            lines = first.iter_lines()  # kept: when it goes, the connection goes
            next(lines)
            second = pool.submit(worker.post, CHAT, said("y"))
            until(lambda: worker.metric("roundhouse_worker_in_flight") == 2)
            assert not second.done()
        assert second.result().status_code == 200  # the first was cancelled and gave its slot back


def test_closing_a_stream_cancels_it(echo: Worker):
    with echo.stream(CHAT, said("x", stream=True, echo={"tokens": 1000, "tokens_per_s": 1})) as answer:
        lines = answer.iter_lines()  # kept: when it goes, the connection goes
        next(lines)
        assert echo.metric("roundhouse_worker_in_flight") == 1
    until(lambda: echo.metric("roundhouse_worker_in_flight") == 0)


def test_text_reports_progress_of_its_delay(echo: Worker):
    lines = echo.lines(CHAT, said("x", echo={"delay_ms": 60, "steps": 3}))
    assert [line["step"] for line in lines if line["type"] == "progress"] == [1, 2, 3]
    assert lines[-1]["json"]["choices"][0]["message"]["content"] == "echo: x"


def test_a_stream_is_a_stream_although_lines_are_accepted(echo: Worker):
    answer = echo.post(CHAT, said("x", stream=True), **NDJSON)
    assert answer.headers["content-type"] == "text/event-stream"
    assert list(frames(answer.text))[-1] == "[DONE]"


def test_sleep_waits_for_streams():
    with Worker(SERVER) as worker, ThreadPoolExecutor() as pool:
        worker.ready()
        with worker.stream(CHAT, said("x", stream=True, echo={"tokens": 1000, "tokens_per_s": 1})) as answer:
            lines = answer.iter_lines()  # kept: when it goes, the connection goes
            next(lines)
            sleeping = pool.submit(worker.post, "/sleep")
            until(lambda: worker.get("/is_sleeping").json()["is_sleeping"])
            assert worker.get("/health").json()["phase"] == "parking"
            assert not sleeping.done()
        assert sleeping.result().status_code == 200
        assert worker.get("/health").json()["phase"] == "parked"


# ---- images, audio, echo -----------------------------------------------------


def test_images_depend_on_prompt_and_seed(echo: Worker):
    def made(**body: object) -> list[bytes]:
        answer = echo.post("/v1/images/generations", {"size": "40x24", **body}).json()
        return [base64.b64decode(image["b64_json"]) for image in answer["data"]]

    (cat,) = made(prompt="cat", seed=1)
    width, height, _ = pixels(cat)
    assert (width, height) == (40, 24)
    assert made(prompt="cat", seed=1) == [cat]
    assert made(prompt="cat", seed=2) != [cat]
    assert made(prompt="dog", seed=1) != [cat]
    assert made(prompt="cat", seed=1, n=2) == [cat, *made(prompt="cat", seed=2)]


def test_images_of_one_size_share_a_pass():
    with Worker(SERVER) as worker:
        worker.ready()
        bodies = [{"prompt": "a", "size": size} for size in ("16x16", "32x32", "16x16")]
        calls = [functools.partial(worker.post, "/v1/images/generations", b, x_roundhouse_run="r;n=3") for b in bodies]
        images = [base64.b64decode(answer.json()["data"][0]["b64_json"]) for answer in worker.at_once(calls)]
        assert [pixels(image)[0] for image in images] == [16, 32, 16]
        assert worker.metric("roundhouse_worker_pass_size_count") == 2
        assert worker.metric("roundhouse_worker_pass_size_sum") == 3


@pytest.mark.parametrize(
    ("path", "body", "seconds"),
    [
        ("/v1/audio/generations", {"prompt": "rain", "duration": 2}, 2.0),
        ("/v1/audio/generations", {"prompt": "rain"}, 1.0),
        ("/v1/audio/speech", {"input": "hello", "voice": "any"}, 0.5),
    ],
)
def test_audio_is_a_wav(echo: Worker, path, body, seconds):
    answer = echo.post(path, body)
    assert answer.headers["content-type"] == "audio/wav"
    with wave.open(io.BytesIO(answer.content)) as file:
        assert file.getnframes() / file.getframerate() == seconds
        assert len(set(file.readframes(100))) > 10  # not silence
    assert base64.b64decode(echo.lines(path, body)[-1]["body_b64"]) == answer.content


def test_progress_is_thinned_to_ten_lines_a_second(echo: Worker):
    started = time.monotonic()
    lines = echo.lines("/echo", {"echo": {"delay_ms": 500, "steps": 250}})
    seconds = time.monotonic() - started
    steps = [line["step"] for line in lines if line["type"] == "progress"]
    assert (steps[0], steps[-1]) == (1, 250)
    assert steps == sorted(set(steps))
    assert 3 <= len(steps) <= 10 * seconds + 2  # the first and the last come in any case


def test_echo_tells_what_arrived(echo: Worker):
    body = {"any": [1, {"thing": None}]}
    assert echo.post("/echo", body, x_request_id="job_9.3").json() == {
        "request_id": "job_9.3",
        "run": None,
        "pass_size": 1,
        "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "pid": echo.process.pid,
        "body": body,
    }
    calls = [functools.partial(echo.post, "/echo", {}, x_roundhouse_run="r7;n=5") for _ in range(5)]
    answers = [answer.json() for answer in echo.at_once(calls)]
    assert {(answer["run"], answer["pass_size"]) for answer in answers} == {("r7", 5)}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {}, "messages"),
        (CHAT, said("x", max_tokens=0), "max_tokens"),
        ("/v1/completions", {"prompt": 7}, "prompt"),
        ("/v1/images/generations", {}, "prompt"),
        ("/v1/images/generations", {"prompt": "x", "size": "0x9"}, "size"),
        ("/v1/images/generations", {"prompt": "x", "size": "2000x9"}, "size"),
        ("/v1/images/generations", {"prompt": "x", "n": 9}, "n"),
        ("/v1/audio/generations", {"prompt": "x", "duration": 31}, "duration"),
        ("/v1/audio/speech", {"input": "x", "response_format": "mp3"}, "response_format"),
        ("/echo", {"echo": 1}, "echo"),
        ("/echo", {"echo": {"crahs": True}}, "echo.crahs"),
        ("/echo", {"echo": {"crash": 1}}, "echo.crash"),
        ("/echo", {"echo": {"steps": 0}}, "echo.steps"),
        ("/echo", {"echo": {"status": 200}}, "echo.status"),
    ],
)
def test_nonsense_is_refused_by_name(echo: Worker, path, body, param):
    answer = echo.post(path, body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


# ---- faults of a request -----------------------------------------------------


@pytest.mark.parametrize("path", [CHAT, "/echo"])
def test_fail_and_oom_have_their_codes(echo: Worker, path):
    failed = echo.post(path, said("x", echo={"fail": "because"}))
    assert (failed.status_code, failed.json()["error"]["message"]) == (500, "because")
    assert echo.lines(path, said("x", echo={"fail": True}))[-1]["code"] == "worker_error"
    assert echo.post(path, said("x", echo={"oom": True})).status_code == 507
    assert echo.lines(path, said("x", echo={"oom": True}))[-1]["code"] == "worker_oom"
    assert echo.post(path, said("x")).status_code == 200


def test_one_item_of_a_run_fails_and_one_out_of_memory_takes_all(echo: Worker):
    def run(name: str, wishes: list[dict]) -> list[int]:
        calls = [
            functools.partial(echo.post, "/echo", {"echo": wish}, x_roundhouse_run=f"{name};n={len(wishes)}")
            for wish in wishes
        ]
        return [answer.status_code for answer in echo.at_once(calls)]

    assert run("f", [{}, {"fail": True}, {}]) == [200, 500, 200]
    assert run("o", [{}, {"oom": True}, {}]) == [507, 507, 507]


@pytest.mark.parametrize("path", [CHAT, "/echo"])
def test_a_status_is_answered(echo: Worker, path):
    answer = echo.post(path, said("x", echo={"status": 429}))
    assert answer.status_code == 429
    assert answer.json()["error"]["code"] == "echo_status"


def test_a_stream_breaks_where_it_was_told(echo: Worker):
    answer = echo.post(CHAT, said("a b c", stream=True, echo={"stream_error_after": 2}))
    assert answer.status_code == 200
    role, first, second, error, done = frames(answer.text)
    assert [chunk["choices"][0]["delta"]["content"] for chunk in (role, first, second)] == ["", "echo:", " a"]
    assert error["error"]["code"] == "worker_error"
    assert done == "[DONE]"


def test_a_stream_that_fails_before_its_first_piece_has_the_status(echo: Worker):
    answer = echo.post(CHAT, said("a", stream=True, echo={"fail": True}))
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "worker_error")


def test_no_finish_leaves_the_reason_out(echo: Worker):
    *chunks, done = frames(echo.post(CHAT, said("a", stream=True, echo={"no_finish": True})).text)
    assert done == "[DONE]"
    assert {chunk["choices"][0]["finish_reason"] for chunk in chunks} == {None}
    assert echo.post(CHAT, said("a", echo={"no_finish": True})).json()["choices"][0]["finish_reason"] is None


@pytest.mark.parametrize("path", [CHAT, "/echo"])
def test_crash_kills_the_process_in_the_middle(path):
    with Worker(SERVER) as worker:
        worker.ready()
        with pytest.raises(httpx.RemoteProtocolError):
            worker.lines(path, said("x", echo={"crash": True, "delay_ms": 50}))
        assert worker.wait_exit() == -signal.SIGKILL


@pytest.mark.parametrize("path", [CHAT, "/echo"])
def test_hang_ignores_cancelling_and_health_stays_well(path):
    with Worker(SERVER, "--grace", "0.1") as worker:
        worker.ready()
        with worker.stream(path, said("x", echo={"hang": True}), **NDJSON):
            assert worker.metric("roundhouse_worker_in_flight") == 1
        assert worker.get("/health").status_code == 200
        worker.signal()  # the end of grace is the end of it all the same
        assert worker.wait_exit() == 0


# ---- faults of the process ---------------------------------------------------


def test_health_tells_the_device_memory_if_it_is_known():
    with Worker(SERVER, "--device-bytes", "5000", environment={"CUDA_VISIBLE_DEVICES": "2,3"}) as worker:
        assert worker.ready().get("/health").json()["device_bytes"] == 5000
        assert worker.post("/echo").json()["gpus"] == "2,3"
    with Worker(SERVER) as worker:
        assert "device_bytes" not in worker.ready().get("/health").json()


def test_slow_loading_has_a_percentage():
    with Worker(SERVER, "--load-s", "0.3") as worker:
        health = until(lambda: (now := worker.get("/health").json())["phase"] == "read" and now)
        assert health["status"] == "loading"
        assert 0 <= health["percent"] < 100
        assert worker.ready().get("/health").json()["percent"] == 100


def test_loading_fails_with_its_text():
    with Worker(SERVER, "--load-fail", "no such weights") as worker:
        worker.wait_log("initialize failed")
        assert worker.get("/health").json()["error"] == "RuntimeError: no such weights"
        assert worker.wait_exit() == 1


def test_requests_are_counted_to_the_one_that_fails_and_the_one_that_crashes():
    with Worker(SERVER, "--fail-item", "2", "--crash-after", "4") as worker:
        worker.ready()
        assert [worker.post("/echo").status_code for _ in range(3)] == [200, 500, 200]
        with pytest.raises(httpx.RemoteProtocolError):
            worker.post("/echo")
        assert worker.wait_exit() == -signal.SIGKILL


def test_passes_have_a_cost_and_a_size_that_does_not_fit():
    with Worker(SERVER, "--batch-cost", "40+30", "--oom-above", "2", "--oom-item", "6") as worker:
        worker.ready()

        def run(name: str, size: int) -> list[int]:
            call = functools.partial(worker.post, "/echo", {}, x_roundhouse_run=f"{name};n={size}")
            return [answer.status_code for answer in worker.at_once([call] * size)]

        started = time.monotonic()
        assert run("two", 2) == [200, 200]
        assert time.monotonic() - started >= 0.1
        assert run("three", 3) == [507] * 3
        assert [worker.post("/echo").status_code for _ in range(2)] == [507, 200]


@pytest.mark.parametrize("cost", ["", "x+1", "1", "-1+1", "1+inf"])
def test_a_cost_is_two_numbers(cost: str):
    checked = subprocess.run(
        [sys.executable, SERVER, "--check", "--batch-cost", cost], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 1
    assert "--batch-cost" in checked.stdout


def test_health_hangs_after_the_first_request():
    with Worker(SERVER, "--hang-health") as worker:
        assert worker.ready().get("/health").status_code == 200
        assert worker.post("/echo").status_code == 200
        with pytest.raises(httpx.ReadTimeout):
            worker.client.get(worker.url + "/health", timeout=0.2)
        assert worker.post("/echo").status_code == 200
        worker.signal()
        assert worker.wait_exit() == 0


def test_sigterm_can_be_ignored():
    with Worker(SERVER, "--ignore-sigterm") as worker:
        worker.ready()
        worker.signal()
        worker.wait_log("ignored stop.signal=SIGTERM")
        assert worker.post("/echo").status_code == 200
        worker.signal(signal.SIGKILL)
        assert worker.wait_exit() == -signal.SIGKILL


def test_it_can_end_without_ado():
    with Worker(SERVER, "--end-at-once") as worker:
        worker.ready()
        worker.signal()
        assert worker.wait_exit() == 0
        assert "stopping" not in worker.log()


def test_flags_are_defaults_and_the_body_wins():
    with Worker(SERVER, "--fail", "by flag") as worker:
        worker.ready()
        assert worker.post("/echo").json()["error"]["message"] == "by flag"
        assert worker.post("/echo", {"echo": {"fail": False}}).status_code == 200


# ---- the fake device ---------------------------------------------------------


def held(directory: Path) -> dict[str, int]:
    """Who holds how many bytes of the device."""
    return {file.name: int(file.read_text()) for file in directory.iterdir() if file.name.isdecimal()}


def test_device_memory_follows_parking_and_ends_with_the_process(tmp_path: Path):
    flags = ("--device-memory-dir", str(tmp_path), "--device-memory-bytes", "5000", "--device-parked-bytes", "70")
    with Worker(SERVER, *flags) as worker:
        pid = str(worker.process.pid)
        worker.ready()
        assert held(tmp_path) == {pid: 5000}
        worker.post("/sleep")
        assert held(tmp_path) == {pid: 70}
        worker.post("/wake_up")
        assert held(tmp_path) == {pid: 5000}
        worker.signal()
        assert worker.wait_exit() == 0
        until(lambda: held(tmp_path) == {})


def test_what_it_tells_of_its_memory_follows_parking():
    with Worker(SERVER, "--device-bytes", "5000", "--device-parked-bytes", "70") as worker:
        worker.ready()
        told = [worker.get("/health").json()["device_bytes"]]
        for verb in ("/sleep", "/wake_up"):
            worker.post(verb)
            told.append(worker.get("/health").json()["device_bytes"])
        assert told == [5000, 70, 5000]


def test_what_it_tells_of_its_copy_in_host_memory():
    flags = ("--host-bytes", "50")
    for most, told in (("50", (50, True)), ("49", (0, False)), (None, (0, None))):
        environment = {} if most is None else {"ROUNDHOUSE_PARK_BYTES": most}
        with Worker(SERVER, *flags, environment=environment) as worker:
            health = worker.ready().get("/health").json()
            assert (health["host_bytes"], health.get("can_park")) == told
            assert ("49 are left" in health.get("park_note", "")) == (most == "49")
    with Worker(SERVER, "--no-park", "offloaded") as worker:
        health = worker.ready().get("/health").json()
        assert (health["can_park"], health["park_note"]) == (False, "offloaded")


def test_without_a_copy_it_makes_one_again_at_the_wake_if_there_is_room():
    flags = ("--host-bytes", "50", "--reread-s", "0")
    with Worker(SERVER, *flags, environment={"ROUNDHOUSE_PARK_BYTES": "49"}) as worker:
        worker.ready()
        told = []
        for call in ("/sleep?level=2", "/wake_up?park_bytes=50", "/sleep?level=2", "/wake_up?park_bytes=10"):
            assert worker.post(call).status_code == 200
            health = worker.get("/health").json()
            told.append((health["host_bytes"], health["can_park"], health["can_reread"]))
        assert told == [(0, True, True), (50, True, True), (0, True, True), (0, False, True)]
        assert worker.post("/sleep").status_code == 200
        assert worker.post("/wake_up?park_bytes=many").status_code == 400


def test_a_lying_sleeper_keeps_the_memory(tmp_path: Path):
    flags = ("--device-memory-dir", str(tmp_path), "--device-memory-bytes", "5000", "--device-bytes", "5000")
    with Worker(SERVER, *flags, "--park-lie") as worker:
        worker.ready()
        assert worker.post("/sleep").status_code == 200
        assert worker.get("/is_sleeping").json() == {"is_sleeping": True}
        assert list(held(tmp_path).values()) == [5000]
        assert worker.get("/health").json()["device_bytes"] == 5000


def test_requests_after_a_wake_can_fail():
    with Worker(SERVER, "--wake-broken", "damaged weights") as worker:
        worker.ready()
        assert worker.post(CHAT, said("hello")).status_code == 200
        worker.post("/sleep")
        worker.post("/wake_up")
        answer = worker.post(CHAT, said("hello"))
        assert (answer.status_code, answer.json()["error"]["message"]) == (500, "damaged weights")


def test_it_can_die_in_its_sleep():
    with Worker(SERVER, "--park-crash") as worker:
        worker.ready()
        with pytest.raises(httpx.HTTPError):
            worker.post("/sleep")
        assert worker.wait_exit() == -signal.SIGKILL


def test_device_memory_is_released_late_even_after_sigkill(tmp_path: Path):
    flags = ("--device-memory-dir", str(tmp_path), "--device-memory-bytes", "5", "--release-delay-s", "0.5")
    with Worker(SERVER, *flags) as worker:
        worker.ready()
        worker.signal(signal.SIGKILL)
        worker.wait_exit()
        assert held(tmp_path) == {str(worker.process.pid): 5}
        until(lambda: held(tmp_path) == {})


def test_a_full_device_refuses_to_load(tmp_path: Path):
    (tmp_path / "1").write_text("60")
    flags = ("--device-memory-dir", str(tmp_path), "--device-memory-bytes", "50", "--device-total-bytes", "100")
    with Worker(SERVER, *flags) as worker:
        worker.wait_log("initialize failed")
        assert worker.get("/health").json()["code"] == "worker_oom"
        assert held(tmp_path) == {"1": 60}
        assert worker.wait_exit() == 1


# ---- standing alone ----------------------------------------------------------


def test_it_runs_from_anywhere_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert "roundhouse_worker" not in os.listdir(tmp_path)
    with Worker(SERVER) as worker:
        assert worker.ready().post(CHAT, said("hi")).status_code == 200


def test_a_keep_alive_connection_serves_many_requests(echo: Worker):
    bodies = [json.loads(echo.post(CHAT, said(str(i))).text) for i in range(200)]
    texts = [body["choices"][0]["message"]["content"] for body in bodies]
    assert texts == [f"echo: {i}" for i in range(200)]


# ---- a shared device ---------------------------------------------------------


class JumpingSelector(selectors.DefaultSelector):
    """A selector whose clock jumps to the next timer instead of waiting for it."""

    now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self.now_s += timeout or 0.0
        return super().select(0)


class JumpingLoop(asyncio.SelectorEventLoop):
    """An event loop in which no time passes but what its timers wait for."""

    def __init__(self) -> None:
        self.jumping = JumpingSelector()
        super().__init__(self.jumping)

    def time(self) -> float:
        return self.jumping.now_s


def shared(alpha: float, *jobs: tuple[float, float, float]) -> list[float]:
    """When jobs end: each begins at a time, has some seconds of work, and is cancelled at a time."""
    spec = importlib.util.spec_from_file_location("echo_server", SERVER)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["echo_server"] = module
    spec.loader.exec_module(module)
    share = module.Share(alpha)

    async def one(begin: float, work: float, cancel: float) -> float:
        await asyncio.sleep(begin)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(share.spend(work), cancel - begin)
        return asyncio.get_running_loop().time()

    async def every() -> list[float]:
        return await asyncio.gather(*(one(*job) for job in jobs))

    loop = JumpingLoop()
    try:
        return loop.run_until_complete(every())
    finally:
        loop.close()


def test_requests_that_share_a_device_slow_each_other_down():
    assert shared(1, (0, 3, 99)) == pytest.approx([3])
    # Each at half the speed until the short one has had its second; then the long one has two left, alone.
    assert shared(1, (0, 3, 99), (0, 1, 99)) == pytest.approx([4, 2])
    assert shared(0.5, (0, 2, 99), (1, 2, 99), (1, 2, 99)) == pytest.approx([3, 4.5, 4.5])
    assert shared(0, (0, 3, 99), (0, 3, 99)) == pytest.approx([3, 3])


def test_a_cancelled_request_gives_its_share_back():
    assert shared(1, (0, 3, 99), (1, 60, 2)) == pytest.approx([3.5, 2])


def test_a_request_of_a_shared_device_is_answered():
    with Worker(SERVER, "--share-alpha", "0.5", "--load-from-start", "--load-s", "0.01") as worker:
        answer = worker.ready().post(CHAT, said("x", echo={"delay_ms": 20}))
        assert answer.json()["choices"][0]["message"]["content"] == "echo: x"
