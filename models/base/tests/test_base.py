"""`BaseService` as its clients meet it: a real process, real HTTP, real signals."""

from __future__ import annotations

import base64
import functools
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from harness import NDJSON, Worker, until

from roundhouse_worker import flags

PROBE = Path(__file__).with_name("probe.py")


@pytest.fixture(scope="module")
def shared() -> Iterator[Worker]:
    """One worker for the tests that leave it as it was."""
    with Worker(PROBE) as worker:
        yield worker.ready()


def passes(worker: Worker, prefix: str) -> list[list[str]]:
    """The passes whose requests have ids with this prefix."""
    seen = worker.get("/seen").json()
    return [entry[1] for entry in seen if entry[0] == "pass" and entry[1][0].startswith(prefix)]


def run(worker: Worker, name: str, bodies: list[dict], size: int | None = None) -> list:
    """Send the bodies as one run; the answers."""
    header = f"{name};n={size or len(bodies)}"
    calls = [
        functools.partial(worker.post, "/run", body, x_request_id=f"{name}-{i}", x_roundhouse_run=header)
        for i, body in enumerate(bodies)
    ]
    return worker.at_once(calls)


# ---- loading -----------------------------------------------------------------


def test_health_tells_how_far_loading_is_and_whose_worker_it_is():
    with Worker(PROBE, "--gated", "--name", "mine", environment={"ROUNDHOUSE_INSTANCE": "dir1:nonce2"}) as worker:
        worker.wait_log("load.phase=imports")
        answer = worker.get("/health")
        assert answer.status_code == 503
        assert answer.json() == {
            "status": "loading",
            "phase": "imports",
            "percent": 25,
            "model": "mine",
            "instance": "dir1:nonce2",
        }
        refused = worker.post("/run")
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "loading"
        assert worker.post("/sleep").status_code == 503

        worker.post("/permit")
        worker.ready()
        answer = worker.get("/health")
        assert answer.status_code == 200
        assert answer.json()["status"] == "ready"
        assert answer.json()["percent"] == 100


def test_a_failed_load_says_why_and_ends_the_process():
    with Worker(PROBE, "--load-error", "weights are torn") as worker:
        worker.wait_log("initialize failed")
        answer = worker.get("/health")
        assert answer.status_code == 503
        assert answer.json()["status"] == "failed"
        assert answer.json()["error"] == "RuntimeError: weights are torn"
        assert answer.json()["code"] == "worker_error"
        assert worker.wait_exit() == 1
        assert "Traceback" in worker.log()
        assert "released" not in worker.log()


def test_a_load_that_runs_out_of_memory_has_its_own_code():
    with Worker(PROBE, "--load-error", "CUDA out of memory") as worker:
        worker.wait_log("initialize failed")
        assert worker.get("/health").json()["code"] == "worker_oom"


def test_sigterm_while_loading_ends_at_the_next_phase():
    with Worker(PROBE, "--gated") as worker:
        worker.wait_log("load.phase=imports")
        worker.signal()
        worker.wait_log("stopping")
        worker.post("/permit")
        assert worker.wait_exit() == 0
        assert "load.phase=weights" not in worker.log()


def test_sigterm_ends_a_load_that_does_not_look_up():
    with Worker(PROBE, "--gated") as worker:
        worker.wait_log("load.phase=imports")
        worker.signal()
        assert worker.wait_exit() == 0
        assert "the model thread is busy" in worker.log()


