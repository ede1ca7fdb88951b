"""scripts/gpu: the arithmetic of scripts/gpu-verify.sh, and its HTTP client. The whole of it: --scale tiny."""

from __future__ import annotations

import asyncio
import http.server
import itertools
import os
import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path
from typing import Any, ClassVar

import pytest

from gpu import box, models, server, swaps, table, throughput
from gpu.common import ROOT, Failed, Json, until
from roundhouse_server import BINARY

SIZES = [{"part": "weights", "model": name, "bytes": size} for name, size in (("flux", 33_800_000_000), ("text", 0))]
LINK = {"part": "link", "torch": "2.11", "to_gpu_pinned": 55.0, "to_host_pinned": 55.0}
LINK |= {"to_gpu_pageable": 8.0, "to_host_pageable": 15.0}


def swap(before: str, after: str, **more: Any) -> Json:
    told = {"part": "swap", "run": "a", "cycle": 2, "how": "parked", "answer": "x", "parked_ms": 50, "load_ms": 650}
    return told | {"came_from": before, "model": after, "gap_ms": 720, "worker_wake_s": 0.63} | more


def verdicts(records: list[Json]) -> dict[str, bool | None]:
    return {row.figure: row.met for row in table.rows([LINK, *SIZES, *records])}


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_a_round_visits_every_ordered_pair_once(count: int) -> None:
    names = [f"m{n}" for n in range(count)]
    walk = swaps.circuit(names)
    assert walk[0] == walk[-1] == names[0]
    assert sorted(itertools.pairwise(walk)) == sorted(itertools.permutations(names, 2))


def test_goals_are_met_or_missed_by_the_median_from_the_second_cycle_on() -> None:
    good = [swap("text", "flux"), swap("flux", "text", load_ms=300)]
    met = verdicts([swap("text", "flux", cycle=1, load_ms=9000, gap_ms=9100), *good])
    assert met["flux: park + wake"] is True
    assert met["flux: speed of its wake"] is True
    assert met["to flux: decision to its job running"] is True
    assert met["decision to job running, beyond park + wake"] is True
    slow = verdicts(
        [swap("text", "flux", load_ms=750, worker_wake_s=0.7, gap_ms=1300), swap("flux", "text", gap_ms=1300)]
    )
    assert slow["flux: park + wake"] is False
    assert slow["flux: speed of its wake"] is False
    assert slow["to flux: decision to its job running"] is False
    assert slow["decision to job running, beyond park + wake"] is False


DONE = {"part": "done", "what": "swaps"}


def test_a_goal_without_a_figure_is_missed_once_all_has_been_swapped() -> None:
    cold = [swap(*pair, how="cold", load_ms=20_000, parked_ms=None) for pair in (("text", "flux"), ("flux", "text"))]
    cold[0] |= {"gap_ms": None}
    figures = ["flux: park + wake", "text: park + wake", "decision to job running, beyond park + wake"]
    found = verdicts([*cold, *cold])
    assert not found.keys() & set(figures), "it may go on"
    found = verdicts([*cold, *cold, DONE])
    assert [found[figure] for figure in figures] == [False] * 3
    assert not any(row.met for row in table.rows([*cold, DONE])), "nor if nobody said how large the weights are"
    rows = {row.figure: row.value for row in table.rows([*cold, DONE])}
    assert rows["flux: park + wake"] == "never parked from the second cycle on"

    silent = [swap("text", "flux", gap_ms=None, worker_wake_s=None), swap("flux", "text", gap_ms=None)]
    found = verdicts([*silent, DONE])
    assert found["flux: park + wake"] is True
    assert found["flux: speed of its wake"] is False
    assert found["to flux: decision to its job running"] is False
    assert found["decision to job running, beyond park + wake"] is False


def test_a_call_of_one_cycle_owes_no_figures_of_a_second_one() -> None:
    once = [swap("text", "flux", cycle=1, how="cold"), swap("flux", "text", cycle=1)]
    figures = {"flux: park + wake", "decision to job running, beyond park + wake"}
    assert not verdicts([*once, DONE]).keys() & figures
    assert verdicts([*once, swap("flux", "text"), DONE])["flux: park + wake"] is False, "it came to a second one"


def test_only_models_of_the_last_call_that_swapped_have_to_be_measured() -> None:
    good = [swap("text", "musicgen", run="b"), swap("musicgen", "text", run="b"), DONE]
    assert "flux: park + wake" not in verdicts([swap("text", "flux", cycle=1, how="cold"), *good])
    failed = {"part": "failed", "what": "swaps", "why": "it died"}
    assert "flux: park + wake" not in verdicts([DONE, swap("text", "flux", cycle=1, how="cold"), failed])
    assert "flux: park + wake" not in verdicts([swap("", "flux", cycle=1, how="cold"), DONE]), "alone"


