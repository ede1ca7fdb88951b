#!/usr/bin/env python3
"""Images from text: serves a Flux pipeline of diffusers behind `POST /v1/images/generations`.

    python models/flux/server.py --model DIR_OR_ID --port 8002

Any pipeline that `DiffusionPipeline.from_pretrained` gives works as long as it takes prompts and makes images: FLUX.1
(schnell, dev) and FLUX.2 klein were tried.
"""

from __future__ import annotations

import base64
import importlib
import io
import json
import logging
import os
import pathlib
import secrets
import sys
import time
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "base"))

from roundhouse_worker import Cancelled, InvalidRequest, Item, Loading, Output, Progress, hostcopy, log, weights
from roundhouse_worker.fields import integer, number, text
from roundhouse_worker.torch_service import Loader, TorchService

if TYPE_CHECKING:
    import argparse

SIZE_STEP = 16  # pipelines round other sizes down, with a warning only
SIZE_MIN, SIZE_MAX = 64, 2048
STEPS_MAX = 1000
IMAGES_MAX = 10
PROMPT_MAX_CHARS = 32_000
SEED_MAX = 2**63 - 1 - IMAGES_MAX
CLASSES = [
    ("diffusers", "FluxPipeline"),
    ("diffusers", "Flux2KleinPipeline"),
    ("diffusers", "FlowMatchEulerDiscreteScheduler"),
]
"""What is imported before it is known which pipeline is wanted; each brings the classes of its components along."""


@dataclass(frozen=True, slots=True)
class Defaults:
    """What a pipeline wants if the request does not say; None: leave it to the pipeline."""

    steps: int
    guidance: float | None
    max_sequence_length: int | None = None


@dataclass(frozen=True, slots=True)
class Params:
    """One request, checked."""

    prompt: str
    negative_prompt: str | None
    count: int
    width: int
    height: int
    steps: int
    guidance: float | None
    true_cfg_scale: float | None
    seed: int


@dataclass(frozen=True, slots=True)
class Picture:
    """One image to make: the `index`-th of a request."""

    item: Item
    index: int

    @property
    def seed(self) -> int:
        return self.item.params.seed + self.index


