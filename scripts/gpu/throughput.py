"""Jobs a second through the server, against the same requests sent straight to the worker."""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

from gpu.common import Failed, Json, Records, epoch, until
from gpu.models import Model
from gpu.server import COLD_LIMIT_S, Server

BULK = 1000
LIVE = ("queued", "running")
REQUEST_LIMIT_S = 300
ROUNDS = {"text": 4, "music": 12}
"""How often direct requests and jobs through the server take turns. A pass of MusicGen is as fast as one core of the
host, whose speed changes from second to second on a shared machine: that takes many."""


class Line:
    """A kept-alive connection to a worker: just enough HTTP for answers with a length or in chunks."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._reader: Any = None
        self._writer: Any = None

    async def post(self, path: str, body: bytes, headers: str = "") -> bytes:
        """The answer's body.

        Raises:
            Failed: any status but 200.
        """
        if self._writer is None:
            self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self.port)
        head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n{headers}"
        self._writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        await self._writer.drain()
        lines = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower().split("\r\n")
        given = dict(line.split(": ", 1) for line in lines[1:] if ": " in line)
        if "content-length" in given:
            data = await self._reader.readexactly(int(given["content-length"]))
        else:
            data = b""
            while size := int((await self._reader.readuntil(b"\r\n")).split(b";")[0], 16):
                data += (await self._reader.readexactly(size + 2))[:-2]
            await self._reader.readexactly(2)
        if given.get("connection") == "close":
            self.close()
        if " 200" not in lines[0]:
            raise Failed(f"the worker answered {lines[0]}: {data[:300]!r}")
        return data

    def close(self) -> None:
        """Next time anew."""
        if self._writer is not None:
            self._writer.close()
        self._writer = None


async def drive(port: int, path: str, bodies: list[bytes], at_once: int, headers: str = "") -> float:
    """Sends all bodies with so many at once; how long it took, in seconds."""
    waiting = iter(bodies)

    async def client() -> None:
        line = Line(port)
        try:
            for body in waiting:
                await asyncio.wait_for(line.post(path, body, headers), REQUEST_LIMIT_S)
        finally:
            line.close()

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(at_once)))
    return time.perf_counter() - began


def through(server: Server, requests: list[Json], limit_s: float) -> list[float]:
    """Submits in bulk and waits for all; when each one ended, in seconds since the first submission, in order.

    Raises:
        Failed: one of them did not succeed.
    """
    began = time.time()
    batches = [
        server.ask("POST", "/v1/jobs/bulk", {"requests": requests[at : at + BULK]})["batch_id"]
        for at in range(0, len(requests), BULK)
    ]

    def is_over() -> bool:
        queue = server.ask("GET", "/v1/queue")
        if queue["queued"] or queue["running"]:
            return False
        # The queue may not have heard yet of what the store has.
        live = [f"/v1/jobs?batch_id={batch}&state={state}&limit=1" for batch in batches for state in LIVE]
        return not any(server.ask("GET", path)["data"] for path in live)

    until(f"the end of {len(requests)} jobs", limit_s, 0.1, is_over)
    ends = []
    for batch in batches:
        after = ""
        while True:
            page = server.ask("GET", f"/v1/jobs?batch_id={batch}&limit=100{after}")
            for job in page["data"]:
                if job["state"] != "succeeded":
                    raise Failed(f"job {job['id']} {job['state']}: {job['error']}")
                ends.append(epoch(job["finished_at"]) - began)
            if not page["has_more"]:
                break
            after = f"&after={page['last_id']}"
    if len(ends) != len(requests):
        raise Failed(f"{len(requests)} jobs were submitted and {len(ends)} are listed")
    return sorted(ends)


def by_turns(
    rounds: int, direct: Callable[[], float], jobs: Callable[[], float]
) -> tuple[list[float], list[float], list[float]]:
    """The same work sent directly and through the server, by turns: direct, jobs, direct, jobs, ..., direct.

    Args:
        direct, jobs: do it once; how long it took, in seconds.

    Returns:
        What each direct turn took; what each turn of jobs took; and for each of these the mean of its two neighbours
        divided by it: more than 1 if the server was faster.
    """
    straight, served = [direct()], []
    for _ in range(rounds):
        served.append(jobs())
        straight.append(direct())
    pairs = zip(straight, straight[1:], served, strict=False)
    return straight, served, [(before + after) / 2 / between for before, after, between in pairs]


def compared(count: int, straight: list[float], served: list[float], ratios: list[float]) -> Json:
    """Fields of a record: `count` jobs took so long each turn."""
    return {
        "rounds": len(served),
        "direct_per_s": round(count / statistics.median(straight), 3),
        "through_per_s": round(count / statistics.median(served), 3),
        "direct_s": [round(value, 2) for value in straight],
        "through_s": [round(value, 2) for value in served],
        "ratios": [round(value, 3) for value in ratios],
        "ratio": round(statistics.median(ratios), 3),
    }


def warm(server: Server, model: Model) -> int:
    """Its worker's port, once it is loaded."""
    server.finished(server.submit(model.request()), COLD_LIMIT_S)
    return server.worker(model.name)["port"]


