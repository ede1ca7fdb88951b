"""What all parts share: failures, records, and what the procedure looks like at each scale."""

from __future__ import annotations

import datetime
import json
import pathlib
import sys
import time
from typing import Any

Json = dict[str, Any]
ROOT = pathlib.Path(__file__).resolve().parents[2]
BEGAN = time.monotonic()


class Failed(Exception):
    """Something did not come out; the text says what and where to look."""


def say(text: str) -> None:
    """A progress line."""
    print(f"[{time.monotonic() - BEGAN:5.0f}s] {text}", file=sys.stderr, flush=True)


def epoch(text: str) -> float:
    """Seconds since 1970 of an RFC 3339 time in UTC."""
    return datetime.datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()


class Records:
    """One JSON object a line, appended: what an earlier call measured stays and counts."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, part: str, **fields: Any) -> None:
        """Keep a measurement and show it."""
        line = {"part": part, **fields}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        shown = ", ".join(f"{key} {value}" for key, value in fields.items() if value is not None)
        say(f"{part}: {shown}"[:240])

    def all(self) -> list[Json]:
        """All of them, oldest first."""
        if not self.path.is_file():
            return []
        return [json.loads(line) for line in self.path.read_text().splitlines() if line.strip()]


def weights_bytes(folder: pathlib.Path) -> int:
    """What the safetensors files below a folder take, links followed, in bytes."""
    files = list(folder.glob("*.safetensors")) + list(folder.glob("*/*.safetensors"))
    return sum(file.stat().st_size for file in files)


def until(what: str, limit_s: float, every_s: float, ready: Any) -> Any:
    """Asks `ready` until it gives something true, and gives that back.

    Raises:
        Failed: it did not within the limit.
    """
    end = time.monotonic() + limit_s
    while True:
        value = ready()
        if value:
            return value
        if time.monotonic() > end:
            raise Failed(f"{what}: not within {limit_s:.0f} s")
        time.sleep(every_s)
