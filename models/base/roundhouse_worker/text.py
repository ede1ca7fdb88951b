"""Answers in OpenAI's shapes for text, whole and streamed.

A stream takes the text as an async iterator of pieces and yields whole SSE
frames: the role first (chat), the pieces, one frame with the `finish_reason`,
the usage if it was asked for, and `[DONE]`.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int

    def json(self) -> dict[str, int]:
        """OpenAI's `usage` object."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }


def frame(data: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: %s\n\n" % json.dumps(data, separators=(",", ":")).encode()


def wants_usage(body: dict[str, Any]) -> bool:
    """Whether the request asked for a usage chunk at the end of its stream."""
    options = body.get("stream_options")
    return isinstance(options, dict) and bool(options.get("include_usage"))  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]


def chat_reply(request_id: str, model: str, text: str, finish_reason: str | None, usage: Usage) -> dict[str, Any]:
    """The answer of `/v1/chat/completions` without `stream`."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
    head = _head(f"chatcmpl-{request_id}", "chat.completion", model)
    return head | {"choices": [choice], "usage": usage.json()}


def completion_reply(request_id: str, model: str, text: str, finish_reason: str | None, usage: Usage) -> dict[str, Any]:
    """The answer of `/v1/completions` without `stream`."""
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason}
    head = _head(f"cmpl-{request_id}", "text_completion", model)
    return head | {"choices": [choice], "usage": usage.json()}


async def chat_stream(
    request_id: str,
    model: str,
    pieces: AsyncIterator[str],
    finish: Callable[[], tuple[str | None, Usage]],
    *,
    include_usage: bool = False,
) -> AsyncIterator[bytes]:
    """The frames of a streamed chat answer.

    Args:
        request_id: becomes part of the answer's id.
        model: the served name.
        pieces: the text, piece by piece.
        finish: called after the last piece; the finish reason (None sends no
            such frame) and the usage.
        include_usage: whether the usage gets a frame of its own.
    """
    head = _head(f"chatcmpl-{request_id}", "chat.completion.chunk", model)

    def chunk(delta: dict[str, str], finish_reason: str | None) -> dict[str, Any]:
        return head | {"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]}

    role = frame(chunk({"role": "assistant", "content": ""}, None))
    async for piece in pieces:
        if role:  # not earlier: what fails before the first piece still gets its HTTP status
            yield role
            role = b""
        yield frame(chunk({"content": piece}, None))
    if role:
        yield role
    finish_reason, usage = finish()
    if finish_reason is not None:
        yield frame(chunk({}, finish_reason))
    if include_usage:
        yield frame(head | {"choices": [], "usage": usage.json()})
    yield DONE


async def completion_stream(
    request_id: str,
    model: str,
    pieces: AsyncIterator[str],
    finish: Callable[[], tuple[str | None, Usage]],
    *,
    include_usage: bool = False,
) -> AsyncIterator[bytes]:
    """The frames of a streamed `/v1/completions` answer; arguments as in `chat_stream`."""
    head = _head(f"cmpl-{request_id}", "text_completion", model)

    def chunk(text: str, finish_reason: str | None) -> dict[str, Any]:
        return head | {"choices": [{"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason}]}

    async for piece in pieces:
        yield frame(chunk(piece, None))
    finish_reason, usage = finish()
    if finish_reason is not None:
        yield frame(chunk("", finish_reason))
    if include_usage:
        yield frame(head | {"choices": [], "usage": usage.json()})
    yield DONE


def _head(answer_id: str, kind: str, model: str) -> dict[str, Any]:
    return {"id": answer_id, "object": kind, "created": int(time.time()), "model": model}
