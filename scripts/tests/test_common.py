"""scripts/lib/common.sh: what the other scripts stand on."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

COMMON = Path(__file__).parents[1] / "lib" / "common.sh"


def test_scripts_that_want_uv_at_the_same_moment_all_get_it(tmp_path: Path) -> None:
    lib = tmp_path / "scripts" / "lib"
    lib.mkdir(parents=True)
    shutil.copy(COMMON, lib)
    script = lib.parent / "wants-uv.sh"
    script.write_text('set -euo pipefail\nsource "$(dirname "$0")/lib/common.sh"\nfind_uv\n"$UV" --version\n')
    started = [
        subprocess.Popen(["bash", str(script)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(3)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], outputs
    assert all("uv " in output for output in outputs), outputs
    assert sum("installing it into .venv-tools" in output for output in outputs) <= 1, outputs
