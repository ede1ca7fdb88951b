"""Fetching weights: the real huggingface_hub of a model's environment, against a local stand-in of the model hub."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from roundhouse_worker import fetch, weights

ROOT = Path(__file__).parents[2]
STANDIN = ROOT / "scripts/lib/hub_standin.py"
PYTHON = ROOT / "models/flux/.venv/bin/python"
PATIENCE_S = 60
BIG = 3_000_000


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """A folder of repositories: one diffusers-like model, with copies that nobody needs."""
    data = random.Random(1)
    model = tmp_path / "hub/org/tiny"
    for name, content in {
        "model_index.json": b'{"_class_name": "FluxPipeline"}',
        "README.md": b"a model",
        "transformer/config.json": b"{}",
        "transformer/diffusion_pytorch_model.safetensors": data.randbytes(BIG),
        "transformer/diffusion_pytorch_model.bin": data.randbytes(5000),
        "text_encoder/model.safetensors": data.randbytes(20_000),
        "all-in-one.safetensors": data.randbytes(9000),
    }.items():
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_bytes(content)
    return tmp_path / "hub"


class Site:
    """A running stand-in."""

    def __init__(self, url: str, log: Path) -> None:
        self.url = url
        self._log = log

    def requests(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._log.read_text().splitlines()]

    def environment(self, **more: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        # A worker's settings must not stop a fetch.
        return kept | {"HF_ENDPOINT": self.url, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "models/base")} | more


@contextmanager
def standin(hub: Path, *flags: str) -> Iterator[Site]:
    log = hub.parent / "requests.log"
    command = [sys.executable, STANDIN, hub, "--log", log, *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield Site(process.stdout.readline().strip(), log)
        finally:
            process.kill()


def command(cache: Path, *flags: str, repo: str = "org/tiny") -> list[str]:
    base = [str(PYTHON), "-m", "roundhouse_worker.fetch", "--repo", repo, "--out", str(cache), "--json-progress"]
    return [*base, "--retry-delay", "0.01", *flags]


def told(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """What a fetch says but that it lives: that comes when it is slow, and only until it has told bytes."""
    has_begun = False
    for line in map(json.loads, lines):
        has_begun = has_begun or line["type"] == "progress"
        if line["type"] == "alive":
            assert not has_begun
        else:
            yield line


def run(site: Site, cache: Path, *flags: str, repo: str = "org/tiny", **environment: str) -> list[dict[str, Any]]:
    """Fetch; the lines it printed."""
    done = subprocess.run(
        command(cache, *flags, repo=repo),
        env=site.environment(**environment),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    lines = list(told(done.stdout.splitlines()))
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == (0 if lines[-1]["type"] == "done" else 1)
    return lines


def snapshot(lines: list[dict[str, Any]]) -> Path:
    assert lines[-1]["type"] == "done", lines
    return Path(lines[-1]["path"])


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


def test_a_model_is_fetched_whole_and_found_offline_by_name(hub: Path, tmp_path: Path) -> None:
    with standin(hub) as site:
        lines = run(site, tmp_path / "cache")
    folder = snapshot(lines)
    assert names(folder) == {
        "model_index.json",
        "README.md",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
    }
    for name in names(folder):
        assert (folder / name).read_bytes() == (hub / "org/tiny" / name).read_bytes()
    assert lines[0]["type"] == "progress"
    assert lines[-2]["bytes"] == lines[-2]["total_bytes"] == lines[-1]["bytes"]
    assert len(lines[-1]["revision"]) == 40
    # The server takes this for the sign that it is whole.
    assert (tmp_path / "cache/models--org--tiny/.roundhouse-complete" / lines[-1]["revision"]).exists()
    # Both by the real library and by ours.
    code = "import huggingface_hub as h; print(h.snapshot_download('org/tiny', local_files_only=True))"
    offline = {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "PATH": os.environ["PATH"]}
    found = subprocess.run([PYTHON, "-c", code], env=offline, capture_output=True, text=True, timeout=PATIENCE_S)
    assert Path(found.stdout.strip()).resolve() == folder.resolve(), found.stderr


def test_a_fetch_that_tells_no_bytes_yet_says_that_it_lives(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fetch, "ALIVE_INTERVAL_S", 0.01)
    reporter = fetch.Reporter(as_json=True, repo="org/tiny")
    until = time.monotonic() + PATIENCE_S
    said = ""
    while said.count("alive") < 3 and time.monotonic() < until:
        said += capsys.readouterr().out
    reporter.start(0, 1)
    reporter.done("/cache", "main")
    lines = [json.loads(line) for line in (said + capsys.readouterr().out).splitlines()]
    kinds = [line["type"] for line in lines]
    first = kinds.index("progress")
    assert first >= 3
    assert set(kinds[:first]) == {"alive"}
    assert "alive" not in kinds[first:]


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing says where the cache is; a folder stands in for a pod's volume."""
    for name in ("HF_HUB_CACHE", "HF_HOME", "RUNPOD_POD_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home-cache"))
    volume = tmp_path / "workspace"
    volume.mkdir()
    monkeypatch.setattr(weights, "POD_VOLUME", volume)
    return volume


