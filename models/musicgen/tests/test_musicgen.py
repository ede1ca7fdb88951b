"""The MusicGen worker as its clients meet it: the real model class, with small random weights."""

from __future__ import annotations

import base64
import functools
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from harness import NDJSON, Worker

ROOT = Path(__file__).parents[3]
SERVER = ROOT / "models/musicgen/server.py"
PYTHON = ROOT / "models/musicgen/.venv/bin/python"
SPEECH = "/v1/audio/speech"
PATH = "/v1/audio/generations"
LOAD_PATIENCE_S = 150.0
PATIENT = ("--batch-wait-ms", "10000")
"""A run waits for its missing requests, however busy the machine is."""


@pytest.fixture(scope="module")
def worker(checkpoints: Path) -> Iterator[Worker]:
    environment = {"OMP_NUM_THREADS": "1"}
    model = str(checkpoints / "musicgen")
    with Worker(SERVER, "--model", model, *PATIENT, python=PYTHON, environment=environment) as worker:
        yield worker.ready(LOAD_PATIENCE_S)
        worker.signal()
        assert worker.wait_exit() == 0


def body(**fields: Any) -> dict[str, Any]:
    return {"prompt": "slow piano, rain", "duration": 1, "seed": 7} | fields


def decode(data: bytes) -> tuple[np.ndarray, int]:
    """(samples, channels) and samples a second."""
    return soundfile.read(io.BytesIO(data), always_2d=True)


def make(worker: Worker, **fields: Any) -> np.ndarray:
    answer = worker.post(PATH, body(**fields))
    assert answer.status_code == 200, answer.text
    return decode(answer.content)[0]


@pytest.mark.parametrize(
    ("name", "content_type", "container", "rate", "slack_s"),
    [
        ("wav", "audio/wav", "WAV", 32_000, 0.0),
        ("flac", "audio/flac", "FLAC", 32_000, 0.0),
        ("mp3", "audio/mpeg", "MP3", 32_000, 0.1),
        ("opus", "audio/ogg", "OGG", 48_000, 0.1),
    ],
)
def test_a_format_is_what_it_says_and_as_long_as_asked(
    worker: Worker, name: str, content_type: str, container: str, rate: int, slack_s: float
) -> None:
    answer = worker.post(PATH, body(duration=2.5, response_format=name))
    assert answer.headers["content-type"] == content_type
    info = soundfile.info(io.BytesIO(answer.content))
    assert (info.format, info.samplerate, info.channels) == (container, rate, 1)
    assert abs(info.duration - 2.5) <= slack_s
    wave, _ = decode(answer.content)
    assert wave.std() > 0.001, "silence"


def test_the_formats_hold_the_same_sound(worker: Worker) -> None:
    wav = make(worker, response_format="wav")
    assert np.array_equal(make(worker, response_format="flac"), wav)
    mp3 = make(worker, response_format="mp3")
    assert abs(mp3.std() / wav.std() - 1) < 0.5
    pcm = np.frombuffer(worker.post(PATH, body(response_format="pcm")).content, dtype="<i2")
    assert pcm.size == 24_000
    assert abs(pcm.std() / 32767 / wav.std() - 1) < 0.5


def test_speech_is_mp3_unless_it_says_otherwise_and_generations_wav(worker: Worker) -> None:
    spoken = worker.post(SPEECH, {"input": "rain", "voice": "alloy", "model": "musicgen", "duration": 1})
    assert spoken.headers["content-type"] == "audio/mpeg"
    assert soundfile.info(io.BytesIO(spoken.content)).format == "MP3"
    assert worker.post(PATH, body()).headers["content-type"] == "audio/wav"


def test_the_prompt_and_the_seed_decide_the_sound(worker: Worker) -> None:
    first = make(worker)
    assert np.array_equal(first, make(worker))
    assert not np.array_equal(first, make(worker, seed=8))
    assert not np.array_equal(first, make(worker, prompt="0123456789, 0123456789!"))
    assert not np.array_equal(make(worker, seed=None), make(worker, seed=None))


