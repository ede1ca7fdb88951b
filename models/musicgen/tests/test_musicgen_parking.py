"""Loading, parking and running out of memory of the MusicGen worker, as far as a CPU can show them."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import LOAD_PATIENCE_S, NDJSON, Worker, torch_worker

PATH = "/v1/audio/generations"


def start(checkpoints: Path, *flags: str, parks: bool = True, **environment: str) -> Worker:
    return torch_worker(
        "musicgen", "--model", str(checkpoints / "musicgen"), "--dtype", "float16", *flags, parks=parks, **environment
    )


def sound(worker: Worker, **fields: Any) -> bytes:
    answer = worker.post(PATH, {"prompt": "slow piano", "duration": 0.5, "seed": 7} | fields)
    assert answer.status_code == 200, answer.text
    return answer.content


@pytest.fixture(scope="module")
def worker(checkpoints: Path) -> Iterator[Worker]:
    with start(checkpoints, ROUNDHOUSE_PARK_BYTES="100000000") as worker:
        yield worker.ready(LOAD_PATIENCE_S)
        worker.signal()
        assert worker.wait_exit() == 0


@pytest.fixture(scope="module")
def expected(checkpoints: Path) -> bytes:
    """The sound that the model makes when transformers loads it."""
    with start(checkpoints, "--loading", "library", parks=False) as worker:
        return sound(worker.ready(LOAD_PATIENCE_S))


def test_float32_files_read_as_float16_make_the_sound_that_the_library_makes(worker: Worker, expected: bytes) -> None:
    assert "read.parts=MusicgenForConditionalGeneration" in worker.wait_log("weights read")
    assert "the warm-up step failed" not in worker.log()
    assert sound(worker) == expected


def test_a_parked_model_wakes_as_it_was(worker: Worker, expected: bytes) -> None:
    health = worker.get("/health").json()
    assert health["can_park"] is True
    assert health["host_bytes"] > 0
    for level in (1, 2, 1, 1):
        assert worker.post(f"/sleep?level={level}").status_code == 200
        assert worker.post("/wake_up").status_code == 200
        assert sound(worker) == expected
    # Each part of it waited for its own weights while the others were still on their way.
    assert worker.log().count("weights are back") == 3
    assert "the early step went wrong" not in worker.log()
    assert "buffers.count=2 buffers.held=0" in worker.log()
    assert "buffers.held=1" not in worker.log()


def test_a_pass_that_runs_out_of_memory_says_so_to_all_and_leaves_the_worker_well(
    worker: Worker, expected: bytes
) -> None:
    def post(prompt: str) -> Any:
        return worker.post(PATH, {"prompt": prompt, "duration": 0.5}, x_roundhouse_run="oom;n=2")

    for answer in worker.at_once([functools.partial(post, "a drum"), functools.partial(post, "oom")]):
        assert answer.status_code == 507
        assert answer.json()["error"]["code"] == "worker_oom"
    worker.wait_log("reclaimed")
    assert sound(worker) == expected


def test_one_that_leaves_does_not_end_the_pass_of_the_others(worker: Worker) -> None:
    body = {"prompt": "slow piano", "duration": 4}

    def leave() -> None:
        with worker.stream(PATH, body, x_roundhouse_run="pair;n=2", **NDJSON) as answer:
            assert json.loads(next(answer.iter_lines()))["step"] == 1

    stay = functools.partial(worker.post, PATH, body, x_roundhouse_run="pair;n=2")
    _, answer = worker.at_once([leave, stay])
    assert answer is not None
    assert answer.status_code == 200
    assert len(answer.content) > 4 * 32_000


def test_a_copy_that_was_spoilt_fails_the_wake(checkpoints: Path) -> None:
    with start(checkpoints, ROUNDHOUSE_PARK_BYTES="100000000", SPOIL="1") as worker:
        worker.ready(LOAD_PATIENCE_S)
        assert worker.post("/sleep").status_code == 200
        answer = worker.post("/wake_up")
        assert answer.status_code == 500
        assert "the weights are not the same" in answer.json()["error"]["message"]
        assert worker.wait_exit() == 1