def test_a_taken_port_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run([sys.executable, PROBE, "--port", str(port)], capture_output=True, text=True, timeout=20)
    assert done.returncode == 1
    assert f"cannot bind http.host=127.0.0.1 http.port={port}" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "answer"),
    [
        (
            ["--size", "3", "--name", "n", "--model", "m"],
            0,
            {"ok": True, "name": "n", "model": "m", "endpoints": ["/run", "/other"], "size": 3},
        ),
        (["--size", "0"], 1, {"ok": False, "error": "--size must be positive, not 0"}),
        (["--sise", "1"], 1, {"ok": False, "error": "unrecognized arguments: --sise 1"}),
        (["--grace", "-1"], 1, {"ok": False, "error": "argument --grace: must be at least 0, not -1"}),
        (["--port", "70000"], 1, {"ok": False, "error": "argument --port: must be 0-65535, not 70000"}),
    ],
)
def test_check_validates_the_flags_and_loads_nothing(arguments, code, answer):
    command = [sys.executable, str(PROBE), "--load-error", "loaded", *arguments, "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert (done.returncode, json.loads(done.stdout)) == (code, answer)
    assert done.stderr == ""


def test_wrong_flags_without_check_are_a_usage_error():
    done = subprocess.run([sys.executable, PROBE, "--size", "0"], capture_output=True, text=True, timeout=20)
    assert done.returncode == 2
    assert "--size must be positive, not 0" in done.stderr


# ---- requests and runs -------------------------------------------------------


def test_request_ids_come_back_or_are_made(shared: Worker):
    assert shared.post("/run", x_request_id="job_7.2").headers["x-request-id"] == "job_7.2"
    first, second = (shared.post("/run").headers["x-request-id"] for _ in range(2))
    assert first.startswith("req_")
    assert first != second


def test_models_are_listed_as_openai_does(shared: Worker):
    models = shared.get("/v1/models").json()
    assert models["object"] == "list"
    assert [(model["id"], model["object"]) for model in models["data"]] == [("probe", "model")]


def test_a_whole_run_is_one_pass_and_does_not_wait():
    with Worker(PROBE, "--batch-wait-ms", "60000") as worker:
        answers = run(worker.ready(), "whole", [{"text": str(i)} for i in range(8)])
        assert [answer.json() for answer in answers] == [{"text": str(i), "run": "whole"} for i in range(8)]
        assert [sorted(ids) for ids in passes(worker, "whole")] == [[f"whole-{i}" for i in range(8)]]


def test_a_run_with_a_missing_request_starts_without_it(shared: Worker):
    answers = run(shared, "short", [{"text": "a"}, {"text": "b"}], size=3)
    assert [answer.json()["text"] for answer in answers] == ["a", "b"]
    assert sum(len(ids) for ids in passes(shared, "short")) == 2


def test_different_keys_are_different_passes(shared: Worker):
    answers = run(shared, "keys", [{"key": i % 2, "text": str(i)} for i in range(4)])
    assert [answer.json()["text"] for answer in answers] == ["0", "1", "2", "3"]
    assert sorted(sorted(ids) for ids in passes(shared, "keys")) == [["keys-0", "keys-2"], ["keys-1", "keys-3"]]


def test_requests_without_a_run_are_passes_of_one(shared: Worker):
    calls = [functools.partial(shared.post, "/run", x_request_id=f"alone-{i}") for i in range(3)]
    assert [answer.status_code for answer in shared.at_once(calls)] == [200] * 3
    assert sorted(passes(shared, "alone")) == [["alone-0"], ["alone-1"], ["alone-2"]]


def test_threads_share_no_connection(shared: Worker):
    """One whose pool two threads use may be closed by the one while the other waits for an answer on it."""
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(lambda: shared.client).result()
        assert pool.submit(lambda: shared.client).result() is other
    assert shared.client is not other


def test_health_answers_while_the_model_works(shared: Worker):
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(shared.post, "/run", {"gated": True}, x_request_id="busy-0")
        until(lambda: passes(shared, "busy"))
        assert shared.get("/health").status_code == 200
        assert shared.metric("roundhouse_worker_in_flight") == 1
        assert not answer.done()
        shared.post("/permit")
        assert answer.result().status_code == 200


def test_health_tells_how_long_a_pass_has_been_given_up_until_it_notices(shared: Worker):
    with shared.stream("/run", {"gated": True}, **NDJSON, x_request_id="left-0"):
        until(lambda: passes(shared, "left"))
        assert "given_up_ms" not in shared.get("/health").json()
    until(lambda: "given_up_ms" in shared.get("/health").json())
    until(lambda: shared.get("/health").json()["given_up_ms"] >= 50)
    shared.post("/permit")
    until(lambda: "given_up_ms" not in shared.get("/health").json())


# ---- answers -----------------------------------------------------------------


def test_progress_is_sent_while_the_pass_runs(shared: Worker):
    with shared.stream("/run", {"steps": 3, "gated": True, "text": "x"}, **NDJSON, x_request_id="live") as answer:
        assert answer.headers["x-request-id"] == "live"
        lines = answer.iter_lines()
        shared.post("/permit")  # one step, and its line comes although the pass waits for the next
        assert json.loads(next(lines)) == {"type": "progress", "step": 1, "total": 3}
        shared.post("/permit?n=2")
        rest = [json.loads(line) for line in lines]
    assert rest[-2:] == [
        {"type": "progress", "step": 3, "total": 3},
        {"type": "result", "content_type": "application/json", "json": {"text": "x", "run": None}},
    ]


def test_bytes_come_plain_or_as_base64(shared: Worker):
    plain = shared.post("/run", {"want": "binary", "text": "abc"})
    assert (plain.status_code, plain.headers["content-type"], plain.content) == (200, "audio/wav", b"RIFFabc")
    last = shared.lines("/run", {"want": "binary", "text": "abc"})[-1]
    assert (last["type"], last["content_type"]) == ("result", "audio/wav")
    assert base64.b64decode(last["body_b64"]) == b"RIFFabc"


@pytest.mark.parametrize(
    ("body", "status", "code", "message", "param"),
    [
        ({"bad": 7}, 400, "invalid_request", "bad is 7", "bad"),
        ({"want": "error", "text": "t"}, 500, "worker_error", "RuntimeError: item failed: t", None),
        ({"want": "raise", "text": "t"}, 500, "worker_error", "RuntimeError: pass failed: t", None),
        ({"want": "exit"}, 500, "worker_error", "SystemExit: 3", None),
        ({"keep": 0}, 500, "worker_error", "generate returned 0 outcomes for 1 items", None),
        ({"want": "oom-class"}, 507, "worker_oom", "OutOfMemoryError: no room", None),
        ({"want": "oom-text"}, 507, "worker_oom", "RuntimeError: CUDA error: out of memory", None),
    ],
)
def test_a_failure_is_an_answer_and_the_worker_lives_on(shared: Worker, body, status, code, message, param):
    plain = shared.post("/run", body)
    assert plain.status_code == status
    error = plain.json()["error"]
    assert (error["code"], error["message"], error["param"]) == (code, message, param)

    line = shared.lines("/run", body)[-1]
    assert line.pop("param", None) == param
    assert line == {"type": "error", "status": status, "code": code, "message": message}
    assert shared.post("/run").status_code == 200


def test_running_out_of_memory_lets_the_model_tidy_up():
    with Worker(PROBE) as worker:
        worker.ready().post("/run", {"want": "oom-class"})
        assert worker.get("/seen").json()[-1] == ["reclaim"]


def test_one_item_of_a_pass_fails_alone(shared: Worker):
    answers = run(shared, "mixed", [{"text": "a"}, {"text": "b", "want": "error"}, {"text": "c"}])
    assert [answer.status_code for answer in answers] == [200, 500, 200]


def test_an_item_that_alone_runs_out_of_memory_is_alone_in_it():
    with Worker(PROBE, "--batch-wait-ms", "10000") as worker:  # all are in one pass, however busy the machine is
        bodies = [{"text": "a"}, {"text": "out of memory", "want": "error"}, {"text": "c"}]
        answers = run(worker.ready(), "mixed", bodies)
        assert [answer.status_code for answer in answers] == [200, 507, 200]
        assert answers[1].json()["error"]["code"] == "worker_oom"
        assert worker.get("/seen").json()[-1] == ["reclaim"]


def test_a_pass_that_runs_out_of_memory_says_so_to_each_of_its_items(shared: Worker):
    answers = run(shared, "oom", [{"want": "oom-class"}, {}, {}])
    assert [answer.json()["error"]["code"] for answer in answers] == ["worker_oom"] * 3


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'"text"', pytest.param(b"[" * 100_000, id="deep")])
def test_a_body_that_is_no_object_is_refused(shared: Worker, content):
    answer = shared.client.post(shared.url + "/run", content=content)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_body_has_a_limit(shared: Worker):
    answer = shared.client.post(shared.url + "/run", content=b" " * (64 * 1024 * 1024 + 1))
    assert answer.status_code == 400
    assert "67108865 bytes" in answer.json()["error"]["message"]


