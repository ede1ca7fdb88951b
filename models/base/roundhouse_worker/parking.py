"""Park a torch model in host memory and wake it again. Needs torch, imports it late.

Weights do not change, so their host copy is made once and kept: parking copies nothing and only lets the device's
memory go; waking is one large copy per storage, at the speed of the link if the host copy is page-locked.
Measured with 23.8 GB on an H100 (PCIe 5): park 0.05 s, wake 0.44 s.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


def prepare_environment() -> None:
    """Make page-locking fast (2 s instead of 9 s for 16 GiB). Call before torch is imported."""
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "pinned_use_cuda_host_register:True,pinned_num_register_threads:8")


@dataclass(frozen=True, slots=True)
class _View:
    """How one tensor looks into its storage."""

    tensor: Any
    dtype: Any
    offset: int
    size: Any
    stride: Any


class Parker:
    """Holds the host copy of some modules' weights.

    One buffer a storage, so tied weights stay tied. Moves as `Module.to` does, by `tensor.data = other`: parameters
    stay the same objects. Not for modules with offload hooks (those move weights themselves) or CUDA graphs (those
    remember addresses).
    """

    def __init__(self, modules: Iterable[Any], device: str) -> None:
        """Make the host copy; the modules stay on `device`.

        Raises:
            RuntimeError: the host memory does not suffice.
        """
        import torch  # pyright: ignore[reportMissingImports]

        self._torch: Any = torch
        self._device: Any = torch.device(device)
        tensors: dict[int, Any] = {}
        for module in modules:
            for tensor in (*module.parameters(), *module.buffers()):
                if tensor.untyped_storage().nbytes():
                    tensors[id(tensor)] = tensor
        storages: dict[int, list[Any]] = {}
        for tensor in tensors.values():
            storages.setdefault(tensor.untyped_storage()._cdata, []).append(tensor)
        self._held: list[tuple[Any, list[_View]]] = []
        for members in storages.values():
            storage = members[0].untyped_storage()
            host = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=self._on_cuda)
            host.copy_(torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage))
            views = [_View(t, t.dtype, t.storage_offset(), t.size(), t.stride()) for t in members]
            self._held.append((host, views))
        self.size_bytes: int = sum(host.numel() for host, _ in self._held)

    @property
    def _on_cuda(self) -> bool:
        return self._device.type == "cuda"

    def park(self) -> None:
        """Let the device's memory go."""
        for host, views in self._held:
            self._point_at(host, views)
        if self._on_cuda:
            self._torch.cuda.synchronize()
            self._torch.cuda.empty_cache()  # else torch keeps it from the next model's process

    def wake(self) -> None:
        """Bring the weights back."""
        for host, views in self._held:
            there = self._torch.empty_like(host, device=self._device, pin_memory=False)
            there.copy_(host, non_blocking=True)
            self._point_at(there, views)
        if self._on_cuda:
            self._torch.cuda.synchronize()

    def _point_at(self, flat: Any, views: Iterable[_View]) -> None:
        for view in views:
            empty = self._torch.empty(0, dtype=view.dtype, device=flat.device)
            view.tensor.data = empty.set_(flat.untyped_storage(), view.offset, view.size, view.stride)


def weights_bytes(modules: Iterable[Any]) -> int:
    """How much memory the modules' weights take, in bytes."""
    sizes: dict[int, int] = {}
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            storage = tensor.untyped_storage()
            sizes[storage._cdata] = storage.nbytes()
    return sum(sizes.values())


def available_bytes() -> int:
    """How much host memory can be had, in bytes: the machine's and, in a container, its limit's."""
    with open("/proc/meminfo", encoding="ascii") as lines:
        free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 0)
    limits = {
        "/sys/fs/cgroup/memory.max": "/sys/fs/cgroup/memory.current",
        "/sys/fs/cgroup/memory/memory.limit_in_bytes": "/sys/fs/cgroup/memory/memory.usage_in_bytes",
    }
    for limit, used in limits.items():
        try:
            with open(limit, encoding="ascii") as most, open(used, encoding="ascii") as now:
                free = min(free, int(most.read()) - int(now.read()))
        except (OSError, ValueError):  # no such limit, or "max"
            continue
    return max(free, 0)
