#!/usr/bin/env python3
"""A small local stand-in for the model hub, for tests of fetching: HF_ENDPOINT=http://127.0.0.1:PORT.

    hub_standin.py FOLDER [--port 0] [--log FILE] [--cut NAME:BYTES] [--stall NAME:BYTES] [--claim NAME:BYTES]
                   [--hold NAME:BYTES:FILE] [--corrupt NAME] [--token TOKEN]

Serves every FOLDER/ORG/NAME as a repository with the one branch "main", in the shape that huggingface_hub asks for:
/api/models/ORG/NAME[/revision/REV], .../tree/REV, /ORG/NAME/resolve/REV/FILE (HEAD, GET, ranges; large files by a
redirect as the real one does). Files over 1 KiB are "LFS": their ETag is a SHA-256. Its first line is its address.

--cut      close the connection after that many bytes of the file, once
--stall    send that many bytes of the file, then nothing more, always (to be killed in the middle)
--hold     send the file up to its byte BYTES, and the rest when FILE is there
--claim    list the file with that size
--corrupt  change a byte of the file on its way
--token    file reads need this bearer token: 401 without one, 403 with another, as with a gated repository
--log      one JSON line a request: method, path, range, whether a token came
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import pathlib
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LFS_BYTES = 1024


def blob_id(data: bytes) -> str:
    """What git calls the content."""
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data, usedforsecurity=False).hexdigest()


class Hub:
    """The repositories and the faults to act out."""

    def __init__(self, folder: pathlib.Path, token: str | None, log: pathlib.Path | None) -> None:
        self.folder = folder
        self.token = token
        self.log = log
        self.cuts: dict[str, int] = {}
        self.stalls: dict[str, int] = {}
        self.holds: dict[str, tuple[int, pathlib.Path]] = {}
        self.claims: dict[str, int] = {}
        self.corrupt: set[str] = set()
        self.lock = threading.Lock()

    def files(self, repo: str) -> dict[str, bytes] | None:
        root = self.folder / repo
        if repo.count("/") != 1 or not root.is_dir():
            return None
        paths = sorted(path for path in root.rglob("*") if path.is_file())
        return {str(path.relative_to(root)): path.read_bytes() for path in paths}

    def commit(self, files: dict[str, bytes]) -> str:
        digest = hashlib.sha1(usedforsecurity=False)
        for name, data in files.items():
            digest.update(f"{name} {blob_id(data)}\n".encode())
        return digest.hexdigest()


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the parameter's name in the base class
        return

    def do_HEAD(self) -> None:
        self.handle_any()

    def do_GET(self) -> None:
        self.handle_any()

    def handle_any(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if self.hub.log:
            line = {
                "method": self.command,
                "path": path,
                "range": self.headers.get("range"),
                "token": "authorization" in self.headers,
            }
            with self.hub.lock, self.hub.log.open("a") as log:
                log.write(json.dumps(line) + "\n")
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"] and parts[4:5] == ["tree"] and len(parts) >= 6:
            self.tree("/".join(parts[2:4]), parts[5])
        elif parts[:2] == ["api", "models"] and len(parts) >= 4:
            self.model_info("/".join(parts[2:4]), parts[5] if parts[4:5] == ["revision"] else "main")
        elif parts[2:3] == ["resolve"] and len(parts) >= 5:
            self.resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        elif parts[0] == "cdn" and len(parts) >= 4:
            self.content("/".join(parts[1:3]), "/".join(parts[3:]))
        else:
            self.refuse(404, "EntryNotFound", "no such route")

    def model_info(self, repo: str, revision: str) -> None:
        files = self.hub.files(repo)
        if files is None:
            # The real hub hides absent and private repositories alike.
            self.refuse(401, "RepoNotFound", "Repository not found")
            return
        commit = self.hub.commit(files)
        if revision not in ("main", commit):
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        siblings: list[dict[str, Any]] = []
        for name, data in files.items():
            size = self.hub.claims.get(name.rpartition("/")[2], len(data))
            sibling: dict[str, Any] = {"rfilename": name, "size": size, "blobId": blob_id(data)}
            if len(data) > LFS_BYTES:
                sibling["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
            siblings.append(sibling)
        gated = "auto" if self.hub.token else False
        info = {"id": repo, "modelId": repo, "sha": commit, "private": False, "gated": gated, "siblings": siblings}
        self.answer(200, {"content-type": "application/json"}, json.dumps(info).encode())

    def tree(self, repo: str, revision: str) -> None:
        files = self.hub.files(repo) or {}
        if revision not in ("main", self.hub.commit(files)):
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        entries: list[dict[str, Any]] = []
        for name, data in files.items():
            entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": blob_id(data)}
            if len(data) > LFS_BYTES:
                entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
            entries.append(entry)
        self.answer(200, {"content-type": "application/json"}, json.dumps(entries).encode())

    def resolve(self, repo: str, revision: str, name: str) -> None:
        if self.hub.token:
            given = self.headers.get("authorization")
            if given != f"Bearer {self.hub.token}":
                status = 403 if given else 401
                self.refuse(status, "GatedRepo", f"Access to model {repo} is restricted")
                return
        files = self.hub.files(repo) or {}
        commit = self.hub.commit(files)
        if name not in files or revision not in ("main", commit):
            self.refuse(404, "EntryNotFound", f"no {name} at {revision}")
            return
        data = files[name]
        if len(data) <= LFS_BYTES:
            self.content(repo, name, {"x-repo-commit": commit, "etag": f'"{blob_id(data)}"'})
            return
        headers = {
            "x-repo-commit": commit,
            "x-linked-size": str(len(data)),
            "x-linked-etag": f'"{hashlib.sha256(data).hexdigest()}"',
            "location": f"{self.hub_address()}/cdn/{repo}/{name}",
        }
        self.answer(302, headers, b"")

    def hub_address(self) -> str:
        # Another name of the same host, so that clients see a redirect to another origin, as with the real one.
        return f"http://localhost:{self.server.server_address[1]}"

    def content(self, repo: str, name: str, extra: dict[str, str] | None = None) -> None:
        data = (self.hub.files(repo) or {}).get(name)
        if data is None:
            self.refuse(404, "EntryNotFound", f"no {name}")
            return
        headers = {"accept-ranges": "bytes", **(extra or {})}
        status, start = 200, 0
        asked = self.headers.get("range")
        if asked:
            start = int(asked.removeprefix("bytes=").split("-")[0])
            if start >= len(data):
                self.answer(416, {"content-range": f"bytes */{len(data)}"}, b"")
                return
            status = 206
            headers["content-range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        base = name.rpartition("/")[2]
        body = data[start:]
        if base in self.hub.corrupt:
            body = body[:-1] + bytes([body[-1] ^ 1])
        with self.hub.lock:
            limit = self.hub.cuts.pop(base, None) if self.command == "GET" else None
        stall = self.hub.stalls.get(base) if self.command == "GET" else None
        hold = self.hub.holds.get(base) if self.command == "GET" else None
        if hold:
            at, released = hold
            self.answer(status, headers, body, sent=body[: max(at - start, 0)])
            while not released.exists():
                time.sleep(0.01)
            with contextlib.suppress(OSError):  # the client may have gone
                self.wfile.write(body[max(at - start, 0) :])
            return
        if limit is None and stall is None:
            self.answer(status, headers, body)
            return
        self.answer(status, headers, body, sent=body[: limit if limit is not None else stall])
        self.wfile.flush()
        if stall is not None:
            self.connection.settimeout(None)
            with contextlib.suppress(OSError):
                self.connection.recv(1)  # until the client goes
        self.close_connection = True

    def refuse(self, status: int, code: str, message: str) -> None:
        headers = {"x-error-code": code, "x-error-message": message, "content-type": "application/json"}
        self.answer(status, headers, json.dumps({"error": message}).encode())

    def answer(self, status: int, headers: dict[str, str], body: bytes, sent: bytes | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body if sent is None else sent)


def fault(text: str) -> tuple[str, int]:
    name, _, count = text.rpartition(":")
    return name, int(count)


def hold(text: str) -> tuple[str, tuple[int, pathlib.Path]]:
    name, count, file = text.split(":", 2)
    return name, (int(count), pathlib.Path(file))


def main() -> None:
    parser = argparse.ArgumentParser(description="A local stand-in for the model hub.")
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--log", type=pathlib.Path)
    parser.add_argument("--cut", type=fault, action="append", default=[], metavar="NAME:BYTES")
    parser.add_argument("--stall", type=fault, action="append", default=[], metavar="NAME:BYTES")
    parser.add_argument("--hold", type=hold, action="append", default=[], metavar="NAME:BYTES:FILE")
    parser.add_argument("--claim", type=fault, action="append", default=[], metavar="NAME:BYTES")
    parser.add_argument("--corrupt", action="append", default=[], metavar="NAME")
    parser.add_argument("--token")
    args = parser.parse_args()
    hub = Hub(args.folder, args.token, args.log)
    hub.cuts.update(args.cut)
    hub.stalls.update(args.stall)
    hub.holds.update(args.hold)
    hub.claims.update(args.claim)
    hub.corrupt.update(args.corrupt)
    handler = type("BoundHandler", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", args.port), handler)
    sys.stdout.write(f"http://127.0.0.1:{server.server_address[1]}\n")
    sys.stdout.flush()
    server.serve_forever()


if __name__ == "__main__":
    main()