class FluxServer(TorchService):
    """Serves a Flux pipeline (images from text)."""

    name = "flux"
    model = "black-forest-labs/FLUX.2-klein-4B"
    endpoints = ("/v1/images/generations",)

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        super().add_arguments(parser)
        parser.add_argument("--default-size", default="1024x1024", help="size of a request that names none")
        parser.add_argument("--batch-megapixels", type=float, default=4.0, help="most pixels in one pipeline call")
        parser.add_argument(
            "--offload", choices=("none", "model"), default="none", help="keep only the part in use on the GPU (slower)"
        )

    def check(self) -> dict[str, Any]:
        self._default_size = parse_size(self.options.default_size, "--default-size")
        folder = weights.local_folder(self.options.model, self.options.revision)
        if not (folder / "model_index.json").is_file():
            raise ValueError(f"--model: {folder} has no model_index.json, so it is no diffusers pipeline")
        pipeline = json.loads((folder / "model_index.json").read_text()).get("_class_name")
        return {"folder": str(folder), "pipeline": pipeline} | random_note(folder)

    # ---- loading -------------------------------------------------------------

    @classmethod
    def import_libraries(cls, folder: pathlib.Path | None) -> None:
        import diffusers
        import transformers

        diffusers.utils.logging.set_verbosity_error()
        diffusers.utils.logging.disable_progress_bar()
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        # Both import a class only when it is asked for, which takes seconds: not while weights are read.
        for library, name in CLASSES if folder is None else classes_of(folder):
            if library in ("diffusers", "transformers"):
                getattr(importlib.import_module(library), name, None)

    def initialize(self, loading: Loading) -> None:
        self.model_facts = random_note(weights.local_folder(self.options.model, self.options.revision))
        if self.model_facts:
            log.event(logging.WARNING, self.model_facts["note"])
        super().initialize(loading)

    @property
    def parks(self) -> bool:
        # With offload the weights mostly are in host memory.
        return self.on_cuda and self.options.offload == "none"

    def load(self, loader: Loader) -> None:
        from diffusers import DiffusionPipeline

        offload = self.options.offload == "model" and self.on_cuda
        parts: dict[str, Any] = {}
        # In this order they come back at a wake: `step` decodes first.
        found = sorted(components_of(self.folder).items(), key=lambda component: component[0] != "vae")
        for name, (library, class_name) in found:
            if not offload and hostcopy.files(self.folder / name):
                module = loader.part(library, class_name, self.folder / name)
                if module is not None:
                    parts[name] = module
        loader.read()
        pipeline = DiffusionPipeline.from_pretrained(self.folder, dtype=self.dtype, local_files_only=True, **parts)
        pipeline.set_progress_bar_config(disable=True)
        if offload:
            pipeline.enable_model_cpu_offload(device=self.device)
        else:
            pipeline.to(self.device)
        self._pipeline: Any = pipeline
        self._takes = call_parameters(pipeline)
        self._defaults = defaults_of(pipeline)

    def modules(self) -> list[Any]:
        return [part for part in self._pipeline.components.values() if isinstance(part, self.torch.nn.Module)]

    def drop(self) -> None:
        self._pipeline = None

    def step(self) -> list[Any]:
        """One step at the smallest size: VAE, text encoders, transformer.

        The VAE first: at a wake, only what comes after the transformer is not hidden behind the copies.
        """
        vae = self.awaited(self._pipeline.vae)
        channels = vae.config.latent_channels
        latents = self.torch.full((1, channels, 8, 8), 0.5, dtype=self.dtype, device=self.device)
        wanted = {
            "height": SIZE_MIN,
            "width": SIZE_MIN,
            "num_inference_steps": 1,
            "guidance_scale": self._defaults.guidance,
            "max_sequence_length": 64,
            "generator": self.torch.Generator("cpu").manual_seed(0),
            "output_type": "latent",
        }
        given = {name: value for name, value in wanted.items() if value is not None and name in self._takes}
        return [vae.decode(latents).sample, self._pipeline(prompt="a red fox in the snow", **given).images]

    # ---- requests ------------------------------------------------------------

    def parse(self, item: Item) -> Params:
        body = item.body
        size = body.get("size")
        if size in (None, "auto"):
            width = integer(body, "width", self._default_size[0], 1, 1 << 20)
            height = integer(body, "height", self._default_size[1], 1, 1 << 20)
            size = f"{width}x{height}"
        try:
            width, height = parse_size(size, "size")
        except ValueError as error:
            raise InvalidRequest(str(error), param="size") from None
        if body.get("output_format") not in (None, "png"):
            raise InvalidRequest("output_format must be png", param="output_format")
        negative = body.get("negative_prompt")
        if negative is not None and not isinstance(negative, str):
            raise InvalidRequest("negative_prompt must be text", param="negative_prompt")
        steps_name = "steps" if body.get("num_inference_steps") is None else "num_inference_steps"
        return Params(
            prompt=text(body, "prompt", PROMPT_MAX_CHARS),
            negative_prompt=negative if "negative_prompt" in self._takes else None,
            count=integer(body, "n", 1, 1, IMAGES_MAX),
            width=width,
            height=height,
            steps=integer(body, steps_name, self._defaults.steps, 1, STEPS_MAX),
            guidance=number(body, "guidance_scale", self._defaults.guidance, 0, 100),
            true_cfg_scale=number(body, "true_cfg_scale", None, 0, 100),
            seed=integer(body, "seed", secrets.randbelow(2**32), 0, SEED_MAX),
        )

    def batch_key(self, item: Item) -> Hashable:
        """One pipeline call has one value of each of these."""
        p: Params = item.params
        return (p.width, p.height, p.steps, p.guidance, p.true_cfg_scale, p.negative_prompt is None)

    def generate(self, items: list[Item], progress: Progress) -> Sequence[Output | Exception]:
        pictures = [Picture(item, index) for item in items for index in range(item.params.count)]
        first: Params = items[0].params
        per_call = max(1, int(self.options.batch_megapixels * 1_000_000 // (first.width * first.height)))
        calls = -(-len(pictures) // per_call)
        made: dict[Picture, bytes] = {}
        for number_of_call in range(calls):
            part = pictures[number_of_call * per_call : (number_of_call + 1) * per_call]
            part = [picture for picture in part if not picture.item.cancelled]
            progress.check()
            if part:
                for picture, png in self._call(part, progress, number_of_call * first.steps, calls * first.steps):
                    made[picture] = png
        return [self._answer(item, made) for item in items]

    def _call(
        self, pictures: list[Picture], progress: Progress, done: int, total: int
    ) -> Iterator[tuple[Picture, bytes]]:
        """One call of the pipeline for pictures that agree in everything but prompt and seed."""
        params: Params = pictures[0].item.params
        step = 0

        def after_step(pipeline: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            # Some schedulers take more model calls than steps: never report past the end of this call.
            nonlocal step
            step = min(step + 1, params.steps)
            progress(done + step, total)  # raises when nobody waits any more; the pipeline stays usable
            return tensors

        wanted = {
            "height": params.height,
            "width": params.width,
            "num_inference_steps": params.steps,
            "guidance_scale": params.guidance,
            "true_cfg_scale": params.true_cfg_scale,
            "negative_prompt": (
                None
                if params.negative_prompt is None
                else [picture.item.params.negative_prompt for picture in pictures]
            ),
            "max_sequence_length": self._defaults.max_sequence_length,
            # On the CPU, so that a seed means the same on every device.
            "generator": [self.torch.Generator("cpu").manual_seed(picture.seed) for picture in pictures],
            "callback_on_step_end": after_step,
            "output_type": "pil",
        }
        given = {name: value for name, value in wanted.items() if value is not None and name in self._takes}
        with self.torch.inference_mode():
            output = self._pipeline(prompt=[picture.item.params.prompt for picture in pictures], **given)
        for picture, image in zip(pictures, output.images, strict=True):
            yield picture, encode_png(image, self._png_note(picture))

    def _answer(self, item: Item, made: dict[Picture, bytes]) -> Output | Exception:
        params: Params = item.params
        pictures = [Picture(item, index) for index in range(params.count)]
        if any(picture not in made for picture in pictures):
            return Cancelled()
        return {
            "created": int(time.time()),
            "data": [
                {"b64_json": base64.b64encode(made[picture]).decode("ascii"), "seed": picture.seed}
                for picture in pictures
            ],
            "size": f"{params.width}x{params.height}",
            "output_format": "png",
            "roundhouse": self._settings(params),
        }

    def _settings(self, params: Params) -> dict[str, Any]:
        return {
            "seed": params.seed,
            "steps": params.steps,
            "guidance_scale": params.guidance,
            "model": self.served_name,
        } | self.model_facts

    def _png_note(self, picture: Picture) -> str:
        """What is written into the PNG, as image tools do: enough to make it again."""
        params: Params = picture.item.params
        return json.dumps(
            {"prompt": params.prompt}
            | ({"negative_prompt": params.negative_prompt} if params.negative_prompt else {})
            | self._settings(params)
            | {"seed": picture.seed, "size": f"{params.width}x{params.height}"}
        )


def random_note(folder: pathlib.Path) -> dict[str, Any]:
    """What is said wherever random weights are shown."""
    if not weights.is_random(folder):
        return {}
    return {"weights": "random", "note": "random weights: images are noise"}


def components_of(folder: pathlib.Path) -> dict[str, tuple[str, str]]:
    """A pipeline's components that are there: library and class, by name."""
    index = json.loads((folder / "model_index.json").read_text())
    return {name: (entry[0], entry[1]) for name, entry in index.items() if isinstance(entry, list) and entry[0]}


def classes_of(folder: pathlib.Path) -> list[tuple[str, str]]:
    """All classes that a pipeline is made of: library and name."""
    pipeline = json.loads((folder / "model_index.json").read_text())["_class_name"]
    return [("diffusers", pipeline), *components_of(folder).values()]


def call_parameters(pipeline: Any) -> set[str]:
    """The keyword arguments that a pipeline takes."""
    import inspect

    return set(inspect.signature(pipeline.__call__).parameters)


def defaults_of(pipeline: Any) -> Defaults:
    """The settings that the authors of a model recommend."""
    name = type(pipeline).__name__
    transformer = getattr(getattr(pipeline, "transformer", None), "config", {})
    if name.startswith("Flux2Klein"):
        return Defaults(4, 1.0) if pipeline.config.get("is_distilled") else Defaults(50, 4.0)
    if name.startswith("Flux2"):
        return Defaults(28, 4.0)
    if name.startswith("Flux"):
        return Defaults(28, 3.5) if transformer.get("guidance_embeds") else Defaults(4, 0.0, max_sequence_length=256)
    return Defaults(28, None)


def parse_size(text: Any, what: str) -> tuple[int, int]:
    """`"WxH"` as two numbers.

    Raises:
        ValueError: it is no size, or one that the pipelines do not make exactly.
    """
    width, cross, height = text.partition("x") if isinstance(text, str) else ("", "", "")
    if not (cross and width.isascii() and height.isascii() and width.isdigit() and height.isdigit()):
        raise ValueError(f'{what} must look like "1024x1024", not {str(text)[:40]!r}')
    for side in (width, height):
        if len(side) > 6 or not SIZE_MIN <= int(side) <= SIZE_MAX or int(side) % SIZE_STEP:
            raise ValueError(
                f"{what}: both sides must be multiples of {SIZE_STEP} from {SIZE_MIN} to {SIZE_MAX}, not {text[:40]}"
            )
    return int(width), int(height)


def encode_png(image: Any, note: str) -> bytes:
    """A PNG with `note` in its text field "parameters"."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("parameters", note)
    out = io.BytesIO()
    image.save(out, format="PNG", pnginfo=info, compress_level=4)
    return out.getvalue()


if __name__ == "__main__":
    raise SystemExit(FluxServer.main())
