"""Prints the speed between host and GPU as JSON. Run apart, so that its memory is gone afterwards. Needs torch."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

BYTES = 4 << 30
ROUNDS = 5
WAKE_COPIES = 6
"""A wake's worth of them, into memory that was just taken."""
FREED_BYTES = 32 << 30
"""What another process gives back right before: the driver clears it, which slows copies down for some 0.1 s."""
HOLDER = f"""
import sys, torch
for line in sys.stdin:
    held = torch.zeros({FREED_BYTES}, dtype=torch.uint8, device="cuda") if line == "take\\n" else None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    print("done", flush=True)
"""


def main() -> None:
    """Measure and print; without a GPU only the version."""
    import torch  # pyright: ignore[reportMissingImports]

    facts: dict[str, Any] = {"torch": str(torch.__version__), "cuda": str(torch.version.cuda)}
    if not torch.cuda.is_available():
        print(json.dumps(facts))
        return

    def speed(copy: Callable[[], Any]) -> float:
        copy()
        torch.cuda.synchronize()
        times = []
        for _ in range(ROUNDS):
            began = time.perf_counter()
            copy()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        return round(BYTES / 1e9 / sorted(times)[ROUNDS // 2], 1)

    device = torch.empty(BYTES, dtype=torch.uint8, device="cuda")
    pinned = torch.empty(BYTES, dtype=torch.uint8, pin_memory=True)
    facts["to_gpu_pinned"] = speed(lambda: device.copy_(pinned, non_blocking=True))
    facts["to_host_pinned"] = speed(lambda: pinned.copy_(device, non_blocking=True))
    facts["to_gpu_new"] = wake_speed(torch, pinned, lambda: None)
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        facts["to_gpu_after_free"] = wake_speed(
            torch, pinned, partial(tell, holder, "free"), partial(tell, holder, "take")
        )
        assert holder.stdin is not None  # noqa: S101 - it is a pipe
        holder.stdin.close()
    pageable = torch.ones(BYTES, dtype=torch.uint8)
    facts["to_gpu_pageable"] = speed(lambda: device.copy_(pageable))
    facts["to_host_pageable"] = speed(lambda: pageable.copy_(device))
    print(json.dumps(facts))


def wake_speed(
    torch: Any, pinned: Any, right_before: Callable[[], None], earlier: Callable[[], None] = lambda: None
) -> float:
    """Copies into new memory, as a wake makes them; GB/s, the middle one of three."""
    rates = []
    for _ in range(3):
        torch.cuda.empty_cache()
        earlier()
        time.sleep(0.5)
        right_before()
        began = time.perf_counter()
        there = torch.empty(WAKE_COPIES * BYTES, dtype=torch.uint8, device="cuda")
        for start in range(0, WAKE_COPIES * BYTES, BYTES):
            there[start : start + BYTES].copy_(pinned, non_blocking=True)
        torch.cuda.synchronize()
        rates.append(WAKE_COPIES * BYTES / 1e9 / (time.perf_counter() - began))
        del there
    return round(sorted(rates)[1], 1)


def tell(holder: subprocess.Popen[str], what: str) -> None:
    """Waits until the other process has done it."""
    assert holder.stdin is not None  # noqa: S101 - pipes
    assert holder.stdout is not None  # noqa: S101
    holder.stdin.write(f"{what}\n")
    holder.stdin.flush()
    holder.stdout.readline()


if __name__ == "__main__":
    main()
