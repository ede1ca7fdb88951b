"""Parts of the Flux worker that need no torch."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest


def load() -> Any:
    spec = importlib.util.spec_from_file_location("flux_server", Path(__file__).parents[1] / "server.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


server = load()


def pipeline(name: str, guidance: bool = False, **config: Any) -> Any:
    made: Any = type(name, (), {})()
    made.config = config
    made.transformer = SimpleNamespace(config={"guidance_embeds": guidance})
    return made


@pytest.mark.parametrize(
    ("pipe", "steps", "guidance"),
    [
        (pipeline("FluxPipeline"), 4, 0.0),
        (pipeline("FluxPipeline", guidance=True), 28, 3.5),
        (pipeline("Flux2KleinPipeline", is_distilled=True), 4, 1.0),
        (pipeline("Flux2KleinPipeline", is_distilled=False), 50, 4.0),
        (pipeline("Flux2Pipeline"), 28, 4.0),
        (pipeline("OtherPipeline"), 28, None),
    ],
)
def test_every_kind_has_its_authors_defaults(pipe: Any, steps: int, guidance: float | None) -> None:
    defaults = server.defaults_of(pipe)
    assert (defaults.steps, defaults.guidance) == (steps, guidance)


def test_a_size_is_two_numbers() -> None:
    assert server.parse_size("1024x768", "size") == (1024, 768)


@pytest.mark.parametrize(
    "text", ["", "x", "1024", "1024x", "-64x64", "64 x64", "64x64x64", "\u0666\u0664x64", "9" * 5000 + "x64"]
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="size"):
        server.parse_size(text, "size")


def test_only_the_keywords_that_a_pipeline_takes_are_known() -> None:
    class Pipe:
        def __call__(self, prompt: str, height: int = 1) -> None: ...

    assert server.call_parameters(Pipe()) == {"prompt", "height"}


def test_no_host_copy_is_made_before_a_sleep_needs_it() -> None:
    parser = argparse.ArgumentParser()
    server.FluxServer.add_arguments(parser)
    assert parser.parse_args([]).host_copy == "sleep"


def test_its_batch_keys_are_those_the_scheduler_knows() -> None:
    fixture = Path(__file__).parents[3] / "tests/fixtures/batch_keys.json"
    flux = object.__new__(server.FluxServer)
    flux._default_size = (1024, 1024)
    flux._defaults = server.Defaults(steps=4, guidance=1.0)
    flux._takes = {"negative_prompt", "true_cfg_scale"}
    keys = []
    for case in json.loads(fixture.read_text())["flux"]:
        item = server.Item("r", case["endpoint"], case["body"])
        item.params = flux.parse(item)
        keys.append((case["worker"], flux.batch_key(item)))
    assert [(a, b) for a, x in keys for b, y in keys if (a == b) != (x == y)] == []
