"""Modules of diffusers and transformers from safetensors files, without their own slow reading. Needs torch.

A `Part` is one module, built with empty parameters; `read` fills all parts of a model through one buffer
(`hostcopy.load`). What does not match its files exactly is no part: the library loads it as it always does.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import pathlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from roundhouse_worker import hostcopy, log
from roundhouse_worker.hostcopy import Entry, Layout, Loaded


@dataclass(frozen=True, slots=True)
class Part:
    """A module and which file's tensor each of its names is read from.

    Attributes:
        module: complete but for its parameters, which are on the meta device.
        source: by the module's own name of a tensor.
        dtypes: what the tensors become, the names of torch's dtypes.
    """

    module: Any
    source: dict[str, Entry]
    dtypes: dict[str, str]

    @property
    def size_bytes(self) -> int:
        """What its tensors take, in bytes."""
        layout = Layout()
        self.place(layout)
        return layout.size

    def place(self, layout: Layout) -> dict[str, hostcopy.Slot]:
        """Give each tensor its place in a layout."""
        return {name: layout.add(self.source[name], self.dtypes[name]) for name in self.source}


class _Mismatch(Exception):
    """The files do not hold exactly what the module has."""


def part(library: str, class_name: str, folder: pathlib.Path, dtype: Any) -> Part | None:
    """A module of a library, ready to be read; None if it has to be loaded the ordinary way (the log says why).

    Args:
        library: "diffusers" or "transformers".
        class_name: the module's class.
        folder: its config.json and weights.
        dtype: the torch dtype that `from_pretrained` would be given.
    """
    try:
        if library not in ("diffusers", "transformers"):
            raise _Mismatch(f"it is of {library}")
        paths = hostcopy.files(folder)
        if not paths:
            raise _Mismatch("its weights are no safetensors files")
        found: dict[str, Entry] = {}
        for path in paths:
            found |= hostcopy.entries(path)
        build = _from_diffusers if library == "diffusers" else _from_transformers
        module = build(getattr(importlib.import_module(library), class_name), folder, dtype)
        source = _match(module, found)
        return Part(module, source, _dtypes(module, source, dtype))
    except Exception as error:  # whatever it is, the library's own way may still do
        why = str(error) if isinstance(error, _Mismatch) else f"{type(error).__name__}: {error}"
        log.event(logging.INFO, "loaded by its library", load_part=class_name, load_reason=why[:300])
        return None


def read(
    parts: list[Part], device: Any, *, keep: bool, report: Callable[[str, float], None] | None = None
) -> Loaded | None:
    """Fill the parts' modules and move them to the device; arguments as for `hostcopy.load`.

    Returns:
        What holds their weights; None if there are none.
    """
    import torch  # pyright: ignore[reportMissingImports]

    if not parts:
        return None
    layout = Layout()
    places = [one.place(layout) for one in parts]
    loaded = hostcopy.load(layout, device, keep=keep, report=report)
    for one, slots in zip(parts, places, strict=True):
        views: dict[str, Any] = {}
        for name, slot in slots.items():
            views[name] = _at(torch, loaded.flat, slot)
        _assign(one.module, views)
        one.module.to(device)  # buffers that no file holds
        one.module.eval()
    return loaded


@contextlib.contextmanager
def _empty_parameters() -> Iterator[None]:
    """In this block modules get their parameters on the meta device; buffers are real."""
    import torch  # pyright: ignore[reportMissingImports]

    original = torch.nn.Module.register_parameter

    def register(self: Any, name: str, param: Any) -> None:
        original(self, name, param)
        if param is not None and param.device.type != "meta":
            empty = torch.nn.Parameter(param.data.to("meta"), requires_grad=param.requires_grad)
            self._parameters[name] = empty

    torch.nn.Module.register_parameter = register
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = original


def _from_diffusers(kind: Any, folder: pathlib.Path, dtype: Any) -> Any:
    import torch  # pyright: ignore[reportMissingImports]

    config = kind.load_config(folder, local_files_only=True)
    if "quantization_config" in config:
        raise _Mismatch("it is quantized")
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with _empty_parameters():
            module = kind.from_config(config)
    finally:
        torch.set_default_dtype(before)
    module.register_to_config(_name_or_path=str(folder))
    return module


def _from_transformers(kind: Any, folder: pathlib.Path, dtype: Any) -> Any:
    config = kind.config_class.from_pretrained(folder, local_files_only=True)
    if getattr(config, "quantization_config", None) is not None:
        raise _Mismatch("it is quantized")
    with _empty_parameters():
        module = kind._from_config(config, dtype=dtype)
    if module.can_generate() and (folder / "generation_config.json").is_file():
        from transformers import GenerationConfig  # pyright: ignore[reportMissingImports]

        module.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return module


def _match(module: Any, found: dict[str, Entry]) -> dict[str, Entry]:
    """Which file's tensor each of the module's tensors is, by the module's name for it.

    Raises:
        _Mismatch: something is missing, left over or of another shape.
    """
    wanted = module.state_dict()
    prefix = f"{getattr(module, 'base_model_prefix', '')}."
    ignored = getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()
    source: dict[str, Entry] = {}
    for name, entry in found.items():
        here = next((key for key in _names(name, prefix) if key in wanted), None)
        if here is None:
            if any(re.search(pattern, name) for pattern in ignored):
                continue
            raise _Mismatch(f"its files hold {name}, which the module does not have")
        if here in source:
            raise _Mismatch(f"its files hold {here} twice")
        if tuple(wanted[here].shape) != entry.shape:
            raise _Mismatch(f"{here} has the shape {list(entry.shape)} in the file, not {list(wanted[here].shape)}")
        source[here] = entry
    served: dict[int, str] = {}
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for name in source:
        if name not in parameters:
            continue
        if id(parameters[name]) in served:
            raise _Mismatch(f"its files hold both {served[id(parameters[name])]} and {name}, which are tied")
        served[id(parameters[name])] = name
    for name, parameter in parameters.items():
        if id(parameter) not in served:
            raise _Mismatch(f"its files do not hold {name}")
    for name in wanted:
        if name not in source and name not in parameters:
            raise _Mismatch(f"its files do not hold {name}")
    # About the order in which they are used, and so in which they had best come back at a wake.
    return {name: source[name] for name in wanted if name in source}


def _names(name: str, prefix: str) -> Iterator[str]:
    """How the module may call what a file calls `name`: as it is, with or without the prefix, or in today's words."""
    today = re.sub(r"\.weight_g$", ".parametrizations.weight.original0", name)
    today = re.sub(r"\.weight_v$", ".parametrizations.weight.original1", today)
    for one in (name, today):
        yield one
        if len(prefix) > 1:
            yield one.removeprefix(prefix)
            yield prefix + one


