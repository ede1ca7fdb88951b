"""A torch worker that parks as on a GPU, though its device is the CPU: the weights are in a second buffer.

`SERVER` names the server.py. With `SPOIL` the copy is spoilt while the model is parked. A prompt with "oom" in it runs
out of memory.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from roundhouse_worker import log
from roundhouse_worker.torch_service import TorchService


def base() -> Any:
    path = Path(os.environ["SERVER"])
    spec = importlib.util.spec_from_file_location("server", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    kinds = [kind for kind in vars(module).values() if isinstance(kind, type) and issubclass(kind, TorchService)]
    return next(kind for kind in kinds if kind is not TorchService)


class Server(base()):
    """The worker under test."""

    parks = True

    def generate(self, items, progress):
        made = super().generate(items, progress)
        if any("oom" in item.params.prompt for item in items):
            raise self.torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return made

    def wake(self):
        if os.environ.get("SPOIL"):
            self._parker._held[0][0].tensor.zero_()
        super().wake()

    def reclaim(self):
        log.event(20, "reclaimed")
        super().reclaim()


if __name__ == "__main__":
    raise SystemExit(Server.main())
