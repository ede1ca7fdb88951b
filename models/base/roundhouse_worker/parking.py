"""Park a torch model in host memory and wake it again. Needs torch, imports it late.

Weights do not change, so their host copy is made once, at best while they are read (`hostcopy`), and kept: parking
copies nothing and only lets the device's memory go; waking is one large copy, at the speed of the link if the host copy
is page-locked. Measured with 23.8 GB on an H100 (PCIe 5): park 0.05 s, wake 0.44 s.

    python -m roundhouse_worker.parking FOLDER     measures the machine with a model's safetensors files
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from roundhouse_worker import hostcopy
from roundhouse_worker.arrival import Arrival
from roundhouse_worker.hostcopy import HostBuffer, Loaded

BUDGET_VARIABLE = "ROUNDHOUSE_PARK_BYTES"
"""Most bytes of host memory that the copy may take, from the scheduler; absent there: the model is not to be parked."""
AUTO_MARGIN = 1.25
RESIDUE_USUAL_BYTES = 64 << 20
"""What torch may hold after a park; more than that may be held by garbage."""


def prepare_environment() -> None:
    """Make torch's own page-locking fast (2 s instead of 9 s for 16 GiB). Call before torch is imported.

    Asked whether there is a GPU, as libraries do when they are imported, torch is to ask the driver's monitor: CUDA
    itself would then be initialised, and a spare process could not choose its GPUs any more.
    """
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "pinned_use_cuda_host_register:True,pinned_num_register_threads:8")


@dataclass(frozen=True, slots=True)
class Plan:
    """Whether a copy of the weights is made in host memory.

    Attributes:
        when: "load", "sleep" (at the first) or "never".
        note: why not, for a person.
    """

    when: str
    note: str | None = None


def plan(needed: int, host_copy: str, available: int, environment: Mapping[str, str] = os.environ) -> Plan:
    """Decide about the copy before any memory is taken.

    Args:
        needed: how many bytes it takes.
        host_copy: the flag `--host-copy`, which decides where no scheduler does: "load", "sleep" or "auto".
        available: how much host memory can be had now, in bytes.
        environment: under a scheduler `ROUNDHOUSE_INSTANCE` is set, and `ROUNDHOUSE_PARK_BYTES` if the model may park.
    """
    budget = environment.get(BUDGET_VARIABLE)
    if budget is None and not environment.get("ROUNDHOUSE_INSTANCE"):
        if host_copy == "auto":
            return Plan("load" if available > AUTO_MARGIN * needed else "sleep")
        return Plan(host_copy)
    if budget is None:
        return Plan("never", "the scheduler does not mean to park it, so no copy of its weights was made")
    if needed > int(budget):
        return Plan(
            "never", f"its weights take {_gib(needed)}, more than the {_gib(int(budget))} left for parked models"
        )
    if needed > available:
        return Plan("never", f"its weights take {_gib(needed)}, but only {_gib(available)} of host memory can be had")
    return Plan("load")


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


@dataclass(frozen=True, slots=True)
class _View:
    """How one tensor looks into the buffer: offset in elements, its end in bytes."""

    tensor: Any
    dtype: Any
    offset: int
    size: Any
    stride: Any
    end: int


class Parker:
    """Holds the host copy of some modules' weights.

    Two buffers at most: the one that the weights were read through (`hostcopy.load`), and one of its own for whatever
    else the modules hold. A storage is copied once, so tied weights stay tied. Moves as `Module.to` does, by
    `tensor.data = other`: parameters stay the same objects. Not for modules with offload hooks (those move weights
    themselves) or CUDA graphs (those remember addresses).
    """

    def __init__(self, modules: Iterable[Any], device: str, loaded: Loaded | None = None, *, lock: bool = True) -> None:
        """Make the host copy of what `loaded` does not hold; the modules stay on `device`.

        Args:
            modules: all their tensors are on `device`, or on the CPU (those stay there).
            device: where the weights are, and come back to.
            loaded: what `hostcopy.load` gave for them; its `host` becomes the Parker's.
            lock: page-lock what is made here.

        Raises:
            RuntimeError, MemoryError: the host memory does not suffice.
        """
        import torch  # pyright: ignore[reportMissingImports]

        self._torch: Any = torch
        self._device: Any = torch.device(device)
        self._modules = list(modules)
        storages = _storages(self._modules, self._device)
        self._held: list[tuple[HostBuffer, list[_View]]] = []
        if loaded is not None and loaded.host is not None:
            members = storages.pop(loaded.flat.untyped_storage()._cdata, [])
            self._held.append((loaded.host, [_view(tensor, 0) for tensor in members]))
        if storages:
            self._held.append(self._copied(list(storages.values()), lock))

    def _copied(self, storages: list[list[Any]], lock: bool) -> tuple[HostBuffer, list[_View]]:
        starts = [0]
        for members in storages:
            size = members[0].untyped_storage().nbytes()
            starts.append(hostcopy._up(starts[-1] + size, hostcopy.ALIGN_BYTES))  # pyright: ignore[reportPrivateUsage]
        host = HostBuffer(starts[-1])
        if lock and self._on_cuda:
            host.lock_all(self._device)
        views: list[_View] = []
        for start, members in zip(starts, storages, strict=False):
            storage = members[0].untyped_storage()
            whole = self._torch.empty(0, dtype=self._torch.uint8, device=storage.device).set_(storage)
            host.copy_from(whole, start)
            views += [_view(tensor, start) for tensor in members]
        return host, views

    @property
    def size_bytes(self) -> int:
        """How much host memory the copy takes."""
        return sum(host.size for host, _ in self._held)

    @property
    def note(self) -> str | None:
        """What a person should know about the copy, if there is something."""
        refused = next((host.refused for host, _ in self._held if host.refused is not None), None)
        return None if refused is None else hostcopy.refusal_note(self.size_bytes, refused)

    @property
    def _on_cuda(self) -> bool:
        return self._device.type == "cuda"

    def park(self) -> int:
        """Let the device's memory go; how many bytes torch holds there still."""
        for host, views in self._held:
            self._point_at(host.tensor, views)
        return release_device_memory(self._torch, collect=False) if self._on_cuda else 0

    def wake(self, meanwhile: Callable[[Arrival], object] | None = None) -> float:
        """Bring the weights back; how long that took, in seconds.

        Args:
            meanwhile: called while they are on their way, each module of which waits for its own; see `Arrival`.

        Raises:
            RuntimeError: the device's memory does not suffice.
        """
        arrival = Arrival(self._torch, self._device)
        placed: list[tuple[Any, list[_View]]] = []
        # The small rest first: who needs it does not wait for everything.
        for host, views in sorted(self._held, key=lambda held: held[0].size):
            there = self._torch.empty(host.size, dtype=self._torch.uint8, device=self._device)
            arrival.add(host, there, ((view.tensor, view.end) for view in views))
            placed.append((there, views))
        arrival.begin()
        try:
            for there, views in placed:
                self._point_at(there, views)
            if meanwhile is not None:
                with arrival.awaited(self._modules):
                    meanwhile(arrival)
        finally:
            took = arrival.end()
        return took

    def close(self) -> None:
        """Unlock the copy; its memory goes with the last tensor that looks into it."""
        for host, _ in self._held:
            host.close()
        self._held.clear()

    def _point_at(self, flat: Any, views: Iterable[_View]) -> None:
        for view in views:
            empty = self._torch.empty(0, dtype=view.dtype, device=flat.device)
            view.tensor.data = empty.set_(flat.untyped_storage(), view.offset, view.size, view.stride)


