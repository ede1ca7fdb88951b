"""What can go wrong with one request, by what the scheduler can do about it.

The scheduler reads `code`; `status` is what a plain HTTP client sees. An error
of this module says that one request failed, never that the worker is unusable.
"""

from __future__ import annotations

from typing import Any

MESSAGE_LIMIT_CHARS = 500


class WorkerError(Exception):
    """A request failed for a reason that is the worker's own (HTTP 500).

    Attributes:
        code: the word the scheduler decides by.
        status: the HTTP status of a plain answer.
        type: the `type` of an OpenAI error object.
        param: the request field at fault, if one is.
    """

    code: str = "worker_error"
    status: int = 500
    type: str = "server_error"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        status: int | None = None,
        type: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message[:MESSAGE_LIMIT_CHARS]
        self.param = param
        self.code = code or self.code
        self.status = status or self.status
        self.type = type or self.type

    def body(self) -> dict[str, Any]:
        """The OpenAI error object."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "code": self.code,
                "param": self.param,
            }
        }


class InvalidRequest(WorkerError):
    """The request can never succeed as it is (HTTP 400); name the field in `param`."""

    code = "invalid_request"
    status = 400
    type = "invalid_request_error"


class OutOfMemory(WorkerError):
    """The device ran out of memory (HTTP 507); a smaller run may succeed."""

    code = "worker_oom"
    status = 507


class Cancelled(WorkerError):
    """Nobody waits for the result any more (HTTP 499)."""

    code = "cancelled"
    status = 499

    def __init__(self, message: str = "the request was cancelled") -> None:
        super().__init__(message)


class Unavailable(WorkerError):
    """The worker takes no requests now (HTTP 503): `loading`, `asleep`, `stopping` or `failed`."""

    code = "unavailable"
    status = 503

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(message, code=code)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out, told without importing torch."""
    names = {cls.__name__ for cls in type(error).__mro__}
    if names & {"OutOfMemoryError", "MemoryError"}:
        return True
    return isinstance(error, RuntimeError) and "out of memory" in str(error).lower()


def as_worker_error(error: BaseException) -> WorkerError:
    """Turn any exception into one that has a code and holds no frames.

    An exception's traceback keeps every tensor of the failed pass alive, so the
    original must not be kept with the result.
    """
    if isinstance(error, WorkerError):
        error.__cause__ = error.__context__ = None
        return error.with_traceback(None)
    message = f"{type(error).__name__}: {error}"
    return OutOfMemory(message) if is_out_of_memory(error) else WorkerError(message)
