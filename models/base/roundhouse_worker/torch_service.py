"""`TorchService`: a worker whose model is torch modules. Loading, parking and its checks are the same for all of them.

A model brings `import_libraries`, `load`, `modules`, `drop` and, so that a wake is checked, `step`.
"""

from __future__ import annotations

import argparse
import logging
import pathlib
import time
from typing import Any

from roundhouse_worker import hostcopy, log, parking, quickload, weights
from roundhouse_worker.arrival import Arrival
from roundhouse_worker.service import BaseService, Loading

CLOSE_ENOUGH = 1e-3
"""How much of its largest value a step may differ by after a wake; what is broken differs by far more."""


class Loader:
    """Handed to `TorchService.load`: gives it modules that are read fast, where that is possible."""

    def __init__(self, service: TorchService, loading: Loading) -> None:
        self._service = service
        self._loading = loading
        self._parts: list[quickload.Part] = []
        self._left_bytes = 0

    def part(self, library: str, class_name: str, folder: pathlib.Path) -> Any:
        """A module that `read` will fill, or None: let its library load it.

        Args:
            library: "diffusers" or "transformers".
            class_name: its class there.
            folder: its config.json and weights.
        """
        if self._service.options.loading == "library":
            return None
        made = quickload.part(library, class_name, folder, self._service.dtype)
        if made is None:
            self._left_bytes += sum(path.stat().st_size for path in hostcopy.files(folder))
            return None
        self._parts.append(made)
        return made.module

    def read(self) -> None:
        """Fill all parts and move them to the device. Then load the rest with the library, and move it too."""
        self._service._read_parts(self._parts, self._left_bytes, self._loading)  # pyright: ignore[reportPrivateUsage]


