#!/usr/bin/env python3
"""Music from text: serves MusicGen of transformers behind `POST /v1/audio/generations` and `/v1/audio/speech`.

python models/musicgen/server.py --model DIR_OR_ID --port 8003
"""

from __future__ import annotations

import io
import json
import logging
import math
import os
import pathlib
import secrets
import sys
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "base"))

from roundhouse_worker import Binary, InvalidRequest, Item, Loading, Output, Progress, log, weights
from roundhouse_worker.fields import integer, number, text
from roundhouse_worker.torch_service import Loader, TorchService

if TYPE_CHECKING:
    import argparse

    import numpy as np

SPEECH = "/v1/audio/speech"
GENERATIONS = "/v1/audio/generations"
SECONDS_MAX = 30.0  # what the model was trained for
SECONDS_MIN = 0.1
PROMPT_MAX_CHARS = 4096
SEED_MAX = 2**63 - 1
DELAY_TOKENS = 3  # the codebooks start one after another
FILES = {
    # format: content type, libsndfile's format and subtype, the rate it must have
    "wav": ("audio/wav", "WAV", "PCM_16", None),
    "flac": ("audio/flac", "FLAC", "PCM_16", None),
    "mp3": ("audio/mpeg", "MP3", "MPEG_LAYER_III", None),
    "opus": ("audio/ogg", "OGG", "OPUS", 48_000),
}
PCM_RATE = 24_000  # 16 bit, little endian, as OpenAI's "pcm"
FORMATS = (*FILES, "pcm")


@dataclass(frozen=True, slots=True)
class Params:
    """One request, checked. `seed` is None if the request named none."""

    prompt: str
    seconds: float
    guidance: float
    temperature: float
    top_k: int
    seed: int | None
    format: str


class MusicgenServer(TorchService):
    """Serves MusicGen (music from text, up to 30 s)."""

    name = "musicgen"
    model = "facebook/musicgen-small"
    endpoints = (GENERATIONS, SPEECH)
    gpu_dtype = "float16"

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        super().add_arguments(parser)
        parser.add_argument("--default-seconds", type=float, default=10.0, help="duration if the request names none")

    def check(self) -> dict[str, Any]:
        if not SECONDS_MIN <= self.options.default_seconds <= SECONDS_MAX:
            raise ValueError(f"--default-seconds must be from {SECONDS_MIN} to {SECONDS_MAX:g}")
        folder = weights.local_folder(self.options.model, self.options.revision)
        try:
            kind = json.loads((folder / "config.json").read_text()).get("model_type")
        except OSError:
            kind = None
        if kind != "musicgen":
            raise ValueError(f"--model: {folder} holds no MusicGen model (its config.json says {kind})")
        return {"folder": str(folder)} | random_note(folder)

    # ---- loading -------------------------------------------------------------

    @classmethod
    def import_libraries(cls, folder: pathlib.Path | None) -> None:
        import soundfile  # noqa: F401 - a missing library should show here, not in the first request
        import transformers
        from transformers import MusicgenForConditionalGeneration  # noqa: F401 - transformers imports when asked

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()

    def initialize(self, loading: Loading) -> None:
        self.model_facts = random_note(weights.local_folder(self.options.model, self.options.revision))
        if self.model_facts:
            log.event(logging.WARNING, self.model_facts["note"])
        super().initialize(loading)

    def load(self, loader: Loader) -> None:
        from transformers import AutoProcessor, MusicgenForConditionalGeneration

        model: Any = loader.part("transformers", "MusicgenForConditionalGeneration", self.folder)
        loader.read()
        if model is None:
            model = MusicgenForConditionalGeneration.from_pretrained(
                self.folder, dtype=self.dtype, local_files_only=True
            )
            model = model.to(self.device).eval()
        self._model: Any = model
        self._processor: Any = AutoProcessor.from_pretrained(self.folder, local_files_only=True)
        self._rate: int = model.config.audio_encoder.sampling_rate
        self._tokens_per_second: int = model.config.audio_encoder.frame_rate

    def modules(self) -> list[Any]:
        return [self._model]

    def drop(self) -> None:
        self._model = None

    def step(self) -> list[Any]:
        """A few frames of sound, and one token of the decoder: codec, text encoder, decoder."""
        torch, model = self.torch, self._model
        books = model.decoder.num_codebooks // model.decoder.config.audio_channels
        codes = torch.arange(4 * books, device=self.device).reshape(1, 1, books, 4)
        sound = self.awaited(model.audio_encoder).decode(codes, audio_scales=[None]).audio_values
        inputs = self._processor(text=["slow piano, rain"], padding=True, return_tensors="pt").to(self.device)
        start = torch.full(
            (model.decoder.num_codebooks, 1), model.generation_config.decoder_start_token_id, device=self.device
        )
        return [sound, model(**inputs, decoder_input_ids=start).logits]

    # ---- requests ------------------------------------------------------------

    def parse(self, item: Item) -> Params:
        body = item.body
        speech = item.endpoint == SPEECH
        # OpenAI's speech call leaves the format out when it wants MP3.
        audio_format = body.get("response_format") or ("mp3" if speech else "wav")
        if audio_format not in FORMATS:
            raise InvalidRequest(
                f"response_format must be one of {', '.join(FORMATS)}, not {str(audio_format)[:40]}",
                param="response_format",
            )
        seed = body.get("seed")
        return Params(
            prompt=text(body, "input" if speech else "prompt", PROMPT_MAX_CHARS),
            seconds=number(body, "duration", float(self.options.default_seconds), SECONDS_MIN, SECONDS_MAX),
            guidance=number(body, "guidance_scale", 3.0, 1.0, 20.0),
            temperature=number(body, "temperature", 1.0, 0.01, 5.0),
            top_k=integer(body, "top_k", 250, 1, 2048),
            seed=None if seed is None else integer(body, "seed", 0, 0, SEED_MAX),
            format=audio_format,
        )

    def batch_key(self, item: Item) -> Hashable:
        """One `generate` call has one duration and one random generator: a request with a seed has a pass to itself."""
        p: Params = item.params
        alone = None if p.seed is None else id(item)
        return (p.seconds, p.guidance, p.temperature, p.top_k, alone)

    def generate(self, items: list[Item], progress: Progress) -> Sequence[Output | Exception]:
        torch = self.torch
        params: Params = items[0].params
        seed = secrets.randbelow(2**32) if params.seed is None else params.seed
        torch.manual_seed(seed)
        tokens = math.ceil(params.seconds * self._tokens_per_second) + DELAY_TOKENS
        prompts = [item.params.prompt for item in items]
        inputs = self._processor(text=prompts, padding=True, return_tensors="pt").to(self.device)
        with torch.inference_mode():
            sound = self._model.generate(
                **inputs,
                do_sample=True,
                guidance_scale=params.guidance,
                temperature=params.temperature,
                top_k=params.top_k,
                max_new_tokens=tokens,
                stopping_criteria=self._after_each_token(progress, tokens),
            )
        # (requests, channels, samples) -> (requests, samples, channels)
        waves = sound.float().clamp(-1, 1).transpose(1, 2).cpu().numpy()
        # The seed of a shared pass gives no single one of its sounds again.
        told = seed if len(items) == 1 else None
        note = json.dumps({"model": self.served_name, "seed": told} | self.model_facts)
        length = round(params.seconds * self._rate)
        return [
            encode(wave[:length], self._rate, item.params.format, note) for item, wave in zip(items, waves, strict=True)
        ]

    def _after_each_token(self, progress: Progress, total: int) -> Any:
        """Reports every token; ends a pass that nobody waits for by raising.

        Never by returning True: the codebooks are shifted against each other, and a sequence that ends early cannot
        be put together again. A streamer would be no help: MusicGen calls it once.
        """
        from transformers import StoppingCriteria, StoppingCriteriaList

        torch = self.torch

        class AfterToken(StoppingCriteria):
            step = 0

            def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
                self.step += 1
                progress(min(self.step, total), total)
                return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

        return StoppingCriteriaList([AfterToken()])


