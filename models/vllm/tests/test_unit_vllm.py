"""What the launcher makes of its flags and its environment; starts nothing."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path("/weights")
GIB = 1024**3


def load() -> Any:
    spec = importlib.util.spec_from_file_location("vllm_server", Path(__file__).parents[1] / "server.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


server = load()


def plan(
    *flags: str,
    cpu: bool = False,
    total: int | None = 80 * GIB,
    free: int | None = None,
    environment: dict[str, str] | None = None,
    folder: Path = FOLDER,
) -> Any:
    options, extra = server.parser().parse_known_args(["--port", "8001", *flags])
    memory = None if total is None else server.DeviceMemory(total, total if free is None else free)
    return server.plan(options, extra, environment or {}, cpu=cpu, folder=folder, memory=memory)


def share(launch: Any) -> str | None:
    argv = launch.argv
    return argv[argv.index("--gpu-memory-utilization") + 1] if "--gpu-memory-utilization" in argv else None


def test_it_serves_the_folder_under_the_name_on_loopback() -> None:
    argv = plan("--name", "qwen").argv
    serve = argv.index("serve")
    assert argv[serve + 1] == "/weights"
    # The script of its environment, or the module where packages were installed beside it.
    assert argv[1:serve] in ([str(Path(sys.executable).with_name("vllm"))], ["-P", "-m", "vllm.entrypoints.cli.main"])
    joined = " ".join(argv)
    assert "--served-model-name qwen" in joined
    assert "--host 127.0.0.1 --port 8001" in joined
    assert "--shutdown-timeout 8" in joined


def test_unknown_flags_go_to_vllm_in_order() -> None:
    assert plan("--quantization", "fp8", "--max-num-seqs", "64").argv[-4:] == [
        "--quantization",
        "fp8",
        "--max-num-seqs",
        "64",
    ]
    assert plan("--", "--kv-cache-dtype", "fp8").argv[-2:] == ["--kv-cache-dtype", "fp8"]


def test_a_gpu_gets_sleep_mode_unless_it_is_off() -> None:
    assert "--enable-sleep-mode" in plan().argv
    assert "--enable-sleep-mode" not in plan("--sleep-mode", "off").argv
    assert plan().environment["VLLM_SERVER_DEV_MODE"] == "1"
    assert "--enforce-eager" not in plan().argv


def test_a_cpu_gets_small_settings() -> None:
    launch = plan(cpu=True, environment={"ROUNDHOUSE_MEMORY_BYTES": str(GIB)})
    assert "--enforce-eager" in launch.argv
    assert "--enable-sleep-mode" not in launch.argv
    assert "--gpu-memory-utilization" not in launch.argv
    assert launch.argv[launch.argv.index("--max-model-len") + 1] == "2048"
    assert launch.environment["VLLM_CPU_KVCACHE_SPACE"] == "1"


@pytest.mark.parametrize(
    ("memory", "total", "wanted"),
    [(18 * GIB, 80 * GIB, "0.22"), (89 * GIB, 80 * GIB, "0.97"), (6 * GIB, 140 * GIB, "0.04"), (GIB, 80 * GIB, "0.01")],
)
def test_the_memory_it_may_take_becomes_a_share(memory: int, total: int, wanted: str) -> None:
    launch = plan(total=total, free=total + GIB, environment={"ROUNDHOUSE_MEMORY_BYTES": str(memory)})
    assert share(launch) == wanted


@pytest.mark.parametrize("memory", [1, GIB // 2])
def test_less_than_a_percent_is_refused_with_the_numbers(memory: int) -> None:
    with pytest.raises(ValueError, match=r"GiB are declared \(`memory`\), .*may take 0 % of the GPU, 0\.0 GiB"):
        plan(environment={"ROUNDHOUSE_MEMORY_BYTES": str(memory)})


def test_it_takes_no_more_than_is_free() -> None:
    """vLLM would refuse to start."""
    declared = {"ROUNDHOUSE_MEMORY_BYTES": str(40 * GIB)}
    assert share(plan(environment=declared)) == "0.5"
    assert share(plan(free=33 * GIB, environment=declared)) == "0.4", "1 GiB is for its own context"
    assert share(plan(free=41 * GIB)) == "0.5", "though nothing is declared"
    assert share(plan(free=79 * GIB)) is None, "vLLM's own default fits"


def test_what_cannot_fit_is_refused_with_the_numbers(tmp_path: Path) -> None:
    with (tmp_path / "model-1.safetensors").open("wb") as file:
        file.truncate(16 * GIB)
    (tmp_path / "consolidated.safetensors").write_bytes(b"the same again")
    assert share(plan(free=18 * GIB, folder=tmp_path)) == "0.21"
    with pytest.raises(ValueError, match=r"out of memory.*16\.5 of 80\.0 GiB are free.*weights alone take 16\.0 GiB"):
        plan(free=16 * GIB + GIB // 2, folder=tmp_path)
    with pytest.raises(ValueError, match=r"10\.0 GiB are declared"):
        plan(folder=tmp_path, environment={"ROUNDHOUSE_MEMORY_BYTES": str(10 * GIB)})
    with pytest.raises(ValueError, match=r"may take 11 % of the GPU, 15\.4 GiB, and the weights alone take 16\.0 GiB"):
        plan(total=140 * GIB, folder=tmp_path, environment={"ROUNDHOUSE_MEMORY_BYTES": str(16 * GIB + GIB // 2)})
    pair = {"ROUNDHOUSE_MEMORY_BYTES": str(10 * GIB), "CUDA_VISIBLE_DEVICES": "0,1"}
    assert share(plan(folder=tmp_path, environment=pair)) == "0.12", "each holds a half"
    small = plan("--quantization", "fp8", folder=tmp_path, environment={"ROUNDHOUSE_MEMORY_BYTES": str(10 * GIB)})
    assert share(small) == "0.12", "how small that makes them is not known here"


def test_a_second_try_after_running_out_of_memory_is_smaller() -> None:
    again = {"ROUNDHOUSE_MEMORY_SCALE": "0.85"}
    launch = plan("--max-model-len", "32768", free=41 * GIB, environment=again)
    assert share(launch) == "0.48", "more stays free"
    assert launch.argv[launch.argv.index("--max-model-len") + 1] == "16384"
    assert launch.argv[launch.argv.index("--max-num-seqs") + 1] == "64"
    assert "--enforce-eager" in launch.argv
    said = plan("--max-model-len", "1024", "--max-num-seqs", "8", "-O", "2", environment=again).argv
    assert said.count("--max-num-seqs") == 1
    assert "--enforce-eager" not in said, "its own word on it"
    assert said[said.index("--max-model-len") + 1] == "1024"


@pytest.mark.parametrize("park", [None, "0", str(40 * GIB)])
def test_only_a_model_that_may_be_parked_with_or_without_a_copy_compiles_and_can_sleep(park: str | None) -> None:
    environment = {"ROUNDHOUSE_INSTANCE": "a:b", "VLLM_SERVER_DEV_MODE": "1"}
    if park is not None:
        environment["ROUNDHOUSE_PARK_BYTES"] = park
    launch = plan(environment=environment)
    parks = park is not None
    assert ("--enable-sleep-mode" in launch.argv) is parks
    assert ("--enforce-eager" in launch.argv) is not parks
    assert ("VLLM_SERVER_DEV_MODE" in launch.environment) is parks
    assert "--enforce-eager" not in plan("--no-enforce-eager", environment=environment).argv


@pytest.mark.parametrize("flag", ["--host", "--host=0.0.0.0", "--hos", "--uds"])
def test_another_address_is_refused(flag: str) -> None:
    with pytest.raises(ValueError, match=r"127\.0\.0\.1 only"):
        plan(flag, "0.0.0.0")
    assert plan("--hf-token", "x").argv[-2:] == ["--hf-token", "x"]


def test_what_was_compiled_is_kept_beside_the_weights(tmp_path: Path) -> None:
    assert plan(environment={"HF_HOME": str(tmp_path)}).environment["VLLM_CACHE_ROOT"] == f"{tmp_path}/vllm"
    said = {"HF_HOME": str(tmp_path), "VLLM_CACHE_ROOT": "/else"}
    assert plan(environment=said).environment["VLLM_CACHE_ROOT"] == "/else"
    for unset in ({}, {"HF_HOME": "/nowhere/at/all"}):
        assert "VLLM_CACHE_ROOT" not in plan(environment=unset).environment


def test_the_driver_is_asked_and_the_scheduler_knows_better(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "nvidia-smi"
    script.write_text('#!/bin/sh\necho "$@" > "$0.asked"\necho "81559, 60000"\necho "81000, 70000"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    mib = 1024**2
    assert server.device_memory({"CUDA_VISIBLE_DEVICES": "2,3"}) == server.DeviceMemory(81000 * mib, 60000 * mib)
    assert (tmp_path / "nvidia-smi.asked").read_text().endswith("-i 2,3\n")
    known = server.device_memory({"ROUNDHOUSE_DEVICE_FREE_BYTES": str(GIB)})
    assert known == server.DeviceMemory(81000 * mib, GIB)
    script.write_text("#!/bin/sh\nexit 9\n")
    assert server.device_memory({}) is None


def test_a_share_that_was_asked_for_wins() -> None:
    argv = plan("--gpu-memory-utilization", "0.5", environment={"ROUNDHOUSE_MEMORY_BYTES": str(GIB)}).argv
    assert argv[argv.index("--gpu-memory-utilization") + 1] == "0.5"
    assert "--gpu-memory-utilization" not in plan().argv


@pytest.mark.parametrize(("memory", "total"), [("18GiB", 80 * GIB), (str(GIB), None)])
def test_memory_that_cannot_be_a_share_is_refused(memory: str, total: int | None) -> None:
    with pytest.raises(ValueError, match="ROUNDHOUSE_MEMORY_BYTES"):
        plan(total=total, environment={"ROUNDHOUSE_MEMORY_BYTES": memory})


def test_it_is_offline_and_gets_no_token() -> None:
    environment = plan(environment={"HF_TOKEN": "secret", "PATH": "/bin"}).environment
    assert "HF_TOKEN" not in environment
    assert environment["PATH"] == "/bin"
    assert environment["HF_HUB_OFFLINE"] == environment["VLLM_NO_USAGE_STATS"] == environment["DO_NOT_TRACK"] == "1"


def test_check_says_in_json_what_is_wrong(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "has_distribution", lambda name: True)
    assert server.main(["--check", "--port", "8001", "--model", "/nowhere/at/all"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert said["ok"] is False
    assert "/nowhere/at/all" in said["error"]
    assert server.main(["--check", "--port", "x"]) == 1


def test_without_vllm_it_names_the_install_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert server.main(["--port", "8001"]) == 2
    assert "scripts/install.sh vllm" in capsys.readouterr().err
