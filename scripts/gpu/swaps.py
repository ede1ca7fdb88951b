"""Requests to models by turns, and what each swap cost by the server's own record."""

from __future__ import annotations

import hashlib
import pathlib
import time
import zlib

from gpu import box
from gpu.common import Failed, Json, Records, epoch, say, until
from gpu.models import Model
from gpu.server import COLD_LIMIT_S, Server

SETTLE_S = 0.3
COLD_ROUNDS = 2
SPARE_LIMIT_S = 90
WAYS_ROUNDS = 2
BARE = "no copy"


def circuit(names: list[str]) -> list[str]:
    """A closed walk over all ordered pairs, each once: it begins and ends with the first name."""
    left = {name: [other for other in reversed(names) if other != name] for name in names}
    stack, walk = [names[0]], []
    while stack:
        if left[stack[-1]]:
            stack.append(left[stack[-1]].pop())
        else:
            walk.append(stack.pop())
    return walk[::-1]


def digest(server: Server, model: Model, job: Json) -> str:
    """What a job answered, as a hash: equal if the answers are, byte for byte.

    Raises:
        Failed: the answer is empty, or an image of one colour (what NaN becomes).
    """
    if model.kind == "text":
        said = job["result"]["body"]["choices"][0]["message"]["content"]
        if not said:
            raise Failed(f"{model.name} answered an empty text")
        return hashlib.sha256(said.encode()).hexdigest()[:16]
    found = job["artifacts"][0]
    if model.kind == "image":
        data = server.ask("GET", f"/v1/jobs/{job['id']}/artifacts/{found['id']}")
        if colours(data) < 16:
            raise Failed(f"{model.name} made an image of one colour: its weights gave NaN")
        return hashlib.sha256(data).hexdigest()[:16]
    return found["sha256"][:16]


def colours(png: bytes) -> int:
    """How many byte values there are in an image's data."""
    at, packed = 8, b""
    while at + 8 <= len(png):
        size, kind = int.from_bytes(png[at : at + 4], "big"), png[at + 4 : at + 8]
        packed += png[at + 8 : at + 8 + size] if kind == b"IDAT" else b""
        at += 12 + size
    return len(set(zlib.decompress(packed)))


def visit(server: Server, model: Model, came_from: str | None, records: Records, **labels: object) -> None:
    """One request, and the swap it took: what the server's log, decisions and workers say of it."""
    server.events()
    asked_at = time.time() - 0.005  # the server's times are whole ms
    job = server.finished(server.submit(model.request()), COLD_LIMIT_S)
    decided = server.decision(model.name, asked_at)
    time.sleep(SETTLE_S)
    found: Json = {"model": model.name, "came_from": came_from, "answer": digest(server, model, job)}
    woke_ms = None
    for event in server.events():
        of, message = event.get("model"), event.get("message")
        if of == came_from and message in ("parked", "stopped"):
            found[f"{message}_ms"] = event.get("park_ms", event.get("stop_ms"))
        elif of == model.name and message in ("awake", "ready"):
            woke_ms = event["load_ms"]
            found["how"] = "parked" if message == "awake" else "cold"
    found["load_ms"] = woke_ms
    if decided:
        found["gap_ms"] = round(1e3 * (epoch(job["started_at"]) - epoch(decided["at"])))
        found["reason"] = decided["reason"]
    if found.get("how") == "parked":
        found["worker_wake_s"] = server.moved_s(model.name, "wake")
    if came_from and "parked_ms" in found:
        found["worker_park_s"] = server.moved_s(came_from, "park")
    found["run_s"] = (job.get("timings") or {}).get("run_s")
    worker = server.worker(model.name)
    if found.get("how") == "cold":
        health = server.health(model.name)
        found |= {key: health[key] for key in ("can_park", "park_note", "host_bytes") if key in health}
        found["phases"] = worker.get("phases") or health.get("phases")
    found["gpu_mib"] = box.used_mib()
    by_pid = box.mib_by_pid()
    found["own_mib"] = mib_of(worker, by_pid)
    # In some containers the driver tells other process ids than /proc: then nothing is known of single ones.
    if "parked_ms" in found and came_from and found["own_mib"]:
        found["left_mib"] = mib_of(server.worker(came_from), by_pid)
    records.add("swap", **labels, **found)


