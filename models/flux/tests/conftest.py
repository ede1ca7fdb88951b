from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def checkpoints() -> Path:
    """Where scripts/make-checkpoints.sh puts the small models."""
    root = Path(__file__).parents[3]
    folder = Path(os.environ.get("ROUNDHOUSE_CHECKPOINTS") or root / ".cache/checkpoints")
    assert folder.is_dir(), f"no {folder}: run scripts/test-workers.sh, which makes it"
    return folder
