"""Prints the speed between host and GPU as JSON. Run apart, so that its memory is gone afterwards. Needs torch."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

BYTES = 4 << 30
ROUNDS = 5


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
    pageable = torch.ones(BYTES, dtype=torch.uint8)
    facts["to_gpu_pageable"] = speed(lambda: device.copy_(pageable))
    facts["to_host_pageable"] = speed(lambda: pageable.copy_(device))
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
