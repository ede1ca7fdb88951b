"""Images through the server: real diffusers pipelines with small random weights, so the pictures are noise."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from roundhouse_server import RoundhouseServer
from worker_deaths import kill_worker_at

ENDPOINT = "/v1/images/generations"
LOAD_PATIENCE_S = 150.0
TOLERANCE = 2
"""An image made in a batch may differ from the same seed alone by this much of 255."""
LONG_STEPS = 500
SCHNELL_THEN_KLEIN = pytest.mark.parametrize("model", ["schnell", "klein"], scope="module")


def body(model: str, **fields: Any) -> dict[str, Any]:
    return {"model": model, "prompt": "a red fox in the snow", "size": "64x64", "seed": 7} | fields


def open_image(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    assert image.format == "PNG"
    return image


def pixels(data: bytes) -> np.ndarray:
    """(height, width, 3), as numbers that can be subtracted."""
    return np.asarray(open_image(data).convert("RGB")).astype(int)


def difference(one: bytes, other: bytes) -> int:
    return int(abs(pixels(one) - pixels(other)).max())


def make(server: RoundhouseServer, model: str, **fields: Any) -> tuple[dict[str, Any], str]:
    """The answer of a synchronous call, and its job's id."""
    answer = server.client.post(ENDPOINT, json=body(model, **fields), timeout=LOAD_PATIENCE_S)
    assert answer.status_code == 200, f"{answer.text}\n{server.log()}"
    return answer.json(), answer.headers["x-roundhouse-job-id"]


def picture(server: RoundhouseServer, model: str, **fields: Any) -> bytes:
    return base64.b64decode(make(server, model, **fields)[0]["data"][0]["b64_json"])


@SCHNELL_THEN_KLEIN
class TestImages:
    def test_a_call_gives_a_picture_that_says_how_it_was_made(self, server: RoundhouseServer, model: str) -> None:
        answer, job_id = make(server, model, size="128x64", num_inference_steps=3)
        (entry,) = answer["data"]
        image = open_image(base64.b64decode(entry["b64_json"]))
        assert image.size == (128, 64)
        assert np.asarray(image).std() > 1, "a flat picture"
        note = json.loads(image.info["parameters"])
        assert (note["prompt"], note["seed"], note["steps"], note["size"]) == ("a red fox in the snow", 7, 3, "128x64")
        job = server.job(job_id)
        assert (job["state"], job["kind"], job["model"]) == ("succeeded", "image", model)
        kept = job["result"]["body"]
        assert kept["data"][0]["seed"] == 7
        assert (kept["roundhouse"]["steps"], kept["size"]) == (3, "128x64")
        assert kept["roundhouse"]["weights"] == "random"

    def test_the_prompt_and_the_seed_decide_the_picture(self, server: RoundhouseServer, model: str) -> None:
        first = picture(server, model)
        assert difference(first, picture(server, model)) <= TOLERANCE
        assert difference(first, picture(server, model, seed=8)) > 20
        assert difference(first, picture(server, model, prompt="0123456789, 0123456789!")) > 0

    def test_a_seed_that_was_chosen_is_kept_with_the_job(self, server: RoundhouseServer, model: str) -> None:
        answer, job_id = make(server, model, seed=None)
        seed = answer["data"][0]["seed"]
        assert server.job(job_id)["result"]["body"]["data"][0]["seed"] == seed
        again = picture(server, model, seed=seed)
        assert difference(again, base64.b64decode(answer["data"][0]["b64_json"])) <= TOLERANCE

    def test_a_job_keeps_its_pictures_as_files(self, server: RoundhouseServer, model: str) -> None:
        job = server.submit(ENDPOINT, body(model, n=2))
        done = server.succeeded(job["id"], LOAD_PATIENCE_S)
        stored = [base64.b64decode(one["b64_json"]) for one in server.response(job["id"]).json()["data"]]
        assert len(stored) == len(done["artifacts"]) == 2
        for artifact, data in zip(done["artifacts"], stored, strict=True):
            kept = server.client.get(artifact["url"])
            assert kept.headers["content-type"] == artifact["mime"] == "image/png"
            assert kept.content == data
            assert hashlib.sha256(data).hexdigest() == artifact["sha256"]
        assert difference(stored[0], stored[1]) > 20

    def test_the_events_tell_the_steps_without_a_gap(self, server: RoundhouseServer, model: str) -> None:
        job = server.submit(ENDPOINT, body(model, steps=60))
        events = list(server.events(job["id"]))
        persisted = [event for event in events if event.seq is not None]
        assert [event.seq for event in persisted] == list(range(1, len(persisted) + 1))
        names = [event.name for event in persisted]
        assert names[0] == "job.queued"
        assert names[-1] == "job.succeeded"
        assert names.index("job.started") < names.index("job.progress")
        steps = [event.data["progress"]["step"] for event in events if event.name == "job.progress"]
        assert steps == sorted(steps)
        assert steps[-1] == 60
        middle = persisted[len(persisted) // 2].seq or 0
        assert [event for event in server.events(job["id"], after=middle) if event.seq] == persisted[middle:]

    def test_a_size_that_cannot_be_made_is_refused(self, server: RoundhouseServer, model: str) -> None:
        answer = server.client.post(ENDPOINT, json=body(model, size="70x64"), timeout=LOAD_PATIENCE_S)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "size"
        assert "16" in answer.json()["error"]["message"]

    def test_cancelling_stops_the_work_and_not_the_worker(self, server: RoundhouseServer, model: str) -> None:
        job = server.submit(ENDPOINT, body(model, steps=LONG_STEPS))
        first = server.first_event(job["id"], "job.progress")
        before = server.worker(model)
        assert server.cancel(job["id"])["state"] in ("cancelling", "cancelled")
        rest = list(server.events(job["id"], after=first.seq or 0))
        assert rest[-1].name == "job.cancelled"
        steps = [event.data["progress"]["step"] for event in rest if event.name == "job.progress"]
        assert all(step < LONG_STEPS for step in steps)
        assert server.finished(job["id"])["error"]["code"] == "cancelled_by_user"
        assert difference(picture(server, model), picture(server, model, seed=8)) > 20
        after = server.worker(model)
        assert (after["pid"], after["starts"]) == (before["pid"], before["starts"])

    def test_a_job_outlives_its_worker(self, server: RoundhouseServer, model: str) -> None:
        job = server.submit(ENDPOINT, body(model, steps=LONG_STEPS))
        done = kill_worker_at(server, job, "job.progress", LOAD_PATIENCE_S)
        (entry,) = server.response(done["id"]).json()["data"]
        assert open_image(base64.b64decode(entry["b64_json"])).size == (64, 64)