def _view(tensor: Any, start: int) -> _View:
    offset, size, stride = start // tensor.element_size() + tensor.storage_offset(), tensor.size(), tensor.stride()
    elements = 1 + sum((side - 1) * step for side, step in zip(size, stride, strict=True)) if tensor.numel() else 0
    return _View(tensor, tensor.dtype, offset, size, stride, (offset + elements) * tensor.element_size())


def _storages(modules: Iterable[Any], device: Any) -> dict[int, list[Any]]:
    """The tensors of the modules that are on the device, by storage."""
    tensors: dict[int, Any] = {}
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.device.type == device.type and tensor.untyped_storage().nbytes():
                tensors[id(tensor)] = tensor
    storages: dict[int, list[Any]] = {}
    for tensor in tensors.values():
        storages.setdefault(tensor.untyped_storage()._cdata, []).append(tensor)
    return storages


def release_device_memory(torch: Any, *, collect: bool = True) -> int:
    """Give the driver back all that torch keeps without need; how many bytes torch holds still.

    Args:
        collect: collect garbage first. That takes 0.2 s in a process with a pipeline; without, only if much is left.

    What is left then is the context's and the libraries' own (0.7 GB on an H100): only the end of the process frees it.
    """
    import gc

    torch.cuda.synchronize()
    if collect:
        gc.collect()
    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if clear is not None:
        clear()
    torch.cuda.empty_cache()  # else torch keeps it from the next model's process
    left = torch.cuda.memory_reserved()
    if left > RESIDUE_USUAL_BYTES and not collect:
        return release_device_memory(torch)
    return left


def weights_bytes(modules: Iterable[Any]) -> int:
    """How much memory the modules' weights take, in bytes."""
    sizes: dict[int, int] = {}
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            storage = tensor.untyped_storage()
            sizes[storage._cdata] = storage.nbytes()
    return sum(sizes.values())


def available_bytes(root: str = "/") -> int:
    """How much host memory can be had, in bytes: the machine's and, in a container, its limit's.

    Pages of files that nobody uses count as free: the kernel drops them.
    """
    with open(os.path.join(root, "proc/meminfo"), encoding="ascii") as lines:
        free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 0)
    groups = [
        ("sys/fs/cgroup", "", "memory.max", "memory.current", "inactive_file"),
        ("sys/fs/cgroup/memory", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ]
    for mount, controller, limit, used, idle in groups:
        for group in _groups(root, controller):
            folder = os.path.join(root, mount, group)
            try:
                most, now = _number(os.path.join(folder, limit)), _number(os.path.join(folder, used))
            except (OSError, ValueError):  # no such limit, or "max"
                continue
            free = min(free, most - now + _stat(os.path.join(folder, "memory.stat"), idle))
    return max(free, 0)


def _groups(root: str, controller: str) -> list[str]:
    """The cgroup of this process and those above it, as paths below the mount; the last is the mount itself.

    In a container with a namespace of its own that is all there is; a unit of systemd or a job of Slurm lies deeper.
    """
    try:
        with open(os.path.join(root, "proc/self/cgroup"), encoding="utf-8") as lines:
            entries = [line.rstrip("\n").split(":", 2) for line in lines]
    except OSError:
        entries = []
    own = next((entry[2] for entry in entries if len(entry) == 3 and controller in entry[1].split(",")), "/")
    parts = [part for part in own.split("/") if part not in ("", "..")]
    return ["/".join(parts[:depth]) for depth in range(len(parts), -1, -1)]


def _number(path: str) -> int:
    with open(path, encoding="ascii") as file:
        return int(file.read())


def _stat(path: str, name: str) -> int:
    try:
        with open(path, encoding="ascii") as lines:
            return next((int(value) for key, value in map(str.split, lines) if key == name), 0)
    except (OSError, ValueError):
        return 0


if __name__ == "__main__":
    from roundhouse_worker.parking_bench import main

    raise SystemExit(main())
