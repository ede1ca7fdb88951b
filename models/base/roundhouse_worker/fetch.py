"""Fetch a model's published weights into the Hugging Face cache, where workers find them with no network.

    python -m roundhouse_worker.fetch --repo ORG/NAME [--revision REV] [--out CACHE] [--json-progress]

Runs in a model's environment (`huggingface_hub` is there). Free space is checked before the first byte. A fetch that
was cut, killed or restarted goes on in the middle of a file: `huggingface_hub` itself starts a file again in a new
process, so only the list of files comes from it. Every file is checked against its hash.

With `--json-progress` stdout has one JSON object a line: `{"type":"waiting"}` while another fetch of the same
repository is at work, any number of `{"type":"progress","bytes","total_bytes","file"}`, `{"type":"alive"}` every few
seconds before the first of them (a fetcher that says nothing is stopped or hangs), then one
`{"type":"done","path","revision","bytes"}` or `{"type":"error","code","message"}`. Codes: `gated`, `not_found`,
`insufficient_space`, `network`, `corrupt`, `misconfigured`, `no_fetcher` (a library is missing). Exit status 0 or 1.

What was fetched whole is noted in `.roundhouse-complete/COMMIT` of the repository's folder in the cache.

This is the only place that reads `HF_TOKEN`.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import fnmatch
import hashlib
import json
import os
import pathlib
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from roundhouse_worker import weights

SPARE_FRACTION = 0.05
"""How much more than the files' size has to be free."""
PARALLEL_FILES = 4
CHUNK_BYTES = 1 << 20
PROGRESS_INTERVAL_S = 0.5
ALIVE_INTERVAL_S = 5.0
TRIES_WITHOUT_PROGRESS = 6
REFUSED_TRIES = 3
"""Nobody listens where the hub should be: it is being started again, or its address is wrong, which no pause mends."""
COMPLETE = ".roundhouse-complete"
"""A folder with an empty file for each commit of which all files were fetched; the server looks there, too."""
ALWAYS_SKIPPED = ("*.onnx", "*.onnx_data", "*.msgpack", "*.h5", "*.ot", "*.tflite", "*.gguf", "original/*", "onnx/*")
"""Other formats of the same weights, which our workers do not read."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


class FetchError(Exception):
    """The fetch failed; `code` says what a person has to do about it, `tries` how often to try before it is told."""

    def __init__(self, code: str, message: str, tries: int = 1) -> None:
        super().__init__(message)
        self.code = code
        self.tries = tries


def was_refused(error: BaseException | None) -> bool:
    """Whether a refused connection is at the bottom of `error`."""
    while error is not None and not isinstance(error, ConnectionRefusedError):
        error = error.__cause__ or error.__context__
    return error is not None


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file of a repository.

    Attributes:
        name: path within the repository.
        size: bytes.
        blob: its name in the cache: SHA-256 for large files, git's blob id for the rest.
    """

    name: str
    size: int
    blob: str


def wanted(files: Sequence[RemoteFile], include: Sequence[str] = (), exclude: Sequence[str] = ()) -> list[RemoteFile]:
    """Leave out the copies of the weights that no worker of ours reads.

    With `include` patterns only what matches them is kept. Otherwise: no foreign formats, no pickles beside
    safetensors, and, where the weights are in one folder per part (diffusers), no single-file copy at the top.
    """

    def matches(name: str, patterns: Sequence[str]) -> bool:
        return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)

    kept = [file for file in files if not matches(file.name, exclude)]
    if include:
        return [file for file in kept if matches(file.name, include)]
    in_parts = any(file.name == "model_index.json" for file in kept)
    safe_folders = {file.name.rpartition("/")[0] for file in kept if file.name.endswith(".safetensors")}
    chosen: list[RemoteFile] = []
    for file in kept:
        folder = file.name.rpartition("/")[0]
        is_pickle = file.name.endswith(PICKLES)
        if matches(file.name, ALWAYS_SKIPPED) or (is_pickle and folder in safe_folders):
            continue
        if in_parts and not folder and (is_pickle or file.name.endswith(".safetensors")):
            continue
        chosen.append(file)
    return chosen


