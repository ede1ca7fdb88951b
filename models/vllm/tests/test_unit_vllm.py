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
    *flags: str, cpu: bool = False, total: int | None = 80 * GIB, environment: dict[str, str] | None = None
) -> Any:
    options, extra = server.parser().parse_known_args(["--port", "8001", *flags])
    return server.plan(options, extra, environment or {}, cpu=cpu, folder=FOLDER, total_bytes=total)


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
    ("memory", "total", "share"), [(18 * GIB, 80 * GIB, "0.22"), (79 * GIB, 80 * GIB, "0.97"), (1, 80 * GIB, "0.05")]
)
def test_the_memory_it_may_take_becomes_a_share(memory: int, total: int, share: str) -> None:
    argv = plan(total=total, environment={"ROUNDHOUSE_MEMORY_BYTES": str(memory)}).argv
    assert argv[argv.index("--gpu-memory-utilization") + 1] == share


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
