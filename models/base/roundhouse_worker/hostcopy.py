"""Weights from safetensors files into host memory, and from there to a device. Imports torch late.

Ordinary loaders read with one thread, through a mapping, and copy from pageable memory. Here many threads read straight
into one large buffer, which is page-locked while they read, and every finished block goes to the device at once. The
buffer can stay: it is then the copy that a parked model wakes from (`parking`), so host memory holds the weights once.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import mmap
import os
import pathlib
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from roundhouse_worker import log

READERS = 16
PIECE_BYTES = 16 << 20
"""What one thread reads at once."""
BLOCK_BYTES = 256 << 20
"""What is page-locked as one range and copied as one: a copy may not cross two locked ranges."""
BLOCKS_AHEAD = 8
"""How many blocks are read at the same time; without a host copy, also how many there are in memory."""
ALIGN_BYTES = 512
"""Where a tensor may start, as torch's own allocator does: kernels choose their way by alignment."""
HEADER_LIMIT_BYTES = 100_000_000

DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
}
SIZES = dict(DTYPES.values())


class Refused(Exception):
    """Memory could not be page-locked; the text says why."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor in a safetensors file: its dtype's name in torch, where its bytes are."""

    path: pathlib.Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a tensor goes in the buffer, and as which dtype."""

    entry: Entry
    dtype: str
    start: int
    size: int


class Layout:
    """Which tensors share a buffer, and where in it each of them is."""

    def __init__(self) -> None:
        self.slots: list[Slot] = []
        self.size = 0

    def add(self, entry: Entry, dtype: str) -> Slot:
        """Give a tensor its place."""
        size = entry.size // SIZES[entry.dtype] * SIZES[dtype]
        slot = Slot(entry, dtype, self.size, size)
        self.slots.append(slot)
        self.size = _up(self.size + size, ALIGN_BYTES)
        return slot


def entries(path: pathlib.Path) -> dict[str, Entry]:
    """The tensors of a safetensors file, by name.

    Raises:
        ValueError: it is no such file, or has a dtype that is not known here.
    """
    total = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else total
        if length > min(total - 8, HEADER_LIMIT_BYTES):
            raise ValueError(f"{path} is no whole safetensors file")
        header: dict[str, Any] = json.loads(file.read(length))
    found: dict[str, Entry] = {}
    for name, told in header.items():
        if name == "__metadata__":
            continue
        if told["dtype"] not in DTYPES:
            raise ValueError(f"{path}: {name} has the dtype {told['dtype']}, which is not known here")
        dtype, width = DTYPES[told["dtype"]]
        first, end = told["data_offsets"]
        size = width
        for side in told["shape"]:
            size *= side
        if end - first != size or 8 + length + end > total:
            raise ValueError(f"{path}: the file does not hold all of {name}")
        found[name] = Entry(path, dtype, tuple(told["shape"]), 8 + length + first, size)
    return found


def files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The safetensors files of one model's folder as its library would choose them; empty: not for sure."""
    for base in ("diffusion_pytorch_model", "model"):
        single, index = folder / f"{base}.safetensors", folder / f"{base}.safetensors.index.json"
        if single.is_file() and index.is_file():
            return []
        if single.is_file():
            return [single]
        if index.is_file():
            names = set(json.loads(index.read_text())["weight_map"].values())
            found = [folder / name for name in sorted(names)]
            return found if all(file.is_file() for file in found) else []
    return []


