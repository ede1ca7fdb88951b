"""One server for all tests of real engines, as models.demo.yaml has them: the CPU, small checkpoints, one device.

The files are numbered, since each start of vLLM takes about a minute: images
and sound come first, then the mixed burst, which ends on text, then text, and
last three deaths of the text worker. vLLM starts four times.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from roundhouse_server import MODELS, ROOT, Json, RoundhouseServer

CHECKPOINTS = Path(os.environ.get("ROUNDHOUSE_CHECKPOINTS") or ROOT / ".cache/checkpoints")
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def entry(kind: str, folder: str, checkpoint: str, startup_time: int, **settings: object) -> Json:
    return {
        "type": kind,
        "service_script": str(MODELS / folder / "server.py"),
        "model": str(CHECKPOINTS / checkpoint),
        "startup_time": startup_time,
        "gpus": 0,
    } | settings


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RoundhouseServer]:
    missing = [
        path
        for path in [
            *(MODELS / name / ".venv/bin/python" for name in ("vllm", "flux", "musicgen")),
            *(CHECKPOINTS / name for name in ("smollm2", "flux-schnell", "flux-klein", "musicgen")),
        ]
        if not path.exists()
    ]
    assert not missing, f"missing: {missing}; scripts/test-engines.sh makes them"
    models = {
        "schnell": entry("image", "flux", "flux-schnell", 15, max_batch=4, env=ONE_THREAD),
        "klein": entry("image", "flux", "flux-klein", 15, max_batch=4, env=ONE_THREAD),
        "music": entry("audio", "musicgen", "musicgen", 15, env=ONE_THREAD),
        "text": entry("text", "vllm", "smollm2", 60),
    }
    with RoundhouseServer(tmp_path_factory.mktemp("engines"), models) as server:
        yield server
