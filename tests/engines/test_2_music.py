"""Sound through the server: the real MusicGen with small random weights, so it is noise."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import soundfile

from roundhouse_server import RoundhouseServer
from worker_deaths import kill_worker_at

ENDPOINT = "/v1/audio/generations"
SPEECH = "/v1/audio/speech"
LOAD_PATIENCE_S = 150.0
LONGEST_S = 30


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "music", "prompt": "slow piano, rain", "duration": 1, "seed": 7} | fields


def make(server: RoundhouseServer, **fields: Any) -> np.ndarray:
    """(samples, channels) of a synchronous call."""
    answer = server.client.post(ENDPOINT, json=body(**fields), timeout=LOAD_PATIENCE_S)
    assert answer.status_code == 200, f"{answer.text}\n{server.log()}"
    return samples(answer.content)


def samples(data: bytes) -> np.ndarray:
    return soundfile.read(io.BytesIO(data), always_2d=True)[0]


@pytest.mark.parametrize(
    ("form", "content_type", "magic", "container", "rate", "slack_s"),
    [
        ("wav", "audio/wav", b"RIFF", "WAV", 32_000, 0.0),
        ("flac", "audio/flac", b"fLaC", "FLAC", 32_000, 0.0),
        ("mp3", "audio/mpeg", b"", "MP3", 32_000, 0.1),
        ("opus", "audio/ogg", b"OggS", "OGG", 48_000, 0.1),
    ],
)
def test_a_format_is_what_it_says_and_as_long_as_asked(
    server: RoundhouseServer, form: str, content_type: str, magic: bytes, container: str, rate: int, slack_s: float
) -> None:
    wanted = body(duration=1.5, response_format=form)
    answer = server.client.post(ENDPOINT, json=wanted, timeout=LOAD_PATIENCE_S)
    assert answer.status_code == 200, f"{answer.text}\n{server.log()}"
    assert answer.headers["content-type"] == content_type
    assert answer.content.startswith(magic)
    info = soundfile.info(io.BytesIO(answer.content))
    assert (info.format, info.samplerate, info.channels) == (container, rate, 1)
    assert abs(info.duration - 1.5) <= slack_s
    assert samples(answer.content).std() > 0.001, "silence"


def test_aac_is_refused(server: RoundhouseServer) -> None:
    for path, wanted in [(ENDPOINT, body()), (SPEECH, {"model": "music", "input": "rain", "voice": "alloy"})]:
        answer = server.client.post(path, json=wanted | {"response_format": "aac"}, timeout=LOAD_PATIENCE_S)
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert error["param"] == "response_format"
        assert "wav" in error["message"], "it names what there is"


def test_the_prompt_and_the_seed_decide_the_sound(server: RoundhouseServer) -> None:
    first = make(server)
    assert np.array_equal(first, make(server))
    assert not np.array_equal(first, make(server, seed=8))
    assert not np.array_equal(first, make(server, prompt="0123456789, 0123456789!"))


def test_the_speech_call_makes_music_as_mp3(server: RoundhouseServer) -> None:
    wanted = {"model": "music", "input": "a drum", "voice": "alloy", "duration": 1}
    answer = server.client.post(SPEECH, json=wanted, timeout=LOAD_PATIENCE_S)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "audio/mpeg"
    assert soundfile.info(io.BytesIO(answer.content)).format == "MP3"


def test_a_job_keeps_its_sound_as_a_file(server: RoundhouseServer) -> None:
    job = server.submit(ENDPOINT, body(duration=2))
    events = list(server.events(job["id"], patience_s=LOAD_PATIENCE_S))
    assert events[-1].name == "job.succeeded"
    steps = [event.data["progress"]["step"] for event in events if event.name == "job.progress"]
    assert steps
    assert steps == sorted(steps)
    (artifact,) = server.job(job["id"])["artifacts"]
    kept = server.client.get(artifact["url"])
    assert kept.headers["content-type"] == artifact["mime"] == "audio/wav"
    assert kept.content == server.response(job["id"]).content
    assert samples(kept.content).shape == (64_000, 1)


def test_cancelling_stops_the_work_and_not_the_worker(server: RoundhouseServer) -> None:
    job = server.submit(ENDPOINT, body(duration=LONGEST_S))
    first = server.first_event(job["id"], "job.progress", LOAD_PATIENCE_S)
    before = server.worker("music")
    server.cancel(job["id"])
    assert list(server.events(job["id"], after=first.seq or 0))[-1].name == "job.cancelled"
    assert make(server).shape == (32_000, 1)
    after = server.worker("music")
    assert (after["pid"], after["starts"]) == (before["pid"], before["starts"])


def test_a_job_outlives_its_worker(server: RoundhouseServer) -> None:
    job = server.submit(ENDPOINT, body(duration=LONGEST_S))
    done = kill_worker_at(server, job, "job.progress", LOAD_PATIENCE_S)
    assert samples(server.response(done["id"]).content).shape == (LONGEST_S * 32_000, 1)