class HostBuffer:
    """Anonymous host memory in huge pages, page-locked block by block; `tensor` shows it to torch as bytes."""

    def __init__(self, size: int, *, huge: bool = True) -> None:
        """Reserve; the memory itself is taken when it is written."""
        import torch  # pyright: ignore[reportMissingImports]

        self.size = size
        # Private: shared memory gets no huge pages. Not for children: a fork would copy all that is page-locked.
        self._map = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for advice in (mmap.MADV_DONTFORK, mmap.MADV_HUGEPAGE if huge else None):
            if advice is not None:
                with contextlib.suppress(OSError):  # a kernel that does not know it
                    self._map.madvise(advice)
        self.tensor: Any = torch.frombuffer(self._map, dtype=torch.uint8)[:size]
        self.address: int = self.tensor.data_ptr() if size else 0
        self.bytes = memoryview(self._map)[:size]
        self._locked: dict[int, int] = {}
        self._guard = threading.Lock()
        self.refused: str | None = None
        """Why not all of it is page-locked."""

    def blocks(self) -> list[range]:
        """The ranges that are locked and copied as one."""
        return [range(start, min(start + BLOCK_BYTES, self.size)) for start in range(0, self.size, BLOCK_BYTES)]

    @property
    def locked_bytes(self) -> int:
        with self._guard:
            return sum(self._locked.values())

    def lock(self, block: range, device: Any) -> None:
        """Page-lock a block. Never raises: after a refusal, the rest stays pageable.

        Call it in a thread of its own: a CUDA error stays with the thread that made it.
        """
        if self.refused is not None:
            return
        try:
            register(self.address + block.start, len(block), device)
        except Refused as error:
            self.refused = str(error)
            return
        with self._guard:
            self._locked[block.start] = len(block)

    def lock_all(self, device: Any) -> None:
        """Page-lock every block, in threads."""
        with ThreadPoolExecutor(READERS, "lock") as pool:
            list(pool.map(lambda block: self.lock(block, device), self.blocks()))

    def copy_to(self, flat: Any, block: range) -> None:
        """Start the copy of a block to the device."""
        flat[block.start : block.stop].copy_(self.tensor[block.start : block.stop], non_blocking=True)

    def copy_from(self, flat: Any, start: int) -> None:
        """Copy bytes from the device to `start`, and wait for them."""
        at, end = start, start + flat.numel()
        while at < end:
            border = min(end, (at // BLOCK_BYTES + 1) * BLOCK_BYTES)
            self.tensor[at:border].copy_(flat[at - start : border - start])
            at = border

    def close(self) -> None:
        """Unlock; the memory goes when the last tensor that looks into it is gone."""
        with self._guard:
            locked, self._locked = self._locked, {}
        if locked:
            with ThreadPoolExecutor(1, "unlock") as pool:
                list(pool.map(lambda start: unregister(self.address + start), locked))

    def __del__(self) -> None:
        if getattr(self, "_locked", None):
            with contextlib.suppress(Exception):  # the process may be ending
                for start in self._locked:
                    unregister(self.address + start)


def register(address: int, size: int, device: Any) -> None:
    """Page-lock a range for copies.

    Raises:
        Refused: the driver said no.
    """
    import torch  # pyright: ignore[reportMissingImports]

    with torch.cuda.device(device):
        runtime: Any = torch.cuda.cudart()
        code = runtime.cudaHostRegister(address, size, 0)
    if int(code) != 0:
        raise Refused(f"{runtime.cudaGetErrorString(code)}, CUDA error {int(code)}")


def unregister(address: int) -> None:
    """Undo `register`."""
    import torch  # pyright: ignore[reportMissingImports]

    torch.cuda.cudart().cudaHostUnregister(address)


def refusal_note(size: int, reason: str) -> str:
    """What to tell a person when page-locking was refused."""
    import resource

    most = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    limit = "unlimited" if most == resource.RLIM_INFINITY else f"{most >> 10} KiB"
    return (
        f"page-locking {size / 2**30:.1f} GiB was refused ({reason}; `ulimit -l` is {limit}): "
        "parking goes on with pageable memory, wakes are slower"
    )


@dataclass(slots=True)
class Loaded:
    """Weights on their device, and where they came from.

    Attributes:
        flat: one tensor of bytes on the device that holds all of them.
        host: the copy that was kept, or None.
    """

    flat: Any
    host: HostBuffer | None


def load(
    layout: Layout, device: Any, *, keep: bool, lock: bool = True, report: Callable[[str, float], None] | None = None
) -> Loaded:
    """Read all of a layout onto a device.

    Args:
        layout: what to read.
        device: a `torch.device`. On a CPU the buffer itself is where the weights are, unless `keep` asks for a copy.
        keep: keep all of it in host memory. Otherwise only `BLOCKS_AHEAD` blocks are there at a time.
        lock: page-lock the host memory (CUDA only).
        report: called with "read" or "device" and the part that is done, from 0 to 1; may raise to end it.

    Raises:
        OSError, ValueError: a file could not be read, or is shorter than its header says.
        RuntimeError: the memory of the host or the device does not suffice.
    """
    import torch  # pyright: ignore[reportMissingImports]

    on_cuda = device.type == "cuda"
    lock = lock and on_cuda
    say = report or (lambda phase, part: None)
    say("read", 0.0)
    if not on_cuda and not keep:
        host = HostBuffer(layout.size)
        for block in _filled(layout, host, None, host.blocks()):
            say("read", block.stop / layout.size)
        return Loaded(host.tensor, host)
    flat = torch.empty(layout.size, dtype=torch.uint8, device=device)
    if keep:
        host = HostBuffer(layout.size)
        try:
            for block in _filled(layout, host, device if lock else None, host.blocks()):
                host.copy_to(flat, block)
                say("read", block.stop / layout.size)
            say("device", 1.0)
        finally:
            _wait(device)  # also if it failed: what is still being copied must not go away
        return Loaded(flat, host)
    _through_ring(layout, flat, device, lock, say)
    return Loaded(flat, None)


def _through_ring(layout: Layout, flat: Any, device: Any, lock: bool, say: Callable[[str, float], None]) -> None:
    """Read through a few blocks of host memory that are used again and again."""
    import torch  # pyright: ignore[reportMissingImports]

    blocks = [range(start, min(start + BLOCK_BYTES, layout.size)) for start in range(0, layout.size, BLOCK_BYTES)]
    ring = HostBuffer(min(BLOCKS_AHEAD * BLOCK_BYTES, layout.size))
    try:
        if lock:
            ring.lock_all(device)
        events: dict[int, Any] = {}

        def free(block: range) -> None:
            """Wait until what was last in this block's place has been copied."""
            event = events.pop(block.start // BLOCK_BYTES - BLOCKS_AHEAD, None)
            if event is not None:
                event.synchronize()

        for block in _filled(layout, ring, None, blocks, before=free):
            start = block.start % ring.size if ring.size else 0
            flat[block.start : block.stop].copy_(ring.tensor[start : start + len(block)], non_blocking=True)
            if device.type == "cuda":
                event = events[block.start // BLOCK_BYTES] = torch.cuda.Event()
                event.record(torch.cuda.current_stream(device))
            say("read", block.stop / layout.size)
        say("device", 1.0)
    finally:
        _wait(device)
        ring.close()


def _wait(device: Any) -> None:
    if device.type == "cuda":
        import torch  # pyright: ignore[reportMissingImports]

        torch.cuda.synchronize(device)


def _filled(
    layout: Layout,
    host: HostBuffer,
    lock_on: Any,
    blocks: list[range],
    before: Callable[[range], None] | None = None,
) -> Iterator[range]:
    """Yield the blocks in order, each once it is read (and locked, if `lock_on` is a device)."""
    import torch  # pyright: ignore[reportMissingImports]

    pieces: dict[int, list[_Piece]] = {block.start: [] for block in blocks}
    for piece in _pieces(layout):
        pieces[piece.start // BLOCK_BYTES * BLOCK_BYTES].append(piece)
    converts = any(slot.dtype != slot.entry.dtype for slot in layout.slots)
    threads = torch.get_num_threads()
    with contextlib.ExitStack() as stack:
        opened: dict[pathlib.Path, int] = {}
        for path in {slot.entry.path for slot in layout.slots}:
            opened[path] = os.open(path, os.O_RDONLY)
            stack.callback(os.close, opened[path])
        if converts:  # each reader converts what it has read: it must not start threads for that
            torch.set_num_threads(1)
            stack.callback(torch.set_num_threads, threads)
        pool = ThreadPoolExecutor(READERS, "read")
        stack.callback(pool.shutdown, wait=True, cancel_futures=True)

        def start(block: range) -> Future[None]:
            if before is not None:
                before(block)
            return _Block(block, pieces.pop(block.start), host, opened, lock_on).start(pool)

        running: list[Future[None]] = []
        for number, block in enumerate(blocks):
            while len(running) < len(blocks) and len(running) < number + BLOCKS_AHEAD:
                running.append(start(blocks[len(running)]))
            running[number].result()
            yield block


class _Block:
    """Reads one block with many threads; the last of them page-locks it."""

    def __init__(
        self, block: range, pieces: list[_Piece], host: HostBuffer, opened: dict[pathlib.Path, int], lock_on: Any
    ) -> None:
        self._block = block
        self._pieces = pieces
        self._host = host
        self._opened = opened
        self._lock_on = lock_on
        self._left = max(len(pieces), 1)
        self._guard = threading.Lock()
        self._done: Future[None] = Future()

    def start(self, pool: ThreadPoolExecutor) -> Future[None]:
        if not self._pieces:
            self._done.set_result(None)
        for piece in self._pieces:
            pool.submit(self._work, piece)
        return self._done

    def _work(self, piece: _Piece) -> None:
        try:
            piece.read(self._opened[piece.path], self._host)
            with self._guard:
                self._left -= 1
                last = self._left == 0
            if last:
                if self._lock_on is not None:
                    self._host.lock(self._block, self._lock_on)
                self._done.set_result(None)
        except BaseException as error:
            with self._guard:
                if not self._done.done():
                    self._done.set_exception(error)


@dataclass(frozen=True, slots=True)
class _Piece:
    """A part of a tensor: `size` bytes of the file become `count` elements at `start` of the layout."""

    path: pathlib.Path
    file_start: int
    size: int
    file_dtype: str
    start: int
    count: int
    dtype: str

    def read(self, file: int, host: HostBuffer) -> None:
        length = self.count * SIZES[self.dtype]
        start = self.start % host.size
        if self.dtype == self.file_dtype:
            _read(file, host.bytes[start : start + length], self.file_start, self.path)
            return
        import torch  # pyright: ignore[reportMissingImports]

        raw = bytearray(self.size)
        _read(file, memoryview(raw), self.file_start, self.path)
        there = host.tensor[start : start + length].view(getattr(torch, self.dtype))
        there.copy_(torch.frombuffer(raw, dtype=getattr(torch, self.file_dtype)))


def _pieces(layout: Layout) -> Iterable[_Piece]:
    """The layout cut at `PIECE_BYTES` and at the blocks' borders; a border is never inside an element."""
    for slot in layout.slots:
        width, file_width = SIZES[slot.dtype], SIZES[slot.entry.dtype]
        at, end = slot.start, slot.start + slot.size
        while at < end:
            border = min(end, (at // BLOCK_BYTES + 1) * BLOCK_BYTES, at + PIECE_BYTES)
            count = (border - at) // width
            file_start = slot.entry.start + (at - slot.start) // width * file_width
            yield _Piece(slot.entry.path, file_start, count * file_width, slot.entry.dtype, at, count, slot.dtype)
            at = border


def _read(file: int, into: memoryview, start: int, path: pathlib.Path) -> None:
    done = 0
    while done < len(into):
        got = os.preadv(file, [into[done:]], start + done)
        if got == 0:
            raise ValueError(f"{path} is shorter than its header says")
        done += got


def start_context(number: int = 0) -> threading.Thread | None:
    """Make the device's context in a thread, while something else goes on (imports); None if there is no driver.

    The primary context of the driver is the one torch uses. Takes no lock of Python's while it works.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None

    def make() -> None:
        device, context = ctypes.c_int(), ctypes.c_void_p()
        code = (
            driver.cuInit(0)
            or driver.cuDeviceGet(ctypes.byref(device), number)
            or driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
        )
        if code:  # torch will meet the same and say it better
            log.event(logging.INFO, "no context made ahead", cuda_error=code)

    thread = threading.Thread(target=make, name="context", daemon=True)
    thread.start()
    return thread


def _up(value: int, step: int) -> int:
    return -(-value // step) * step