@pytest.mark.parametrize("header", ["", "x", "x;n=0", "x;n=", ";n=2", "x;n=5000", "x;m=2"])
def test_a_malformed_run_is_refused(shared: Worker, header):
    answer = shared.post("/run", x_roundhouse_run=header)
    assert answer.status_code == 400
    assert "x-roundhouse-run" in answer.json()["error"]["message"]


def test_unknown_paths_and_methods_have_openai_errors(shared: Worker):
    assert shared.post("/nothing").json()["error"]["code"] == "not_found"
    assert shared.get("/run").status_code == 405
    assert "error" in shared.get("/run").json()


def test_metrics_count_outcomes_and_passes():
    with Worker(PROBE) as worker:
        run(worker.ready(), "m", [{}, {}])
        worker.post("/run", {"want": "error"})
        assert worker.metric('roundhouse_worker_requests_total{outcome="succeeded"}') == 2
        assert worker.metric('roundhouse_worker_requests_total{outcome="worker_error"}') == 1
        assert worker.metric("roundhouse_worker_pass_size_sum") == 3
        assert worker.metric("roundhouse_worker_pass_size_count") == worker.metric(
            "roundhouse_worker_pass_seconds_count"
        )
        assert worker.metric("roundhouse_worker_in_flight") == 0