def _dtypes(module: Any, source: dict[str, Entry], dtype: Any) -> dict[str, str]:
    """What each tensor becomes: what the empty module has, but for what transformers keeps in float32."""
    kept: dict[str, Any] = {}
    if hasattr(module, "_get_dtype_plan"):
        kept = module._get_dtype_plan(dtype)
    elif getattr(module, "_keep_in_fp32_modules", None):
        raise _Mismatch("some of it stays in float32")
    patterns = {pattern.replace("*", ".*"): wanted for pattern, wanted in kept.items()}
    made = module.state_dict()
    dtypes: dict[str, str] = {}
    for name in source:
        wanted = next((value for pattern, value in patterns.items() if re.search(pattern, name)), made[name].dtype)
        dtypes[name] = str(wanted).removeprefix("torch.")
        if dtypes[name] not in hostcopy.SIZES:
            raise _Mismatch(f"{name} would become {wanted}")
    return dtypes


def _at(torch: Any, flat: Any, slot: hostcopy.Slot) -> Any:
    """A tensor in the buffer. Not a slice: torch's views hold the buffer for ever, whatever `data` they get."""
    dtype, strides = getattr(torch, slot.dtype), [1]
    for side in reversed(slot.entry.shape[1:]):
        strides.insert(0, strides[0] * side)
    empty = torch.empty(0, dtype=dtype, device=flat.device)
    start = slot.start // empty.element_size()
    return empty.set_(flat.untyped_storage(), start, slot.entry.shape, strides[: len(slot.entry.shape)])


def _assign(module: Any, views: dict[str, Any]) -> None:
    """Put the tensors into the module; what is tied stays tied."""
    import torch  # pyright: ignore[reportMissingImports]

    made: dict[int, Any] = {}
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for name, view in views.items():
        if name in parameters:
            old = parameters[name]
            made[id(old)] = torch.nn.Parameter(view, requires_grad=old.requires_grad and view.is_floating_point())
    for name, old in parameters.items():
        owner, _, last = name.rpartition(".")
        setattr(module.get_submodule(owner), last, made[id(old)])  # a setattr, as an LSTM keeps a list of its own
    for name, view in views.items():
        if name not in parameters:
            owner, _, last = name.rpartition(".")
            module.get_submodule(owner)._buffers[last] = view
