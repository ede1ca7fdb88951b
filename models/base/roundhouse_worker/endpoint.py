"""One POST endpoint: from an HTTP request to an `Item`, and its outcome back.

Three shapes of answer: plain (JSON or bytes, the error's status), NDJSON (always
200, progress lines, the last line is the result or the error) and SSE (the
frames the worker makes). A connection that closes cancels its item.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import re
import time
import uuid
from typing import TYPE_CHECKING, Any

from roundhouse_worker import log, text
from roundhouse_worker.errors import Cancelled, InvalidRequest, WorkerError, as_worker_error
from roundhouse_worker.items import Binary, Item, Output, Stream

if TYPE_CHECKING:
    from starlette.types import Message, Receive, Scope, Send

    from roundhouse_worker.service import BaseService

NDJSON = "application/x-ndjson"
BODY_LIMIT_BYTES = 64 * 1024 * 1024
RUN_LIMIT = 4096
_RUN = re.compile(r"(?P<id>[^;\s]{1,200})\s*;\s*n=(?P<size>[0-9]{1,6})")


class _Gone(Exception):
    """The client closed the connection before it had sent everything."""


class Endpoint:
    """An ASGI application that serves one path of a service."""

    def __init__(self, service: BaseService, path: str) -> None:
        self._service = service
        self._path = path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        started = time.perf_counter()
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        request_id = headers.get("x-request-id") or f"req_{uuid.uuid4().hex}"
        item = Item(request_id, self._path, {}, headers)
        reply: _PlainReply | _LineReply = _PlainReply(item, send)
        problem: WorkerError | None = None
        try:
            item.body = _decode(await _read(receive))
        except _Gone:
            return
        except InvalidRequest as error:
            problem = error
        if NDJSON in headers.get("accept", "") and item.body.get("stream") is not True:
            reply = _LineReply(item, send)
        try:
            self._service.enter(item)
        except WorkerError as error:
            self._service.count(error.code)
            await _PlainReply(item, send).fail(error)
            return
        outcome = "worker_error"
        try:
            outcome = await self._answer(item, reply, receive, problem)
        finally:
            self._service.leave(item, outcome)
            level = logging.DEBUG if outcome == "succeeded" else logging.INFO
            seconds = time.perf_counter() - started
            log.event(
                level, "request finished", request_id=request_id, request_outcome=outcome, request_seconds=seconds
            )

    async def _answer(
        self, item: Item, reply: _PlainReply | _LineReply, receive: Receive, problem: WorkerError | None
    ) -> str:
        """Work on an admitted item until its answer is sent; the outcome's name."""
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - a coroutine that runs has a task
        item.on_cancel(task.cancel)
        watch = asyncio.create_task(_cancel_when_closed(receive, item))
        try:
            await reply.begin()
            if problem is not None:
                raise problem
            self._prepare(item)
            await reply.finish(await self._service.answer(item))
            return "succeeded"
        except asyncio.CancelledError:
            if not item.cancelled:
                raise  # not ours: the loop is closing
            task.uncancel()
            failure: WorkerError = Cancelled()
        except Exception as error:
            if not isinstance(error, WorkerError):
                log.event(
                    logging.ERROR,
                    "request raised",
                    request_id=item.request_id,
                    error_type=type(error).__name__,
                    error_at=log.where(error),
                )
            failure = as_worker_error(error)
        finally:
            item.on_cancel(None)
            closed = watch.done()
            watch.cancel()
            reply.close()
        if not closed:
            await reply.fail(failure)
        return failure.code

    def _prepare(self, item: Item) -> None:
        run = item.headers.get("x-roundhouse-run")
        if run is not None:
            match = _RUN.fullmatch(run)
            if match is None or not 1 <= int(match["size"]) <= RUN_LIMIT:
                raise InvalidRequest(f"x-roundhouse-run must be <id>;n=<1..{RUN_LIMIT}>, not {run!r}")
            item.run_id, item.run_size = match["id"], int(match["size"])
        item.params = self._service.parse(item)
        item.batch_key = self._service.batch_key(item)


class _Sender:
    """Writes the parts of one response; sends a head once, and nothing after the end."""

    def __init__(self, item: Item, send: Send) -> None:
        self._item = item
        self._send = send
        self.started = False
        self.ended = False

    async def head(self, status: int, content_type: str, length: int | None = None) -> None:
        headers = [
            (b"content-type", content_type.encode("latin-1")),
            (b"x-request-id", self._item.request_id.encode("latin-1")),
        ]
        if length is not None:
            headers.append((b"content-length", b"%d" % length))
        self.started = True
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def part(self, data: bytes) -> None:
        await self._send(_part(data, more=True))

    async def end(self, data: bytes = b"") -> None:
        self._item.on_cancel(None)  # the answer exists: too late to cancel
        self.ended = True
        await self._send(_part(data, more=False))


