"""The models that are served, at each scale, and the model file of the real server."""

from __future__ import annotations

import json
import pathlib
import sys
from dataclasses import dataclass, field, replace
from typing import Any

from gpu.common import ROOT, Json, weights_bytes

GIB = 1 << 30
REAL, TINY = "real", "tiny"
HALF = 0.52


@dataclass(frozen=True)
class Model:
    """One model, and what is asked of it."""

    name: str
    kind: str
    """text, image or audio."""
    server: str
    """Folder in models/ whose server.py it is."""
    folder: pathlib.Path | None
    memory: int
    """Bytes."""
    endpoint: str
    body: Json
    slow: Json
    """A body that runs for long: to be killed in the middle."""
    args: list[str] = field(default_factory=list)
    env: Json = field(default_factory=dict)
    spare: bool = False
    max_batch: int | None = None

    def bytes(self) -> int:
        """Of its weights in their files."""
        return weights_bytes(self.folder) if self.folder else 0

    def request(self, **more: Any) -> Json:
        """As POST /v1/jobs takes it."""
        return {"endpoint": self.endpoint, "body": {"model": self.name, **self.body, **more}, "priority": 8}


def image(name: str, folder: pathlib.Path, gib: int, scale: str) -> Model:
    real = scale == REAL
    body = {"prompt": "a lighthouse", "seed": 7, "size": "1024x1024" if real else "128x128"}
    return Model(
        name,
        "image",
        "flux",
        folder,
        gib * GIB,
        "/v1/images/generations",
        {**body, "steps": 4},
        {**body, "steps": 400},
        env={} if real else {"OMP_NUM_THREADS": 1},
        spare=True,
    )


def catalogue(scale: str, checkpoints: pathlib.Path, vllm: bool, eager: bool) -> dict[str, Model]:
    """All models of a scale by name."""
    real = scale == REAL
    if real:
        whole = image("flux", checkpoints / "flux", 44, scale)
        alone = image("flux-transformer", checkpoints / "flux-transformer", 32, scale)
    else:
        whole = image("flux", checkpoints / "flux-klein", 44, scale)
        alone = image("flux-transformer", checkpoints / "flux-schnell", 32, scale)
    music = Model(
        "musicgen",
        "audio",
        "musicgen",
        checkpoints / "musicgen",
        12 * GIB,
        "/v1/audio/generations",
        {"prompt": "calm piano", "seed": 7, "duration": 1, "response_format": "wav"},
        {"prompt": "calm piano", "seed": 8, "duration": 30, "response_format": "wav"},
        env={} if real else {"OMP_NUM_THREADS": 1},
        spare=True,
        max_batch=16 if real else 4,
    )
    chat = {"messages": [{"role": "user", "content": "What is 2+2?"}], "temperature": 0}
    options: dict[str, Any] = {"args": [], "env": {}}
    if real:
        # Without prefix caching, since a prompt that was seen is computed in another order, and compared here.
        options["args"] = ["--load-format", "dummy", "--max-model-len", "4096", "--no-enable-prefix-caching"]
        options["args"] += ["--enforce-eager"] if eager else []
        options["env"] = {"VLLM_USE_FLASHINFER_SAMPLER": "0"}
    elif vllm:
        options["args"] = ["--max-model-len", "2048"]
        options["env"] = {"VLLM_CPU_KVCACHE_SPACE": 1, "OMP_NUM_THREADS": 2}
    folder = checkpoints / ("text" if real else "smollm2")
    words = Model(
        "text",
        "text",
        "vllm" if vllm else "echo",
        folder if vllm else None,
        32 * GIB,
        "/v1/chat/completions",
        {**chat, "max_tokens": 16, "ignore_eos": True} if vllm else chat | {"max_tokens": 16},
        {**chat, "max_tokens": 1500, "ignore_eos": True} if vllm else chat | {"echo": {"delay_ms": 20_000}},
        **options,
    )
    return {model.name: model for model in (alone, whole, music, words)}


def with_files(words: Model) -> Model:
    """The text model with fewer layers and weights in files: dummy ones vLLM does not read again."""
    if words.folder is None:
        return words
    args = [word for word in words.args if word not in ("--load-format", "dummy")]
    return replace(words, name="text-files", folder=words.folder.with_name("text-files"), args=args)


def entry(model: Model, python: str | None, keys: set[str], card: int, gpu_count: int = 1) -> Json:
    """Its entry in the model file.

    Args:
        python: interpreter of its worker; None: the one of its environment.
        keys: those that the server knows.
        card: memory of a GPU, in bytes; more than half of it is asked for, so that no two models fit at once.
    """
    made: Json = {
        "type": model.kind,
        "service_script": str(ROOT / "models" / model.server / "server.py"),
        "endpoint": model.endpoint,
        "startup_time": 60,
        "memory": max(model.memory if card >= 24 * GIB else 0, int(HALF * card)),
        "park": "ram",
        "gpus": gpu_count,
        "args": model.args + (["--tensor-parallel-size", str(gpu_count)] if needs_ranks(model, gpu_count) else []),
        "env": model.env,
    }
    if model.folder:
        made["model"] = str(model.folder)
    if model.max_batch:
        made["max_batch"] = model.max_batch
    if model.spare and "spare" in keys:
        made["spare"] = True
    if python:
        made["python"] = python
    return made


def needs_ranks(model: Model, gpu_count: int) -> bool:
    return model.server == "vllm" and gpu_count > 1


def python_of(model: Model, given: str | None, scale: str) -> str | None:
    """The interpreter to name in its entry; None: the model's own environment."""
    if given:
        return given
    if scale == TINY:
        tests = ROOT / ".venv-dev/bin/python"
        return None if own_python(model.server).exists() else str(tests) if tests.exists() else sys.executable
    return sys.executable


def own_python(engine: str) -> pathlib.Path:
    """The interpreter of the environment of a folder in models/, which may not have been made."""
    return ROOT / "models" / engine / ".venv/bin/python"


def model_file(path: pathlib.Path, entries: dict[str, Json], park_ram: str) -> None:
    """JSON is YAML, too."""
    scheduler = {"park_ram": park_ram}
    path.write_text(json.dumps({"models": entries, "scheduler": scheduler}, indent=1) + "\n")
