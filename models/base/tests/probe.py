"""A worker that a test drives step by step: `/permit` lets it go on, `/seen` tells what its hooks saw.

It uses every hook of `BaseService`. With `--gated` loading needs a permit; a
request with `gated` needs a permit for every step.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from starlette.responses import JSONResponse
from starlette.routing import Route

from roundhouse_worker import BaseService, Binary, InvalidRequest


class OutOfMemoryError(Exception):
    """Named like torch's."""


class Probe(BaseService):
    """The worker of the base's own tests."""

    name = "probe"
    endpoints = ("/run", "/other")

    @classmethod
    def add_arguments(cls, parser):
        parser.add_argument("--gated", action="store_true")
        parser.add_argument("--load-error")
        parser.add_argument("--park-error")
        parser.add_argument("--size", type=int, default=1)
        parser.add_argument("--break")

    @classmethod
    def preload(cls):
        print(f"importing niceness={os.getpriority(os.PRIO_PROCESS, threading.get_native_id())}", file=sys.stderr)
        gate = os.environ.get("PROBE_GATE")
        while gate and not os.path.exists(gate):
            time.sleep(0.005)
        if "PROBE_IMPORT_ERROR" in os.environ:
            raise ImportError(os.environ["PROBE_IMPORT_ERROR"])

    def check(self):
        if self.options.size < 1:
            raise ValueError(f"--size must be positive, not {self.options.size}")
        if broken := getattr(self.options, "break"):
            raise OSError("no disk") if broken == "os" else RuntimeError("broken")
        return {"size": self.options.size}

    def __init__(self, options):
        super().__init__(options)
        self.permits = threading.Semaphore(0)
        self.seen = []

    def initialize(self, loading):
        loading("imports", 25)
        if self.options.gated:
            self.permits.acquire()
        loading("weights", 50)
        loading("read", 60)
        loading("device", 90)
        self.seen.append(["environment", os.environ.get("PROBE_COLOUR"), os.environ.get("PROBE_OLD")])
        if self.options.load_error:
            raise RuntimeError(self.options.load_error)

    def parse(self, item):
        if item.body.get("bad") is not None:
            raise InvalidRequest(f"bad is {item.body['bad']!r}", param="bad")
        return item.body.get("text", "")

    def batch_key(self, item):
        return item.body.get("key")

    def generate(self, items, progress):
        self.seen.append(["pass", [item.request_id for item in items]])
        body = items[0].body
        steps = body.get("steps", 1)
        try:
            for step in range(1, steps + 1):
                if body.get("gated"):
                    self.permits.acquire()
                progress(step, steps)
        except BaseException as error:
            self.seen.append([type(error).__name__, [item.request_id for item in items]])
            raise
        return [self.outcome(item) for item in items][: body.get("keep")]

    def outcome(self, item):
        match item.body.get("want", "json"):
            case "json":
                return {"text": item.params, "run": item.run_id}
            case "binary":
                return Binary("audio/wav", b"RIFF" + item.params.encode())
            case "error":
                return RuntimeError(f"item failed: {item.params}")
            case "raise":
                raise RuntimeError(f"pass failed: {item.params}")
            case "oom-class":
                raise OutOfMemoryError("no room")
            case "oom-text":
                raise RuntimeError("CUDA error: out of memory")
            case "exit":
                raise SystemExit(3)

    def park(self, level):
        self.seen.append(["park", level])
        if self.options.park_error:
            raise RuntimeError(self.options.park_error)

    def wake(self):
        self.seen.append(["wake"])

    def reclaim(self):
        self.seen.append(["reclaim"])

    def release(self):
        print("released", file=sys.stderr, flush=True)

    def create_app(self):
        app = super().create_app()
        app.routes.append(Route("/permit", self.permit, methods=["POST"]))
        app.routes.append(Route("/seen", self.tell))
        return app

    async def permit(self, request):
        self.permits.release(int(request.query_params.get("n", "1")))
        return JSONResponse({})

    async def tell(self, request):
        return JSONResponse(self.seen)


if __name__ == "__main__":
    raise SystemExit(Probe.main())
