"""Where a model's weights lie on this machine. No network, no heavy imports."""

from __future__ import annotations

import importlib.util
import os
import pathlib

RANDOM_MARKER = "RANDOM_WEIGHTS"
"""A file of this name in a model's folder says that its weights are random: what comes out is noise."""
POD_VOLUME = pathlib.Path("/workspace")
"""Where RunPod mounts the volume that outlives a pod; all else there, the home folder too, goes with the pod."""


def default_cache() -> pathlib.Path:
    """The Hugging Face cache.

    `HF_HUB_CACHE`, else `hub` in `HF_HOME`, else on a RunPod pod its volume, else the usual place in the home folder.
    """
    cache = os.environ.get("HF_HUB_CACHE")
    if cache:
        return pathlib.Path(cache).expanduser()
    home = os.environ.get("HF_HOME")
    if not home and os.environ.get("RUNPOD_POD_ID") and POD_VOLUME.is_dir():
        home = str(POD_VOLUME / ".cache/huggingface")
    if not home:
        home = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return pathlib.Path(home).expanduser() / "hub"


def local_folder(model: str, revision: str = "main") -> pathlib.Path:
    """The folder that holds `model`: the folder itself, or the cached snapshot of a Hugging Face id.

    Raises:
        ValueError: it is not here; the text says how to get it.
    """
    folder = pathlib.Path(model).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise ValueError(f"--model: there is no folder {model}, and it is no Hugging Face id (ORG/NAME)")
    cached = default_cache() / f"models--{model.replace('/', '--')}"
    ref = cached / "refs" / revision
    commit = ref.read_text().strip() if ref.is_file() else revision
    snapshot = cached / "snapshots" / commit
    if not snapshot.is_dir():
        raise ValueError(f"--model: {model} (revision {revision}) is not in {default_cache()}; {_how(model, revision)}")
    return snapshot


def _how(model: str, revision: str) -> str:
    """How to get it; without its libraries the fetcher would be no help."""
    for library in ("httpx", "huggingface_hub"):
        if importlib.util.find_spec(library) is None:
            why = f"No module named '{library}'; run scripts/install.sh for this model"
            return f"this environment cannot fetch it ({why})"
    return f"fetch it: python -m roundhouse_worker.fetch --repo {model} --revision {revision}"


def is_random(folder: pathlib.Path) -> bool:
    """Whether the weights in `folder` are random."""
    return (folder / RANDOM_MARKER).is_file()
