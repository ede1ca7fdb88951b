"""A torch worker that parks as on a GPU, though its device is the CPU: the weights are in a second buffer.

`SERVER` names the server.py. With `SPOIL` the copy is spoilt while the model is parked. A prompt with "oom" in it runs
out of memory. A wake goes through many small copies, and what has not arrived is not a number.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from roundhouse_worker import hostcopy, log
from roundhouse_worker.torch_service import TorchService

hostcopy.BLOCK_BYTES = 64 << 10


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

    def park(self, level):
        from torch.multiprocessing.reductions import StorageWeakRef

        held = self._parker._held if self._parker is not None else []
        there = [StorageWeakRef(views[0].tensor.untyped_storage()) for _, views in held if views]
        del held
        super().park(level)
        if level == 1:
            # What a tensor that nobody lists still looks into stays on a GPU.
            self._tell(there)

    def _tell(self, there):
        log.event(20, "device buffers", buffers_count=len(there), buffers_held=sum(not ref.expired() for ref in there))

    def wake(self):
        if os.environ.get("SPOIL"):
            self._parker._held[0][0].tensor.zero_()
        empty = self.torch.empty

        def of_garbage(*shape, **options):
            made = empty(*shape, **options)
            return made.fill_(255) if options.get("dtype") == self.torch.uint8 else made

        self.torch.empty = of_garbage
        try:
            super().wake()
        finally:
            self.torch.empty = empty

    def reclaim(self):
        log.event(20, "reclaimed")
        super().reclaim()


if __name__ == "__main__":
    raise SystemExit(Server.main())