def test_logs_name_requests_and_never_quote_them():
    with Worker(PROBE, "--log-level", "debug") as worker:
        worker.ready()
        for want in ("json", "error", "raise"):
            worker.post("/run", {"want": want, "text": "s3cret"}, x_request_id=f"job_{want}.1")
        worker.signal()
        assert worker.wait_exit() == 0
        assert "s3cret" not in worker.log()
        for want in ("json", "error", "raise"):
            assert f"request.id=job_{want}.1" in worker.log()
        assert "error.type=RuntimeError" in worker.log()


# ---- cancelling --------------------------------------------------------------


def test_closing_the_only_connection_ends_the_pass_at_its_next_step(shared: Worker):
    with shared.stream("/run", {"steps": 1000, "gated": True}, **NDJSON, x_request_id="gone-0") as answer:
        shared.post("/permit")
        next(answer.iter_lines())
    until(lambda: shared.metric("roundhouse_worker_in_flight") == 0)
    shared.post("/permit")
    until(lambda: ["Cancelled", ["gone-0"]] in shared.get("/seen").json())
    assert shared.post("/run").status_code == 200


def test_a_plain_request_is_cancelled_too():
    with Worker(PROBE) as worker:
        worker.ready()
        with socket.create_connection(("127.0.0.1", int(worker.url.rpartition(":")[2]))) as connection:
            body = b'{"steps": 1000, "gated": true}'
            connection.sendall(
                b"POST /run HTTP/1.1\r\nhost: x\r\nx-request-id: p\r\ncontent-length: %d\r\n\r\n" % len(body)
            )
            connection.sendall(body)
            until(lambda: passes(worker, "p"))
        until(lambda: worker.metric('roundhouse_worker_requests_total{outcome="cancelled"}') == 1)
        worker.post("/permit")
        until(lambda: ["Cancelled", ["p"]] in worker.get("/seen").json())


