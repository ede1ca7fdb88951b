"""Parts of the MusicGen worker that need no torch."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest


def load() -> Any:
    spec = importlib.util.spec_from_file_location("musicgen_server", Path(__file__).parents[1] / "server.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


server = load()


@pytest.mark.parametrize(("rate", "wanted"), [(32_000, 48_000), (32_000, 24_000), (16_000, 48_000)])
def test_resampling_keeps_length_pitch_loudness_and_phase(rate: int, wanted: int) -> None:
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate)
    made = server.resample(np.stack([tone, -tone], axis=1).astype(np.float32), rate, wanted)
    assert made.shape == (wanted, 2)
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(wanted) / wanted)
    inner = slice(200, -200)
    assert abs(made[inner, 0] - expected[inner]).max() < 0.005
    assert abs(made[inner, 1] + expected[inner]).max() < 0.005


def test_resampling_down_removes_what_would_alias() -> None:
    high = np.sin(2 * np.pi * 15_000 * np.arange(32_000) / 32_000)[:, None].astype(np.float32)
    assert abs(server.resample(high, 32_000, 24_000)[200:-200]).max() < 0.02


def test_the_same_rate_is_left_alone() -> None:
    wave = np.ones((10, 1), dtype=np.float32)
    assert server.resample(wave, 32_000, 32_000) is wave


def test_pcm_is_little_endian_at_openai_s_rate() -> None:
    made = server.encode(np.full((32_000, 1), 0.5, dtype=np.float32), 32_000, "pcm", "")
    assert made.content_type == "audio/pcm"
    samples = np.frombuffer(made.data, dtype="<i2")
    assert samples.size == 24_000
    assert abs(int(samples[12_000]) - 16_383) < 100


def test_no_host_copy_is_made_before_a_sleep_needs_it() -> None:
    parser = argparse.ArgumentParser()
    server.MusicgenServer.add_arguments(parser)
    assert parser.parse_args([]).host_copy == "sleep"


def test_its_batch_keys_are_those_the_scheduler_knows() -> None:
    fixture = Path(__file__).parents[3] / "tests/fixtures/batch_keys.json"
    musicgen = object.__new__(server.MusicgenServer)
    musicgen.options = argparse.Namespace(default_seconds=10.0)
    items, keys = [], []
    for case in json.loads(fixture.read_text())["musicgen"]:
        item = server.Item("r", case["endpoint"], case["body"])
        item.params = musicgen.parse(item)
        items.append(item)  # a key may name its item
        keys.append((case["worker"], musicgen.batch_key(item)))
    assert [(a, b) for a, x in keys for b, y in keys if (a == b) != (x == y)] == []
