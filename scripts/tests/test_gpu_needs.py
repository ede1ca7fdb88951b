"""scripts/gpu/needs.py: what a machine lacks is told before anything is started; and that failures show their cause."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gpu import models, needs, server, table
from gpu.common import ROOT, Failed, Json
from roundhouse_server import BINARY

GB = 10**9


def verify(*flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [ROOT / "scripts/gpu-verify.sh", *flags]
    env = os.environ | {"PYTHON": sys.executable} | environment
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)


def test_an_interpreter_that_is_not_there_or_lacks_a_library_is_named_with_what_to_do() -> None:
    needs.libraries({"here": needs.Python(sys.executable, {"json"}, "")})
    with pytest.raises(Failed) as caught:
        needs.libraries(
            {
                "one": needs.Python("/no/python", {"json"}, "make it"),
                "two": needs.Python(sys.executable, {"json", "no_such_library"}, "install it"),
                "three": needs.Python("/bin/false", {"json"}, "mend it"),
            }
        )
    one, two, three, more = str(caught.value).splitlines()
    assert one == "one: there is no interpreter /no/python; make it"
    assert two == f"two: {sys.executable} lacks no_such_library; install it"
    assert three == "three: /bin/false does not run: status 1; mend it"
    assert "--models" in more


def test_disk_is_wanted_for_what_is_not_there_yet() -> None:
    every = list(needs.WEIGHTS_GB)
    assert needs.files_gb(every, []) == 24 + 10 + 4 + needs.CACHES_GB
    assert needs.files_gb(["flux"], []) == 34 + needs.CACHES_GB, "nothing to share"
    assert needs.files_gb(["flux"], ["flux-transformer"]) == 10 + needs.CACHES_GB
    assert needs.files_gb(every, every) == needs.CACHES_GB


def test_a_machine_that_is_too_small_is_refused_with_both_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = list(models.catalogue(models.REAL, tmp_path, True, False).values())
    folder = tmp_path / "not/made/yet"
    monkeypatch.setattr(needs, "machine_gb", lambda: 134)
    monkeypatch.setattr(needs, "disk_gb", lambda _: 50)
    needs.room(chosen, folder, makes=True, parks=True)
    monkeypatch.setattr(needs, "disk_gb", lambda _: 30)
    with pytest.raises(Failed, match=r"30 GB free, 49 wanted; .*--checkpoints"):
        needs.room(chosen, folder, makes=True, parks=True)
    needs.room(chosen, folder, makes=False, parks=True)
    monkeypatch.setattr(needs, "machine_gb", lambda: 64)
    with pytest.raises(Failed, match=r"64 GB of memory, .* takes 114; .*--models"):
        needs.room(chosen, folder, makes=False, parks=True)
    needs.room(chosen, folder, makes=False, parks=False)


def test_what_the_machine_has_is_read() -> None:
    assert needs.disk_gb(Path("/tmp/not/there")) >= 0
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < needs.machine_gb() <= pages // GB + 1


def test_a_model_whose_interpreter_is_not_there_ends_it_before_a_server_is_started(tmp_path: Path) -> None:
    flags = ["--scale", "tiny", "--models", "text", "--only", "swaps", "--binary", str(BINARY)]
    run = verify(*flags, "--python", "/no/python", "--out", str(tmp_path / "out"), TMPDIR=str(tmp_path))
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith(
        "error: workers of models/echo: there is no interpreter /no/python; name another one by"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "nothing is left in TMPDIR"
    assert not list((tmp_path / "out").glob("data-*"))


def test_a_checkpoint_that_is_not_there_is_named_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--scale", "tiny", "--models", "musicgen", "--only", "swaps", "--binary", str(BINARY)]
    libraries = tmp_path / "libraries"
    for name in needs.OF_ALL | needs.OF_ENGINE["musicgen"]:
        (libraries / name).mkdir(parents=True)
        (libraries / name / "__init__.py").touch()
    flags += ["--python", sys.executable, "--checkpoints", str(tmp_path / "none"), "--out", str(tmp_path / "out")]
    run = verify(*flags, PYTHONPATH=str(libraries))
    assert run.returncode == 2
    assert run.stderr == f"error: no checkpoint {tmp_path}/none/musicgen: run scripts/make-checkpoints.sh\n"


def test_help_names_models_parts_defaults_needs_and_exit_codes() -> None:
    said = " ".join(verify("--help").stdout.split()).replace("- ", "-")
    for text in [
        "default: all, flux-transformer,flux,musicgen,text",
        "or none; default: all, link,checkpoints,swaps,cold,text,music,stop,kill,ways",
        "default: target/gpu-verify",
        "default: target/release/roundhouse",
        "default: 90%",
        "PYTHON names it",
        "exit codes: 0 all goals were met",
        "2 a flag is wrong",
    ]:
        assert text in said


class Asked(server.Server):
    """Answers as a server does whose model fails to load."""

    def __init__(self, failed_loads: int) -> None:
        self.failed_loads = failed_loads
        self.ports: set[int] = set()
        self.asked = 0

    def ask(self, method: str, path: str, body: Any = None, limit_s: float = 120) -> Any:
        if path == "/v1/workers":
            worker = {"model": "flux", "port": None, "pid": None, "failed_loads": self.failed_loads}
            return {"data": [worker | {"reason": "no interpreter"}]}
        self.asked += 1
        job: Json = {"id": "1", "model": "flux", "state": "succeeded" if self.asked > 2 else "queued"}
        return job


def test_a_job_is_not_waited_for_once_its_model_fails_to_load_again() -> None:
    assert Asked(1).finished("1", 60)["state"] == "succeeded", "it may have been the memory of another"
    again = Asked(2)
    with pytest.raises(Failed, match="flux cannot be loaded: no interpreter"):
        again.finished("1", 60)
    assert again.asked == 1


def test_the_table_shows_the_cause_of_a_long_failure() -> None:
    why = "job 1 of flux has not ended: " + "x" * 800 + ": there is a | cause\nand lines of logs"
    [row] = table.rows([{"part": "failed", "what": "swaps", "why": why}])
    assert row.value.startswith("failed: job 1 of flux has not ended: ")
    assert row.value.endswith(": there is a / cause")
    assert len(row.value) < 450
