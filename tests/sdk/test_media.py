"""Images and sound by the official SDK, unmodified."""

from __future__ import annotations

import base64
import io
import wave
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from openai.types import Image, ImagesResponse
from PIL import Image as Pillow

from roundhouse_server import RoundhouseServer


def images_of(answer: ImagesResponse) -> list[Image]:
    assert answer.data is not None
    return answer.data


def bytes_of(image: Image) -> bytes:
    assert image.b64_json is not None
    return base64.b64decode(image.b64_json)


def test_an_image_comes_as_base64_unless_asked_otherwise(client: OpenAI) -> None:
    answer = client.images.generate(model="paint", prompt="a red fox", size="256x256")
    (image,) = images_of(answer)
    assert image.url is None
    picture = Pillow.open(io.BytesIO(bytes_of(image)))
    assert (picture.format, picture.size) == ("PNG", (256, 256))
    assert answer.created > 0


def test_several_images_differ(client: OpenAI) -> None:
    first, second = images_of(client.images.generate(model="paint", prompt="a red fox", n=2))
    (other,) = images_of(client.images.generate(model="paint", prompt="a blue fox"))
    assert len({bytes_of(first), bytes_of(second), bytes_of(other)}) == 3


def url_of(image: Image, server: RoundhouseServer) -> httpx.URL:
    """Relative to the server, as long as it has not been told its public address."""
    assert image.url is not None
    return httpx.URL(server.url).join(image.url)


def test_an_image_url_needs_no_key_and_gives_the_same_bytes(keyed: OpenAI, impatient: RoundhouseServer) -> None:
    (image,) = images_of(keyed.images.generate(model="draw", prompt="a fox", response_format="url"))
    (same,) = images_of(keyed.images.generate(model="draw", prompt="a fox", response_format="b64_json"))
    assert image.b64_json is None
    url = url_of(image, impatient)
    fetched = httpx.get(url)
    assert fetched.status_code == 200
    assert fetched.headers["content-type"] == "image/png"
    assert fetched.content == bytes_of(same)
    forged = url.copy_set_param("sig", "0" * len(url.params["sig"]))
    assert httpx.get(forged).status_code in (401, 403)
    assert httpx.get(url.copy_remove_param("sig")).status_code == 401


def test_speech(client: OpenAI, folder: Path) -> None:
    with client.audio.speech.with_streaming_response.create(
        model="sing", voice="alloy", input="la la la", response_format="wav"
    ) as answer:
        assert answer.headers["content-type"] == "audio/wav"
        answer.stream_to_file(folder / "streamed.wav")
    whole = client.audio.speech.create(model="sing", voice="alloy", input="la la la", response_format="wav")
    assert whole.content == (folder / "streamed.wav").read_bytes()
    with wave.open(io.BytesIO(whole.content)) as sound:
        assert sound.getnframes() / sound.getframerate() == pytest.approx(0.5)
    other = client.audio.speech.create(model="sing", voice="alloy", input="lo lo lo", response_format="wav")
    assert other.content != whole.content


def test_a_sound_is_an_artifact_of_its_job(client: OpenAI, server: RoundhouseServer) -> None:
    answer = client.audio.speech.with_raw_response.create(
        model="sing", voice="alloy", input="la", response_format="wav"
    )
    job = server.job(answer.headers["x-roundhouse-job-id"])
    assert (job["kind"], job["state"]) == ("audio", "succeeded")
    (artifact,) = job["artifacts"]
    assert artifact["mime"] == "audio/wav"
    assert artifact["bytes"] == len(answer.content)
    kept = server.get(f"/jobs/{job['id']}/artifacts/{artifact['id']}", headers={"range": "bytes=0-3"})
    assert (kept.status_code, kept.content) == (206, b"RIFF")


@pytest.mark.parametrize("form", ["aac", "mp3"])
def test_a_format_that_is_not_made_is_a_bad_request(client: OpenAI, form: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.audio.speech.create(model="sing", voice="alloy", input="la", response_format=form)
    assert caught.value.param == "response_format"
    assert "wav" in caught.value.message, "it names what there is"
