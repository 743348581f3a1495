"""Where a run came from: model, scheduler, adapters, precision, machine and versions, as plain data."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from dit_lens.families import Family

PACKAGES = ("dit-lens", "torch", "diffusers", "transformers", "nnsight")


def describe(pipe: DiffusionPipeline, family: Family) -> dict[str, Any]:
    """Everything about the model and the machine that can change a picture."""
    transformer = pipe.transformer
    device = pipe.device
    return {
        "family": family.name,
        "pipeline": type(pipe).__name__,
        "model": str(getattr(pipe, "name_or_path", "") or "") or None,
        "revision": pipe.config.get("_commit_hash"),
        "transformer": _config(transformer),
        "scheduler": {"class": type(pipe.scheduler).__name__, **_config(pipe.scheduler)},
        "lora": plain(getattr(transformer, "peft_config", None) and list(transformer.peft_config)) or [],
        "dtype": str(transformer.dtype).removeprefix("torch."),
        "quantization": plain(getattr(transformer.config, "quantization_config", None)),
        "attention": str(getattr(transformer, "_attention_backend", None) or "native"),
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type} ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
    }


def _config(part: Any) -> dict[str, Any]:
    """A part's configuration without diffusers' own notes: where it came from, and a list whose order changes."""
    return plain({name: value for name, value in part.config.items() if not name.startswith("_")})


def plain(value: Any) -> Any:
    """A value as JSON can hold it; tensors, pictures and other objects become a word that says what they were."""
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    shape = getattr(value, "shape", None) or getattr(value, "size", None)
    return {"unsaved": f"{type(value).__name__}{'' if shape is None else ' ' + str(list(shape))}"}


def unsaved(value: Any) -> bool:
    """Whether plain data holds, anywhere, the place of something that could not be kept."""
    if isinstance(value, dict):
        return "unsaved" in value or any(unsaved(item) for item in value.values())
    return isinstance(value, list) and any(unsaved(item) for item in value)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
