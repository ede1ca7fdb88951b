"""Jobs a second through the server, against the same requests sent straight to the worker."""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics
import time
from typing import Any

from gpu.common import Failed, Json, Records, epoch, until
from gpu.models import Model
from gpu.server import COLD_LIMIT_S, Server

BULK = 1000
LIVE = ("queued", "running")
REQUEST_LIMIT_S = 300
ROUNDS = 12
"""How often direct passes and jobs through the server take turns."""


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


def warm(server: Server, model: Model) -> int:
    """Its worker's port, once it is loaded."""
    server.finished(server.submit(model.request()), COLD_LIMIT_S)
    return server.worker(model.name)["port"]


def text(server: Server, model: Model, count: int, at_once: int, records: Records) -> None:
    """Short prompts: straight to the worker, through the server, straight again."""
    port = warm(server, model)
    bodies = [prompt(model, f"Say the number {number}.") for number in range(count)]
    raw = [json.dumps(body).encode() for body in bodies]
    asyncio.run(drive(port, model.endpoint, raw[: at_once * 2], at_once))  # all batch sizes have been seen once
    requests = [{"endpoint": model.endpoint, "body": body} for body in bodies]
    first = asyncio.run(drive(port, model.endpoint, raw, at_once))
    ends = through(server, requests, 600)
    second = asyncio.run(drive(port, model.endpoint, raw, at_once))
    records.add(
        "text",
        model=model.name,
        worker=model.server,
        jobs=count,
        at_once=at_once,
        direct_per_s=[round(count / first, 1), round(count / second, 1)],
        through_per_s=round(count / ends[-1], 1),
        ratio=round((first + second) / 2 / ends[-1], 3),
    )


def prompt(model: Model, words: str) -> Json:
    body = {"model": model.name, **model.body}
    return body | {"messages": [{"role": "user", "content": words}]}


def music(server: Server, model: Model, count: int, seconds: int, records: Records) -> None:
    """Clips: the best batch straight to the worker, and through the server."""
    port = warm(server, model)
    body = {name: value for name, value in model.body.items() if name != "seed"}
    body |= {"model": model.name, "duration": seconds}
    raw = json.dumps(body).encode()
    sizes = [size for size in (1, 4, 16) if size <= (model.max_batch or 16)]
    turns = itertools.count()

    def direct(size: int) -> float:
        """How long a pass takes, in seconds."""
        run = f"x-roundhouse-run: direct-{next(turns)};n={size}\r\n"
        return asyncio.run(drive(port, model.endpoint, [raw] * size, size, run))

    requests = [{"endpoint": model.endpoint, "body": body}] * count
    direct(sizes[-1])  # the first one is slower
    took = {size: [direct(size)] for size in sizes}
    best = max(sizes, key=lambda size: size / took[size][0])
    through(server, requests[: sizes[-1]], 900)  # by which the server has learned how large a pass pays
    # Passes are as fast as one core of the host, whose speed changes from second to second on a shared machine. So each
    # round compares the jobs with as many direct passes, half of them just before and half just after.
    full = -(-count // best)
    took[best], ends, ratios = [], [], []
    seen = len(server.passes(model.name))
    for _ in range(ROUNDS):
        around = [direct(best) for _ in range(full // 2)]
        ends.append(through(server, requests, 900)[-1])
        around += [direct(best) for _ in range(full - full // 2)]
        took[best] += around
        ratios.append(sum(around) / (full * best) * count / ends[-1])
    passes = server.passes(model.name)[seen:]
    per_s = {size: size / statistics.median(times) for size, times in took.items()}
    records.add(
        "music",
        model=model.name,
        jobs=count * ROUNDS,
        clip_s=seconds,
        direct_per_s={str(size): round(value, 3) for size, value in per_s.items()},
        direct_s=[round(value, 2) for value in took[best]],
        best_batch=best,
        passes=passes,
        through_per_s=round(count / statistics.median(ends), 3),
        through_s=[round(value, 2) for value in ends],
        ratios=[round(value, 3) for value in ratios],
        ratio=round(statistics.median(ratios), 3),
    )
