"""A stock engine, in the shape of vLLM: a server that leads and a process of its own that does the work.

    python3 tests/support/stock_server.py --name t --port 8001 [faults]

Speaks OpenAI's chat, streamed and whole, one request at a time; needs nothing but Python. As engines do, it keeps
shared memory and temporary files that are left behind when it is killed. What a request does is in its body, under
`fault`.
"""

from __future__ import annotations

import argparse
import http.server
import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path
from typing import Any

HANG_S = 3600


def flags() -> argparse.Namespace:
    made = argparse.ArgumentParser()
    made.add_argument("--name", default="t")
    made.add_argument("--port", type=int, default=0)
    made.add_argument("--shm", metavar="NAME", help="shared memory of this name and the process id; temporary files")
    made.add_argument("--ignore-term", action="store_true", help="end by SIGKILL alone")
    made.add_argument("--exit", type=int, metavar="CODE", help="say something and end at once")
    made.add_argument("--deaf", action="store_true", help="take connections and answer none")
    made.add_argument("--never-ready", action="store_true", help="/health says 503 for ever")
    made.add_argument("--other-instance-on", type=int, metavar="PORT", help="on this port, be somebody else's worker")
    made.add_argument("--survive-engine", action="store_true", help="outlive the engine, with /health 503")
    made.add_argument("--chatter", action="store_true", help="a line on stdout for each request")
    made.add_argument("--engine", action="store_true", help="the process that does the work")
    return made.parse_args()


def work() -> None:
    """The engine: reads wishes, one line each, and writes words, one line each, then an empty one."""
    for line in sys.stdin:
        wish = json.loads(line)
        for index in range(wish.get("words", 3)):
            if index == wish.get("hang_after"):
                time.sleep(HANG_S)
            if index == wish.get("die_after"):
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(wish.get("gap_s", 0))
            print(f"word{index} ", flush=True)
        print(flush=True)


class EngineDeadError(Exception):
    """Its pipe has closed."""


class Engine:
    """The process that does the work, as its server sees it."""

    def __init__(self) -> None:
        self.is_dead = False
        self._turn = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--engine"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def words(self, wish: dict[str, Any]) -> Any:
        with self._turn:
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            try:
                print(json.dumps(wish), file=self._process.stdin, flush=True)
            except BrokenPipeError:
                raise EngineDeadError from None
            for line in iter(self._process.stdout.readline, "\n"):
                if not line:
                    raise EngineDeadError
                yield line.removesuffix("\n")

    def stop(self) -> None:
        self._process.kill()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        options = self.server.options
        if options.deaf:
            time.sleep(HANG_S)
        well = not (options.never_ready or self.server.engine.is_dead)
        body: dict[str, Any] = {}
        if options.other_instance_on == options.port:
            body = {"status": "ready", "instance": "another:0123456789abcdef"}
        self.answer(200 if well else 503, body)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if body.get("fault", {}).get("break"):
            self.wfile.write(b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{"id"')
            self.close_connection = True
            return
        if self.server.options.chatter:
            print("a request", flush=True)
        stream = body.get("stream") is True
        text = ""
        try:
            for word in self.server.engine.words(body.get("fault", {})):
                if stream and not text:
                    self.send_response(200)
                    self.send_header("content-type", "text/event-stream")
                    self.send_header("connection", "close")
                    self.end_headers()
                text += word
                if stream:
                    self.chunk({"content": word}, None)
        except EngineDeadError:
            self.engine_died(stream and bool(text))
            return
        if stream:
            self.chunk({}, "stop")
            self.wfile.write(b"data: [DONE]\n\n")
            return
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        self.answer(200, {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "choices": [choice]})

    def engine_died(self, streaming: bool) -> None:
        """As vLLM does it: 500 to everybody, and the server ends, too."""
        self.server.engine.is_dead = True
        error = {"message": "EngineCore encountered an issue", "type": "InternalServerError", "code": 500}
        if streaming:
            self.wfile.write(b"data: " + json.dumps({"error": error}).encode() + b"\n\ndata: [DONE]\n\n")
        else:
            self.answer(500, {"error": error})
        if not self.server.options.survive_engine:
            # Not at once: a server that ends finishes its answers first.
            threading.Timer(0.3, os._exit, [1]).start()

    def chunk(self, delta: dict[str, str], finish: str | None) -> None:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        chunk = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "choices": [choice]}
        self.wfile.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
        self.wfile.flush()

    def answer(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class Server(http.server.ThreadingHTTPServer):
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.engine = Engine()
        super().__init__(("127.0.0.1", options.port), Handler)


def main() -> None:
    options = flags()
    if options.engine:
        work()
        return
    if options.exit is not None:
        print("nothing to do here", flush=True)
        sys.exit(options.exit)
    kept: list[Path] = []
    if options.shm:
        memory = Path("/dev/shm", f"{options.shm}{os.getpid()}")
        memory.write_bytes(bytes(4096))
        with memory.open("r+b") as file:
            mapped = mmap.mmap(file.fileno(), 4096)
        assert mapped
        # As ZeroMQ's sockets and onnxruntime's logs are called.
        temporary = Path(tempfile.gettempdir())
        door, log = temporary / str(uuid.uuid4()), temporary / f"mat-debug-{os.getpid()}.log"
        talk = socket.socket(socket.AF_UNIX)
        talk.bind(str(door))
        log.write_text("x")
        kept = [memory, door, log]
    server = Server(options)

    def end(*_: object) -> None:
        server.engine.stop()
        for path in kept:
            path.unlink()
        os._exit(0)

    signal.signal(signal.SIGTERM, signal.SIG_IGN if options.ignore_term else end)
    server.serve_forever()


if __name__ == "__main__":
    main()