def test_a_drawn_seed_is_told_and_gives_the_sound_again(worker: Worker) -> None:
    drawn = worker.post(PATH, body(response_format="flac", seed=None))
    with soundfile.SoundFile(io.BytesIO(drawn.content)) as file:
        seed = json.loads(file.comment)["seed"]
        sound = file.read(dtype="int16", always_2d=True)
    again = worker.post(PATH, body(response_format="flac", seed=seed))
    with soundfile.SoundFile(io.BytesIO(again.content)) as file:
        assert np.array_equal(sound, file.read(dtype="int16", always_2d=True))


def test_the_file_says_that_the_weights_are_random(worker: Worker) -> None:
    answer = worker.post(PATH, body(response_format="flac"))
    with soundfile.SoundFile(io.BytesIO(answer.content)) as file:
        note = json.loads(file.comment)
    assert (note["weights"], note["seed"]) == ("random", 7)
    (model,) = worker.get("/v1/models").json()["data"]
    assert model["weights"] == "random"
    worker.wait_log("random weights: sound is noise")


def test_a_run_of_four_is_one_pass(worker: Worker) -> None:
    calls = [
        functools.partial(worker.post, PATH, body(prompt=prompt, seed=None), x_roundhouse_run="four;n=4")
        for prompt in ("rain", "a drum", "0123456789", "strings, slow")
    ]
    sounds = [decode(answer.content)[0] for answer in worker.at_once(calls)]
    worker.wait_log("pass.size=4")
    assert all(sound.shape == (32_000, 1) for sound in sounds)
    assert not any(np.array_equal(sounds[0], other) for other in sounds[1:])


def test_a_seed_holds_in_a_run_too(worker: Worker) -> None:
    calls = [functools.partial(worker.post, PATH, body(), x_roundhouse_run="seeds;n=3") for _ in range(3)]
    sounds = [decode(answer.content)[0] for answer in worker.at_once(calls)]
    alone = make(worker)
    assert all(np.array_equal(alone, sound) for sound in sounds)


def test_progress_counts_every_token_up_to_the_result(worker: Worker) -> None:
    *progress, last = worker.lines(PATH, body(duration=4))
    assert progress[0]["step"] == 1
    assert progress[-1] == {"type": "progress", "step": 203, "total": 203}
    assert last["type"] == "result"
    assert last["content_type"] == "audio/wav"
    assert decode(base64.b64decode(last["body_b64"]))[0].shape == (4 * 32_000, 1)


def test_closing_the_connection_ends_a_long_job_and_the_next_works(worker: Worker) -> None:
    with worker.stream(PATH, body(duration=30), x_request_id="left", **NDJSON) as answer:
        assert json.loads(next(answer.iter_lines()))["step"] == 1
    assert "pass.outcome=cancelled" in worker.wait_log("request.ids=left")
    assert make(worker).shape == (32_000, 1)


def test_thirty_seconds_are_made_whole(worker: Worker) -> None:
    assert make(worker, duration=30).shape == (30 * 32_000, 1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("duration", 31),
        ("duration", 0),
        ("duration", "long"),
        ("response_format", "aac"),
        ("response_format", 3),
        ("seed", -1),
        ("top_k", 0),
        ("temperature", 0),
        ("guidance_scale", 0.5),
        ("prompt", ""),
        ("prompt", None),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_by_name(worker: Worker, field: str, value: Any) -> None:
    answer = worker.post(PATH, body(**{field: value}))
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_request"
    assert answer.json()["error"]["param"] == field


def test_a_wrong_format_is_told_the_right_ones(worker: Worker) -> None:
    message = worker.post(SPEECH, {"input": "rain", "response_format": "aac"}).json()["error"]["message"]
    assert all(name in message for name in ("wav", "flac", "mp3", "opus", "pcm"))


@pytest.mark.parametrize("level", [1, 2])
def test_after_sleep_and_wake_the_sound_is_the_same(worker: Worker, level: int) -> None:
    before = make(worker)
    assert worker.post(f"/sleep?level={level}").status_code == 200
    assert worker.post(PATH, body()).status_code == 503
    assert worker.post("/wake_up").status_code == 200
    assert np.array_equal(before, make(worker))


def test_prompts_are_never_logged(worker: Worker) -> None:
    make(worker, prompt="zebra-zeppelin")
    worker.post(PATH, body(prompt="zebra-zeppelin", duration=99))
    assert "zeppelin" not in worker.log()
