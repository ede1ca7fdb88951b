#!/usr/bin/env python3
"""Measures swaps through the real server on a real GPU; see scripts/gpu-verify.sh.

Records go to OUT/results.jsonl, one JSON object a line, and the table is made of all that is in there: parts may be
measured in several calls. Only the standard library is needed here; torch is, for the workers and the checkpoints.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

from gpu import box, models, needs, swaps, table, throughput
from gpu.common import ROOT, Failed, Json, Records, say, until
from gpu.models import REAL, TINY, Model
from gpu.server import COLD_LIMIT_S, Server, environment

PARTS = ("link", "checkpoints", "swaps", "cold", "text", "music", "stop", "kill", "ways")
PARKED = {"swaps", "stop", "kill", "ways", "two-gpus"}
SERVED = PARKED | {"cold", "text", "music"}
"""Parts that park models, and those that load any."""
MODELS = ("flux-transformer", "flux", "musicgen", "text")
EPILOG = """\
needs:
  a program (--binary) built by cargo build --release
  real: a GPU of 80 GB, 128 GB of memory, 50 GB of disk for the checkpoints; fewer --models take less
  real: a Python with torch, transformers, diffusers, starlette, uvicorn, soundfile and vllm: the environment variable
        PYTHON names it; default: python3
  tiny: scripts/install.sh --cpu flux musicgen (with --vllm: vllm, too), and scripts/make-checkpoints.sh

exit codes:
  0  all goals were met
  1  a goal was missed, or a part failed
  2  a flag is wrong, or this machine lacks something: nothing was started
  130  broken off by a signal; what had been started was stopped
