"""What this machine gives for loading, parking and waking: `python -m roundhouse_worker.parking FOLDER`.

FOLDER holds safetensors files, as deep as they may lie; `--make GIB` writes one of random bytes there first. Needs only
torch; without CUDA it shows no more than that it works. All but the first reading is from the page cache.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import pathlib
import struct
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from roundhouse_worker import hostcopy, parking

PART_BYTES = 64 << 20


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print a line a step."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m roundhouse_worker.parking")
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--make", type=float, metavar="GIB", help="write a file of this size there first")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--block-mib", type=int, nargs="*", default=[128, 256, 512, 1024])
    parser.add_argument("--readers", type=int, nargs="*", default=[hostcopy.READERS])
    options = parser.parse_args(argv)

    parking.prepare_environment()
    began = time.perf_counter()
    import torch  # pyright: ignore[reportMissingImports]

    device = torch.device(
        ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    )
    torch.zeros(1, device=device)
    say("import torch, context", began)
    if options.make:
        make(options.folder / "made.safetensors", options.make)
    layout = hostcopy.Layout()
    for path in sorted(options.folder.rglob("*.safetensors")):
        for entry in hostcopy.entries(path).values():
            layout.add(entry, entry.dtype)
    if not layout.size:
        parser.error(f"{options.folder} has no safetensors files")
    print(f"{layout.size / 1e9:.2f} GB, {len(layout.slots)} tensors, {device}, {os.cpu_count()} cores")
    steps(layout, device, huge=False)
    steps(layout, device, huge=True)
    for readers in options.readers:
        for mib in options.block_mib:
            hostcopy.READERS, hostcopy.BLOCK_BYTES = readers, mib << 20
            for keep in (False, True):
                began = time.perf_counter()
                loaded = hostcopy.load(layout, device, keep=keep)
                say(f"load, keep={keep}, {readers} readers, blocks of {mib} MiB", began, layout.size)
                park_and_wake(torch, loaded, device, options.rounds if keep else 0)
                began = time.perf_counter()
                if loaded.host is not None:
                    loaded.host.close()
                del loaded
                say("    closed", began)
    return 0


def steps(layout: hostcopy.Layout, device: Any, *, huge: bool) -> None:
    """Each step alone, nothing overlapped."""
    print(f"one after another, huge pages: {huge}")
    host = hostcopy.HostBuffer(layout.size, huge=huge)
    for what in ("read into new memory", "read into old memory"):
        began = time.perf_counter()
        for _ in hostcopy._filled(layout, host, None, host.blocks()):  # pyright: ignore[reportPrivateUsage]
            pass
        say(f"    {what}", began, layout.size)
    if device.type == "cuda":
        for _ in range(2):
            began = time.perf_counter()
            host.lock_all(device)
            say(f"    lock what was written ({host.refused or 'ok'})", began, layout.size)
            began = time.perf_counter()
            host.close()
            say("    unlock", began, layout.size)
        new = hostcopy.HostBuffer(layout.size, huge=huge)
        began = time.perf_counter()
        new.lock_all(device)
        say("    lock new memory", began, layout.size)
        new.close()
        del new
    del host
    populated = hostcopy.HostBuffer(layout.size, huge=huge)
    began = time.perf_counter()
    done = populate(populated)
    say(f"    populate new memory ({done})", began, layout.size)


def populate(host: hostcopy.HostBuffer) -> str:
    """Take a buffer's memory with many threads."""
    libc = ctypes.CDLL(None, use_errno=True)

    def work(start: int) -> int:
        size = min(PART_BYTES, host.size - start)
        return libc.madvise(ctypes.c_void_p(host.address + start), ctypes.c_size_t(size), 23)  # MADV_POPULATE_WRITE

    with ThreadPoolExecutor(hostcopy.READERS) as pool:
        return "ok" if not any(pool.map(work, range(0, host.size, PART_BYTES))) else "refused"


def park_and_wake(torch: Any, loaded: hostcopy.Loaded, device: Any, rounds: int) -> None:
    """Park and wake what was loaded, and compare."""
    module = torch.nn.Module()
    module.register_buffer("all", loaded.flat)
    head = loaded.flat[: 1 << 20].clone(), loaded.flat[-(1 << 20) :].clone()
    parker = parking.Parker([module], device, loaded) if rounds else None
    loaded.flat = None
    if parker is None:
        return
    for _ in range(rounds):
        timed("    park", parker.park)
        timed("    wake", parker.wake, parker.size_bytes)
    same = torch.equal(module.all[: 1 << 20], head[0]) and torch.equal(module.all[-(1 << 20) :], head[1])
    held = torch.cuda.memory_reserved() / 1e6 if device.type == "cuda" else 0
    print(f"    same bytes: {same}; note: {parker.note}; torch holds {held:.0f} MB")


def timed(what: str, call: Callable[[], object], size: int | None = None) -> None:
    began = time.perf_counter()
    call()
    say(what, began, size)


def say(what: str, began: float, size: int | None = None) -> None:
    took = time.perf_counter() - began
    rate = f"  {size / 1e9 / took:6.1f} GB/s" if size else ""
    print(f"{what:<60} {took:8.3f} s{rate}", flush=True)


def make(path: pathlib.Path, gib: float) -> None:
    """A safetensors file of 64 MiB tensors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count = max(1, round(gib * 2**30 / PART_BYTES))
    header = {
        f"t{i:05}": {"dtype": "U8", "shape": [PART_BYTES], "data_offsets": [i * PART_BYTES, (i + 1) * PART_BYTES]}
        for i in range(count)
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    noise = os.urandom(PART_BYTES)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _ in range(count):
            file.write(noise)
