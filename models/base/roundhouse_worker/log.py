"""One-line logs on stderr: a readable message, then the same values as dotted fields.

Prompts, outputs and bodies are never logged; say their length.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from typing import Any

LOGGER = logging.getLogger("roundhouse_worker")


class _LineFormatter(logging.Formatter):
    """`2026-01-31T12:00:00.123Z INFO  message key=value`, a traceback only if one is given."""

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = f"{stamp}.{int(record.msecs):03d}Z {record.levelname:<5} {record.getMessage()}"
        if record.exc_info:
            line = f"{line}\n{self.formatException(record.exc_info)}"
        return line


def configure(level: str) -> None:
    """Send every logger's lines to stderr in one shape."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_LineFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    LOGGER.setLevel(level.upper())


def event(level: int, message: str, /, **fields: Any) -> None:
    """Log `message` with fields; `pass_size=4` is written as `pass.size=4`."""
    if LOGGER.isEnabledFor(level):
        parts = (f"{key.replace('_', '.', 1)}={_value(value)}" for key, value in fields.items())
        LOGGER.log(level, "%s", " ".join((message, *parts)))


def where(error: BaseException) -> str:
    """The innermost frames of an exception, without its text, which may quote a prompt."""
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    return " > ".join(f"{frame.filename.rpartition('/')[2]}:{frame.lineno}:{frame.name}" for frame in frames)


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        value = ",".join(map(str, value))  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    text = str(value)
    return text if text and text.isprintable() and " " not in text else json.dumps(text)
