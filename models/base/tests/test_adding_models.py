"""The example of docs/ADDING_MODELS.md works as it stands there."""

from __future__ import annotations

import re
import wave
from io import BytesIO
from pathlib import Path

from harness import Worker

ROOT = Path(__file__).parents[3]


def test_the_example_is_a_worker(tmp_path: Path):
    text = (ROOT / "docs/ADDING_MODELS.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert code
    # The neighbour `base` is found from the folder that the example is meant to be in.
    (tmp_path / "base").symlink_to(ROOT / "models/base")
    script = tmp_path / "tone/server.py"
    script.parent.mkdir()
    script.write_text(code[1])
    with Worker(script) as worker:
        worker.ready()
        sounds = [worker.post("/v1/audio/generations", {"prompt": prompt}) for prompt in ("low", "much higher")]
        refused = worker.post("/v1/audio/generations", {})
    assert [sound.headers["content-type"] for sound in sounds] == ["audio/wav"] * 2
    with wave.open(BytesIO(sounds[0].content)) as sound:
        assert (sound.getframerate(), sound.getnframes()) == (8000, 8000)
    assert sounds[0].content != sounds[1].content
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "prompt"
