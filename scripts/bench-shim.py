"""What the synchronous shim adds to a chat call, over calling the worker directly.

Starts `roundhouse serve` with one echo worker, opens one keep-alive connection to
the server and one to the worker, and sends the same request over both, in blocks
by turns, so that whatever else the machine does meets both alike. The client is
a bare socket. Prints percentiles of both and what lies between them.

    scripts/bench-shim.sh [--requests 1000] [--json]
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests/support"))
from roundhouse_server import BINARY, RoundhouseServer, echo

MODEL = "echo"
WARM_UP = 200
GOALS_MS = {"p50": 0.8, "p99": 3.0}


class Connection:
    """One keep-alive HTTP/1.1 connection that sends the same request again and again."""

    def __init__(self, host: str, port: int) -> None:
        body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "hello there"}]}).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: {host}:{port}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        self._request = head.encode() + body
        self._socket = socket.create_connection((host, port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def call(self) -> int:
        """Send and read one answer whole; nanoseconds."""
        began = time.perf_counter_ns()
        self._socket.sendall(self._request)
        data = self._socket.recv(65536)
        while not self._is_whole(data):
            more = self._socket.recv(65536)
            if not more:
                raise ConnectionError(f"closed in the middle of an answer: {data!r}")
            data += more
        took = time.perf_counter_ns() - began
        if not data.startswith(b"HTTP/1.1 200") or b"echo: hello there" not in data:
            raise RuntimeError(f"not the answer that was expected: {data.decode(errors='replace')}")
        return took

    @staticmethod
    def _is_whole(data: bytes) -> bool:
        head, end, body = data.partition(b"\r\n\r\n")
        if not end:
            return False
        for line in head.split(b"\r\n"):
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                return len(body) >= int(value)
        return body.endswith(b"0\r\n\r\n")

    def close(self) -> None:
        self._socket.close()


@contextmanager
def collector_off() -> Iterator[None]:
    """Python's garbage collector would be measured too."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def measure(shim: Connection, worker: Connection, requests: int, block: int) -> tuple[list[int], list[int]]:
    """Nanoseconds of each call through the shim, and of each to the worker; each block begins with the other one."""
    through: list[int] = []
    direct: list[int] = []
    for connection in (shim, worker):
        for _ in range(WARM_UP):
            connection.call()
    with collector_off():
        turns = [(shim, through), (worker, direct)]
        while len(through) < requests:
            for connection, times in turns:
                times.extend(connection.call() for _ in range(min(block, requests - len(times))))
            turns.reverse()
    return through, direct


def quantile_ms(times_ns: list[int], share: float) -> float:
    """The smallest time that at least this share of all calls did not exceed."""
    ordered = sorted(times_ns)
    return ordered[min(len(ordered) - 1, max(0, -int(-share * len(ordered) // 1) - 1))] / 1e6


def resident_mib(pid: int) -> float:
    """Resident memory of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0


def run(requests: int, block: int, folder: Path) -> dict[str, object]:
    """Measure; milliseconds by name."""
    with RoundhouseServer(folder, {MODEL: echo(preload=True)}) as server:
        idle_mib = resident_mib(server.process.pid)
        body = {"model": MODEL, "messages": [{"role": "user", "content": "hello there"}]}
        server.post("/chat/completions", body).raise_for_status()  # loads it
        server_url = urlsplit(server.url)
        assert server_url.hostname is not None
        assert server_url.port is not None
        shim = Connection(server_url.hostname, server_url.port)
        worker = Connection("127.0.0.1", server.worker(MODEL)["port"])
        try:
            through, direct = measure(shim, worker, requests, block)
        finally:
            shim.close()
            worker.close()
    found: dict[str, object] = {"requests": requests, "block": block, "server_idle_mib": round(idle_mib, 1)}
    for name, share in (("p50", 0.50), ("p90", 0.90), ("p99", 0.99)):
        times = {"shim": quantile_ms(through, share), "worker": quantile_ms(direct, share)}
        found[name] = times | {"added": times["shim"] - times["worker"]}
    return found


def report(found: dict[str, object]) -> bool:
    """Print the figures; whether the goals are met."""
    print(f"binary      {BINARY} ({BINARY.stat().st_size / 1e6:.1f} MB, idle {found['server_idle_mib']} MiB)")
    print(f"requests    {found['requests']} each, one connection each, in blocks of {found['block']} by turns")
    print(f"{'':12}{'worker':>10}{'shim':>10}{'added':>10}{'goal':>10}{'of goal':>10}")
    met = True
    for name in ("p50", "p90", "p99"):
        times = found[name]
        assert isinstance(times, dict)
        line = f"{name:12}{times['worker']:>7.3f} ms{times['shim']:>7.3f} ms{times['added']:>7.3f} ms"
        if goal := GOALS_MS.get(name):
            met = met and times["added"] <= goal
            line += f"{goal:>7.1f} ms{times['added'] / goal:>9.0%}"
        print(line)
    print("goals met" if met else "goals NOT met")
    return met


def main() -> int:
    """Exit code 0 if the goals are met, 1 if not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000, help="calls each way (1000)")
    parser.add_argument("--block", type=int, default=50, help="calls one way before the other's turn (50)")
    parser.add_argument("--folder", type=Path, help="where the database lies while measuring (a temporary folder)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="bench-shim-") as folder:
        found = run(options.requests, options.block, Path(folder))
    if options.json:
        print(json.dumps(found))
        return 0
    return 0 if report(found) else 1


if __name__ == "__main__":
    os.environ.setdefault("ROUNDHOUSE_BIN", str(BINARY))
    raise SystemExit(main())