def text(server: Server, model: Model, count: int, at_once: int, records: Records) -> None:
    """Short prompts, straight to the worker and through the server by turns."""
    port = warm(server, model)
    bodies = [prompt(model, f"Say the number {number}.") for number in range(count)]
    raw = [json.dumps(body).encode() for body in bodies]
    asyncio.run(drive(port, model.endpoint, raw[: at_once * 2], at_once))  # all batch sizes have been seen once
    requests = [{"endpoint": model.endpoint, "body": body} for body in bodies]
    turns = by_turns(
        ROUNDS["text"],
        lambda: asyncio.run(drive(port, model.endpoint, raw, at_once)),
        lambda: through(server, requests, 600)[-1],
    )
    facts = {"model": model.name, "worker": model.server, "jobs": count, "at_once": at_once}
    records.add("text", **facts, **compared(count, *turns))


def prompt(model: Model, words: str) -> Json:
    body = {"model": model.name, **model.body}
    return body | {"messages": [{"role": "user", "content": words}]}


def music(server: Server, model: Model, count: int, seconds: int, records: Records) -> None:
    """Clips, in passes of the best size straight to the worker and through the server by turns."""
    port = warm(server, model)
    body = {name: value for name, value in model.body.items() if name != "seed"}
    body |= {"model": model.name, "duration": seconds}
    raw = json.dumps(body).encode()
    sizes = [size for size in (1, 4, 16) if size <= (model.max_batch or 16)]
    turns = itertools.count()

    def direct(size: int, clips: int) -> float:
        """How long so many clips take in passes of this size, in seconds."""
        took = 0.0
        for at in range(0, clips, size):
            n = min(size, clips - at)
            run = f"x-roundhouse-run: direct-{next(turns)};n={n}\r\n"
            took += asyncio.run(drive(port, model.endpoint, [raw] * n, n, run))
        return took

    requests = [{"endpoint": model.endpoint, "body": body}] * count
    direct(sizes[-1], sizes[-1])  # the first one is slower
    took = {size: direct(size, size) for size in sizes}
    best = max(sizes, key=lambda size: size / took[size])
    through(server, requests[: sizes[-1]], 900)  # by which the server has learned how large a pass pays
    seen = len(server.passes(model.name))
    compare = by_turns(ROUNDS["music"], lambda: direct(best, count), lambda: through(server, requests, 900)[-1])
    records.add(
        "music",
        model=model.name,
        jobs=count,
        clip_s=seconds,
        best_batch=best,
        direct_by_batch={str(size): round(size / value, 3) for size, value in took.items()},
        passes=server.passes(model.name)[seen:],
        **compared(count, *compare),
    )