class _PlainReply(_Sender):
    """JSON or bytes with the right status, or the frames of a stream."""

    async def begin(self) -> None:
        """Nothing to say before the outcome is known."""

    def close(self) -> None:
        """Nothing runs beside the answer."""

    async def finish(self, output: Output | Stream) -> None:
        if isinstance(output, Stream):
            await self._relay(output)
        elif isinstance(output, Binary):
            await self._whole(200, output.content_type, output.data)
        else:
            await self._whole(200, "application/json", _json(output))

    async def fail(self, error: WorkerError) -> None:
        if self.ended:
            return
        if self.started:  # a stream that broke: say so in its last frames
            await self.end(text.frame(error.body()) + text.DONE)
        else:
            await self._whole(error.status, "application/json", _json(error.body()))

    async def _whole(self, status: int, content_type: str, data: bytes) -> None:
        await self.head(status, content_type, len(data))
        await self.end(data)

    async def _relay(self, stream: Stream) -> None:
        """Send frames as they come; the head goes with the first, so that an early error has its status."""
        try:
            async for chunk in stream.chunks:
                if not self.started:
                    await self.head(200, stream.content_type)
                await self.part(chunk)
        finally:
            close = getattr(stream.chunks, "aclose", None)
            if close is not None:
                await close()
        if not self.started:
            await self.head(200, stream.content_type)
        await self.end()


class _LineReply(_Sender):
    """NDJSON: 200 at once, progress while the item runs, then the result or the error."""

    _pump: asyncio.Task[None] | None = None

    async def begin(self) -> None:
        await self.head(200, NDJSON)
        await self.part(b"")
        self._pump = asyncio.create_task(self._send_progress())

    def close(self) -> None:
        if self._pump is not None:
            self._pump.cancel()

    async def finish(self, output: Output | Stream) -> None:
        if isinstance(output, Stream):
            raise WorkerError("a stream cannot be sent as NDJSON")
        if isinstance(output, Binary):
            body = {"content_type": output.content_type, "body_b64": base64.b64encode(output.data).decode("ascii")}
        else:
            body = {"content_type": "application/json", "json": output}
        await self._last({"type": "result"} | body)

    async def fail(self, error: WorkerError) -> None:
        line: dict[str, Any] = {"type": "error", "status": error.status, "code": error.code, "message": error.message}
        if error.param is not None:
            line["param"] = error.param
        await self._last(line)

    async def _last(self, line: dict[str, Any]) -> None:
        if self.ended:
            return
        self.close()
        await self.end(self._progress_line() + _json(line) + b"\n")

    async def _send_progress(self) -> None:
        while True:
            await self._item.wait_report()
            if line := self._progress_line():
                await self.part(line)

    def _progress_line(self) -> bytes:
        """The newest progress not sent yet, as a line; empty if there is none."""
        report = self._item.take_report()
        if report is None:
            return b""
        return _json({"type": "progress", "step": report[0], "total": report[1]}) + b"\n"


async def _read(receive: Receive) -> bytes:
    """The request's body.

    Raises:
        _Gone: the client went away first.
        InvalidRequest: it is longer than `BODY_LIMIT_BYTES`; the rest is read and dropped.
    """
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _Gone
        size += len(message.get("body", b""))
        if size <= BODY_LIMIT_BYTES:
            parts.append(message.get("body", b""))
        else:
            parts.clear()
        if not message.get("more_body", False):
            break
    if size > BODY_LIMIT_BYTES:
        raise InvalidRequest(f"the body has {size} bytes, more than {BODY_LIMIT_BYTES}")
    return b"".join(parts)


def _decode(raw: bytes) -> dict[str, Any]:
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the body is no JSON: {type(error).__name__}") from None
    if not isinstance(body, dict):
        raise InvalidRequest(f"the body must be a JSON object, not {type(body).__name__}")
    return body  # pyright: ignore[reportUnknownVariableType]


async def _cancel_when_closed(receive: Receive, item: Item) -> None:
    """End when the client goes away, with the item cancelled."""
    while (await receive())["type"] != "http.disconnect":
        pass
    item.cancel()


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _part(data: bytes, *, more: bool) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more}
