"""Fields of a request's body: what is taken, what is refused and in which words."""

from __future__ import annotations

from typing import Any

import pytest

from roundhouse_worker import InvalidRequest
from roundhouse_worker.fields import integer, number, text


def test_what_is_within_its_limits_is_taken_and_what_is_missing_has_a_default() -> None:
    body = {"prompt": " a ", "n": 3, "scale": 2, "none": None}
    assert text(body, "prompt", 3) == " a "
    assert [integer(body, name, 7, 1, 3) for name in ("n", "none", "missing")] == [3, 7, 7]
    assert [number(body, name, 0.5, 0, 2) for name in ("scale", "none", "missing")] == [2.0, 0.5, 0.5]
    assert number(body, "missing", None, 0, 2) is None


@pytest.mark.parametrize("value", [0, 4, 1.0, True, "2", float("nan"), [], {}])
def test_a_whole_number_is_refused_with_its_limits(value: Any) -> None:
    with pytest.raises(InvalidRequest, match="n must be a whole number from 1 to 3, not ") as refused:
        integer({"n": value}, "n", 2, 1, 3)
    assert refused.value.param == "n"


@pytest.mark.parametrize("value", [-1, 2.5, False, "2", float("nan"), float("inf")])
def test_a_number_is_refused_with_its_limits(value: Any) -> None:
    with pytest.raises(InvalidRequest, match="scale must be a number from 0 to 2, not "):
        number({"scale": value}, "scale", 1.0, 0, 2)


@pytest.mark.parametrize(
    ("value", "why"),
    [(None, "not empty"), ("  ", "not empty"), (3, "not empty"), ("abcd", "4 characters, more than 3")],
)
def test_a_text_is_refused_with_its_reason(value: Any, why: str) -> None:
    with pytest.raises(InvalidRequest, match=why):
        text({"prompt": value}, "prompt", 3)
