"""The base's torch modules (hostcopy, quickload, parking), on a CPU: all of it but the calls of CUDA."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PYTHON = ROOT / "models/flux/.venv/bin/python"
SCRIPT = Path(__file__).parent / "torch_checks.py"
NAMES = re.findall(r"^def (check_\w+)", SCRIPT.read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def outcomes(checkpoints: Path) -> dict[str, str | None]:
    environment = os.environ | {
        "PYTHONPATH": str(ROOT / "models/base"),
        "ROUNDHOUSE_CHECKPOINTS": str(checkpoints),
        "OMP_NUM_THREADS": "2",
    }
    done = subprocess.run([PYTHON, str(SCRIPT)], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", NAMES)
def test_torch(outcomes: dict[str, str | None], name: str) -> None:
    assert outcomes[name] is None, outcomes[name]
