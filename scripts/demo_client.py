#!/usr/bin/env python3
"""Sends a mixed burst of text, image and music jobs to a running Roundhouse server and shows what becomes of it.

    demo_client.py http://127.0.0.1:9000 [--out demo-output] [--small | --real] [--stays-up]

Needs nothing but Python's standard library. Exit code: 0 if every job succeeded, else 1.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import pathlib
import shutil
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

TERMINAL = ("succeeded", "failed", "cancelled", "expired")
GLYPHS = {"queued": ".", "running": ">", "cancelling": ">", "succeeded": "#"}
POLL_S = 0.4
PLAIN_EVERY_S = 10.0
STUCK_AFTER_S = 900.0

QUESTIONS = [
    "What is 2+2?",
    "What is the capital of France?",
    "Name three primary colours.",
    "Write one sentence about the sea.",
    "What do bees make?",
    "How many days are in a week?",
    "What is the opposite of hot?",
    "Say hello in Spanish.",
]
PICTURES = [
    "a roundhouse with steam locomotives at dawn",
    "a red fox in the snow",
    "a turntable seen from above",
    "a lighthouse in a storm",
    "a bowl of oranges, oil painting",
    "an empty station at night",
]
TUNES = ["slow piano, rain", "a steam engine's rhythm, drums", "cheerful banjo", "strings, very quiet"]
STREAMED = "Write a short poem about a train."

Json = dict[str, Any]


class Failed(Exception):
    """Something that a person has to read."""


class Api:
    """The server's HTTP API."""

    def __init__(self, base: str) -> None:
        self.base = base.rstrip("/")

    def fetch(self, path: str, body: Json | None = None) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base + path, data, {"content-type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=120) as reply:
                return reply.read()
        except urllib.error.HTTPError as error:
            raise Failed(f"{path}: HTTP {error.code}: {error.read(500).decode(errors='replace')}") from None
        except OSError as error:
            raise Failed(f"{path}: {error}") from None

    def get(self, path: str) -> Json:
        return json.loads(self.fetch(path))

    def post(self, path: str, body: Json) -> Json:
        return json.loads(self.fetch(path, body))

    def stream(self, path: str, body: Json) -> Iterator[Json]:
        """The chunks of a server-sent stream, until `[DONE]`."""
        parts = urlsplit(self.base)
        connection = http.client.HTTPConnection(parts.hostname or "127.0.0.1", parts.port or 80, timeout=600)
        with contextlib.closing(connection):
            connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
            reply = connection.getresponse()
            if reply.status != 200:
                raise Failed(f"{path}: HTTP {reply.status}: {reply.read(500).decode(errors='replace')}")
            for raw in reply:
                line = raw.decode().strip()
                if line == "data: [DONE]":
                    return
                if line.startswith("data: "):
                    yield json.loads(line.removeprefix("data: "))
        raise Failed(f"{path}: the stream ended without [DONE]")


class Screen:
    """Lines that stay, above a few that are drawn anew; on anything but a terminal only the former."""

    def __init__(self) -> None:
        self.live = sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        self.lock = threading.RLock()
        self.began = time.monotonic()
        self.drawn = 0
        self.held: list[str] | None = None

    def elapsed(self) -> float:
        return time.monotonic() - self.began

    def say(self, text: str = "", stamped: bool = False) -> None:
        line = f"{self.elapsed():7.1f} s  {text}" if stamped else text
        with self.lock:
            if self.held is not None:
                self.held.append(line)
                return
            self.erase()
            self.write(line + "\n")

    def draw(self, lines: list[str]) -> None:
        if not self.live:
            return
        width = shutil.get_terminal_size().columns - 1
        with self.lock:
            self.erase()
            self.write("".join(line[:width] + "\n" for line in lines))
            self.drawn = len(lines)

    def piece(self, text: str) -> None:
        """Text as it comes, in a line of its own; other lines wait until `end_piece`."""
        if self.live:
            return
        with self.lock:
            if self.held is None:
                self.held = []
                self.write(f"{self.elapsed():7.1f} s  streamed chat, token by token: ")
            self.write(text.replace("\n", " / "))

    def end_piece(self) -> None:
        with self.lock:
            held, self.held = self.held, None
            if held is not None:
                self.write("\n" + "".join(line + "\n" for line in held))

    def erase(self) -> None:
        if self.drawn:
            self.write(f"\x1b[{self.drawn}A\x1b[J")
            self.drawn = 0

    def write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


@dataclass
class Job:
    """One job of the burst."""

    label: str
    model: str
    what: str
    id: str
    state: str = "queued"
    shown: Json = field(default_factory=dict)


class Stream(threading.Thread):
    """A chat through the OpenAI face, streamed."""

    def __init__(self, api: Api, screen: Screen, model: str) -> None:
        super().__init__(daemon=True)
        self.api, self.screen, self.model = api, screen, model
        self.text = ""
        self.tokens = 0
        self.first_at: float | None = None
        self.took = 0.0
        self.error: str | None = None
        self.finished = False

    def run(self) -> None:
        body: Json = {
            "model": self.model,
            "stream": True,
            "max_tokens": 60,
            "temperature": 0,
            "messages": [{"role": "user", "content": STREAMED}],
        }
        try:
            for chunk in self.api.stream("/v1/chat/completions", body):
                self.take(chunk)
            if not self.finished:
                raise Failed("the stream has no finish_reason")
        except (Failed, OSError, http.client.HTTPException, ValueError) as error:
            self.error = str(error)
        self.took = self.screen.elapsed() - (self.first_at or 0.0)
        self.screen.end_piece()

    def take(self, chunk: Json) -> None:
        if "error" in chunk:
            raise Failed(str(chunk["error"].get("message", chunk["error"])))
        for choice in chunk.get("choices", []):
            piece = choice.get("delta", {}).get("content") or ""
            self.finished = self.finished or choice.get("finish_reason") is not None
            if piece:
                self.first_at = self.first_at or self.screen.elapsed()
                self.text += piece
                self.tokens += 1
                self.screen.piece(piece)


class Demo:
    """The burst and what is known of it."""

    def __init__(self, api: Api, out: pathlib.Path, small: bool) -> None:
        self.api, self.out, self.small = api, out, small
        self.screen = Screen()
        self.models = self.choose_models()
        self.jobs: list[Job] = []
        self.decisions_seen: set[tuple[Any, str]] = set()
        self.plain_at = 0.0
        self.moved_at = 0.0
        self.queue: Json = {}
        self.workers: list[Json] = []

    def choose_models(self) -> dict[str, str]:
        """The first model of each kind."""
        chosen: dict[str, str] = {}
        for model in self.api.get("/v1/models")["data"]:
            ours = model.get("roundhouse", {})
            chosen.setdefault(str(ours.get("kind") or ours.get("type")), model["id"])
        missing = [kind for kind in ("text", "image", "audio") if kind not in chosen]
        if missing:
            raise Failed(f"the server has no {' and no '.join(missing)} model: {chosen}")
        return chosen

    def burst(self) -> list[tuple[str, str, str, Json]]:
        """(label, kind, what, request), interleaved: no two in a row are for one model."""
        size, seconds = ("256x256", 3) if self.small else ("1024x1024", 8)
        texts = [("text", "/v1/chat/completions", what, self.chat(what)) for what in QUESTIONS]
        images = [
            ("image", "/v1/images/generations", what, {"prompt": what, "size": size, "seed": seed})
            for seed, what in enumerate(PICTURES, 1)
        ]
        tunes = [("audio", "/v1/audio/generations", what, {"prompt": what, "duration": seconds}) for what in TUNES]
        order = "text image audio text image text audio text image text image audio text image text audio text image"
        sources = {"text": iter(texts), "image": iter(images), "audio": iter(tunes)}
        counts = {"text": 0, "image": 0, "audio": 0}
        burst = []
        for turn in order.split():
            kind, endpoint, what, body = next(sources[turn])
            counts[kind] += 1
            name = {"audio": "music"}.get(kind, kind)
            request = {"endpoint": endpoint, "body": {"model": self.models[kind], **body}}
            burst.append((f"{name}-{counts[kind]}", kind, what, request))
        return burst

    @staticmethod
    def chat(what: str) -> Json:
        return {"messages": [{"role": "user", "content": what}], "max_tokens": 40, "temperature": 0}

    def submit(self) -> Stream:
        say = self.screen.say
        for label, kind, what, request in self.burst():
            job = self.api.post("/v1/jobs", request)
            self.jobs.append(Job(label, self.models[kind], what, job["id"]))
        counts = " + ".join(f"{sum(job.model == model for job in self.jobs)} {model}" for model in self.models.values())
        say(f"submitted {len(self.jobs)} jobs, interleaved: {counts}", stamped=True)
        stream = Stream(self.api, self.screen, self.models["text"])
        stream.start()
        say(f"and one streamed chat with {self.models['text']} through /v1/chat/completions", stamped=True)
        return stream

    def follow(self, stream: Stream) -> None:
        """Until all has ended."""
        while True:
            self.look()
            over = all(job.state in TERMINAL for job in self.jobs) and not stream.is_alive()
            self.screen.draw([] if over else self.table(stream))
            if over:
                return
            if self.screen.elapsed() - self.moved_at > STUCK_AFTER_S:
                raise Failed(f"nothing has happened for {STUCK_AFTER_S:.0f} s")
            self.plain_progress()
            time.sleep(POLL_S)

    def look(self) -> None:
        self.queue = self.api.get("/v1/queue")
        self.workers = self.api.get("/v1/workers")["data"]
        for decision in reversed(self.queue.get("history", [])):
            key = (decision["at"], decision["reason"])
            if key not in self.decisions_seen:
                self.decisions_seen.add(key)
                self.moved_at = self.screen.elapsed()
                self.screen.say(f"DECISION  {decision['reason']}  [{decision['code']}]", stamped=True)
        fresh = {job["id"]: job for job in self.api.get("/v1/jobs?limit=100")["data"]}
        for job in self.jobs:
            if job.id in fresh and job.state not in TERMINAL:
                self.update(job, fresh[job.id])
            if job.state == "running" and job.model != self.models["text"]:
                job.shown = self.api.get(f"/v1/jobs/{job.id}")  # with its progress, which lists leave out

    def update(self, job: Job, fresh: Json) -> None:
        if fresh["state"] != job.state:
            self.moved_at = self.screen.elapsed()
        job.state, job.shown = fresh["state"], fresh
        if job.state in TERMINAL:
            timings = fresh.get("timings") or {}
            figures = f"waited {timings.get('queue_s', 0):.1f} s, ran {timings.get('run_s', 0):.2f} s"
            why = "" if job.state == "succeeded" else f": {(fresh.get('error') or {}).get('message')}"
            self.screen.say(f"{job.state}  {job.label:<8} {figures}  ({job.what}){why}", stamped=True)

    def loading(self, model: str) -> str:
        for worker in self.workers:
            if worker["model"] == model and worker["state"] == "loading":
                percent = worker.get("percent")
                share = f" {percent:.0f}%" if percent is not None else ""
                return f" ({worker.get('phase') or 'starting'}{share})"
        return ""

    def table(self, stream: Stream) -> list[str]:
        lines = ["", f"{'model':<12} {'state':<28} jobs  (. waits, > runs, # done, x failed)"]
        for entry in self.queue.get("models", []):
            model = entry["model"]
            mine = [job for job in self.jobs if job.model == model]
            if not mine:
                continue
            glyphs = "".join(GLYPHS.get(job.state, "x") for job in mine)
            done = sum(job.state in TERMINAL for job in mine)
            state = f"{entry['state']}{self.loading(model)}"
            lines.append(f"{model:<12} {state:<28} {glyphs:<10} {done} of {len(mine)}  {self.steps(mine)}")
        lines.append(f"now: {(self.queue.get('decision') or {}).get('reason', '')}")
        text = stream.text.replace("\n", " / ")
        room = shutil.get_terminal_size().columns - 20
        lines.append(f"streamed chat: {text[-room:] if text else 'waits for its model'}")
        return lines

    @staticmethod
    def steps(jobs: list[Job]) -> str:
        for job in jobs:
            progress = job.shown.get("progress") or {}
            if job.state == "running" and progress.get("total"):
                return f"{job.label}: step {progress['step']} of {progress['total']}"
        return ""

    def plain_progress(self) -> None:
        if self.screen.live or self.screen.elapsed() < self.plain_at:
            return
        self.plain_at = self.screen.elapsed() + PLAIN_EVERY_S
        parts = []
        for entry in self.queue.get("models", []):
            mine = [job for job in self.jobs if job.model == entry["model"]]
            if mine:
                done = sum(job.state in TERMINAL for job in mine)
                parts.append(f"{entry['model']} {entry['state']}{self.loading(entry['model'])} {done}/{len(mine)}")
        self.screen.say("progress  " + ", ".join(parts), stamped=True)
        reason = (self.queue.get("decision") or {}).get("reason")
        if reason:
            self.screen.say(f"     now  {reason}", stamped=True)

    def save(self) -> list[str]:
        """Writes images and sounds to the output folder; returns their names."""
        self.out.mkdir(parents=True, exist_ok=True)
        names = []
        for job in self.jobs:
            if job.state != "succeeded" or job.model == self.models["text"]:
                continue
            shown = self.api.get(f"/v1/jobs/{job.id}")
            for position, artifact in enumerate(shown["artifacts"]):
                data = self.api.fetch(f"/v1/jobs/{job.id}/artifacts/{artifact['id']}")
                suffix = pathlib.PurePath(artifact["name"]).suffix
                if not data.startswith((b"\x89PNG", b"RIFF")):
                    raise Failed(f"{job.label}: neither a PNG nor a WAV but {data[:8]!r}")
                name = f"{job.label}{f'-{position}' if position else ''}{suffix}"
                (self.out / name).write_bytes(data)
                names.append(name)
        return names

    def price(self) -> None:
        """What the order cost, and what arrival order would have cost."""
        cost = {entry["model"]: float(entry["swap_cost_s"]) for entry in self.queue["models"]}
        swaps, in_order = self.queue["swaps"], self.queue["swaps_in_arrival_order"]
        history = list(reversed(self.queue["history"]))
        loaded = [decision["numbers"] and decision["model"] for decision in history if decision["action"] == "swap"]
        paid = sum(cost.get(model or "", 0.0) for model in loaded)
        # The chat came last, and was for the text model.
        arrivals = [job.model for job in self.jobs] + [self.models["text"]]
        changes = [model for before, model in zip(arrivals, arrivals[1:], strict=False) if before != model]
        would = sum(cost.get(model, 0.0) for model in changes)
        say = self.screen.say
        each = ", ".join(f"{model} {cost[model]:.1f} s" for model in self.models.values())
        say(f"Swaps: {swaps}, about {paid:.0f} s of stopping and loading.")
        say(f"In order of arrival: {in_order} swaps, about {would:.0f} s.")
        say(f"(One swap as measured just now, stop and load: {each}.)")

    def result(self, stream: Stream) -> None:
        say = self.screen.say
        say()
        asked = self.jobs[0]
        if asked.state == "succeeded":
            answer = self.api.get(f"/v1/jobs/{asked.id}/response")["choices"][0]["message"]["content"].strip()
            say(f"{asked.label}: {asked.what}\n    {answer}")
        if stream.error is None and stream.tokens:
            if self.screen.live:
                say(f"streamed chat: {STREAMED}\n    " + stream.text.strip().replace("\n", "\n    "))
            say(f"streamed chat: {stream.tokens} pieces in {stream.took:.1f} s")
        names = self.save()
        if names:
            say(f"Images and sounds, in {self.out}/: {' '.join(names)}")
            if self.small:
                say("Their models have random weights: the images are noise, and so is the sound.")
        say()
        self.price()

    def how_to(self, stays_up: bool) -> None:
        base, models = self.api.base, self.models
        self.screen.say(
            f"""
Try it yourself{"" if stays_up else " (scripts/demo.sh --keep leaves the server up)"}:

    curl -L {base}/v1/chat/completions -H 'content-type: application/json' \\
         -d '{{"model": "{models["text"]}", "temperature": 0,
              "messages": [{{"role": "user", "content": "What is 2+2?"}}]}}'

    curl {base}/v1/jobs -H 'content-type: application/json' \\
         -d '{{"endpoint": "/v1/images/generations", "body": {{"model": "{models["image"]}", "prompt": "a red fox"}}}}'
    curl '{base}/v1/jobs/JOB_ID?wait=60'
    curl {base}/v1/queue

    pip install openai
    from openai import OpenAI
    client = OpenAI(base_url="{base}/v1", api_key="none")
    chat = client.chat.completions.create(
        model="{models["text"]}", messages=[{{"role": "user", "content": "What is 2+2?"}}])
    print(chat.choices[0].message.content)
"""
        )

    def failures(self, stream: Stream) -> list[str]:
        bad = [f"{job.label} {job.state}" for job in self.jobs if job.state != "succeeded"]
        return bad + ([f"streamed chat: {stream.error}"] if stream.error else [])


def main() -> int:
    parser = argparse.ArgumentParser(description="A mixed burst for a running Roundhouse server.")
    parser.add_argument("base", help="for example http://127.0.0.1:9000")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("demo-output"))
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--small", action="store_true", default=True, help="random image and music weights (default)")
    size.add_argument("--real", dest="small", action="store_false", help="real weights: larger images, longer music")
    parser.add_argument("--stays-up", action="store_true", help="the server stays up afterwards")
    args = parser.parse_args()
    try:
        demo = Demo(Api(args.base), args.out, args.small)
        stream = demo.submit()
        demo.follow(stream)
        demo.result(stream)
        demo.how_to(args.stays_up)
        bad = demo.failures(stream)
    except Failed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if bad:
        print(f"error: not all succeeded: {', '.join(bad)}", file=sys.stderr)
        return 1
    print(f"All {len(demo.jobs)} jobs and the streamed chat succeeded, in {demo.screen.elapsed():.0f} s.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