class Reporter:
    """Says how far the fetch is: JSON lines on stdout, or text on stderr. Safe in any thread."""

    def __init__(self, as_json: bool, repo: str) -> None:
        self._as_json = as_json
        self._repo = repo
        self._lock = threading.Lock()
        self._bytes = 0
        self._total = 0
        self._told_at = float("-inf")
        self._began_at = time.monotonic()
        self._began_with = 0
        self._file = ""
        self._started = threading.Event()
        self._ended = threading.Event()
        if as_json:
            threading.Thread(target=self._live_on, name="alive", daemon=True).start()

    def _live_on(self) -> None:
        """Until bytes are told: importing, asking the hub and waiting for another fetch may take long."""
        while not self._started.wait(ALIVE_INTERVAL_S):
            with self._lock:
                if not self._started.is_set():
                    self._line({"type": "alive"})

    def start(self, present: int, total: int) -> None:
        """`present` of `total` bytes are here already."""
        with self._lock:
            self._started.set()
            self._bytes = self._began_with = present
            self._total = total
            self._tell("", force=True)
        if self._as_json:
            # A fetch that stands is told, too.
            threading.Thread(target=self._tell_on, name="progress", daemon=True).start()

    def _tell_on(self) -> None:
        while not self._ended.wait(PROGRESS_INTERVAL_S):
            with self._lock:
                if not self._ended.is_set():
                    self._tell(self._file, force=True)

    def add(self, count: int, file: str) -> None:
        """`count` more bytes of `file` arrived (negative: they were thrown away)."""
        with self._lock:
            self._bytes += count
            self._file = file
            self._tell(file)

    def waiting(self) -> None:
        """Another fetch of the repository is at work."""
        if self._as_json:
            with self._lock:
                self._line({"type": "waiting"})
        sys.stderr.write(f"{self._repo}: another fetch is at work, waiting for it\n")

    def again(self, why: str) -> None:
        """Something went wrong and is tried again after a pause."""
        with self._lock:
            if self._as_json:
                self._line({"type": "retry", "message": why})
            else:
                sys.stderr.write(f"{self._repo}: {why}; trying again\n")

    def done(self, path: str, revision: str) -> None:
        """Everything is here."""
        with self._lock:
            self._ended.set()
            self._tell("", force=True)
            if self._as_json:
                self._line({"type": "done", "path": path, "revision": revision, "bytes": self._total})
            else:
                sys.stderr.write(f"{self._repo}: done, revision {revision}\n")
                sys.stdout.write(f"{path}\n")
                sys.stdout.flush()

    def fail(self, error: FetchError) -> None:
        """The fetch ended without success."""
        with self._lock:
            self._started.set()
            self._ended.set()
            if self._as_json:
                self._line({"type": "error", "code": error.code, "message": str(error)})
        if not self._as_json:
            sys.stderr.write(f"error: {error}\n")

    def _tell(self, file: str, force: bool = False) -> None:
        now = time.monotonic()
        if not force and now - self._told_at < (PROGRESS_INTERVAL_S if self._as_json else 2.0):
            return
        self._told_at = now
        if self._as_json:
            self._line({"type": "progress", "bytes": self._bytes, "total_bytes": self._total, "file": file})
        elif self._total:
            rate = (self._bytes - self._began_with) / max(now - self._began_at, 0.001)
            percent = 100 * self._bytes // self._total
            of = f"{self._bytes / 1e9:.2f} of {self._total / 1e9:.2f} GB"
            sys.stderr.write(f"{self._repo}: {percent:3d} %  {of}  {rate / 1e6:.0f} MB/s  {file}\n")

    @staticmethod
    def _line(message: dict[str, Any]) -> None:
        sys.stdout.write(json.dumps(message) + "\n")
        sys.stdout.flush()