def test_a_cold_load_is_judged_if_a_spare_was_to_be_there() -> None:
    load = {"part": "cold", "model": "flux-transformer", "run": "a", "load_ms": 2800, "spare": True, "was_spare": True}
    figure = "flux-transformer: cold load from page cache"
    assert verdicts([load, load])[figure] is True
    assert verdicts([load, load | {"load_ms": 8000}, load | {"load_ms": 8000}])[figure] is False
    assert verdicts([load, load | {"was_spare": False}])[figure] is False
    assert verdicts([load | {"spare": False, "was_spare": False}])[figure] is None


def test_a_later_call_replaces_what_an_earlier_one_measured() -> None:
    earlier = [swap("text", "flux", load_ms=5000, answer="other"), swap("flux", "text")]
    later = [swap("text", "flux", run="b"), swap("flux", "text", run="b"), swap("text", "flux", run="b")]
    found = verdicts([*earlier, *later])
    assert found["flux: park + wake"] is True
    assert found["flux: the same answer before and after"] is True


def test_an_answer_that_changed_is_missed() -> None:
    seen = [swap("text", "flux"), swap("text", "flux", answer="y")]
    assert verdicts(seen)["flux: the same answer before and after"] is False


def test_what_failed_and_what_was_left_is_missed_until_it_went_well() -> None:
    failed = [
        {"part": "failed", "what": "music", "why": "no\nlog"},
        {"part": "left", "after": "kill -9", "left": ["port 1"], "s": 15},
    ]
    found = verdicts(failed)
    assert found["part music"] is False
    assert found["left behind after kill -9"] is False
    found = verdicts(
        [*failed, {"part": "done", "what": "music"}, {"part": "left", "after": "kill -9", "left": [], "s": 1}]
    )
    assert "part music" not in found
    assert found["left behind after kill -9"] is True


def test_jobs_are_compared_with_the_direct_turns_on_both_sides() -> None:
    straight, served = [1.0, 3.0, 2.0], [4.0, 2.0]
    turns: list[str] = []

    def turn(what: str, left: list[float]) -> float:
        turns.append(what)
        return left[turns.count(what) - 1]

    found = throughput.by_turns(2, lambda: turn("direct", straight), lambda: turn("jobs", served))
    assert turns == ["direct", "jobs", "direct", "jobs", "direct"]
    assert found == (straight, served, [0.5, 1.25])
    assert throughput.compared(6, *found)["ratio"] == 0.875  # the median


def test_throughput_is_judged_by_its_ratio() -> None:
    text = {"part": "text", "jobs": 5000} | throughput.compared(5000, [10, 10, 10], [10, 11], [1.0, 0.88])
    music = {"part": "music", "jobs": 64} | throughput.compared(64, [10, 9, 8, 30], [10, 10, 9], [0.95, 0.85, 2.1])
    found = verdicts([text, music])
    assert found["5 000 short prompts through the server / direct"] is False
    assert found["music / best batch"] is True


def test_throughput_of_an_earlier_version_has_no_spread() -> None:
    record = {"part": "text", "jobs": 5000, "ratio": 0.97, "through_per_s": 97.0, "direct_per_s": [99.0, 101.0]}
    [row] = [row for row in table.rows([record]) if "short prompts" in row.figure]
    assert (row.value, row.met) == ("0.970 (97.0/s, direct [99.0, 101.0]/s)", True)


def test_a_way_of_parking_is_met_if_it_came_back_as_it_was() -> None:
    way = {"part": "way", "model": "musicgen", "way": "the driver's checkpoint", "parks": [2.7], "wakes": [1.3]}
    figure = "musicgen parked by way of the driver's checkpoint"
    assert verdicts([way | {"same": True}])[figure] is True
    assert verdicts([way | {"same": False}])[figure] is False
    assert verdicts([way | {"same": True, "wakes": []}])[figure] is False


def test_the_text_model_with_files_is_read_from_them(tmp_path: Path) -> None:
    words = models.with_files(models.catalogue("real", tmp_path, True, False)["text"])
    assert words.folder == tmp_path / "text-files"
    assert "dummy" not in words.args
    assert "--max-model-len" in words.args


def test_the_table_is_markdown_with_all_pairs() -> None:
    first = swap("flux", "text", cycle=1, how="cold", gap_ms=92_000)
    text = table.markdown([LINK, *SIZES, first, swap("text", "flux"), swap("flux", "text", gap_ms=500)])
    assert "| flux |  | 0.50 s, cold 92.0 s |" in text
    assert "| text | 0.72 s |  |" in text


def png(pixels: bytes) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + b"\0\0\0\0"

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", b"\0" * 13) + chunk(b"IDAT", zlib.compress(pixels))


