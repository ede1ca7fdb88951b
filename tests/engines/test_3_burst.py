"""A mixed burst, interleaved as clients send it: run model by model."""

from __future__ import annotations

import base64
import io

import soundfile
from PIL import Image

from roundhouse_server import Json, RoundhouseServer

ROUNDS = 5
SWAPS_MAX = 3
PATIENCE_S = 240.0


def requests() -> list[Json]:
    """Music, image, text, music, image, text and so on."""
    question = [{"role": "user", "content": "What is 2+2?"}]
    found: list[Json] = []
    for number in range(ROUNDS):
        music = {"model": "music", "prompt": f"song {number}", "duration": 1}
        image = {"model": "schnell", "prompt": f"picture {number}", "size": "64x64"}
        text = {"model": "text", "messages": question, "temperature": 0, "max_tokens": 24}
        found += [
            {"custom_id": f"music-{number}", "endpoint": "/v1/audio/generations", "body": music},
            {"custom_id": f"image-{number}", "endpoint": "/v1/images/generations", "body": image},
            {"custom_id": f"text-{number}", "endpoint": "/v1/chat/completions", "body": text},
        ]
    return found


def test_a_mixed_burst_is_grouped_by_model(server: RoundhouseServer) -> None:
    before = server.queue()
    answer = server.post("/jobs/bulk", {"requests": requests()})
    assert answer.status_code == 202, answer.text
    accepted = {job["custom_id"]: job["id"] for job in answer.json()["jobs"]}
    assert len(accepted) == 3 * ROUNDS
    done = {custom_id: server.succeeded(job_id, PATIENCE_S) for custom_id, job_id in accepted.items()}
    after = server.queue()

    assert {job["attempt"] for job in done.values()} == {1}
    assert after["swaps"] - before["swaps"] <= SWAPS_MAX
    assert after["swaps_in_arrival_order"] - before["swaps_in_arrival_order"] >= 3 * ROUNDS - 1
    new = [decision for decision in after["history"] if decision not in before["history"]]
    assert new
    assert all(decision["reason"] for decision in new)

    started = sorted(done.values(), key=lambda job: job["started_at"])
    order = [job["model"] for job in started]
    assert sum(one != other for one, other in zip(order, order[1:], strict=False)) == 2, order
    for custom_id, job in done.items():
        stored = server.response(job["id"])
        if custom_id.startswith("text"):
            assert "4" in stored.json()["choices"][0]["message"]["content"]
        elif custom_id.startswith("image"):
            picture = base64.b64decode(stored.json()["data"][0]["b64_json"])
            assert Image.open(io.BytesIO(picture)).size == (64, 64)
        else:
            assert soundfile.info(io.BytesIO(stored.content)).duration == 1.0
