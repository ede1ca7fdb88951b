"""The Flux worker as its clients meet it: real diffusers pipelines, with small random weights."""

from __future__ import annotations

import base64
import functools
import io
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import NDJSON, Worker
from PIL import Image

ROOT = Path(__file__).parents[3]
SERVER = ROOT / "models/flux/server.py"
PYTHON = ROOT / "models/flux/.venv/bin/python"
PATH = "/v1/images/generations"
LOAD_PATIENCE_S = 150.0
PATIENT = ("--batch-wait-ms", "10000")
"""A run waits for its missing requests, however busy the machine is."""
BATCH_TOLERANCE = 2
"""An image in a batch may differ from the same seed alone by this much of 255."""


@pytest.fixture(scope="module", params=["schnell", "klein"])
def worker(request: pytest.FixtureRequest, checkpoints: Path) -> Iterator[Worker]:
    model = checkpoints / f"flux-{request.param}"
    environment = {"OMP_NUM_THREADS": "1"}
    with Worker(SERVER, "--model", str(model), *PATIENT, python=PYTHON, environment=environment) as worker:
        yield worker.ready(LOAD_PATIENCE_S)
        worker.signal()
        assert worker.wait_exit() == 0


def body(**fields: Any) -> dict[str, Any]:
    return {"prompt": "a red fox in the snow", "size": "64x64", "seed": 7} | fields


def pixels(encoded: str) -> np.ndarray:
    """(height, width, 3), as numbers that can be subtracted."""
    image = Image.open(io.BytesIO(base64.b64decode(encoded)))
    assert image.format == "PNG"
    return np.asarray(image.convert("RGB")).astype(int)


def make(worker: Worker, **fields: Any) -> list[np.ndarray]:
    answer = worker.post(PATH, body(**fields))
    assert answer.status_code == 200, answer.text
    return [pixels(entry["b64_json"]) for entry in answer.json()["data"]]


def difference(one: np.ndarray, other: np.ndarray) -> int:
    return int(abs(one - other).max())


def test_an_image_has_its_size_and_says_how_it_was_made(worker: Worker) -> None:
    answer = worker.post(PATH, body(size="128x64", num_inference_steps=3)).json()
    (entry,) = answer["data"]
    assert answer["size"] == "128x64"
    assert entry["seed"] == answer["roundhouse"]["seed"] == 7
    assert answer["roundhouse"]["steps"] == 3
    assert answer["roundhouse"]["weights"] == "random"
    image = Image.open(io.BytesIO(base64.b64decode(entry["b64_json"])))
    assert image.size == (128, 64)
    note = json.loads(image.info["parameters"])
    assert (note["prompt"], note["seed"], note["steps"], note["size"]) == ("a red fox in the snow", 7, 3, "128x64")
    assert pixels(entry["b64_json"]).std() > 1, "a flat image"


def test_the_prompt_and_the_seed_decide_the_image(worker: Worker) -> None:
    (first,) = make(worker)
    (again,) = make(worker)
    (other_seed,) = make(worker, seed=8)
    (other_prompt,) = make(worker, prompt="0123456789, 0123456789!")
    assert difference(first, again) == 0
    assert difference(first, other_seed) > 20
    assert difference(first, other_prompt) > 0


def test_without_a_seed_one_is_chosen_and_told(worker: Worker) -> None:
    chosen = [worker.post(PATH, body(seed=None)).json() for _ in range(2)]
    assert chosen[0]["roundhouse"]["seed"] != chosen[1]["roundhouse"]["seed"]
    (again,) = make(worker, seed=chosen[0]["roundhouse"]["seed"])
    assert difference(again, pixels(chosen[0]["data"][0]["b64_json"])) == 0


def test_n_images_have_the_seeds_that_follow(worker: Worker) -> None:
    answer = worker.post(PATH, body(n=3)).json()
    assert [entry["seed"] for entry in answer["data"]] == [7, 8, 9]
    (alone,) = make(worker, seed=9)
    assert difference(alone, pixels(answer["data"][2]["b64_json"])) <= BATCH_TOLERANCE


def test_a_run_of_four_is_one_pass(worker: Worker) -> None:
    prompts = ["a fox", "a red boat on a lake", "0123456789", "snow, snow, snow!"]
    bodies = [body(prompt=prompt, seed=100 + i) for i, prompt in enumerate(prompts)]
    answers = worker.at_once([functools.partial(worker.post, PATH, one, x_roundhouse_run="four;n=4") for one in bodies])
    assert "pass.size=4" in worker.wait_log("pass.size=4")
    for one, answer in zip(bodies, answers, strict=True):
        (alone,) = make(worker, **one)
        assert difference(alone, pixels(answer.json()["data"][0]["b64_json"])) <= BATCH_TOLERANCE