def random_note(folder: pathlib.Path) -> dict[str, Any]:
    """What is said wherever random weights are shown."""
    if not weights.is_random(folder):
        return {}
    return {"weights": "random", "note": "random weights: sound is noise"}


def encode(wave: np.ndarray, rate: int, audio_format: str, note: str) -> Binary:
    """A sound file.

    Args:
        wave: (samples, channels), floats from -1 to 1.
        rate: samples a second.
        audio_format: one of FORMATS.
        note: a comment to write into the file, where the format has room for one.
    """
    if audio_format == "pcm":
        return Binary("audio/pcm", sixteen_bits(resample(wave, rate, PCM_RATE)).tobytes())
    import soundfile

    content_type, container, subtype, wanted_rate = FILES[audio_format]
    wave, rate = resample(wave, rate, wanted_rate or rate), wanted_rate or rate
    out = io.BytesIO()
    with soundfile.SoundFile(
        out, "w", samplerate=rate, channels=wave.shape[1], format=container, subtype=subtype
    ) as file:
        file.comment = note
        file.write(sixteen_bits(wave))
    return Binary(content_type, out.getvalue())


def sixteen_bits(wave: np.ndarray) -> np.ndarray:
    """Floats from -1 to 1 as little-endian 16-bit numbers; here, as the formats round differently."""
    return (wave * 32767).round().astype("<i2")


def resample(wave: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """Change the sample rate by a ratio of small numbers, with a windowed-sinc low-pass.

    Args:
        wave: (samples, channels).
        rate: its samples a second.
        wanted: the samples a second to make.

    Returns:
        (samples * wanted / rate, channels), within -1..1.
    """
    import numpy as np

    if rate == wanted:
        return wave
    factor = math.gcd(rate, wanted)
    up, down = wanted // factor, rate // factor
    half = 16 * max(up, down)
    taps = np.sinc(np.arange(-half, half + 1) / max(up, down)) * np.kaiser(2 * half + 1, 8.0)
    taps *= up / taps.sum()
    length = -(-wave.shape[0] * up // down)
    made = np.empty((length, wave.shape[1]), dtype=np.float32)
    for channel in range(wave.shape[1]):
        spread = np.zeros(wave.shape[0] * up)
        spread[::up] = wave[:, channel]
        made[:, channel] = np.convolve(spread, taps)[half : half + spread.size : down]
    return made.clip(-1, 1)


if __name__ == "__main__":
    raise SystemExit(MusicgenServer.main())