class TorchService(BaseService):
    """Serves a model made of torch modules."""

    gpu_dtype = "bfloat16"
    """What `--dtype auto` means on a GPU; on a CPU it is float32."""

    # ---- hooks ---------------------------------------------------------------

    @classmethod
    def import_libraries(cls, folder: pathlib.Path | None) -> None:
        """Import what is heavy besides torch; nothing here may touch the device. *Model thread.*

        Args:
            folder: the weights; None if it is not known yet which will be wanted.
        """

    def load(self, loader: Loader) -> None:
        """Load from `self.folder` in `self.dtype` to `self.device`. *Model thread.*"""
        raise NotImplementedError

    def modules(self) -> list[Any]:
        """All modules whose weights are on the device. *Model thread.*"""
        raise NotImplementedError

    def drop(self) -> None:
        """Forget the modules, and all that holds them. *Model thread.*"""
        raise NotImplementedError

    def step(self) -> list[Any] | None:
        """A tiny pass through all modules, the same each time; its tensors. None: there is no such. *Model thread.*

        Run once at load (it warms the libraries up) and at every wake, when it must give the same again; then while
        the weights are on their way, so that it costs little: modules wait for their own when they are called, and
        what is used in another way is asked for by `awaited`.
        """
        return None

    # ---- flags ---------------------------------------------------------------

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--device", default="auto", help="auto, cuda, cuda:1, cpu")
        parser.add_argument("--dtype", choices=("auto", "bfloat16", "float16", "float32"), default="auto")
        parser.add_argument(
            "--host-copy",
            choices=("auto", "load", "sleep"),
            default="sleep",
            help="when the copy of the weights in host memory is made that /sleep needs: at the first sleep, at load, "
            "or auto: at load if the memory is there; under the scheduler it decides",
        )
        parser.add_argument(
            "--loading",
            choices=("fast", "library"),
            default="fast",
            help="fast: safetensors files are read by many threads; library: as from_pretrained does it",
        )

    @property
    def parks(self) -> bool:
        """Whether there is device memory that `/sleep` can give back. On a CPU there is none."""
        return self.on_cuda

    # ---- loading -------------------------------------------------------------

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        self.folder: Any = None
        self.on_cuda = False
        self._parker: parking.Parker | None = None
        self._plan = parking.Plan("never")
        self._loaded_parts: hostcopy.Loaded | None = None
        self._held_bytes = 0
        self._asleep_without = False  # asleep, and the weights are nowhere
        self._reference: list[Any] | None = None
        self._arrival: Arrival | None = None  # while the step runs during a wake
        self._checked = False  # by that step

    @classmethod
    def preload(cls) -> None:
        parking.prepare_environment()
        import torch  # noqa: F401  # pyright: ignore[reportMissingImports, reportUnusedImport]

        cls.import_libraries(None)

    def initialize(self, loading: Loading) -> None:
        self.folder = weights.local_folder(self.options.model, self.options.revision)
        loading("import", 2)
        parking.prepare_environment()
        device: str = self.options.device
        if device != "cpu":
            hostcopy.start_context(int(device.partition(":")[2] or 0))
        import torch  # pyright: ignore[reportMissingImports]

        self.import_libraries(self.folder)
        self.torch: Any = torch
        self.device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self.on_cuda = self.device.startswith("cuda")
        dtype = self.options.dtype
        if dtype == "auto":
            dtype = self.gpu_dtype if self.on_cuda else "float32"
        self.dtype = getattr(torch, dtype)
        self._load_model(loading)
        loading("warm_up", 90)
        self._reference = self._first_step()

    def _load_model(self, loading: Loading) -> None:
        loading("read", 20)
        self._held_bytes = 0
        self._loaded_parts = None
        self.load(Loader(self, loading))
        loading("device", 80)
        self._keep_copy()
        if self.on_cuda:
            self.torch.cuda.synchronize()

    def _read_parts(self, parts: list[quickload.Part], left_bytes: int, loading: Loading) -> None:
        """`left_bytes`: what the library reads afterwards, through host memory that the copy must leave."""
        size = sum(part.size_bytes for part in parts)
        self._plan = self._planned(size, left_bytes)
        keep = self.parks and self._plan.when == "load"
        self._held_bytes = size if keep else 0

        def report(phase: str, part: float) -> None:
            loading(phase, 20 + 60 * part)

        began = time.monotonic()
        self._loaded_parts = quickload.read(parts, self.torch.device(self.device), keep=keep, report=report)
        loading("device", 80)
        if parts:
            log.event(
                logging.INFO,
                "weights read",
                read_parts=[type(part.module).__name__ for part in parts],
                read_bytes=size,
                read_seconds=time.monotonic() - began,
                read_kept=keep,
            )

    def _planned(self, size: int, beside: int = 0) -> parking.Plan:
        available = parking.available_bytes() + self._held_bytes - beside
        return parking.plan(size, self.options.host_copy, max(available, 0))

    def _keep_copy(self) -> None:
        """Make the Parker, now that all there is to copy is known: decided before any of it is page-locked."""
        loaded, self._loaded_parts = self._loaded_parts, None
        self._parker = None
        if not self.parks:
            self._held_bytes = 0
            return
        size = parking.weights_bytes(self.modules())
        self._plan = self._planned(size)
        if self._plan.when == "load":
            self._make_parker(loaded)
        elif loaded is not None and loaded.host is not None:
            loaded.host.close()
        if self._parker is None:
            self._held_bytes = 0
            if self._plan.note:
                log.event(logging.WARNING, "this model cannot park", park_reason=self._plan.note)

    def _make_parker(self, loaded: hostcopy.Loaded | None = None) -> None:
        self._parker = parking.Parker(self.modules(), self.device, loaded)
        self._held_bytes = self._parker.size_bytes
        if self._parker.note:
            log.event(logging.WARNING, self._parker.note)

    # ---- parking -------------------------------------------------------------

    def park(self, level: int) -> None:
        if level == 1 and self.parks and self._parker is None:
            if self._plan.when == "sleep":
                self._make_parker()
            else:
                log.event(logging.WARNING, "no copy of the weights: they are read again at the wake")
                level = 2
        if level == 2:
            self._asleep_without = True
            self.drop()
            if self._parker is not None:
                self._parker.close()
            self._parker = None
            self._held_bytes = 0
            self.reclaim()
        elif self._parker is not None:
            residue = self._parker.park()
            log.event(logging.INFO, "device memory released", park_residue_bytes=residue)

    def wake(self) -> None:
        if self._asleep_without:
            self._load_model(Loading())
            self._asleep_without = False
        elif self._parker is not None:
            copy_seconds = self._parker.wake(self._check_early)
            log.event(logging.INFO, "weights are back", wake_copy_seconds=copy_seconds)
        checked, self._checked = self._checked, False
        if self._reference is not None and not checked:
            check_same(self._reference, self._step())

    def _check_early(self, arrival: Arrival) -> None:
        """The checking step while weights are on their way. If it goes wrong, it is run again when they are there."""
        if self._reference is None:
            return
        self._arrival = arrival
        try:
            check_same(self._reference, self._step())
            self._checked = True
        except Exception as error:
            log.event(
                logging.INFO,
                "the early step went wrong",
                error_type=type(error).__name__,
                error_at=log.where(error),
            )
        finally:
            self._arrival = None

    def awaited(self, module: Any) -> Any:
        """For `step`: the module, once it is there, if it is used in another way than by calling it."""
        if self._arrival is not None:
            self._arrival.wait_for(module)
        return module

    def _first_step(self) -> list[Any] | None:
        try:
            return self._step()
        except Exception as error:
            log.event(
                logging.WARNING,
                "the warm-up step failed: wakes go unchecked",
                error_type=type(error).__name__,
                error_at=log.where(error),
            )
        self.reclaim()
        return None

    def _step(self) -> Any:
        with self.torch.inference_mode():
            made = self.step()
            return None if made is None else [tensor.detach().float().cpu() for tensor in made]

    def reclaim(self) -> None:
        if self.on_cuda:
            parking.release_device_memory(self.torch)

    def parking_facts(self) -> dict[str, Any]:
        if not self._loaded:
            return {"host_bytes": self._held_bytes}
        facts: dict[str, Any] = {"host_bytes": self._held_bytes}
        parker = self._parker
        if not self.parks:
            if self.on_cuda:
                facts |= {"can_park": False, "park_note": "it moves its parts between host and device memory itself"}
        elif self._plan.when == "never":
            facts |= {"can_park": False, "park_note": self._plan.note}
        else:
            facts["can_park"] = True
            if parker is not None and parker.note:
                facts["park_note"] = parker.note
        # Parts with hooks are not simply forgotten.
        facts["can_reread"] = self.parks
        return facts


def check_same(before: list[Any], now: list[Any]) -> None:
    """Raise `RuntimeError` if a step gave something else than before."""
    import torch  # pyright: ignore[reportMissingImports]

    if len(before) != len(now):
        raise RuntimeError(f"after the wake a step made {len(now)} tensors, not {len(before)}")
    for old, new in zip(before, now, strict=True):
        old, new = torch.nan_to_num(old), torch.nan_to_num(new)
        if torch.equal(old, new):
            continue
        furthest = (old - new).abs().max().item() if old.shape == new.shape else float("inf")
        if not furthest <= CLOSE_ENOUGH * old.abs().max().item():
            raise RuntimeError("after the wake a step gives another result than at load: the weights are not the same")
        log.event(logging.INFO, "the step after the wake is not exact", wake_difference=furthest)
