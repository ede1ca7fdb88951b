"""scripts/install.sh, in a copy of the repository with a small model, so that no real environment is touched."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PATIENCE_S = 300

UV = """#!/bin/sh
echo "$@" >>"{log}"
# The index that "auto" chooses is not asked here; PyPI's torch, built for CUDA 13, is what a wrong choice would give.
for argument; do shift; [ "$argument" = --torch-backend=auto ] || set -- "$@" "$argument"; done
exec "{uv}" "$@"
"""
# A driver that is too old for CUDA 13.
NVIDIA_SMI = """#!/bin/sh
case "$*" in
-L) echo "GPU 0: Old Card (UUID: GPU-0)" ;;
*driver_version*) echo 550.54.14 ;;
*) echo "| NVIDIA-SMI 550.54.14   Driver Version: 550.54.14   CUDA Version: 12.4 |" ;;
esac
"""


class Copy:
    """The part of the repository that installing needs, with one model, `mini`."""

    def __init__(self, root: Path, requirements: str) -> None:
        self.root = root
        keep_out = shutil.ignore_patterns("tests", "__pycache__", "*.egg-info", "build")
        shutil.copytree(ROOT / "scripts", root / "scripts", ignore=keep_out)
        shutil.copytree(ROOT / "models/base", root / "models/base", ignore=keep_out)
        self.requirements = root / "models/mini/requirements.txt"
        self.requirements.parent.mkdir()
        self.requirements.write_text(requirements)
        self.python = root / "models/mini/.venv/bin/python"
        self.stamp = root / "models/mini/.venv/.roundhouse-stamp"
        self._uv_log = root / "uv.log"
        uv = shutil.which("uv") or ROOT / ".venv-tools/bin/uv"
        self.bin = root / "bin"
        self.bin.mkdir()
        self.command("uv", UV.format(log=self._uv_log, uv=uv))

    def command(self, name: str, text: str) -> None:
        """Put a command in front of the PATH."""
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def install(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        self._uv_log.write_text("")
        return subprocess.run(
            [self.root / "scripts/install.sh", *arguments],
            env=os.environ | {"PATH": f"{self.bin}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )

    def uv_calls(self) -> list[str]:
        return self._uv_log.read_text().splitlines()


@pytest.fixture
def small(tmp_path: Path) -> Copy:
    return Copy(tmp_path, "idna==3.*\n")


def test_a_second_run_does_nothing_and_a_changed_requirement_something(small: Copy) -> None:
    done = small.install("--cpu")
    assert done.returncode == 0, done.stderr
    code = "import idna, roundhouse_worker; print(roundhouse_worker.BaseService.__name__)"
    said = subprocess.run([small.python, "-c", code], capture_output=True, text=True, timeout=PATIENCE_S)
    assert said.stdout == "BaseService\n", said.stderr
    assert small.uv_calls()

    again = small.install("--cpu")
    assert "mini: up to date" in again.stderr
    assert not small.uv_calls()

    small.requirements.write_text("idna==3.*\ncertifi\n")
    assert small.install("--cpu", "mini").returncode == 0
    assert small.uv_calls()
    assert subprocess.run([small.python, "-c", "import certifi"], timeout=PATIENCE_S).returncode == 0


def test_a_failed_install_shows_why_and_is_tried_again(small: Copy) -> None:
    small.requirements.write_text("idna==99.*\n")
    failed = small.install("--cpu")
    assert failed.returncode != 0
    assert "idna" in failed.stderr
    assert "mini: installing requirements.txt failed" in failed.stderr
    assert not small.stamp.exists()
    small.requirements.write_text("idna==3.*\n")
    assert small.install("--cpu").returncode == 0


def test_a_wrong_name_is_told_the_right_ones(small: Copy) -> None:
    done = small.install("maxi")
    assert done.returncode != 0
    assert "no model maxi; there are: mini" in done.stderr


def test_what_a_link_leads_to_is_left_alone(small: Copy, tmp_path: Path) -> None:
    of_another = tmp_path / "elsewhere/.venv"
    of_another.mkdir(parents=True)
    (of_another / "kept").touch()
    link = small.root / "models/mini/.venv"
    link.symlink_to(of_another)
    for flags in (["--cpu"], ["--cpu", "--force"]):
        done = small.install(*flags)
        assert done.returncode != 0
        assert f"mini: models/mini/.venv is a link to {of_another}" in done.stderr
        assert f"Remove the link (rm {link})" in done.stderr
        assert not small.uv_calls()
        assert [file.name for file in of_another.iterdir()] == ["kept"]


def test_a_gpu_that_does_not_answer_is_not_assumed(small: Copy) -> None:
    small.command("nvidia-smi", "#!/bin/sh\nexit 9\n")
    done = small.install("--gpu")
    assert done.returncode != 0
    assert "nvidia-smi does not answer" in done.stderr


def test_a_wheel_too_new_for_the_driver_names_both(tmp_path: Path) -> None:
    copy = Copy(tmp_path, "torch==2.13.0\n")
    copy.command("nvidia-smi", NVIDIA_SMI)
    done = copy.install()
    assert any("--torch-backend=auto" in call for call in copy.uv_calls()), "the wheel was not chosen by driver"
    assert not any("overrides" in call for call in copy.uv_calls())
    assert done.returncode != 0
    assert "torch was built for CUDA 13.0" in done.stderr
    assert "550.54.14 (supports CUDA up to 12.4)" in done.stderr
    assert not copy.stamp.exists(), "an environment that does not work counts as installed"
