"""A thousand calls at once, for two models of which only one can be loaded."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI

from roundhouse_server import RoundhouseServer, echo

CALLS = 1000
PAGE = 100
SWAPS_MAX = 3
PATIENCE_S = 120.0


async def ask_all(url: str) -> list[str | None]:
    """Call *i* asks alpha or beta by turns; the answers in order."""
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", timeout=PATIENCE_S) as client:

        async def ask(number: int) -> str | None:
            answer = await client.chat.completions.create(
                model=("alpha", "beta")[number % 2],
                messages=[{"role": "user", "content": f"question {number}"}],
            )
            assert answer.model == ("alpha", "beta")[number % 2]
            return answer.choices[0].message.content

        return await asyncio.gather(*(ask(number) for number in range(CALLS)))


def all_jobs(server: RoundhouseServer) -> list[dict[str, Any]]:
    """Every job, page by page."""
    jobs: list[dict[str, Any]] = []
    while True:
        after = {"after": jobs[-1]["id"]} if jobs else {}
        answer = server.get("/jobs", params={"limit": PAGE} | after)
        assert answer.status_code == 200, answer.text
        page = answer.json()
        jobs.extend(page["data"])
        if not page["has_more"]:
            return jobs


def test_a_thousand_calls_get_their_own_answers_with_few_swaps(folder: Path) -> None:
    with RoundhouseServer(folder / "many", {"alpha": echo(), "beta": echo()}) as server:
        answers = asyncio.run(ask_all(server.url))
        assert answers == [f"echo: question {number}" for number in range(CALLS)]
        jobs = all_jobs(server)
        queue = server.queue()
    assert len({job["id"] for job in jobs}) == CALLS, "as many jobs as calls: none was refused and sent again"
    assert {(job["state"], job["attempt"]) for job in jobs} == {("succeeded", 1)}
    assert queue["swaps"] <= SWAPS_MAX
    assert queue["swaps_in_arrival_order"] > CALLS / 4
    assert (queue["queued"], queue["running"]) == (0, 0)
