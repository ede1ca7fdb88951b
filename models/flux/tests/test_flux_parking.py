"""Loading, parking and running out of memory of the Flux worker, as far as a CPU can show them."""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import LOAD_PATIENCE_S, Worker, torch_worker
from PIL import Image

PATH = "/v1/images/generations"


def start(
    checkpoints: Path, *flags: str, parks: bool = True, model: str = "flux-schnell", **environment: str
) -> Worker:
    return torch_worker("flux", "--model", str(checkpoints / model), *flags, parks=parks, **environment)


def image(worker: Worker, **fields: Any) -> str:
    answer = worker.post(PATH, {"prompt": "a red fox", "size": "64x64", "seed": 7, "steps": 2} | fields)
    assert answer.status_code == 200, answer.text
    return answer.json()["data"][0]["b64_json"]


def pixels(encoded: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB")).astype(int)


@pytest.fixture(scope="module")
def worker(checkpoints: Path) -> Iterator[Worker]:
    with start(checkpoints, ROUNDHOUSE_PARK_BYTES="100000000") as worker:
        yield worker.ready(LOAD_PATIENCE_S)
        worker.signal()
        assert worker.wait_exit() == 0


@pytest.fixture(scope="module")
def expected(worker: Worker) -> str:
    """What the worker makes before anything is done with it."""
    return image(worker)


def test_what_many_threads_read_makes_the_image_that_the_library_makes(
    worker: Worker, expected: str, checkpoints: Path
) -> None:
    line = worker.wait_log("weights read")
    assert "read.parts=AutoencoderKL,CLIPTextModel,T5EncoderModel,FluxTransformer2DModel" in line
    assert "loaded by its library" not in worker.log()
    with start(checkpoints, "--loading", "library", parks=False) as other:
        other.ready(LOAD_PATIENCE_S)
        assert "weights read" not in other.log()
        # On a CPU diffusers leaves weights where they are in the file, at odd addresses, for which there are other
        # kernels; torch_checks.py shows that the images are the same to the bit once they are aligned.
        assert abs(pixels(image(other)) - pixels(expected)).max() <= 1


def test_health_tells_what_the_copy_takes_and_how_long_loading_took(worker: Worker, checkpoints: Path) -> None:
    health = worker.get("/health").json()
    weights = sum(path.stat().st_size for path in (checkpoints / "flux-schnell").glob("*/*.safetensors"))
    assert 0.8 * weights < health["host_bytes"] < 1.5 * weights
    assert health["can_park"] is True
    assert "park_note" not in health
    assert [phase["phase"] for phase in health["phases"]] == ["import", "read", "device", "warm_up"]
    assert all(isinstance(phase["ms"], int) for phase in health["phases"])


def test_a_parked_model_wakes_as_it_was(worker: Worker, expected: str) -> None:
    copy = worker.get("/health").json()["host_bytes"]
    for level in (1, 2, 1, 1):
        assert worker.post(f"/sleep?level={level}").status_code == 200
        health = worker.get("/health").json()
        assert (health["status"], health["can_park"]) == ("asleep", True)
        assert health["host_bytes"] == (copy if level == 1 else 0)
        assert worker.post("/wake_up").status_code == 200
        assert worker.get("/health").json()["host_bytes"] == copy
        assert image(worker) == expected
    # Each part of it waited for its own weights while the others were still on their way.
    assert worker.log().count("weights are back") == 3
    assert "the early step went wrong" not in worker.log()


def test_another_pipeline_wakes_as_it_was_too(checkpoints: Path) -> None:
    with start(checkpoints, model="flux-klein", ROUNDHOUSE_PARK_BYTES="100000000") as worker:
        worker.ready(LOAD_PATIENCE_S)
        before = image(worker)
        assert worker.post("/sleep").status_code == 200
        assert worker.post("/wake_up").status_code == 200
        assert "weights are back" in worker.log()
        assert "the early step went wrong" not in worker.log()
        assert image(worker) == before


def test_a_pass_that_runs_out_of_memory_says_so_to_all_and_leaves_the_worker_well(
    worker: Worker, expected: str
) -> None:
    def post(prompt: str) -> Any:
        body = {"prompt": prompt, "size": "64x64", "seed": 7, "steps": 2}
        return worker.post(PATH, body, x_roundhouse_run="oom;n=2")

    before = worker.log().count("reclaimed")
    for answer in worker.at_once([functools.partial(post, "a fox"), functools.partial(post, "oom")]):
        assert answer.status_code == 507
        assert answer.json()["error"]["code"] == "worker_oom"
        assert "2.00 GiB" in answer.json()["error"]["message"]
    assert worker.log().count("reclaimed") == before + 1
    assert image(worker) == expected


def test_without_room_for_a_copy_none_is_made_and_sleep_still_works(checkpoints: Path, expected: str) -> None:
    with start(checkpoints, ROUNDHOUSE_PARK_BYTES="1000") as worker:
        worker.ready(LOAD_PATIENCE_S)
        health = worker.get("/health").json()
        assert (health["host_bytes"], health["can_park"]) == (0, False)
        assert "left for parked models" in health["park_note"]
        assert "read.kept=False" in worker.wait_log("weights read")
        assert worker.post("/sleep?level=1").status_code == 200
        worker.wait_log("no copy of the weights: they are read again at the wake")
        assert worker.post("/wake_up").status_code == 200
        assert image(worker) == expected


def test_a_copy_that_was_spoilt_fails_the_wake(checkpoints: Path) -> None:
    with start(checkpoints, ROUNDHOUSE_PARK_BYTES="100000000", SPOIL="1") as worker:
        worker.ready(LOAD_PATIENCE_S)
        assert worker.post("/sleep").status_code == 200
        answer = worker.post("/wake_up")
        assert answer.status_code == 500
        assert "the weights are not the same" in answer.json()["error"]["message"]
        assert worker.wait_exit() == 1
