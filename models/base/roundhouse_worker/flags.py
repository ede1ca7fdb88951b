"""The command line every worker shares."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import NoReturn


class FlagError(Exception):
    """A flag is missing, unknown or out of range."""


class _Parser(argparse.ArgumentParser):
    """Raises instead of exiting, so that `--check` can answer in JSON."""

    def error(self, message: str) -> NoReturn:
        raise FlagError(message)


def at_least(low: float, kind: Callable[[str], float] = float) -> Callable[[str], float]:
    """A flag's type: a number that is not smaller than `low`."""

    def number(text: str) -> float:
        value = kind(text)
        if not value >= low:
            raise argparse.ArgumentTypeError(f"must be at least {low:g}, not {text}")
        return value

    return number


def port(text: str) -> int:
    """A flag's type: a TCP port; 0 takes a free one and logs which."""
    value = int(text)
    if not 0 <= value <= 65535:
        raise argparse.ArgumentTypeError(f"must be 0-65535, not {text}")
    return value


def parser(description: str, *, name: str, model: str) -> argparse.ArgumentParser:
    """The shared flags; a worker adds its own in `BaseService.add_arguments`."""
    flags = _Parser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flags.add_argument("--port", type=port, default=8000, help="port on 127.0.0.1; 0 takes a free one")
    flags.add_argument("--model", default=model, help="a folder of weights or a Hugging Face id")
    flags.add_argument("--revision", default="main", help="revision of a Hugging Face id, as it was fetched")
    flags.add_argument("--name", default=name, help="the model's name as it is served")
    flags.add_argument("--check", action="store_true", help="check the flags, load nothing, print JSON")
    flags.add_argument(
        "--batch-wait-ms", type=at_least(0), default=50, help="how long a run waits for its missing requests"
    )
    flags.add_argument(
        "--grace",
        type=at_least(0),
        default=os.environ.get("ROUNDHOUSE_GRACE_S", "8"),  # a text is checked like the flag
        help="seconds that running passes may take to finish after SIGTERM",
    )
    flags.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info")
    return flags