def test_one_item_leaves_and_the_others_of_its_pass_get_their_results(shared: Worker):
    body = {"steps": 2, "gated": True, "text": "stays"}
    with ThreadPoolExecutor() as pool:
        leaver = shared.stream("/run", body, **NDJSON, x_request_id="pair-a", x_roundhouse_run="pair;n=2")
        stays = pool.submit(shared.lines, "/run", body, x_request_id="pair-b", x_roundhouse_run="pair;n=2")
        with leaver as answer:
            shared.post("/permit")
            next(answer.iter_lines())
        until(lambda: shared.metric("roundhouse_worker_in_flight") == 1)
        shared.post("/permit")
        assert stays.result()[-1]["json"]["text"] == "stays"
    assert [sorted(ids) for ids in passes(shared, "pair")] == [["pair-a", "pair-b"]]


def test_a_request_cancelled_while_it_waits_never_reaches_the_model(shared: Worker):
    with ThreadPoolExecutor() as pool:
        first = pool.submit(shared.post, "/run", {"gated": True}, x_request_id="ahead")
        until(lambda: passes(shared, "ahead"))
        with shared.stream("/run", {}, **NDJSON, x_request_id="behind"):
            assert shared.metric("roundhouse_worker_in_flight") == 2
        until(lambda: shared.metric("roundhouse_worker_in_flight") == 1)
        shared.post("/permit")
        assert first.result().status_code == 200
    assert shared.post("/run").status_code == 200  # the queue is empty again
    assert passes(shared, "behind") == []


# ---- sleeping ----------------------------------------------------------------


def test_sleep_waits_for_the_pass_refuses_new_requests_and_wakes_again():
    with Worker(PROBE) as worker, ThreadPoolExecutor() as pool:
        worker.ready()
        assert worker.get("/is_sleeping").json() == {"is_sleeping": False}
        running = pool.submit(worker.post, "/run", {"gated": True}, x_request_id="last")
        until(lambda: passes(worker, "last"))
        sleeping = pool.submit(worker.post, "/sleep?level=1")
        until(lambda: worker.get("/health").json()["phase"] == "parking")
        refused = worker.post("/run")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "asleep")
        assert ["park", 1] not in worker.get("/seen").json()

        worker.post("/permit")
        assert running.result().status_code == 200
        assert sleeping.result().json() == {"is_sleeping": True}
        assert worker.get("/seen").json()[-1] == ["park", 1]
        health = worker.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "asleep")
        assert worker.get("/is_sleeping").json() == {"is_sleeping": True}
        assert worker.post("/sleep").status_code == 200

        assert worker.post("/wake_up").json() == {"is_sleeping": False}
        assert worker.post("/wake_up").status_code == 200
        assert worker.get("/health").status_code == 200
        assert worker.post("/run").status_code == 200
        verbs = [entry[0] for entry in worker.get("/seen").json() if entry[0] in ("park", "wake")]
        assert verbs == ["park", "wake"]


def test_sleep_does_not_wait_for_the_rest_of_a_run():
    with Worker(PROBE, "--batch-wait-ms", "60000") as worker, ThreadPoolExecutor() as pool:
        worker.ready()
        half = pool.submit(worker.post, "/run", {"text": "half"}, x_roundhouse_run="r;n=2")
        until(lambda: worker.metric("roundhouse_worker_in_flight") == 1)
        assert worker.post("/sleep").status_code == 200
        assert half.result().json()["text"] == "half"


def test_sleep_has_levels(shared: Worker):
    assert shared.post("/sleep?level=3").status_code == 400
    assert shared.get("/health").status_code == 200


