"""Answers in OpenAI's shapes for images."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterable
from typing import Any


def images_reply(images: Iterable[bytes]) -> dict[str, Any]:
    """The answer of `/v1/images/generations`: encoded images (PNG, JPEG, ...) as base64."""
    data = [{"b64_json": base64.b64encode(image).decode("ascii")} for image in images]
    return {"created": int(time.time()), "data": data}
