"""What must be true when a worker is killed while it works."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Literal

from roundhouse_server import Json, Processes, RoundhouseServer, command_of, shared_memory

GONE_PATIENCE_S = 12.0
"""The grace of ten seconds, and two."""


Victim = Literal["leader", "engine", "group"]


def kill(pids: list[int], victim: Victim) -> None:
    """Kill -9 the leader of a worker (a guard, its leader, the rest), a process that it started, or the whole group."""
    if victim == "group":
        os.killpg(pids[1], signal.SIGKILL)
    elif victim == "leader":
        os.kill(pids[1], signal.SIGKILL)
    else:
        os.kill(next(pid for pid in pids[2:] if "EngineCore" in command_of(pid)), signal.SIGKILL)


def kill_worker_at(
    server: RoundhouseServer, job: Json, event: str, patience_s: float, victim: Victim = "leader"
) -> Json:
    """Kill -9 a part of the worker at the first such event of its job, and see the job through.

    Nothing of the old worker may be left when the job runs again: no process, and no shared memory.
    Returns the finished job.
    """
    first = server.first_event(job["id"], event, patience_s)
    running = server.job(job["id"])
    assert (running["state"], running["attempt"]) == ("running", 1)
    starts = server.worker(job["model"])["starts"]
    pids = server.worker_pids(job["model"])
    assert len(pids) >= 2, "a guard and its worker"
    processes, memory = Processes(pids), shared_memory(pids)
    try:
        kill(pids, victim)
        names: list[str] = []
        for later in server.events(job["id"], after=first.seq or 0, patience_s=patience_s):
            names.append(later.name)
            if later.name == "job.started":
                assert not processes.still_there(0), "the old worker lives beside the new one"
        left = processes.still_there(GONE_PATIENCE_S)
        assert not left, f"the worker was killed, and this is left of it: {left}"
    finally:
        processes.close()
    kept = [path for path in memory if Path(path).exists()]
    assert not kept, f"shared memory of the dead: {kept}"
    assert "job.retrying" in names
    assert names.index("job.retrying") < names.index("job.started")
    done = server.job(job["id"])
    assert done["state"] == "succeeded", f"{done}\n{server.log()}"
    assert done["attempt"] == 2
    assert (done["crashes"], done["failures"]) == (1, 0)
    assert server.worker(job["model"])["starts"] == starts + 1
    return done
