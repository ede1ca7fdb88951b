"""What is decided about parking before any memory is taken, and what safetensors files say; no torch needed."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from roundhouse_worker import hostcopy, parking, service

GIB = 2**30
SCHEDULED = {"ROUNDHOUSE_INSTANCE": "dir:nonce"}


def budget(size: int) -> dict[str, str]:
    return SCHEDULED | {"ROUNDHOUSE_PARK_BYTES": str(size)}


@pytest.mark.parametrize(
    ("environment", "host_copy", "available", "when"),
    [
        ({}, "sleep", 100 * GIB, "sleep"),
        ({}, "load", 0, "load"),
        ({}, "auto", 100 * GIB, "load"),
        ({}, "auto", 11 * GIB, "sleep"),
        (SCHEDULED, "load", 100 * GIB, "never"),
        (budget(10 * GIB), "sleep", 100 * GIB, "load"),
        (budget(10 * GIB), "sleep", 10 * GIB, "load"),
        (budget(10 * GIB - 1), "load", 100 * GIB, "never"),
        (budget(0), "load", 100 * GIB, "never"),
        (budget(100 * GIB), "load", 10 * GIB - 1, "never"),
    ],
)
def test_the_scheduler_s_budget_and_the_machine_s_memory_decide(environment, host_copy, available, when):
    made = parking.plan(10 * GIB, host_copy, available, environment)
    assert made.when == when
    assert (made.note is not None) == (when == "never")


def test_a_note_names_both_sizes():
    assert "10.0 GiB" in str(parking.plan(10 * GIB, "load", 99 * GIB, budget(3 * GIB)).note)
    assert "3.0 GiB left" in str(parking.plan(10 * GIB, "load", 99 * GIB, budget(3 * GIB)).note)
    assert "only 2.0 GiB" in str(parking.plan(10 * GIB, "load", 2 * GIB, budget(30 * GIB)).note)


def write(root: Path, **files: str) -> str:
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("DOT", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return str(root)


MEMINFO = f"MemTotal: {64 * GIB // 1024} kB\nMemAvailable: {40 * GIB // 1024} kB\n"


def test_available_memory_is_the_machine_s_without_a_limit(tmp_path):
    assert parking.available_bytes(write(tmp_path, proc__meminfo=MEMINFO)) == 40 * GIB


def test_available_memory_is_within_the_container_s_limit_and_unused_file_pages_are_free(tmp_path):
    root = write(
        tmp_path,
        proc__meminfo=MEMINFO,
        sys__fs__cgroup__memoryDOTmax=str(16 * GIB),
        sys__fs__cgroup__memoryDOTcurrent=str(14 * GIB),
        sys__fs__cgroup__memoryDOTstat=f"anon {4 * GIB}\nactive_file 7\ninactive_file {10 * GIB}\n",
    )
    assert parking.available_bytes(root) == 12 * GIB


def test_available_memory_in_an_old_container(tmp_path):
    root = write(
        tmp_path,
        proc__meminfo=MEMINFO,
        sys__fs__cgroup__memory__memoryDOTlimit_in_bytes=str(16 * GIB),
        sys__fs__cgroup__memory__memoryDOTusage_in_bytes=str(14 * GIB),
        sys__fs__cgroup__memory__memoryDOTstat=f"inactive_file 1\ntotal_inactive_file {3 * GIB}\n",
    )
    assert parking.available_bytes(root) == 5 * GIB


def test_the_limit_of_a_unit_counts_and_that_of_the_slice_above_it(tmp_path):
    unit = "sys__fs__cgroup__system.slice__my.service__memoryDOT"
    above = "sys__fs__cgroup__system.slice__memoryDOT"
    files = {
        "proc__meminfo": MEMINFO,
        "proc__self__cgroup": "0::/system.slice/my.service\n",
        f"{unit}max": str(16 * GIB),
        f"{unit}current": str(6 * GIB),
        f"{above}max": str(20 * GIB),
        f"{above}current": str(6 * GIB),
    }
    assert parking.available_bytes(write(tmp_path, **files)) == 10 * GIB
    assert parking.available_bytes(write(tmp_path, **files | {f"{above}current": str(17 * GIB)})) == 3 * GIB


def test_the_limit_of_a_job_where_cgroups_are_old(tmp_path):
    job = "sys__fs__cgroup__memory__slurm__job_7__memoryDOT"
    root = write(
        tmp_path,
        proc__meminfo=MEMINFO,
        proc__self__cgroup="5:cpu,cpuacct:/\n4:memory:/slurm/job_7\n",
        **{f"{job}limit_in_bytes": str(9 * GIB), f"{job}usage_in_bytes": str(1 * GIB)},
    )
    assert parking.available_bytes(root) == 8 * GIB


def test_no_limit_is_no_limit(tmp_path):
    root = write(
        tmp_path,
        proc__meminfo=MEMINFO,
        sys__fs__cgroup__memoryDOTmax="max\n",
        sys__fs__cgroup__memoryDOTcurrent=str(14 * GIB),
    )
    assert parking.available_bytes(root) == 40 * GIB


def test_a_refusal_names_size_reason_limit_and_what_follows():
    note = hostcopy.refusal_note(3 * GIB, "out of memory, CUDA error 2")
    assert note.startswith("page-locking 3.0 GiB was refused (out of memory, CUDA error 2; `ulimit -l` is ")
    assert note.endswith("): parking goes on with pageable memory, wakes are slower")


# ---- safetensors files -------------------------------------------------------


def tensors(path: Path, header: dict[str, Any], data: bytes) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_a_header_tells_where_each_tensor_is(tmp_path):
    header = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]},
        "b": {"dtype": "F32", "shape": [], "data_offsets": [12, 16]},
    }
    path = tensors(tmp_path / "x.safetensors", header, bytes(16))
    found = hostcopy.entries(path)
    start = path.stat().st_size - 16
    assert found == {
        "a": hostcopy.Entry(path, "bfloat16", (2, 3), start, 12),
        "b": hostcopy.Entry(path, "float32", (), start + 12, 4),
    }


@pytest.mark.parametrize(
    ("entry", "data"),
    [
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, b"1234"),
        ({"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}, b"12345678"),
        ({"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}, b"1"),
    ],
)
def test_a_file_that_cannot_be_right_is_refused_by_name(tmp_path, entry, data):
    path = tensors(tmp_path / "x.safetensors", {"a": entry}, data)
    with pytest.raises(ValueError, match="x.safetensors"):
        hostcopy.entries(path)


@pytest.mark.parametrize("content", [b"", b"12345", struct.pack("<Q", 2**40) + b"{}"])
def test_what_is_no_safetensors_file_is_refused(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="no whole safetensors file"):
        hostcopy.entries(path)


def test_the_files_of_a_folder_are_those_its_library_would_take(tmp_path):
    def folder(name: str, *files: str, index: dict[str, str] | None = None) -> list[str]:
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).touch()
        if index is not None:
            text = json.dumps({"weight_map": index})
            (tmp_path / name / "model.safetensors.index.json").write_text(text)
        return [path.name for path in hostcopy.files(tmp_path / name)]

    assert folder("one", "model.safetensors") == ["model.safetensors"]
    assert folder("diffusers", "diffusion_pytorch_model.safetensors") == ["diffusion_pytorch_model.safetensors"]
    assert folder("many", "a.safetensors", "b.safetensors", "c.safetensors", index={"x": "b.safetensors"}) == [
        "b.safetensors"
    ]
    assert folder("torn", "a.safetensors", index={"x": "a.safetensors", "y": "b.safetensors"}) == []
    assert folder("both", "model.safetensors", index={"x": "model.safetensors"}) == []
    assert folder("old", "pytorch_model.bin") == []


# ---- phases ------------------------------------------------------------------


def test_phases_are_listed_once_in_order_when_they_are_over(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(service.time, "monotonic", lambda: now[0])
    loading = service.Loading()
    now[0] += 1  # before the first phase: the supervisor counts that
    for phase, seconds in [("import", 2), ("read", 3), ("device", 1), ("read", 4), ("read", 0.5)]:
        loading(phase, 10)
        now[0] += seconds
    assert loading.phases() == [
        {"phase": "import", "ms": 2000},
        {"phase": "read", "ms": 3000},
        {"phase": "device", "ms": 1000},
    ]
    loading.end_phase()
    assert loading.phases()[1] == {"phase": "read", "ms": 7500}
