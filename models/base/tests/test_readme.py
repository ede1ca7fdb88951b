"""The examples of README.md: their hooks are those that the base calls."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from roundhouse_worker.service import BaseService

README = Path(__file__).parents[1] / "README.md"


def examples() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("text", examples())
def test_hooks_are_as_the_base_calls_them(text: str):
    made: dict[str, Any] = {"__name__": "example"}
    exec(compile(text, str(README), "exec"), made)
    example = made["Server"]
    assert issubclass(example, BaseService)
    base = example.__bases__[0]
    hooks = [name for name, member in vars(example).items() if inspect.isroutine(member)]
    assert hooks
    for name in hooks:
        kinds = [type(inspect.getattr_static(of, name)) for of in (example, base)]
        assert kinds[0] is kinds[1], name
        parameters = [list(inspect.signature(getattr(of, name)).parameters) for of in (example, base)]
        assert parameters[0] == parameters[1], name
