"""Which exception of the official SDK each trouble becomes, and that it does not resubmit what we tried already."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam

from roundhouse_server import RoundhouseServer

HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hello"}]


def chat(client: OpenAI, **fields: Any) -> Any:
    return client.chat.completions.create(**({"model": "alpha", "messages": HELLO} | fields))


def gather(pieces: list[str], stream: Any) -> None:
    """Add what comes, as it comes: an exception leaves what came before."""
    for chunk in stream:
        pieces.append(chunk.choices[0].delta.content or "")


def jobs_marked(server: RoundhouseServer, marker: str) -> list[dict[str, Any]]:
    """The jobs that carry the marker: as many as the SDK made requests."""
    answer = server.get("/jobs", params={"metadata[marker]": marker})
    assert answer.status_code == 200, answer.text
    return answer.json()["data"]


@pytest.mark.parametrize("stream", [False, True])
def test_an_unknown_model(client: OpenAI, stream: bool) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        chat(client, model="gamma", stream=stream)
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"
    assert "gamma" in caught.value.message
    assert caught.value.request_id


def test_an_unknown_model_cannot_be_retrieved(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gamma")
    assert caught.value.code == "model_not_found"


def test_a_model_of_another_kind(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, model="paint")
    assert caught.value.param == "model"
    assert "paint" in caught.value.message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"model": ""}, "model"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"extra_body": {"echo": {"tokens": "many"}}}, "echo.tokens"),
        ({"extra_body": {"stream": "yes"}}, "stream"),
    ],
)
def test_bad_fields_are_named(client: OpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises((openai.BadRequestError, openai.NotFoundError)) as caught:
        chat(client, **fields)
    assert caught.value.param == param
    assert caught.value.code
    assert param.rpartition(".")[2] in caught.value.message


def test_an_image_without_a_prompt(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(model="paint", prompt=None)  # pyright: ignore[reportArgumentType]
    assert caught.value.param == "prompt"


def test_a_job_that_is_not_there(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.get("/jobs/job_019ac000-0000-7000-8000-000000000000", cast_to=object)
    assert caught.value.code == "not_found"


def test_a_wrong_key(impatient: RoundhouseServer) -> None:
    with OpenAI(base_url=f"{impatient.url}/v1", api_key="sk-wrong") as client:
        with pytest.raises(openai.AuthenticationError) as caught:
            chat(client, model="slow")
        assert caught.value.code == "invalid_api_key"
        with pytest.raises(openai.AuthenticationError):
            client.models.list()


def test_a_full_queue(keyed: OpenAI, impatient: RoundhouseServer) -> None:
    body = {"model": "slow", "messages": HELLO, "echo": {"delay_ms": 600_000, "steps": 600}}
    running = impatient.submit("/v1/chat/completions", body)
    impatient.first_event(running["id"], "job.started")
    queued = [impatient.submit("/v1/chat/completions", body) for _ in range(2)]
    try:
        with pytest.raises(openai.RateLimitError) as caught:
            chat(keyed.with_options(max_retries=0), model="slow")
        assert caught.value.code == "queue_full"
        assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60
        assert "2" in caught.value.message, "the limit is named"
    finally:
        for job in [*queued, running]:
            impatient.cancel(job["id"])
            assert impatient.finished(job["id"])["state"] == "cancelled"


def test_a_worker_that_fails_on_the_job(client: OpenAI, server: RoundhouseServer) -> None:
    with pytest.raises(openai.InternalServerError) as caught:
        chat(client, metadata={"marker": "fails"}, extra_body={"echo": {"fail": "the tubes are cold"}})
    assert caught.value.status_code == 500
    assert caught.value.code == "worker_error"
    assert "the tubes are cold" in caught.value.message
    assert caught.value.response.headers["x-should-retry"] == "false"
    (job,) = jobs_marked(server, "fails")
    assert (job["state"], job["error"]["code"]) == ("failed", "worker_error")


def test_a_device_that_is_too_small(client: OpenAI) -> None:
    with pytest.raises(openai.InternalServerError) as caught:
        chat(client, extra_body={"echo": {"oom": True}})
    assert caught.value.code == "worker_oom"


@pytest.mark.parametrize(
    ("status", "error"),
    [(400, openai.BadRequestError), (409, openai.ConflictError), (418, openai.APIStatusError)]
    + [(422, openai.UnprocessableEntityError)],
)
def test_what_the_engine_refuses_keeps_its_status(
    client: OpenAI, server: RoundhouseServer, status: int, error: type[openai.APIStatusError]
) -> None:
    with pytest.raises(error) as caught:
        chat(client, metadata={"marker": f"status-{status}"}, extra_body={"echo": {"status": status}})
    assert caught.value.status_code == status
    assert f"status {status} was asked for" in caught.value.message
    (job,) = jobs_marked(server, f"status-{status}")
    assert (job["state"], job["error"]["code"]) == ("failed", "upstream_rejected")


def test_a_worker_that_dies_of_the_job_every_time(client: OpenAI, server: RoundhouseServer) -> None:
    with pytest.raises(openai.InternalServerError) as caught:
        chat(client, metadata={"marker": "crashes"}, extra_body={"echo": {"crash": True}})
    assert caught.value.status_code == 502
    assert caught.value.code == "worker_lost"
    (job,) = jobs_marked(server, "crashes")
    assert job["attempt"] == 2, "tried once more, alone"
    assert chat(client).choices[0].message.content == "echo: hello", "the next job has a new worker"


def test_an_answer_without_an_end_is_no_answer(client: OpenAI) -> None:
    with pytest.raises(openai.InternalServerError) as caught:
        chat(client, extra_body={"echo": {"no_finish": True}})
    assert caught.value.code == "worker_error"
    assert "finish_reason" in caught.value.message


def test_a_stream_that_breaks_raises_after_its_pieces(client: OpenAI) -> None:
    pieces: list[str] = []
    with pytest.raises(openai.APIError) as caught:
        gather(pieces, chat(client, stream=True, extra_body={"echo": {"tokens": 9, "stream_error_after": 3}}))
    assert "".join(pieces) == "echo: hello echo:"
    assert caught.value.code == "worker_error"
    assert "the stream breaks" in caught.value.message


def test_a_stream_whose_worker_dies_raises(client: OpenAI) -> None:
    pieces: list[str] = []
    wishes = {"echo": {"tokens": 8, "tokens_per_s": 100, "crash": True}}
    with pytest.raises(openai.APIError) as caught:
        gather(pieces, chat(client, stream=True, extra_body=wishes))
    assert caught.value.code == "worker_lost"
    assert "".join(pieces).split()[:2] == ["echo:", "hello"], "the pieces before are kept"