def test_a_run_of_different_sizes_gives_each_its_size(worker: Worker) -> None:
    sizes = ["64x64", "96x64", "64x96"]
    answers = worker.at_once(
        [functools.partial(worker.post, PATH, body(size=size), x_roundhouse_run="mixed;n=3") for size in sizes]
    )
    for size, answer in zip(sizes, answers, strict=True):
        height, width, _ = pixels(answer.json()["data"][0]["b64_json"]).shape
        assert f"{width}x{height}" == size


def test_progress_counts_every_step_up_to_the_result(worker: Worker) -> None:
    *progress, last = worker.lines(PATH, body(steps=12))
    assert {line["type"] for line in progress} == {"progress"}
    assert progress[0]["step"] == 1
    assert progress[-1] == {"type": "progress", "step": 12, "total": 12}
    assert [line["step"] for line in progress] == sorted(line["step"] for line in progress)
    assert last["type"] == "result"
    assert len(last["json"]["data"]) == 1


def test_closing_the_connection_ends_a_long_job_and_the_next_works(worker: Worker) -> None:
    with worker.stream(PATH, body(steps=500, size="512x512"), x_request_id="left", **NDJSON) as answer:
        assert json.loads(next(answer.iter_lines()))["step"] == 1
    line = worker.wait_log("request.ids=left")
    assert "pass.outcome=cancelled" in line
    assert len(make(worker)) == 1


def test_one_that_leaves_does_not_end_the_pass_of_the_others(worker: Worker) -> None:
    def leave() -> None:
        with worker.stream(PATH, body(steps=60), x_roundhouse_run="pair;n=2", **NDJSON) as answer:
            next(answer.iter_lines())

    stay = functools.partial(worker.post, PATH, body(steps=60, seed=9), x_roundhouse_run="pair;n=2")
    _, answer = worker.at_once([leave, stay])
    assert answer is not None
    assert answer.status_code == 200
    (alone,) = make(worker, steps=60, seed=9)
    assert difference(alone, pixels(answer.json()["data"][0]["b64_json"])) <= BATCH_TOLERANCE


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("size", "70x65"),
        ("size", "48x64"),
        ("size", "4096x64"),
        ("size", "64"),
        ("size", 64),
        ("n", 0),
        ("n", 11),
        ("n", True),
        ("seed", -1),
        ("num_inference_steps", 0),
        ("steps", 1001),
        ("guidance_scale", "much"),
        ("prompt", " "),
        ("prompt", ["a"]),
        ("output_format", "gif"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_by_name(worker: Worker, field: str, value: Any) -> None:
    answer = worker.post(PATH, body(**{field: value}))
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_request"
    assert answer.json()["error"]["param"] == field


@pytest.mark.parametrize("level", [1, 2])
def test_after_sleep_and_wake_the_images_are_the_same(worker: Worker, level: int) -> None:
    (before,) = make(worker)
    assert worker.post(f"/sleep?level={level}").status_code == 200
    assert worker.post(PATH, body()).status_code == 503
    assert worker.post("/wake_up").status_code == 200
    (after,) = make(worker)
    assert difference(before, after) == 0


def test_random_weights_are_said_to_be_random(worker: Worker) -> None:
    (model,) = worker.get("/v1/models").json()["data"]
    assert model["weights"] == "random"
    worker.wait_log("random weights: images are noise")


def test_prompts_are_never_logged(worker: Worker) -> None:
    make(worker, prompt="zebra-zeppelin")
    worker.post(PATH, body(prompt="zebra-zeppelin", size="1x1"))
    assert "zeppelin" not in worker.log()


PARKING = """
import torch
from roundhouse_worker.parking import Parker, weights_bytes
tied = torch.nn.Linear(6, 4, bias=False)
other = torch.nn.Linear(6, 4, bias=False)
other.weight = tied.weight
half = torch.nn.Linear(3, 5).to(torch.bfloat16)
turned = torch.nn.Module()
turned.register_buffer("view", torch.arange(12.0).reshape(3, 4).t()[1:])
modules = [tied, other, half, turned]
x, y = torch.ones(2, 6), torch.ones(2, 3, dtype=torch.bfloat16)
def answers():
    return [tied(x), other(x), half(y), turned.view.clone()]
before, parameters = answers(), [id(p) for m in modules for p in m.parameters()]
parker = Parker(modules, "cpu")
assert weights_bytes(modules) == 4 * 24 + 2 * 20 + 4 * 12
assert parker.size_bytes == 4 * 512, parker.size_bytes  # one buffer; each of the four storages starts aligned
for _ in range(3):
    parker.park()
    parker.wake()
    assert all(torch.equal(a, b) for a, b in zip(before, answers()))
assert parameters == [id(p) for m in modules for p in m.parameters()]
assert tied.weight.data_ptr() == other.weight.data_ptr()
assert turned.view.stride() == (1, 4)
print("same")
"""


def test_parked_weights_come_back_as_they_were() -> None:
    done = subprocess.run([PYTHON, "-c", PARKING], capture_output=True, text=True, timeout=LOAD_PATIENCE_S)
    assert done.stdout == "same\n", done.stderr