def test_an_image_of_one_colour_is_told_from_noise() -> None:
    assert swaps.colours(png(b"\0" * 3000)) == 1
    assert swaps.colours(png(bytes(range(256)) * 12)) == 256


def test_models_are_kept_apart_by_their_memory(tmp_path: Path) -> None:
    card = 80 << 30
    entries = {
        model.name: models.entry(model, None, {"spare"}, card)
        for model in models.catalogue(models.REAL, tmp_path, True, False).values()
    }
    assert all(2 * entry["memory"] > card > entry["memory"] for entry in entries.values())
    assert entries["flux"]["spare"] is True
    assert "spare" not in models.entry(models.catalogue(models.REAL, tmp_path, True, False)["flux"], None, set(), card)
    both = models.entry(models.catalogue(models.REAL, tmp_path, True, True)["text"], None, set(), card, gpu_count=2)
    assert both["gpus"] == 2
    assert both["args"][-2:] == ["--tensor-parallel-size", "2"]


def test_the_worker_says_in_its_log_how_long_it_took(tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    (tmp_path / "log/flux.log").write_text(
        "T INFO  parked park.seconds=0.05\nT INFO  ready wake.seconds=0.61\nT INFO  ready wake.seconds=0.62\n"
    )
    one = object.__new__(server.Server)
    one.data = tmp_path
    assert one.moved_s("flux", "wake") == 0.62
    assert one.moved_s("flux", "park") == 0.05
    assert one.moved_s("text", "wake") is None
    (tmp_path / "log/music.log").write_text("T INFO  moved wake.copy_seconds=0.4\nT INFO  ready wake.seconds=0.61\n")
    assert one.passes("music") == []
    with (tmp_path / "log/music.log").open("a") as log:
        log.write("T INFO  pass finished pass.size=16 pass.seconds=7.25 pass.outcome=succeeded\n")
    assert one.passes("music") == [[16, 7.25]]
    assert one.moved_s("music", "wake") == 0.4


class Worker(http.server.BaseHTTPRequestHandler):
    """Answers with a length, and every other time in chunks."""

    protocol_version = "HTTP/1.1"
    asked: ClassVar[list[bytes]] = []

    def do_POST(self) -> None:
        self.asked.append(self.rfile.read(int(self.headers["content-length"])))
        self.send_response(200)
        if len(self.asked) % 2:
            self.send_header("content-length", "2")
            self.end_headers()
            self.wfile.write(b"{}")
        else:
            self.send_header("transfer-encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"1\r\n{\r\n1\r\n}\r\n0\r\n\r\n")

    def log_message(self, *args: object) -> None:
        pass


def test_the_client_reads_lengths_and_chunks_and_sends_all() -> None:
    async def talk(port: int) -> None:
        await throughput.drive(port, "/x", [str(n).encode() for n in range(20)], 4)
        line = throughput.Line(port)
        assert await line.post("/x", b"a") == b"{}"
        assert await line.post("/x", b"b") == b"{}"
        line.close()

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Worker) as site:
        threading.Thread(target=site.serve_forever, daemon=True).start()
        asyncio.run(talk(site.server_address[1]))
        site.shutdown()
    assert sorted(Worker.asked) == sorted([str(n).encode() for n in range(20)] + [b"a", b"b"])


def test_what_is_left_is_found_by_its_mark_its_files_and_its_port(tmp_path: Path) -> None:
    before = box.look(tmp_path)
    environment = dict(os.environ) | {box.MARK: "here"}
    sleeper = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, env=environment)
    try:
        until("its start", 10, 0.01, lambda: box.marked("here"))
        (tmp_path / "leftover").touch()
        left = box.left(before, "here", tmp_path, {1}, True)
        assert [line.split(":")[0] for line in left] == [f"process {sleeper.pid}", str(tmp_path / "leftover")]
        assert sleeper.pid in box.children_of(os.getpid())
    finally:
        sleeper.communicate(b"\n", timeout=10)
    assert box.marked("here") == []


def test_waits_are_bounded() -> None:
    with pytest.raises(Failed, match="a thing: not within 0 s"):
        until("a thing", 0, 0.001, lambda: False)


def test_the_procedure_runs_with_the_real_server_and_a_worker_that_pretends(tmp_path: Path) -> None:
    flags = ["--scale", "tiny", "--models", "text", "--only", "swaps,text,stop,kill"]
    run = subprocess.run(
        [ROOT / "scripts/gpu-verify.sh", *flags, "--out", tmp_path / "out", "--binary", BINARY],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHON": sys.executable},
    )
    assert run.returncode == 0, run.stderr
    written = (tmp_path / "out/table.md").read_text()
    assert "| left behind after SIGTERM | nothing, " in written
    assert "| left behind after kill -9 | nothing, " in written
    assert "| 200 short prompts through the server / direct | " in written