class Fetcher:
    """One repository at one revision, into one cache folder."""

    def __init__(self, repo: str, cache: pathlib.Path, token: str | None, reporter: Reporter, retry_s: float) -> None:
        import httpx
        import huggingface_hub

        self._httpx: Any = httpx
        self._hub: Any = huggingface_hub
        self._repo = repo
        self._cache = cache
        self._token = token
        self._reporter = reporter
        self._retry_s = retry_s
        self._stop = threading.Event()
        self._folder = cache / f"models--{repo.replace('/', '--')}"
        self._api: Any = huggingface_hub.HfApi(token=token)

    def fetch(self, revision: str, include: Sequence[str], exclude: Sequence[str]) -> None:
        """Fetch what is missing, lay out the cache and report.

        Raises:
            FetchError: with the reason.
        """
        commit, files = self._list(revision)
        files = wanted(files, include, exclude)
        if not files:
            raise FetchError("not_found", f"{self._repo} has no files that match at revision {commit}")
        blobs = self._folder / "blobs"
        blobs.mkdir(parents=True, exist_ok=True)
        with self._only_one():
            total = sum(file.size for file in files)
            present = sum(self._present(blobs, file) for file in files)
            self._check_space(total - present)
            self._reporter.start(present, total)
            self._fetch_all(blobs, commit, [file for file in files if not (blobs / file.blob).exists()])
            path = self._lay_out(commit, files)
            # Another revision is no business of "main": workers are told which one they serve.
            if revision != commit:
                ref = self._folder / "refs" / revision
                ref.parent.mkdir(parents=True, exist_ok=True)
                ref.write_text(commit)
            if not include and not exclude:
                mark = self._folder / COMPLETE / commit
                mark.parent.mkdir(exist_ok=True)
                mark.touch()
        self._reporter.done(path, commit)

    def _list(self, revision: str) -> tuple[str, list[RemoteFile]]:
        tries = 0
        while True:
            try:
                with self._hub_errors(revision):
                    info = self._api.model_info(self._repo, revision=revision, files_metadata=True, timeout=30)
                break
            except FetchError as error:
                tries += 1
                if tries >= error.tries:
                    raise
                self._reporter.again(str(error))
                time.sleep(self._retry_s * 2 ** (tries - 1))
        files: list[RemoteFile] = []
        for sibling in info.siblings:
            name = str(sibling.rfilename)
            if name.startswith("/") or ".." in name.split("/"):
                raise FetchError("corrupt", f"{self._repo} lists a file outside of itself: {name}")
            blob = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
            files.append(RemoteFile(name, int(sibling.size or 0), str(blob)))
        return str(info.sha), files

    def _partial(self, blobs: pathlib.Path, file: RemoteFile) -> pathlib.Path:
        return blobs / f"{file.blob}.roundhouse-partial"

    def _present(self, blobs: pathlib.Path, file: RemoteFile) -> int:
        if (blobs / file.blob).exists():
            return file.size
        partial = self._partial(blobs, file)
        return min(partial.stat().st_size, file.size) if partial.exists() else 0

    def _check_space(self, missing: int) -> None:
        needed = int(missing * (1 + SPARE_FRACTION))
        free = shutil.disk_usage(self._folder).free
        if needed > free:
            raise FetchError(
                "insufficient_space",
                f"{self._repo} needs {needed} bytes ({needed / 1e9:.2f} GB) more in {self._cache}, "
                f"{free} bytes ({free / 1e9:.2f} GB) are free",
            )

    def _fetch_all(self, blobs: pathlib.Path, commit: str, files: Sequence[RemoteFile]) -> None:
        unique = {file.blob: file for file in sorted(files, key=lambda file: file.size)}.values()
        timeout = self._httpx.Timeout(30.0)
        # No token in the client's defaults: it is sent to the hub alone, not to where the hub redirects.
        with (
            self._httpx.Client(follow_redirects=True, timeout=timeout) as client,
            ThreadPoolExecutor(PARALLEL_FILES) as pool,
        ):
            futures = [pool.submit(self._fetch_one, client, blobs, commit, file) for file in unique]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                self._stop.set()
            failures = [future.exception() for future in futures if future.done() and future.exception()]
            for future in futures:
                future.cancel()
            for failure in failures:
                if failure is not None:
                    raise failure

    def _fetch_one(self, client: Any, blobs: pathlib.Path, commit: str, file: RemoteFile) -> None:
        partial = self._partial(blobs, file)
        tries = 0
        while True:
            before = partial.stat().st_size if partial.exists() else 0
            try:
                self._read_on(client, partial, commit, file)
                break
            except self._httpx.HTTPStatusError as error:
                status = error.response.status_code
                if status in (401, 403):
                    raise self._gated(status) from None
                if status == 404:
                    raise FetchError("not_found", f"{self._repo} has no file {file.name} at {commit}") from None
                reason = f"HTTP {status}"
            except self._httpx.HTTPError as error:
                reason = f"{type(error).__name__}: {error}"
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise FetchError(
                        "insufficient_space", f"the disk of {self._cache} is full at {file.name}"
                    ) from None
                raise FetchError("misconfigured", f"cannot write to {self._cache}: {error}") from None
            after = partial.stat().st_size if partial.exists() else 0
            tries = 1 if after > before else tries + 1
            if tries >= TRIES_WITHOUT_PROGRESS:
                raise FetchError("network", f"{file.name}: gave up after {tries} tries without a byte: {reason}")
            self._reporter.again(f"{file.name}: {reason}")
            if self._stop.wait(self._retry_s * 2 ** (tries - 1)):
                return
        if self._stop.is_set():
            return
        self._verify(partial, file)
        os.replace(partial, blobs / file.blob)

    def _read_on(self, client: Any, partial: pathlib.Path, commit: str, file: RemoteFile) -> None:
        """Read from where the partial file ends."""
        offset = partial.stat().st_size if partial.exists() else 0
        if offset > file.size:
            partial.unlink()
            offset = 0
        if offset == file.size:
            partial.touch()
            return
        headers = {"accept-encoding": "identity"}
        if self._token:
            headers["authorization"] = f"Bearer {self._token}"
        if offset:
            headers["range"] = f"bytes={offset}-"
        url = self._hub.hf_hub_url(self._repo, file.name, revision=commit)
        with client.stream("GET", url, headers=headers) as response:
            response.raise_for_status()
            if offset and response.status_code != 206:  # the range was ignored: all of it comes
                self._reporter.add(-offset, file.name)
                offset = 0
            with partial.open("ab" if offset else "wb", buffering=0) as out:
                for chunk in response.iter_raw():
                    out.write(chunk)
                    self._reporter.add(len(chunk), file.name)
                    if self._stop.is_set():
                        return
        size = partial.stat().st_size
        if size != file.size:
            if size > file.size:
                partial.unlink()
                self._reporter.add(-size, file.name)
            raise self._httpx.ReadError(f"{size} of {file.size} bytes came")

    def _verify(self, partial: pathlib.Path, file: RemoteFile) -> None:
        if len(file.blob) == 64:
            digest = hashlib.sha256()
        else:  # git's own id: SHA-1 over a header and the content
            digest = hashlib.sha1(f"blob {file.size}\0".encode(), usedforsecurity=False)
        with partial.open("rb") as data:
            while chunk := data.read(8 * CHUNK_BYTES):
                digest.update(chunk)
        if digest.hexdigest() != file.blob:
            partial.unlink()
            raise FetchError("corrupt", f"{file.name} does not have the hash that {self._repo} lists; fetch it again")

    def _lay_out(self, commit: str, files: Sequence[RemoteFile]) -> str:
        """Link the blobs as `huggingface_hub` would; the snapshot's folder.

        Not done by its `snapshot_download`: that notes the repository's whole file list, and then refuses to load
        offline a snapshot from which files were left out.
        """
        snapshot = self._folder / "snapshots" / commit
        for file in files:
            pointer = snapshot / file.name
            blob = self._folder / "blobs" / file.blob
            pointer.parent.mkdir(parents=True, exist_ok=True)
            fresh = pointer.with_name(f".{pointer.name}.roundhouse-new")
            fresh.unlink(missing_ok=True)
            try:
                fresh.symlink_to(os.path.relpath(blob, pointer.parent))
            except OSError:  # a file system without symbolic links
                fresh.hardlink_to(blob)
            os.replace(fresh, pointer)
        return str(snapshot)

    @contextlib.contextmanager
    def _only_one(self) -> Iterator[None]:
        with (self._folder / ".roundhouse-fetch.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EAGAIN, errno.EACCES):
                    self._reporter.waiting()
                    fcntl.flock(lock, fcntl.LOCK_EX)
                # else a file system without locks: go on
            yield

    @contextlib.contextmanager
    def _hub_errors(self, revision: str) -> Iterator[None]:
        errors = self._hub.errors
        try:
            yield
        except errors.GatedRepoError as error:
            raise self._gated(error.response.status_code) from None
        except errors.RevisionNotFoundError:
            raise FetchError("not_found", f"{self._repo} has no revision {revision}") from None
        except errors.RepositoryNotFoundError as error:
            if error.response.status_code in (401, 403):
                raise self._gated(error.response.status_code) from None
            raise FetchError("not_found", f"there is no repository {self._repo} (or it is private)") from None
        except errors.HfHubHTTPError as error:
            status = error.response.status_code
            if status in (401, 403):
                raise self._gated(status) from None
            message = f"the hub answered HTTP {status} for {self._repo}"
            raise FetchError("network", message, TRIES_WITHOUT_PROGRESS) from None
        except errors.HFValidationError as error:
            raise FetchError("misconfigured", f"{self._repo!r} is no repository name: {error}") from None
        except (self._httpx.HTTPError, errors.LocalEntryNotFoundError, ConnectionError) as error:
            where = re.sub(r"//[^/@]*@", "//", self._api.endpoint)  # a mirror's password is nobody's business
            message = f"cannot reach the hub, {where}: {type(error).__name__}: {error}"
            tries = REFUSED_TRIES if was_refused(error) else TRIES_WITHOUT_PROGRESS
            raise FetchError("network", message, tries) from None

    def _gated(self, status: int) -> FetchError:
        what = "the token in HF_TOKEN has no access to it" if self._token else "HF_TOKEN is not set"
        return FetchError(
            "gated",
            f"HTTP {status} for {self._repo}: it is gated, private or absent, and {what}. Accept its licence on "
            f"https://huggingface.co/{self._repo} with your account, then set HF_TOKEN to a token of that account",
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m roundhouse_worker.fetch", description="Fetch a model's published weights."
    )
    parser.add_argument("--repo", required=True, help="the repository, ORG/NAME")
    parser.add_argument("--revision", default="main", help="branch, tag or commit (default: main)")
    parser.add_argument("--out", help="the Hugging Face cache folder (default: where workers look)")
    parser.add_argument("--include", action="append", default=[], metavar="PATTERN", help="fetch only these files")
    parser.add_argument("--exclude", action="append", default=[], metavar="PATTERN", help="leave these files out")
    parser.add_argument("--json-progress", action="store_true", help="JSON lines on stdout")
    parser.add_argument("--retry-delay", type=float, default=1.0, metavar="SECONDS", help="first pause, doubled later")
    args = parser.parse_args(argv)

    token = os.environ.get("HF_TOKEN") or None
    # Workers run offline; a fetch must not inherit that.
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        os.environ.pop(name, None)
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    reporter = Reporter(args.json_progress, args.repo)
    try:
        try:
            cache = pathlib.Path(args.out or weights.default_cache()).expanduser().absolute()
            fetcher = Fetcher(args.repo, cache, token, reporter, args.retry_delay)
        except ImportError as error:
            raise FetchError("no_fetcher", f"{error}; run scripts/install.sh for this model") from None
        try:
            fetcher.fetch(args.revision, args.include, args.exclude)
        except OSError as error:
            raise FetchError("misconfigured", f"cannot use {cache}: {error}") from None
    except FetchError as error:
        reporter.fail(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
