"""Calls that outlast a proxy's patience: answered by redirects that the official SDK follows by itself.

The server of these tests redirects after 0.3 s, where others do after 85.
"""

from __future__ import annotations

import io
import wave
from typing import Any

import openai
import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam

from roundhouse_server import RoundhouseServer, echo

HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hello"}]


def hops(answer: Any) -> list[int]:
    """The statuses of the redirects before an answer."""
    return [response.status_code for response in answer.http_response.history]


def give_the_device_to_tune(client: OpenAI) -> None:
    client.audio.speech.create(model="tune", voice="alloy", input="la", response_format="wav")


def test_a_call_that_waits_for_its_model(keyed: OpenAI) -> None:
    give_the_device_to_tune(keyed)
    answer = keyed.chat.completions.with_raw_response.create(model="slow", messages=HELLO)
    assert answer.parse().choices[0].message.content == "echo: hello"
    assert answer.status_code == 200
    assert len(hops(answer)) >= 3, "loading takes 1.5 s"
    assert set(hops(answer)) == {303}


def test_a_redirect_stays_on_the_same_host_and_is_not_cached(keyed: OpenAI) -> None:
    answer = keyed.chat.completions.with_raw_response.create(
        model="slow", messages=HELLO, extra_body={"echo": {"delay_ms": 500}}
    )
    assert answer.parse().choices[0].message.content == "echo: hello"
    job_id = answer.headers["x-roundhouse-job-id"]
    for number, redirect in enumerate(answer.http_response.history, start=1):
        assert redirect.headers["location"] == f"/v1/jobs/{job_id}/response?hop={number}"
        assert redirect.headers["cache-control"] == "no-store"
        assert redirect.headers["x-roundhouse-job-id"] == job_id
    assert hops(answer)


def test_sound_comes_through_redirects_too(keyed: OpenAI) -> None:
    answer = keyed.audio.speech.with_raw_response.create(
        model="tune", voice="alloy", input="la", response_format="wav", extra_body={"echo": {"delay_ms": 900}}
    )
    assert set(hops(answer)) == {303}
    with wave.open(io.BytesIO(answer.content)) as sound:
        assert sound.getnframes() > 0


def test_a_failure_comes_through_redirects_as_its_exception(keyed: OpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        keyed.chat.completions.create(
            model="slow", messages=HELLO, extra_body={"echo": {"delay_ms": 900, "fail": "late, and in vain"}}
        )
    assert caught.value.code == "worker_error"
    assert "late, and in vain" in caught.value.message


def test_a_stream_waits_without_redirects(keyed: OpenAI) -> None:
    give_the_device_to_tune(keyed)
    answer = keyed.chat.completions.with_raw_response.create(model="slow", messages=HELLO, stream=True)
    assert answer.status_code == 200
    assert not hops(answer)
    with answer.parse() as stream:
        chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "echo: hello"


def test_a_short_timeout_of_the_client_makes_the_hops_shorter(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The SDK's timeout is per hop, and it tells the server: hops of 85 s would never reach it."""
    with (
        RoundhouseServer(tmp_path_factory.mktemp("hasty"), {"alpha": echo()}) as server,
        OpenAI(base_url=f"{server.url}/v1", api_key="unused", timeout=2.0, max_retries=0) as client,
    ):
        answer = client.chat.completions.with_raw_response.create(
            model="alpha", messages=HELLO, extra_body={"echo": {"delay_ms": 3000}}
        )
        assert answer.parse().choices[0].message.content == "echo: hello"
        assert set(hops(answer)) == {303}


def test_after_the_last_hop_the_job_goes_on(tmp_path_factory: pytest.TempPathFactory) -> None:
    settings = {"sync_hop": "100ms", "sync_max_hops": 2}
    with (
        RoundhouseServer(tmp_path_factory.mktemp("curt"), {"alpha": echo()}, server=settings) as server,
        OpenAI(base_url=f"{server.url}/v1", api_key="unused") as client,
    ):
        client.models.list()
        with pytest.raises(openai.InternalServerError) as caught:
            client.chat.completions.create(model="alpha", messages=HELLO, extra_body={"echo": {"delay_ms": 2000}})
        assert caught.value.status_code == 504
        assert caught.value.code == "sync_wait_exceeded"
        assert caught.value.response.headers["x-should-retry"] == "false"
        assert isinstance(caught.value.body, dict)
        job_id = caught.value.body["job_id"]
        assert server.succeeded(job_id)["attempt"] == 1
        assert len(server.get("/jobs").json()["data"]) == 1, "it was not sent again"
        stored = server.response(job_id).json()
        assert stored["choices"][0]["message"]["content"] == "echo: hello"