ON_A_POD = """
import pathlib, sys
from roundhouse_worker import fetch, weights
weights.POD_VOLUME = pathlib.Path(sys.argv.pop(1))
sys.exit(fetch.main())
"""


def test_an_environment_that_cannot_fetch_is_told_so(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "httpx", None)  # as if it were not installed
    with pytest.raises(ValueError, match="No module named 'httpx'; run scripts/install.sh") as told:
        weights.local_folder("org/tiny")
    assert "roundhouse_worker.fetch" not in str(told.value), "which needs it"


@pytest.mark.parametrize("told_by", ["HF_HUB_CACHE", "RUNPOD_POD_ID"])
def test_our_own_lookup_finds_it_too(
    hub: Path, tmp_path: Path, nowhere: Path, monkeypatch: pytest.MonkeyPatch, told_by: str
) -> None:
    on_a_pod = told_by == "RUNPOD_POD_ID"
    value = "pod1" if on_a_pod else str(tmp_path / "cache")
    monkeypatch.setenv(told_by, value)
    with pytest.raises(ValueError, match=r"roundhouse_worker\.fetch --repo org/tiny"):
        weights.local_folder("org/tiny")
    with standin(hub) as site:
        done = subprocess.run(
            [PYTHON, "-c", ON_A_POD, nowhere, "--repo", "org/tiny", "--json-progress"],
            env=site.environment(**{told_by: value}),
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )
    assert done.returncode == 0, done.stderr
    folder = snapshot(list(told(done.stdout.splitlines())))
    cache = nowhere / ".cache/huggingface/hub" if on_a_pod else tmp_path / "cache"
    assert folder.is_relative_to(cache)
    assert weights.local_folder("org/tiny") == folder
    assert weights.local_folder("org/tiny", folder.name) == folder


