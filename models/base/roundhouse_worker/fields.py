"""Fields of a request's body, each checked, with an error that names the field and its limits."""

from __future__ import annotations

from typing import Any, overload

from roundhouse_worker.errors import InvalidRequest


def text(body: dict[str, Any], name: str, limit: int) -> str:
    """A required text of at most `limit` characters, not only of white space.

    Raises:
        InvalidRequest: it is missing, empty, too long or no text.
    """
    value = body.get(name)
    if not isinstance(value, str) or not value.strip():
        raise InvalidRequest(f"{name} must be a text that is not empty", param=name)
    if len(value) > limit:
        raise InvalidRequest(f"{name} has {len(value)} characters, more than {limit}", param=name)
    return value


def integer(body: dict[str, Any], name: str, default: int, low: int, high: int) -> int:
    """An optional whole number from `low` to `high`; `default` if it is missing or null.

    Raises:
        InvalidRequest: it is no whole number (true and false are none), or outside the limits.
    """
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidRequest(f"{name} must be a whole number from {low} to {high}, not {str(value)[:40]}", param=name)
    return value


@overload
def number(body: dict[str, Any], name: str, default: float, low: float, high: float) -> float: ...
@overload
def number(body: dict[str, Any], name: str, default: float | None, low: float, high: float) -> float | None: ...
def number(body: dict[str, Any], name: str, default: float | None, low: float, high: float) -> float | None:
    """An optional number from `low` to `high`; `default` if it is missing or null.

    Raises:
        InvalidRequest: it is no number (true and false are none), or outside the limits.
    """
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise InvalidRequest(f"{name} must be a number from {low:g} to {high:g}, not {str(value)[:40]}", param=name)
    return float(value)
