"""What the driver says of the GPUs, and what is left behind on the machine."""

from __future__ import annotations

import os
import pathlib
import socket
import subprocess
from dataclasses import dataclass

MARK = "GPU_VERIFY_MARK"
"""In the environment of all that is started here; workers inherit it from the server."""
MIB_SLACK = 64


def smi(query: str, *more: str) -> list[list[str]]:
    """Rows of nvidia-smi's answer; none where there is no driver."""
    command = ["nvidia-smi", f"--query-{query}", "--format=csv,noheader,nounits", *more]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [[cell.strip() for cell in line.split(",")] for line in answer.splitlines() if line.strip()]


def gpus() -> list[dict[str, str]]:
    """Name, driver and MiB of each GPU."""
    rows = smi("gpu=name,driver_version,memory.total")
    return [dict(zip(("name", "driver", "mib"), row, strict=False)) for row in rows]


def used_mib() -> list[int]:
    """Memory in use on each GPU."""
    return [int(row[0]) for row in smi("gpu=memory.used")]


def mib_by_pid() -> dict[int, int]:
    """GPU memory of each process that has any."""
    found: dict[int, int] = {}
    for row in smi("compute-apps=pid,used_memory"):
        if len(row) == 2 and row[0].isdigit() and row[1].isdigit():
            found[int(row[0])] = found.get(int(row[0]), 0) + int(row[1])
    return found


def environ(pid: int) -> list[bytes]:
    """The environment a process was started with; empty if it cannot be read."""
    try:
        return pathlib.Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []


def children_of(pid: int) -> set[int]:
    """A process and all below it."""
    parents: dict[int, int] = {}
    for each in pids():
        try:
            stat = pathlib.Path(f"/proc/{each}/stat").read_text()
        except OSError:
            continue
        parents[each] = int(stat.rpartition(")")[2].split()[1])
    family = {pid}
    while more := {child for child, parent in parents.items() if parent in family} - family:
        family |= more
    return family


def pids() -> list[int]:
    """All processes that can be seen."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def marked(mark: str) -> list[int]:
    """Processes that carry the mark, without this one."""
    wanted = f"{MARK}={mark}".encode()
    return [pid for pid in pids() if pid != os.getpid() and wanted in environ(pid) and not is_zombie(pid)]


def is_zombie(pid: int) -> bool:
    """Whether it has ended and nobody has asked for its status."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def listens(port: int) -> bool:
    """Whether somebody listens on a port of this machine."""
    with socket.socket() as sock:
        sock.settimeout(1)
        return sock.connect_ex(("127.0.0.1", port)) == 0


def files(folder: pathlib.Path) -> set[str]:
    """What lies in a folder."""
    return {str(path) for path in folder.iterdir()}


@dataclass(frozen=True)
class Before:
    """How the machine was before anything was started."""

    mib: list[int]
    shm: set[str]
    tmp: set[str]


def look(tmp: pathlib.Path) -> Before:
    """How the machine is now."""
    return Before(used_mib(), files(pathlib.Path("/dev/shm")), files(tmp))


def left(before: Before, mark: str, tmp: pathlib.Path, ports: set[int], shared: bool) -> list[str]:
    """What is left over against `before`, in words. On a `shared` machine others may use /dev/shm meanwhile."""
    now = look(tmp)
    found = [f"process {pid}: {command(pid)}" for pid in marked(mark)]
    found += [
        f"{have - had} MiB on GPU {gpu}"
        for gpu, (had, have) in enumerate(zip(before.mib, now.mib, strict=False))
        if have > had + MIB_SLACK
    ]
    found += [f"port {port}" for port in sorted(ports) if listens(port)]
    found += sorted(now.tmp - before.tmp)
    if not shared:
        found += sorted(now.shm - before.shm)
    return found


def command(pid: int) -> str:
    """Its command line."""
    try:
        return pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:120]
    except OSError:
        return "gone"
