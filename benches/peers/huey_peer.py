"""huey as a peer: ``huey_peer.py DIR SECONDS JOBS BYTES``.

SqliteHuey with its defaults (synchronous=FULL). Enqueues for SECONDS, one job per
call, from one thread, then by four; then one thread takes and runs jobs that do
nothing, as a worker of huey's consumer does, until JOBS are done or four times
SECONDS have passed. Prints one JSON object a line.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path

from huey import SqliteHuey

THREADS = 4


def report(what: str, by: int, jobs: int, seconds: float) -> None:
    """One line."""
    print(json.dumps({"what": what, "by": by, "jobs": jobs, "seconds": seconds}), flush=True)


def main() -> int:
    """Measure."""
    folder, seconds, jobs, size = Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    huey = SqliteHuey("bench", filename=str(folder / "huey.db"))
    payload = "x" * size

    @huey.task()
    def noop(_text: str) -> None:
        return None

    def submit(until: float, done: list[int]) -> None:
        count = 0
        while time.monotonic() < until:
            noop(payload)
            count += 1
        done.append(count)

    for threads in (1, THREADS):
        begun = time.monotonic()
        done: list[int] = []
        submitters = [threading.Thread(target=submit, args=(begun + seconds, done)) for _ in range(threads)]
        for thread in submitters:
            thread.start()
        for thread in submitters:
            thread.join()
        report("enqueue", threads, sum(done), time.monotonic() - begun)

    connection = huey.storage.conn
    mode = connection.execute("pragma journal_mode").fetchone()[0]
    level = connection.execute("pragma synchronous").fetchone()[0]
    name = ("OFF", "NORMAL", "FULL", "EXTRA")[level]
    text = f"huey {version('huey')}, journal_mode={mode}, synchronous={name} (read back); a job is deleted when taken"
    print(json.dumps({"what": "settings", "text": text}), flush=True)

    for _ in range(jobs - huey.pending_count()):
        noop(payload)
    begun, count = time.monotonic(), 0
    while count < jobs and time.monotonic() < begun + 4 * seconds:
        task = huey.dequeue()
        if task is None:
            print(json.dumps({"what": "note", "text": "the queue ran dry"}), flush=True)
            return 1
        huey.execute(task)
        count += 1
    report("process", 1, count, time.monotonic() - begun)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
