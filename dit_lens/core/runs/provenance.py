"""Where a run came from: model, scheduler, adapters, precision, machine and versions, as plain data."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from dit_lens.families.module_tree import look_up
from dit_lens.families.tensors import sum_bits

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import nn

    from dit_lens.families import Family

SAMPLED = 4096  # elements of a weight, about
ADAPTER = ("scaling", "active_adapters", "disable_adapters", "merged")  # of a layer of peft
PACKAGES = ("dit-lens", "torch", "diffusers", "transformers", "nnsight")


def describe(pipe: DiffusionPipeline, family: Family) -> dict[str, Any]:
    """Everything about the model and the machine that can change an image."""
    transformer = pipe.transformer
    device = pipe.device
    return {
        "family": family.name,
        "pipeline": type(pipe).__name__,
        "model": str(getattr(pipe, "name_or_path", "") or "") or None,
        "revision": pipe.config.get("_commit_hash"),
        "transformer": _config(transformer),
        "scheduler": {"class": type(pipe.scheduler).__name__, **_config(pipe.scheduler)},
        "lora": to_plain_data(getattr(transformer, "peft_config", None) and list(transformer.peft_config)) or [],
        "shift": to_plain_data(getattr(pipe.scheduler, "shift", None)),
        "adapters": digest(repr(describe_adapters(find_modules(pipe))).encode()),
        "dtype": str(transformer.dtype).removeprefix("torch."),
        "weights": fingerprint(transformer),
        "quantization": to_plain_data(getattr(transformer.config, "quantization_config", None)),
        "attention": str(getattr(transformer, "_attention_backend", None) or "native"),
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type} ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
    }


@torch.no_grad()
def fingerprint(module: nn.Module) -> str | None:
    """A hash of about 4,096 elements, evenly spaced, of every weight: the same for the same weights wherever they lie.

    >>> layer = torch.nn.Linear(4, 4)
    >>> before = fingerprint(layer)
    >>> layer.weight.data[0, 0] += 1
    >>> fingerprint(layer) == before
    False

    Weights of up to 4,096 elements are covered whole, and of matrices up to about 4,000 wide every row; a change of
    single elements of larger ones may pass unseen, and so does the strength at which an adapter is applied.
    None where weights are not plainly at hand: offloaded ones, and those of quantised layers.
    """
    weights = [weight.detach() for weight in module.parameters()]
    if not all(type(w) is torch.Tensor and w.device.type != "meta" and w.is_floating_point() for w in weights):
        return None
    # Strides are odd, so that a width of a power of 2 does not always meet one column.
    samples = [weight.flatten()[:: weight.numel() // SAMPLED | 1].float() for weight in weights]
    if len({sample.device for sample in samples}) == 1:
        samples = [torch.cat(samples)]  # one copy to main memory, which is waited for once
    sampled = hashlib.sha256()
    for sample in samples:
        sampled.update(sample.cpu().numpy())
    return sampled.hexdigest()[:16]


@torch.no_grad()
def checksum(module: nn.Module, *, computed: bool = True) -> str | None:
    """A hash that any change of a single weight or buffer changes, or their order, from one pass over their bits.

    >>> layer = torch.nn.Linear(4, 4)
    >>> before = checksum(layer)
    >>> _ = layer.weight.data[0, 0].nextafter_(torch.tensor(9.0))
    >>> checksum(layer) == before
    False

    Sums are made where the weights lie, and fetched once. None where weights are not at hand.

    computed: whether buffers count that are not stored with the weights; machines differ in their last digits.
    """
    left_out = set() if computed else _computed_buffers(module)
    named = [*module.named_parameters(), *((name, one) for name, one in module.named_buffers() if name not in left_out)]
    tensors = [part for _, tensor in named for part in _plain_parts(tensor.detach())]
    if any(tensor.device.type == "meta" for tensor in tensors):
        return None
    sums = [" ".join(map(str, total.tolist())) for total in [sum_bits(tensor) for tensor in tensors]]
    return digest("\n".join(sums).encode())


def _computed_buffers(module: nn.Module) -> set[str]:
    """The names of buffers that are not stored with the weights."""
    return {
        f"{name}.{buffer}" if name else buffer
        for name, part in module.named_modules()
        for buffer in part._non_persistent_buffers_set  # noqa: SLF001 torch offers no public way
    }


def _plain_parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """A tensor, or those that a quantised one is made of."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return [tensor]
    return [part for name in flatten()[0] for part in _plain_parts(getattr(tensor, name))]


def find_modules(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    """The parts of a pipeline that hold weights, by name."""
    return {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


def describe_adapters(modules: Mapping[str, nn.Module]) -> dict[str, dict[str, str]]:
    """What is set beside the weights: layer -> the strength of its adapters, which are active; its processor's class.

    modules: component -> module.
    """
    found: dict[str, dict[str, str]] = {}
    for component, module in modules.items():
        for name, layer in module.named_modules():
            if look_up(layer, "scaling") is not None:
                found[f"{component}.{name}"] = {of: str(getattr(layer, of, None)) for of in ADAPTER}
            elif (processor := look_up(layer, "processor")) is not None:
                scale = getattr(processor, "scale", None)
                plain = "" if scale is None or isinstance(scale, torch.Tensor) else f", scale {scale}"
                found[f"{component}.{name}"] = {"processor": f"{type(processor).__name__}{plain}"}
    return found


def describe_scheduler(pipe: DiffusionPipeline) -> dict[str, Any]:
    """The scheduler and its settings; ``set_shift`` does not touch its configuration."""
    return {
        "class": type(pipe.scheduler).__name__,
        **_config(pipe.scheduler),
        "shift now": to_plain_data(getattr(pipe.scheduler, "shift", None)),
    }


def _config(part: Any) -> dict[str, Any]:
    """A part's configuration without diffusers' own notes: where it came from, and a list whose order changes."""
    return to_plain_data({name: value for name, value in part.config.items() if not name.startswith("_")})


def to_plain_data(value: Any) -> Any:
    """A value as JSON can hold it; tensors, images and other objects become a word that says what they were.

    Arrays and images have a digest of what is in them, so that two are told apart.
    """
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, dict):
        return {str(key): to_plain_data(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain_data(item) for item in value]
    shape = next((found for of in ("shape", "size") if isinstance(found := getattr(value, of, None), tuple)), None)
    said = {"unsaved": f"{type(value).__name__}{'' if shape is None else ' ' + str(list(shape))}"}
    if isinstance(value, torch.Tensor) and value.device.type != "meta":
        raw = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        return {**said, "digest": digest(raw.tobytes())}
    return {**said, "digest": digest(value.tobytes())} if hasattr(value, "tobytes") else said


def digest(data: bytes) -> str:
    """A short hash, the same for the same bytes on every machine."""
    return hashlib.sha256(data).hexdigest()[:16]


def holds_unsaved(value: Any) -> bool:
    """Whether plain data holds, anywhere, the name of something that could not be kept."""
    if isinstance(value, dict):
        return "unsaved" in value or any(holds_unsaved(item) for item in value.values())
    return isinstance(value, list) and any(holds_unsaved(item) for item in value)


@cache
def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