def test_a_pod_s_volume_is_used_only_if_nothing_else_is_said(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = nowhere.parent / "home-cache/huggingface/hub"
    assert weights.default_cache() == usual, "no pod"
    monkeypatch.setenv("RUNPOD_POD_ID", "pod1")
    assert weights.default_cache() == nowhere / ".cache/huggingface/hub"
    monkeypatch.setenv("HF_HOME", "/hf")
    assert weights.default_cache() == Path("/hf/hub")
    monkeypatch.delenv("HF_HOME")
    nowhere.rmdir()
    assert weights.default_cache() == usual, "a pod without a volume"


def test_a_second_fetch_gets_no_file_again(hub: Path, tmp_path: Path) -> None:
    with standin(hub) as site:
        run(site, tmp_path / "cache")
        before = len(site.requests())
        again = run(site, tmp_path / "cache", "--revision", "main")
        assert [line["path"] for line in site.requests()[before:]] == ["/api/models/org/tiny/revision/main"]
    assert again[0]["bytes"] == again[0]["total_bytes"]


def test_a_pinned_revision_is_fetched_and_what_main_is_stays(hub: Path, tmp_path: Path) -> None:
    with standin(hub) as site:
        commit = run(site, tmp_path / "other")[-1]["revision"]
        folder = tmp_path / "cache/models--org--tiny"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs/main").write_text("another")
        lines = run(site, tmp_path / "cache", "--revision", commit)
    assert lines[-1]["revision"] == commit
    assert (folder / "refs/main").read_text() == "another"
    assert (folder / "snapshots" / commit).is_dir()


def test_a_cut_connection_goes_on_where_it_was_cut(hub: Path, tmp_path: Path) -> None:
    with standin(hub, "--cut", "diffusion_pytorch_model.safetensors:1000000") as site:
        folder = snapshot(run(site, tmp_path / "cache"))
        ranges = [line["range"] for line in site.requests() if line["path"].startswith("/cdn/org/tiny/transformer")]
    assert ranges == [None, "bytes=1000000-"]
    big = "transformer/diffusion_pytorch_model.safetensors"
    assert (folder / big).read_bytes() == (hub / "org/tiny" / big).read_bytes()


def size_now(path: Path) -> int:
    """Its bytes; 0 if it has been renamed since it was listed."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def test_a_killed_fetch_goes_on_in_the_middle_of_the_file(hub: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with (
        standin(hub, "--stall", "diffusion_pytorch_model.safetensors:2000000") as site,
        subprocess.Popen(
            command(cache), env=site.environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process,
    ):
        assert process.stdout is not None
        partials = cache / "models--org--tiny/blobs"
        assert next(told(process.stdout))["type"] == "progress"  # it comes before the first byte
        while not any(size_now(path) >= 2_000_000 for path in partials.glob("*.roundhouse-partial")):
            assert process.poll() is None
        process.kill()
    with standin(hub) as site:
        lines = run(site, cache)
        asked = [line["range"] for line in site.requests() if line["path"].startswith("/cdn/org/tiny/transformer")]
    assert asked[-1] == "bytes=2000000-"
    assert lines[0]["bytes"] >= 2_000_000
    big = "transformer/diffusion_pytorch_model.safetensors"
    assert (snapshot(lines) / big).read_bytes() == (hub / "org/tiny" / big).read_bytes()


def test_a_fetch_that_stands_is_told_too(hub: Path, tmp_path: Path) -> None:
    with (
        standin(hub, "--stall", "diffusion_pytorch_model.safetensors:2000000") as site,
        subprocess.Popen(
            command(tmp_path / "cache"),
            env=site.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as process,
    ):
        assert process.stdout is not None
        lines = told(process.stdout)
        standing = next(line["bytes"] for line in lines if line["bytes"] >= 2_000_000)
        assert next(lines)["bytes"] == standing
        process.kill()


def test_a_second_process_says_that_it_waits_for_the_first(hub: Path, tmp_path: Path) -> None:
    go_on = tmp_path / "go-on"
    cache = tmp_path / "cache"
    with standin(hub, "--hold", f"diffusion_pytorch_model.safetensors:1000000:{go_on}") as site:
        with subprocess.Popen(
            command(cache), env=site.environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as first:
            assert first.stdout is not None
            assert next(told(first.stdout))["type"] == "progress"  # it has the lock
            with subprocess.Popen(
                command(cache), env=site.environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            ) as second:
                assert second.stdout is not None
                assert next(told(second.stdout)) == {"type": "waiting"}
                go_on.touch()
                first.communicate(timeout=PATIENCE_S)
                last = second.communicate(timeout=PATIENCE_S)[0].splitlines()[-1]
        asked = [line for line in site.requests() if line["path"].endswith("diffusion_pytorch_model.safetensors")]
    assert json.loads(last)["type"] == "done"
    assert len([line for line in asked if line["path"].startswith("/cdn/")]) == 1


def test_too_little_space_is_told_in_bytes_before_anything_is_read(hub: Path, tmp_path: Path) -> None:
    claim = 10**16
    with standin(hub, "--claim", f"diffusion_pytorch_model.safetensors:{claim}") as site:
        (line,) = run(site, tmp_path / "cache")
        assert not [one for one in site.requests() if "/resolve/" in one["path"]]
    assert (line["type"], line["code"]) == ("error", "insufficient_space")
    needed = int(line["message"].split(" needs ")[1].split()[0])
    assert claim * 1.05 <= needed < claim * 1.051
    assert "free" in line["message"]


def test_a_gated_model_names_its_licence_page_and_the_token(hub: Path, tmp_path: Path) -> None:
    with standin(hub, "--token", "right") as site:
        for given in ({}, {"HF_TOKEN": "wrong"}):
            line = run(site, tmp_path / "cache", **given)[-1]
            assert (line["type"], line["code"]) == ("error", "gated")
            assert "https://huggingface.co/org/tiny" in line["message"]
            assert "HF_TOKEN" in line["message"]
            assert ("HTTP 403" if given else "HTTP 401") in line["message"]
        assert run(site, tmp_path / "cache", HF_TOKEN="right")[-1]["type"] == "done"
        elsewhere = [one for one in site.requests() if one["path"].startswith("/cdn/")]
    assert elsewhere
    assert not any(one["token"] for one in elsewhere), "the token went to where the hub redirects"


def test_what_is_not_there_is_said(hub: Path, tmp_path: Path) -> None:
    with standin(hub) as site:
        absent = run(site, tmp_path / "cache", repo="org/none")[-1]
        revision = run(site, tmp_path / "cache", "--revision", "v9")[-1]
    assert absent["code"] in ("gated", "not_found")  # the hub tells absent and private ones apart to nobody
    assert "org/none" in absent["message"]
    assert revision["code"] == "not_found"
    assert "v9" in revision["message"]


def test_a_file_with_another_hash_is_not_kept(hub: Path, tmp_path: Path) -> None:
    with standin(hub, "--corrupt", "diffusion_pytorch_model.safetensors") as site:
        line = run(site, tmp_path / "cache")[-1]
    assert line["code"] == "corrupt"
    assert not (tmp_path / "cache/models--org--tiny/snapshots").exists()
    with standin(hub) as site:
        snapshot(run(site, tmp_path / "cache"))


def test_a_hub_that_cannot_be_reached_is_given_up_after_some_tries(hub: Path, tmp_path: Path) -> None:
    with standin(hub) as site:
        pass
    *tries, line = run(site, tmp_path / "cache")
    assert line["code"] == "network"
    assert line["message"].startswith(f"cannot reach the hub, {site.url}: ")
    assert "refused" in line["message"]
    assert tries == [{"type": "retry", "message": line["message"]}] * (fetch.REFUSED_TRIES - 1)


def test_a_hub_that_breaks_off_is_tried_more_often_than_one_that_is_not_there(tmp_path: Path) -> None:
    def break_off() -> None:
        with suppress(OSError):
            while True:
                listener.accept()[0].close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=break_off, daemon=True).start()
        site = Site(f"http://127.0.0.1:{listener.getsockname()[1]}", tmp_path / "none")
        *tries, line = run(site, tmp_path / "cache")
    assert line["code"] == "network"
    assert [told["type"] for told in tries] == ["retry"] * (fetch.TRIES_WITHOUT_PROGRESS - 1)


def test_a_password_of_the_hub_is_not_told(tmp_path: Path) -> None:
    environment = Site("http://me:secret@127.0.0.1:9", tmp_path / "none").environment()
    run = subprocess.run(command(tmp_path / "cache"), capture_output=True, text=True, timeout=60, env=environment)
    assert "cannot reach the hub, http://127.0.0.1:9: " in run.stdout
    assert "secret" not in run.stdout + run.stderr


def test_include_and_exclude_choose_files(hub: Path, tmp_path: Path) -> None:
    with standin(hub) as site:
        folder = snapshot(run(site, tmp_path / "a", "--include", "*.json"))
        assert names(folder) == {"model_index.json", "transformer/config.json"}
        assert not (tmp_path / "a/models--org--tiny/.roundhouse-complete").exists()
        folder = snapshot(run(site, tmp_path / "b", "--exclude", "transformer/*"))
        assert names(folder) == {"model_index.json", "README.md", "text_encoder/model.safetensors"}


def test_copies_in_other_formats_are_left_out() -> None:
    def chosen(*files: str) -> list[str]:
        return [file.name for file in fetch.wanted([fetch.RemoteFile(name, 1, "0") for name in files])]

    assert chosen("config.json", "model.safetensors", "pytorch_model.bin", "state_dict.bin") == [
        "config.json",
        "model.safetensors",
    ]
    assert chosen("config.json", "pytorch_model.bin", "model.onnx") == ["config.json", "pytorch_model.bin"]
    assert chosen("model.safetensors", "original/consolidated.00.pth") == ["model.safetensors"]
    assert chosen("model_index.json", "flux1-schnell.safetensors", "ae.safetensors", "vae/m.safetensors") == [
        "model_index.json",
        "vae/m.safetensors",
    ]


def script(site: Site, config: Path, cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / "scripts/download-models.sh", "--config", config, *arguments],
        env=site.environment(HF_HUB_CACHE=str(cache)),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )


def test_the_script_fetches_what_the_config_names(hub: Path, tmp_path: Path) -> None:
    config = tmp_path / "models.yaml"
    config.write_text("models:\n  pics: {model: org/tiny, revision: main}\n  local: {model: ./here}\n  other: {}\n")
    with standin(hub) as site:
        listed = script(site, config, tmp_path / "cache", "--list")
        assert listed.stdout.splitlines()[0] == "pics: org/tiny, revision main"
        assert not (tmp_path / "cache").exists()
        done = script(site, config, tmp_path / "cache")
        assert done.returncode == 0, done.stderr
        assert "100 %" in done.stderr
        assert (tmp_path / "cache/models--org--tiny/refs/main").exists()
        unknown = script(site, config, tmp_path / "cache", "nobody")
        assert unknown.returncode != 0
        assert "no model nobody; there are: pics, local, other" in unknown.stderr
