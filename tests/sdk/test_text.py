"""Chat and completions by the official SDK, unmodified."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletionMessageParam

from roundhouse_server import RoundhouseServer


def ask(text: str) -> list[ChatCompletionMessageParam]:
    return [{"role": "system", "content": "Be an echo."}, {"role": "user", "content": text}]


def job_of(client: OpenAI, headers: Any) -> Any:
    """The job behind an answer, by the same client."""
    return client.get(f"/jobs/{headers['x-roundhouse-job-id']}", cast_to=object)


def uuid_of(some_id: str) -> str:
    """Ids of the same job on several faces differ in what stands before the uuid."""
    return some_id.rpartition("_")[2].rpartition("chatcmpl-")[2].rpartition("cmpl-")[2].replace("-", "")


def test_chat(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="alpha", messages=ask("hello there"))
    (choice,) = answer.choices
    assert choice.message.content == "echo: hello there"
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "stop"
    assert answer.object == "chat.completion"
    assert answer.model == "alpha"
    assert answer.id.startswith("chatcmpl-")
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2, 3)


def test_streamed_chat_gives_pieces_and_no_usage_unasked(client: OpenAI) -> None:
    with client.chat.completions.create(model="alpha", messages=ask("one two three"), stream=True) as stream:
        chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "echo: one two three"
    assert len([chunk for chunk in chunks if chunk.choices[0].delta.content]) == 4
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "stop"
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].id.startswith("chatcmpl-")
    assert {chunk.model for chunk in chunks} == {"alpha"}
    assert not any(chunk.usage for chunk in chunks)


def test_streamed_chat_ends_with_the_usage_if_asked(client: OpenAI) -> None:
    with client.chat.completions.create(
        model="alpha", messages=ask("one two"), stream=True, stream_options={"include_usage": True}
    ) as stream:
        chunks = list(stream)
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 3
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "echo: one two"


def test_the_stream_helper_puts_the_answer_together(client: OpenAI) -> None:
    with client.chat.completions.stream(model="alpha", messages=ask("a b c")) as stream:
        kinds = [event.type for event in stream]
        whole = stream.get_final_completion()
    assert kinds.count("content.done") == 1
    assert "content.delta" in kinds
    assert whole.choices[0].message.content == "echo: a b c"
    assert whole.choices[0].message.role == "assistant"
    assert whole.choices[0].finish_reason == "stop"


def test_a_streamed_answer_is_stored_whole(client: OpenAI) -> None:
    answer = client.chat.completions.with_raw_response.create(model="alpha", messages=ask("keep me"), stream=True)
    with answer.parse() as stream:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    job = job_of(client, answer.headers)
    assert job["state"] == "succeeded"
    stored: Any = client.get(f"/jobs/{job['id']}/response", cast_to=object)
    assert stored["object"] == "chat.completion"
    assert stored["choices"][0]["message"]["content"] == text == "echo: keep me"


def test_completions(client: OpenAI) -> None:
    answer = client.completions.create(model="alpha", prompt="once upon a time")
    assert answer.choices[0].text == "echo: once upon a time"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.object == "text_completion"


def test_streamed_completions(client: OpenAI) -> None:
    with client.completions.create(model="alpha", prompt="once upon a time", stream=True) as stream:
        chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == "echo: once upon a time"
    assert len(chunks) >= 5
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_max_tokens_cuts_and_says_so(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="alpha", messages=ask("a b c d e f"), max_completion_tokens=3)
    assert answer.choices[0].message.content == "echo: a b"
    assert answer.choices[0].finish_reason == "length"


def test_unknown_fields_reach_the_worker(client: OpenAI) -> None:
    wishes = {"echo": {"tokens": 7}}
    answer = client.chat.completions.create(model="alpha", messages=ask("x"), extra_body=wishes)
    assert answer.choices[0].message.content == "echo: x echo: x echo: x echo:"


def test_an_alias_is_answered_under_its_name(client: OpenAI) -> None:
    answer = client.chat.completions.with_raw_response.create(model="gpt-4o-mini", messages=ask("hi"))
    assert answer.parse().model == "gpt-4o-mini"
    assert job_of(client, answer.headers)["model"] == "alpha"


def test_headers_lead_to_the_job(client: OpenAI) -> None:
    answer = client.chat.completions.with_raw_response.create(model="alpha", messages=ask("hi"), metadata={"run": "7"})
    assert answer.request_id
    assert answer.headers["x-request-id"] == answer.request_id
    assert float(answer.headers["openai-processing-ms"]) >= 0
    job = job_of(client, answer.headers)
    assert uuid_of(job["id"]) == uuid_of(answer.parse().id)
    expected = {
        "object": "job",
        "kind": "chat",
        "endpoint": "/v1/chat/completions",
        "model": "alpha",
        "state": "succeeded",
        "attempt": 1,
        "priority": 7,
        "metadata": {"run": "7"},
    }
    assert {name: job[name] for name in expected} == expected
    assert job["usage"]["completion_tokens"] == 2


def test_the_id_of_an_answer_finds_its_job(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="alpha", messages=ask("hi"))
    job: Any = client.get(f"/jobs/{answer.id}", cast_to=object)
    assert uuid_of(job["id"]) == uuid_of(answer.id)


@pytest.mark.parametrize(("tier", "priority"), [("priority", 8), ("default", 7), ("flex", 3)])
def test_service_tiers_are_priorities(client: OpenAI, tier: Any, priority: int) -> None:
    answer = client.chat.completions.with_raw_response.create(model="alpha", messages=ask("hi"), service_tier=tier)
    assert answer.parse().service_tier == tier
    assert job_of(client, answer.headers)["priority"] == priority


def test_respond_async_gives_the_job_at_once(client: OpenAI) -> None:
    answer = client.chat.completions.with_raw_response.create(
        model="alpha",
        messages=ask("later"),
        extra_headers={"Prefer": "respond-async"},
        extra_body={"echo": {"delay_ms": 200}},
    )
    assert answer.status_code == 202
    job_id = answer.headers["x-roundhouse-job-id"]
    assert answer.headers["location"] == f"/v1/jobs/{job_id}"
    done: Any = client.get(f"/jobs/{job_id}", cast_to=object, options={"params": {"wait": 30}})
    assert done["state"] == "succeeded"
    stored: Any = client.get(f"/jobs/{job_id}/response", cast_to=object)
    assert stored["choices"][0]["message"]["content"] == "echo: later"


def test_native_calls_work_with_the_same_client(client: OpenAI) -> None:
    body = {"model": "alpha", "messages": ask("native")}
    job: Any = client.post("/jobs", cast_to=object, body={"endpoint": "/v1/chat/completions", "body": body})
    done: Any = client.get(f"/jobs/{job['id']}", cast_to=object, options={"params": {"wait": 30}})
    assert (done["state"], done["priority"]) == ("succeeded", 5)
    listed: Any = client.get("/jobs", cast_to=object, options={"params": {"model": "alpha", "limit": 1}})
    assert [one["id"] for one in listed["data"]] == [job["id"]]
    queue: Any = client.get("/queue", cast_to=object)
    assert queue["decision"]["reason"]
    cancelled: Any = client.post(f"/jobs/{job['id']}/cancel", cast_to=object)
    assert cancelled["state"] == "succeeded", "a terminal job stays as it is"


def test_models(client: OpenAI) -> None:
    models = {model.id: model for model in client.models.list()}
    assert {"alpha", "beta", "paint", "sing"} <= models.keys()
    assert models["alpha"].object == "model"
    assert models["alpha"].created > 0
    one = client.models.retrieve("paint")
    assert one.id == "paint"
    extra = (one.model_extra or {})["roundhouse"]
    assert extra["kind"] == "image"
    assert "/v1/images/generations" in extra["endpoints"]


def test_a_stream_that_is_closed_ends_its_job(client: OpenAI, server: RoundhouseServer) -> None:
    answer = client.chat.completions.with_raw_response.create(
        model="alpha",
        messages=ask("on and on"),
        stream=True,
        extra_body={"echo": {"tokens": 10_000, "tokens_per_s": 20}},
    )
    stream = answer.parse()
    next(iter(stream))
    stream.close()
    job = server.abandoned(answer.headers["x-roundhouse-job-id"])
    assert job["state"] == "cancelled"
    assert job["error"]["code"] == "client_disconnected"


def test_the_async_client(server: RoundhouseServer) -> None:
    async def both() -> tuple[str | None, str]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused") as client:
            whole = await client.chat.completions.create(model="alpha", messages=ask("a whole"))
            pieces = ""
            stream = await client.chat.completions.create(model="alpha", messages=ask("in pieces"), stream=True)
            async with stream:
                async for chunk in stream:
                    pieces += chunk.choices[0].delta.content or ""
            return whole.choices[0].message.content, pieces

    assert asyncio.run(both()) == ("echo: a whole", "echo: in pieces")
