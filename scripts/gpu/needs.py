"""What the procedure needs of a machine, looked at before minutes are spent."""

from __future__ import annotations

import pathlib
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass

from gpu.common import ROOT, Failed
from gpu.models import Model

GB = 10**9
OF_ALL = {"starlette", "uvicorn"}
OF_TORCH = {"torch", "transformers", "safetensors", "numpy"}
OF_ENGINE = {
    "flux": OF_TORCH | {"diffusers", "PIL"},
    "musicgen": OF_TORCH | {"soundfile"},
    "vllm": {"torch", "transformers", "vllm"},
    "echo": set[str](),
}
"""Libraries by the folder in models/."""
WEIGHTS_GB = {"flux-transformer": 24, "flux": 34, "musicgen": 4, "text": 16}
"""At real scale. In files, but for `text`, which has none, and in host memory while a model is parked."""
SHARED_GB = 24
"""What `flux` has of `flux-transformer`, as a link."""
CACHES_GB = 11
"""And logs, and the files of the part `ways`."""
PARKED_SHARE = 0.8
"""How much of the memory that parked models take is theirs alone: what else is locked, and the files' pages, is not."""
WORKERS_GB = 16
"""Of processes."""


@dataclass(frozen=True)
class Python:
    """An interpreter that is used.

    Attributes:
        advice: what to do if it will not do.
    """

    path: str
    libraries: set[str]
    advice: str


def libraries(pythons: dict[str, Python]) -> None:
    """That each interpreter is there and has what is imported; they are named by what they are for.

    Raises:
        Failed: with a line for each that will not do.
    """
    wrong: list[str] = []
    for what, python in pythons.items():
        if shutil.which(python.path) is None:
            wrong.append(f"{what}: there is no interpreter {python.path}; {python.advice}")
        elif trouble := trouble_of(python.path, python.libraries):
            wrong.append(f"{what}: {python.path} {trouble}; {python.advice}")
    if wrong:
        raise Failed("\n".join([*wrong, "or leave out what needs them by --models and --only"]))


def trouble_of(python: str, names: Iterable[str]) -> str:
    """Which libraries an interpreter lacks, or that it does not run; empty if all is well."""
    code = f"import importlib.util as u; print(*[n for n in {sorted(names)} if u.find_spec(n) is None])"
    run = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    if run.returncode:
        return f"does not run: {(run.stderr.splitlines() or [f'status {run.returncode}'])[-1]}"
    missing = run.stdout.split()
    return f"lacks {', '.join(missing)}" if missing else ""


def files_gb(models: Iterable[str], made: Iterable[str]) -> int:
    """How much disk the checkpoints take that are yet to be made, in GB, with caches and logs."""
    missing = set(models) - set(made)
    shares = "flux" in missing and "flux-transformer" in {*models, *made}
    return sum(WEIGHTS_GB[name] for name in missing if name != "text") - (SHARED_GB if shares else 0) + CACHES_GB


def memory_gb(models: Iterable[str]) -> int:
    """How much host memory it takes to have them all parked, in GB."""
    return round(sum(WEIGHTS_GB[name] for name in models) / PARKED_SHARE) + WORKERS_GB


def room(models: list[Model], folder: pathlib.Path, *, makes: bool, parks: bool) -> None:
    """That disk and memory suffice at real scale.

    Args:
        folder: where the checkpoints lie or are made.
        makes: whether those that are missing are made.
        parks: whether models are parked.

    Raises:
        Failed: they do not; the text has both figures and what to do.
    """
    names = [model.name for model in models]
    if makes:
        made = [name for name in WEIGHTS_GB if (folder / name / ".complete").exists()]
        wanted, free = files_gb(names, made), disk_gb(folder)
        if set(names) - set(made) and free < wanted:
            raise Failed(f"{folder}: {free} GB free, {wanted} wanted; name a larger disk by --checkpoints")
    if parks and (has := machine_gb()) < (wanted := memory_gb(names)):
        raise Failed(
            f"this machine has {has} GB of memory, and to park {', '.join(names)} takes {wanted}; "
            "choose fewer by --models"
        )


def disk_gb(folder: pathlib.Path) -> int:
    """Free space where a folder is, or will be, in GB."""
    there = next(each for each in (folder, *folder.parents) if each.exists())
    return shutil.disk_usage(there).free // GB


def machine_gb() -> int:
    """Memory of this machine, or of this container if that has less, in GB."""
    lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal:")]
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):
        path = pathlib.Path("/sys/fs/cgroup") / limit
        text = path.read_text().strip() if path.is_file() else ""
        found += [int(text)] if text.isdigit() else []
    return min(found) // GB