def mib_of(worker: Json, by_pid: dict[int, int]) -> int:
    """GPU memory of a worker's processes."""
    family = box.children_of(worker["pid"]) if worker.get("pid") and by_pid else set()
    return sum(mib for pid, mib in by_pid.items() if pid in family)


def run(server: Server, models: list[Model], cycles: int, records: Records, end_at: float, labels: Json) -> None:
    """All ordered pairs, `cycles` times, the first time with cold loads; fewer if the time is up, but at least two."""
    by_name = {model.name: model for model in models}
    walk = circuit([model.name for model in models])
    before: str | None = None
    for cycle in range(1, cycles + 1):
        if cycle > 2 and time.monotonic() > end_at:
            say(f"the time is up after {cycle - 1} cycles")
            return
        for name in walk if before is None else walk[1:]:
            if cycle == 1 and before is not None:
                unload(server, name)
            visit(server, by_name[name], before, records, cycle=cycle, **labels)
            before = name


def unload(server: Server, name: str) -> None:
    """Ends a model's worker, parked or not, so that its next job takes a cold load."""
    server.ask("POST", f"/v1/models/{name}/unload")
    until(f"the end of {name}", 60, 0.1, lambda: server.worker(name)["state"] == "absent")


def ways(server: Server, models: list[Model], names: dict[str, str], records: Records) -> None:
    """Two models by turns, each parked in its own way: whether it comes back so, how fast, and as it was."""
    seen: dict[str, list[str]] = {model.name: [] for model in models}
    server.events()
    for model in models * (WAYS_ROUNDS + 1):
        job = server.finished(server.submit(model.request()), COLD_LIMIT_S)
        seen[model.name].append(digest(server, model, job))
    time.sleep(SETTLE_S)
    events = server.events()
    for model in models:
        mine = [event for event in events if event.get("model") == model.name]
        is_bare = names[model.name] == BARE
        told = [event for event in mine if bool(event.get("bare") or event.get("was_bare")) == is_bare]
        parks = [event["park_ms"] / 1e3 for event in told if event.get("message") == "parked"]
        wakes = [event["load_ms"] / 1e3 for event in told if event.get("message") == "awake"]
        same = len(set(seen[model.name])) == 1
        records.add("way", model=model.name, way=names[model.name], parks=parks, wakes=wakes, same=same)


def cold_starts(server: Server, model: Model, records: Records, spare: bool, labels: Json) -> None:
    """Loads from the page cache: unloaded by hand, and asked for again."""
    visit(server, model, None, records, cycle=0, **labels)
    for _ in range(COLD_ROUNDS):
        unload(server, model.name)
        if spare:
            until("spare processes", SPARE_LIMIT_S, 0.2, lambda: spares_are_ready(server))
        server.events()
        job = server.finished(server.submit(model.request()), COLD_LIMIT_S)
        events = [event for event in server.events() if event.get("model") == model.name]
        loads = [event for event in events if event.get("message") == "ready"]
        if not loads:
            raise Failed(f"{model.name} was not loaded anew after an unload")
        phases = server.worker(model.name).get("phases") or server.health(model.name).get("phases")
        records.add(
            "cold",
            model=model.name,
            load_ms=loads[-1]["load_ms"],
            spare=spare,
            was_spare=any(event.get("was_spare") for event in events if event.get("message") == "loading"),
            **labels,
            phases=phases,
            answer=digest(server, model, job),
        )


def spares_are_ready(server: Server) -> bool:
    """Whether each spare process has imported what is heavy."""
    return all(spare["state"] == "ready" for spare in server.ask("GET", "/v1/workers").get("spares", []))


def folder_sizes(models: list[Model], records: Records) -> None:
    """How much each one's weights take, for the rates."""
    for model in models:
        records.add("weights", model=model.name, bytes=model.bytes(), folder=str(pathlib.Path(model.folder or ".")))