"""
CHECKPOINT_LIMIT_S = 420
GONE_LIMIT_S = 15
CHECKPOINT = "the driver's checkpoint"
WAYS_PARK_RAM = "24GiB"
"""Enough for what the driver takes there; too little for what the text model without a copy is declared to take."""


class LeftOut(Exception):
    """A part has nothing to do with the chosen models, or on this machine; the text says what it needs."""


class Verify:
    """One call of the procedure."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.out: pathlib.Path = options.out.resolve()
        self.out.mkdir(parents=True, exist_ok=True)
        self.records = Records(self.out / "results.jsonl")
        self.keys = self.known_keys()
        found = models.catalogue(options.scale, options.checkpoints.resolve(), self.uses_vllm, options.eager)
        unknown = [name for name in options.models if name not in found]
        if unknown:
            raise Failed(f"--models: there is no {', '.join(unknown)}; there are {', '.join(found)}")
        self.models = {name: found[name] for name in options.models}
        self.look_around()
        self.end_at = time.monotonic() + options.budget
        self.mark = f"{os.getpid()}-{random.randrange(10**9)}"
        self.tmp = pathlib.Path(tempfile.gettempdir())
        self.env = environment(self.mark, self.out / "cache")
        if self.is_tiny:
            # Others may use /tmp meanwhile. Short, since sockets lie in it, whose paths may have 107 characters.
            self.tmp = pathlib.Path(tempfile.mkdtemp(prefix="rhv-"))
            self.env["TMPDIR"] = str(self.tmp)
            self.env.setdefault("ROUNDHOUSE_FAKE_GPUS", f"{2 if options.two_gpus else 1}x1GiB")
        self.before = box.look(self.tmp)
        self.server: Server | None = None
        self.runs = 0
        self.ports: set[int] = set()

    @property
    def is_tiny(self) -> bool:
        return self.options.scale == TINY

    @property
    def uses_vllm(self) -> bool:
        return not self.is_tiny or self.options.vllm

    @property
    def card(self) -> int:
        """Memory of the smallest GPU, in bytes."""
        return min((int(gpu["mib"]) for gpu in box.gpus()), default=1024) << 20

    def known_keys(self) -> set[str]:
        """Keys of a model's entry that the binary knows."""
        binary = self.options.binary
        if not os.access(binary, os.X_OK):
            raise Failed(f"no program {binary}: run cargo build --release, or say --binary")
        answer = subprocess.run([binary, "config", "schema"], capture_output=True, timeout=30, check=True).stdout
        return set(json.loads(answer)["$defs"]["Entry"]["properties"])

    def look_around(self) -> None:
        """That this box has what the chosen parts need, before minutes are spent.

        Raises:
            Failed: it has not.
        """
        if not self.is_tiny and not box.gpus():
            raise Failed("nvidia-smi shows no GPU; --scale tiny does without one")
        parts = {*self.options.only, *(["two-gpus"] if self.options.two_gpus else [])}
        serves, makes = bool(parts & SERVED), "checkpoints" in parts and not self.is_tiny
        pythons: dict[str, needs.Python] = {}
        makes_any = bool(parts & {"checkpoints", "ways"}) and not self.is_tiny
        if "link" in parts or makes_any:
            torch = needs.OF_TORCH | {"diffusers"} if makes_any else {"torch"}
            pythons["link and checkpoints"] = needs.Python(self.own_or_this("flux"), torch, self.advice("flux"))
        for model in self.models.values() if serves else ():
            python = self.python(model) or str(models.own_python(model.server))
            libraries = needs.OF_ALL | needs.OF_ENGINE[model.server]
            pythons[f"workers of models/{model.server}"] = needs.Python(python, libraries, self.advice(model.server))
        needs.libraries(pythons)
        if not self.is_tiny:
            folder, chosen = self.options.checkpoints.resolve(), list(self.models.values())
            needs.room(chosen, folder, makes=makes, parks=bool(parts & PARKED))
        for model in self.models.values() if serves and not makes else ():
            if model.folder and not (model.folder / ".complete").exists():
                how = "run scripts/make-checkpoints.sh" if self.is_tiny else "let the part checkpoints go before"
                raise Failed(f"no checkpoint {model.folder}: {how}")

    def advice(self, engine: str) -> str:
        """What to do if the interpreter of an engine's workers will not do."""
        if self.is_tiny and not self.options.python:
            return f"run scripts/install.sh --cpu {engine}"
        return "name another one by --python" if self.options.python else "name another one by PYTHON or --python"

    def own_or_this(self, engine: str) -> str:
        """The interpreter of what runs beside the server."""
        own = models.own_python(engine)
        return self.options.python or (str(own) if self.is_tiny and own.exists() else sys.executable)

    # ---- the server ----------------------------------------------------------

    def session(self) -> Server:
        """The server with the chosen models; the one that runs, if it does."""
        if self.server is None:
            self.server = self.serve(
                {m.name: models.entry(m, self.python(m), self.keys, self.card) for m in self.models.values()}, "one"
            )
        return self.server

    def serve(self, entries: dict[str, Json], name: str, park_ram: str | None = None) -> Server:
        config = self.out / f"models-{name}.yaml"
        models.model_file(config, entries, park_ram or self.options.park_ram)
        self.runs += 1
        stamp = datetime.datetime.now(datetime.UTC).strftime("%H%M%S")
        say(f"starting the server with {', '.join(entries)}")
        return Server(self.options.binary.resolve(), config, self.out / f"data-{stamp}-{self.runs}", self.env)

    def python(self, model: Model) -> str | None:
        return models.python_of(model, self.options.python, self.options.scale)

    def end(self, how: Callable[[Server], object]) -> None:
        """Stop the server that runs, if one does."""
        server, self.server = self.server, None
        if server is not None:
            self.ports |= server.ports
            how(server)

    def clean_up(self) -> None:
        """Whatever happens: nothing that was started here goes on."""
        try:
            self.end(Server.stop)
        except Failed as error:
            say(str(error))
        for pid in box.marked(self.mark):
            say(f"killing what was left: {pid} {box.command(pid)}")
            os.kill(pid, signal.SIGKILL)
        if self.is_tiny:
            shutil.rmtree(self.tmp, ignore_errors=True)

    # ---- parts ---------------------------------------------------------------

    def link(self) -> None:
        """The speed between host and GPU, in this very run."""
        facts = json.loads(self.alone([str(ROOT / "scripts/gpu/link.py")], 180, "flux").splitlines()[-1])
        self.records.add("link", **facts)

    def alone(self, arguments: list[str], limit_s: float, engine: str) -> str:
        """What a Python program prints that needs torch."""
        run = subprocess.run(
            [self.own_or_this(engine), *arguments],
            capture_output=True,
            text=True,
            timeout=limit_s,
            cwd=ROOT / "scripts",
            env=self.env,
        )
        if run.returncode:
            raise Failed(f"{' '.join(arguments)} failed: {run.stderr[-1500:]}")
        return run.stdout

    def checkpoints(self) -> None:
        """Random weights at the real shapes, made once."""
        for model in self.models.values():
            if model.folder and not (model.folder / ".complete").exists():
                self.make(model, model.folder)
        swaps.folder_sizes(list(self.models.values()), self.records)

    def make(self, model: Model, folder: pathlib.Path) -> None:
        if self.is_tiny:
            raise Failed(f"no checkpoint {folder}: run scripts/make-checkpoints.sh")
        began = time.monotonic()
        arguments = ["-m", "gpu.checkpoints", model.name, str(folder)]
        share = self.options.checkpoints / "flux-transformer"
        if model.name == "flux" and (share / ".complete").exists():
            arguments.append(str(share))
        self.alone(arguments, CHECKPOINT_LIMIT_S, "flux")
        (folder / ".complete").touch()
        self.records.add("made", model=model.name, gb=round(model.bytes() / 1e9, 2), s=round(time.monotonic() - began))

    def swaps(self) -> None:
        """All pairs by turns."""
        labels = {"run": self.mark}
        swaps.run(self.session(), list(self.models.values()), self.options.cycles, self.records, self.end_at, labels)

    def cold(self) -> None:
        """Cold starts from the page cache, with a spare process where the server has them."""
        first = next(iter(self.models.values()))
        spare = "spare" in self.keys and first.spare
        swaps.cold_starts(self.session(), first, self.records, spare, {"run": self.mark})

    def text(self) -> None:
        """A batch of short prompts against driving the engine directly."""
        if "text" not in self.models:
            raise LeftOut("it needs the model text")
        few = (16, 8) if self.uses_vllm else (200, 16)
        count, at_once = few if self.is_tiny else (5000, 256)
        throughput.text(self.session(), self.models["text"], count, at_once, self.records)

    def music(self) -> None:
        """Clips against the best direct batch."""
        if "musicgen" not in self.models:
            raise LeftOut("it needs the model musicgen")
        count, seconds = (16, 1) if self.is_tiny else (32, 2)
        throughput.music(self.session(), self.models["musicgen"], count, seconds, self.records)

    def stop(self) -> None:
        """SIGTERM, and nothing is left."""
        self.loaded()
        self.end(Server.stop)
        self.nothing_left("SIGTERM")

    def loaded(self) -> tuple[Server, Model]:
        """The server with a model of each engine loaded, all but the last of them parked; and that one.

        One of each is enough: each more costs a cold load.
        """
        server = self.session()
        order = list({model.server: model for model in reversed(self.models.values())}.values())[::-1]
        for model in order:
            server.finished(server.submit(model.request()), COLD_LIMIT_S)
            server.worker(model.name)  # whose port is to be free afterwards
        return server, order[-1]

    def kill(self) -> None:
        """SIGKILL of the server while a job runs and others are parked, and nothing is left."""
        server, busy = self.loaded()
        job = server.submit({**busy.request(), "body": {"model": busy.name, **busy.slow}})
        until("a job that runs", 60, 0.05, lambda: server.ask("GET", f"/v1/jobs/{job}")["state"] == "running" or None)
        self.end(Server.kill)
        self.nothing_left("kill -9")

    def nothing_left(self, after: str) -> None:
        began = time.monotonic()
        while True:
            left = box.left(self.before, self.mark, self.tmp, self.ports, self.is_tiny)
            took = time.monotonic() - began
            if not left or took > GONE_LIMIT_S:
                break
            time.sleep(0.2)
        self.records.add("left", after=after, left=left, s=round(took, 1))

    def ways(self) -> None:
        """The other ways of parking by turns: the driver's checkpoint, of one process and of several, and no copy."""
        if self.is_tiny or not {"musicgen", "text"} <= set(self.models):
            raise LeftOut("it needs a GPU and the models musicgen and text")
        self.end(Server.stop)
        music, words = self.models["musicgen"], models.with_files(self.models["text"])
        if words.folder and not (words.folder / ".complete").exists():
            self.make(words, words.folder)
        engine = replace(words, name="text-checkpoint")
        ways = {music.name: CHECKPOINT, words.name: swaps.BARE, engine.name: CHECKPOINT}
        by_turns = [music, words, engine]
        entries = {m.name: models.entry(m, self.python(m), self.keys, self.card) for m in by_turns}
        for model in (music, engine):
            # Of all that is on the GPU the driver makes a copy.
            entries[model.name] |= {"park": "checkpoint", "spare": False, "memory": music.memory}
        for model in (words, engine):
            entries[model.name] |= {"exclusive": True}
        self.server = self.serve(entries, "ways", WAYS_PARK_RAM)
        swaps.ways(self.server, by_turns, ways, self.records)

    def two_gpus(self) -> None:
        """Two models at once on a GPU each, one on both, and back."""
        self.end(Server.stop)
        names = [name for name in ("flux-transformer", "musicgen", "text") if name in self.models]
        if len(names) < 3:
            raise Failed("--two-gpus needs the models flux-transformer, musicgen and text")
        picture, music, words = (self.models[name] for name in names)
        entries = {m.name: models.entry(m, self.python(m), self.keys, self.card) for m in (picture, music)}
        entries[words.name] = models.entry(words, self.python(words), self.keys, self.card, gpu_count=2)
        server = self.server = self.serve(entries, "two")
        for turn in ("apart", "back"):
            self.apart(server, picture, music, turn)
            if turn == "apart":
                jobs = [server.finished(server.submit(words.request()), COLD_LIMIT_S) for _ in range(2)]
                gpus = server.worker(words.name)["gpus"]
                same = len({swaps.digest(server, words, job) for job in jobs}) == 1
                value = f"{words.name} answered on GPUs {gpus}, twice {'the same' if same else 'not the same'}"
                self.records.add("two-gpus", what="one model on both", value=value, met=same and len(gpus) == 2)

    def apart(self, server: Server, one: Model, other: Model, turn: str) -> None:
        """Jobs of both run at the same time, on different GPUs."""
        for model in (one, other):
            server.finished(server.submit(model.request()), COLD_LIMIT_S)
        slow = [server.submit({**m.request(), "body": {"model": m.name, **m.slow}}) for m in (one, other)]
        try:
            until(
                "both models running at once",
                60,
                0.05,
                lambda: all(server.ask("GET", f"/v1/jobs/{job}")["state"] == "running" for job in slow),
            )
        finally:
            for job in slow:
                server.ask("POST", f"/v1/jobs/{job}/cancel")
        where = [server.worker(m.name)["gpus"] for m in (one, other)]
        met = all(len(gpus) == 1 for gpus in where) and where[0] != where[1]
        value = f"{one.name} on {where[0]}, {other.name} on {where[1]}, jobs of both running"
        self.records.add("two-gpus", what=f"different models at once, {turn}", value=value, met=met)

    # ---- all of it -----------------------------------------------------------

    def run(self) -> int:
        """All chosen parts, and the table; the exit code."""
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
        self.records.add("start", at=now, scale=self.options.scale, gpus=box.gpus(), used_mib=self.before.mib)
        chosen = [part for part in PARTS if part in self.options.only]
        if self.options.two_gpus:
            chosen.append("two-gpus")
        for part in chosen:
            if time.monotonic() > self.end_at:
                self.records.add("failed", what=part, why="the time was up")
                continue
            say(f"== {part}")
            try:
                getattr(self, part.replace("-", "_"))()
                self.records.add("done", what=part)
            except LeftOut as why:
                say(f"{part} is left out: {why}")
            except (Failed, OSError, subprocess.SubprocessError, KeyError) as error:
                say(f"{part} failed: {error!r}" if isinstance(error, KeyError) else f"{part} failed: {error}")
                if self.server is not None:
                    say(self.server.tails())
                self.records.add("failed", what=part, why=str(error))
                self.clean_session()
        return self.conclude()

    def clean_session(self) -> None:
        """The next part gets a new server."""
        try:
            self.end(Server.stop)
        except Failed as error:
            say(str(error))

    def conclude(self) -> int:
        records = self.records.all()
        (self.out / "table.md").write_text(table.markdown(records))
        print(table.plain(records))
        print(f"\n{table.markdown(records)}")
        found = table.rows(records)
        judged = [row for row in found if row.met is not None]
        if self.is_tiny:
            # Speeds of small models on a CPU say nothing; what is the same, and what is left, does.
            judged = [row for row in judged if row.goal in ("", "identical", "nothing in 15 s", "works")]
        missed = [row.figure for row in judged if not row.met]
        print(f"{len(judged) - len(missed)} met, {len(missed)} missed{': ' if missed else ''}{', '.join(missed)}")
        return 1 if missed else 0


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/gpu-verify.sh",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    words = lambda text: [word for word in text.split(",") if word]  # noqa: E731
    add = parser.add_argument
    out, binary = ROOT / "target/gpu-verify", ROOT / "target/release/roundhouse"
    add("--out", type=pathlib.Path, default=out, help="records, logs, table.md; default: target/gpu-verify")
    add("--scale", choices=(REAL, TINY), default=REAL, help="tiny: small checkpoints, on the CPU; default: real")
    every = ",".join(PARTS)
    add("--only", type=words, default=list(PARTS), help=f"parts by commas, or none; default: all, {every}")
    add("--models", type=words, default=list(MODELS), help=f"models by commas; default: all, {','.join(MODELS)}")
    add("--binary", type=pathlib.Path, default=binary, help="the server; default: target/release/roundhouse")
    add(
        "--checkpoints",
        type=pathlib.Path,
        help="where they are made, a large disk; default: OUT/checkpoints (tiny: those of scripts/make-checkpoints.sh)",
    )
    add("--python", help="interpreter of the workers; default: this one, PYTHON (tiny: models/*/.venv)")
    add("--cycles", type=int, default=3, help="how often all pairs are gone through; default: 3")
    add("--budget", type=float, default=1e9, help="seconds after which no part begins; default: no limit")
    add("--park-ram", default="90%", help="scheduler.park_ram of the model file; default: 90%%")
    add("--eager", action="store_true", help="vLLM without compiling: starts sooner, runs slower")
    add("--vllm", action="store_true", help="tiny: real vLLM on the CPU, too (a minute a start)")
    add("--two-gpus", action="store_true", help="also models on two GPUs at once, and one on both")
    made = parser.parse_args(arguments)
    unknown = [part for part in made.only if part not in PARTS and part != "none"]
    if unknown:
        parser.error(f"--only: there is no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if made.checkpoints is None:
        tiny = pathlib.Path(os.environ.get("ROUNDHOUSE_CHECKPOINTS", ROOT / ".cache/checkpoints"))
        made.checkpoints = tiny if made.scale == TINY else made.out / "checkpoints"
    return made


def main() -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.default_int_handler)
    chosen = options()
    try:
        verify = Verify(chosen)
    except Failed as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        return verify.run()
    except KeyboardInterrupt:
        say("broken off; stopping what was started")
        return 130
    finally:
        verify.clean_up()


if __name__ == "__main__":
    sys.exit(main())