def test_a_failed_park_ends_the_worker():
    with Worker(PROBE, "--park-error", "host memory is full") as worker:
        assert worker.ready().post("/sleep").status_code == 500
        assert worker.get("/health").json()["error"] == "RuntimeError: host memory is full"
        assert worker.wait_exit() == 1


def test_sigterm_while_asleep_ends_with_0():
    with Worker(PROBE) as worker:
        worker.ready().post("/sleep")
        worker.signal()
        assert worker.wait_exit() == 0
        assert "released" in worker.log()


# ---- ending ------------------------------------------------------------------


def test_sigterm_lets_the_running_pass_finish_and_refuses_the_rest():
    with Worker(PROBE) as worker, ThreadPoolExecutor() as pool:
        worker.ready()
        running = pool.submit(worker.post, "/run", {"gated": True}, x_request_id="runs")
        until(lambda: passes(worker, "runs"))
        waiting = pool.submit(worker.post, "/run", x_request_id="waits")
        until(lambda: worker.metric("roundhouse_worker_in_flight") == 2)
        worker.signal()
        refused = waiting.result()
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "stopping")
        refused = worker.post("/run")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "stopping")
        health = worker.get("/health")
        assert (health.status_code, health.json()["phase"]) == (503, "stopping")

        worker.post("/permit")
        assert running.result().status_code == 200
        assert worker.wait_exit() == 0
        assert "released" in worker.log()


def test_after_the_grace_the_pass_is_cancelled():
    with Worker(PROBE, "--grace", "0.1") as worker, ThreadPoolExecutor() as pool:
        worker.ready()
        running = pool.submit(worker.lines, "/run", {"steps": 1000, "gated": True}, x_request_id="late")
        until(lambda: passes(worker, "late"))
        worker.signal()
        worker.wait_log("grace is over")
        worker.post("/permit")
        assert running.result()[-1]["code"] == "cancelled"
        assert worker.wait_exit() == 0
        assert "released" in worker.log()


@pytest.mark.parametrize(("told", "grace"), [(None, 8), ("0.1", 0.1), ("58", 58)])
def test_the_grace_is_what_the_scheduler_tells(told, grace, monkeypatch):
    monkeypatch.delenv("ROUNDHOUSE_GRACE_S", raising=False)
    if told:
        monkeypatch.setenv("ROUNDHOUSE_GRACE_S", told)
    parse = flags.parser("a worker", name="n", model="m").parse_args
    assert parse([]).grace == grace
    assert parse(["--grace", "3"]).grace == 3


def test_a_scheduler_that_tells_nonsense_is_refused(monkeypatch):
    monkeypatch.setenv("ROUNDHOUSE_GRACE_S", "-1")
    with pytest.raises(flags.FlagError, match="--grace: must be at least 0, not -1"):
        flags.parser("a worker", name="n", model="m").parse_args([])


def test_a_second_signal_skips_the_grace():
    with Worker(PROBE, "--grace", "3600") as worker, ThreadPoolExecutor() as pool:
        worker.ready()
        running = pool.submit(worker.post, "/run", {"steps": 1000, "gated": True}, x_request_id="late")
        until(lambda: passes(worker, "late"))
        worker.signal()
        worker.wait_log("stopping")
        worker.signal(signal.SIGINT)
        worker.wait_log("grace is over")
        assert running.result().status_code == 499
        worker.post("/permit")
        assert worker.wait_exit() == 0


def test_a_pass_that_never_returns_is_ended_with_the_process():
    with Worker(PROBE, "--grace", "0.1") as worker, ThreadPoolExecutor() as pool:
        worker.ready()
        running = pool.submit(worker.post, "/run", {"gated": True}, x_request_id="stuck")
        until(lambda: passes(worker, "stuck"))
        worker.signal()
        assert running.result().status_code == 499
        assert worker.wait_exit() == 0
        assert "the model thread is busy" in worker.log()
