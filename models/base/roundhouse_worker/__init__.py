"""The base service that Roundhouse's Python workers are built on.

A worker serves one model over HTTP on 127.0.0.1. Subclass `BaseService`, write
`initialize` and `generate`, and call `main`; see the README beside this package.
"""

from roundhouse_worker.errors import (
    Cancelled,
    InvalidRequest,
    OutOfMemory,
    Unavailable,
    WorkerError,
)
from roundhouse_worker.items import Binary, Item, Output, Progress, Stream
from roundhouse_worker.replies import images_reply
from roundhouse_worker.service import BaseService, Loading
from roundhouse_worker.text import Usage, chat_reply, chat_stream, completion_reply, completion_stream, wants_usage

__all__ = [
    "BaseService",
    "Binary",
    "Cancelled",
    "InvalidRequest",
    "Item",
    "Loading",
    "OutOfMemory",
    "Output",
    "Progress",
    "Stream",
    "Unavailable",
    "Usage",
    "WorkerError",
    "chat_reply",
    "chat_stream",
    "completion_reply",
    "completion_stream",
    "images_reply",
    "wants_usage",
]
