"""Use weights while they are still on their way to the device: every module waits for its own, and for no more.

The copies go one after another in a fixed order, so what has to be waited for is a number of copies. On a GPU it is the
GPU that waits (an event of the copies' stream), while the thread that starts its work runs ahead: all that a first step
costs but the work itself is hidden behind the copies. Without a GPU a copy is made when it is waited for.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

from roundhouse_worker.hostcopy import HostBuffer

AHEAD = 3
"""Copies that are handed to the driver and not over. Few: with more its queue is full, and whoever starts a kernel then
waits for room there, together with the copies, instead of running ahead."""


class Arrival:
    """The copies of one wake. Modules are used by one thread, on the stream that is its current one."""

    def __init__(self, torch: Any, device: Any) -> None:
        self._torch = torch
        self._device = device
        self._copies: list[tuple[HostBuffer, Any, range]] = []
        self._needs: dict[int, int] = {}
        """How many copies have to be over, by the id of the tensor."""
        self._waited = 0
        self._began = time.monotonic()
        self._start: Any = None
        self._ends: list[Any] = []
        """An event for each copy that is handed over."""
        self._took = 0.0
        self._news = threading.Condition()
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def add(self, host: HostBuffer, flat: Any, tensors: Iterable[tuple[Any, int]]) -> None:
        """Plan the copy of a whole buffer.

        Args:
            host: where from.
            flat: where to: bytes on the device, as many.
            tensors: those that look into it, each with the offset in bytes at which it ends there.
        """
        before, blocks = len(self._copies), host.blocks()
        self._copies += [(host, flat, block) for block in blocks]
        for tensor, end in tensors:
            through = next((i for i, block in enumerate(blocks, 1) if end <= block.stop), len(blocks))
            self._needs[id(tensor)] = before + through

    def begin(self) -> None:
        """Start the copies; none of it is waited for."""
        if self._on_cuda:
            stream = self._torch.cuda.Stream(self._device)
            stream.wait_stream(self._torch.cuda.current_stream(self._device))
            self._thread = threading.Thread(target=self._copy_all, args=(stream,), name="arrival", daemon=True)
            self._thread.start()

    def end(self) -> float:
        """Wait until everything is there; how long that took from the making of this, in seconds."""
        if not self._on_cuda:
            self._wait(len(self._copies))
            return time.monotonic() - self._began
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error
        if self._ends:
            self._ends[-1].synchronize()
            self._took += self._start.elapsed_time(self._ends[-1]) / 1e3
        return self._took

    def wait_for(self, module: Any) -> None:
        """Let what the caller starts next wait for a module and all that is in it."""
        self._wait(self._need(module, deep=True))

    @contextlib.contextmanager
    def awaited(self, modules: Iterable[Any]) -> Iterator[None]:
        """Meanwhile each part of the modules is waited for when it is called.

        What is used in another way than by a call needs `wait_for`.
        """
        hooks: list[Any] = []
        for module in modules:
            self._hook(module, hooks)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    # ---- inside --------------------------------------------------------------

    @property
    def _on_cuda(self) -> bool:
        return self._device.type == "cuda"

    def _copy_all(self, stream: Any) -> None:
        """*A thread of its own.*"""
        cuda = self._torch.cuda
        try:
            with cuda.device(self._device), cuda.stream(stream):
                self._start = cuda.Event(enable_timing=True)
                self._start.record()
                self._took = time.monotonic() - self._began
                for number, (host, flat, block) in enumerate(self._copies):
                    if number >= AHEAD:
                        self._ends[number - AHEAD].synchronize()
                    host.copy_to(flat, block)
                    end = cuda.Event(enable_timing=True, blocking=True)
                    end.record()
                    with self._news:
                        self._ends.append(end)
                        self._news.notify()
        except BaseException as error:  # raised again where it is waited for
            with self._news:
                self._error = error
                self._news.notify()

    def _hook(self, module: Any, hooks: list[Any]) -> None:
        """On the module, and where it is a stack of many, on its parts instead of all of it at once."""
        lists = (self._torch.nn.ModuleList, self._torch.nn.Sequential, self._torch.nn.ModuleDict)
        is_stack = any(isinstance(part, lists) for part in module.modules())
        if number := self._need(module, deep=not is_stack):
            # Before other hooks: some make weights out of others.
            hooks.append(module.register_forward_pre_hook(lambda *_: self._wait(number), prepend=True))
        if is_stack:
            for part in module.children():
                self._hook(part, hooks)

    def _need(self, module: Any, *, deep: bool) -> int:
        tensors = (*module.parameters(recurse=deep), *module.buffers(recurse=deep))
        return max((self._needs.get(id(tensor), 0) for tensor in tensors), default=0)

    def _wait(self, number: int) -> None:
        if number <= self._waited:
            return
        if self._on_cuda:
            with self._news:
                self._news.wait_for(lambda: len(self._ends) >= number or self._error is not None)
            if self._error is not None:
                raise self._error
            self._torch.cuda.current_stream(self._device).wait_event(self._ends[number - 1])
        else:
            for host, flat, block in self._copies[self._waited : number]:
                host.copy_to(flat, block)
        self._waited = number
