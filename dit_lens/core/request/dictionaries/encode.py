"""What sparse autoencoders compute. Torch and plain data only: it travels to a server by source.

Letters: d channel, f feature.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, TypedDict, cast

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from dit_lens.families.layout import argument
from dit_lens.families.levels import pick_time
from dit_lens.families.transfers import send

if TYPE_CHECKING:
    from dit_lens.families.locations import TimeRule

LARGEST = 2**26  # numbers that are computed at once
PERIOD = 10_000  # of the slowest of the waves that a time becomes
TINY = 1e-5  # beside a standard deviation, as SAELens has it


class Parts(TypedDict):
    """A dictionary, as far as some of its features need it.

    encoder: [d, f], and with it encoder_bias and threshold [f]: of those features, or of all where they compete.
    decoder: [f, d] of those features.
    decoder_bias: [d].
    k: how many features of a token are active at most, where they compete; else None.
    chosen: their numbers among all, where they compete; else None.
    centred: whether the decoder's bias is subtracted first.
    normalisation: "none", "layer_norm" or "constant_norm_rescale".
    time: weights by which the noise level modulates what is encoded; empty for none.
    transcoder: whether the decoder writes elsewhere.
    """

    encoder: Tensor
    encoder_bias: Tensor
    threshold: Tensor | None
    decoder: Tensor
    decoder_bias: Tensor
    k: int | None
    chosen: Tensor | None
    centred: bool
    normalisation: str
    time: dict[str, Tensor]
    transcoder: bool


def encode(parts: Parts, x: Tensor, level: Any = None) -> tuple[Tensor, Tensor | float]:
    """Activations of the chosen features, [..., f], and by what a decoded feature is multiplied, [..., 1].

    parts: of a dictionary.
    x: hidden states [..., d], which are encoded in float32 at least.
    level: the noise level, where the dictionary depends on it.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    parts = cast_parts(parts, x)
    x, unit = _normalise(x, parts["normalisation"])
    if parts["time"]:
        x = _modulate(x, level, parts["time"])
    if parts["centred"]:
        x = x - parts["decoder_bias"]
    tokens = x.reshape(-1, x.shape[-1]).split(max(1, LARGEST // len(parts["encoder_bias"])))
    found = torch.cat([_activate(parts, some) for some in tokens])
    return found.reshape(*x.shape[:-1], -1), 1.0 if parts["transcoder"] else unit


def cast_parts(parts: Parts, like: Tensor) -> Parts:
    """The same parts with the device and type of a tensor."""
    moved: Any = dict(parts)
    moved |= {name: value.to(like) for name, value in moved.items() if _is_number(value)}
    return {**moved, "time": {name: value.to(like) for name, value in parts["time"].items()}}


def place_parts(parts: Parts, key: str, device: torch.device, kept: dict[Any, Any]) -> Parts:
    """The same parts in float32 on the device of a run, where they stay.

    parts, key: what is to be there, and its name.
    device: of the run.
    kept: what was sent before.
    """
    if (key, device) not in kept:
        there = {name: send(value, device) if isinstance(value, Tensor) else value for name, value in parts.items()}
        there["time"] = {name: send(value, device) for name, value in parts["time"].items()}
        kept[key, device] = cast_parts(cast("Parts", there), torch.empty((), device=device))
    return kept[key, device]


def find_level(arguments: tuple[tuple, dict], rule: TimeRule) -> Any:
    """The noise level of a forward pass as a tensor, which nothing waits for. arguments: of the pass."""
    time = pick_time(argument(arguments, rule["argument"], rule["position"]), rule)
    return rule["offset"] + rule["scale"] * (time.float() if isinstance(time, Tensor) else time)


def _is_number(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _normalise(x: Tensor, how: str) -> tuple[Tensor, Tensor | float]:
    """What is encoded, and what the decoded is multiplied by: SAELens' ``normalize_activations``."""
    if how == "layer_norm":
        centred = x - x.mean(-1, keepdim=True)
        deviation = centred.std(-1, keepdim=True)
        return centred / (deviation + TINY), deviation
    if how == "constant_norm_rescale":
        unit = x.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny) / x.shape[-1] ** 0.5
        return x / unit, unit
    return x, 1.0


def _activate(parts: Parts, x: Tensor) -> Tensor:
    """Activations [token, f] of the chosen features. x: [token, d]."""
    before = x @ parts["encoder"] + parts["encoder_bias"]
    if (k := parts["k"]) is not None:
        strongest = before.topk(k, dim=-1)
        sparse = torch.zeros_like(before).scatter_(-1, strongest.indices, strongest.values.relu())
        return sparse[:, parts["chosen"]]
    active = before.relu()
    threshold = parts["threshold"]
    return active if threshold is None else torch.where(before > threshold, active, 0)


def _modulate(x: Tensor, level: Any, time: dict[str, Tensor]) -> Tensor:
    """X (1 + scale) + shift, both computed from the noise level: DifFRACT (arXiv 2606.15796).

    The level becomes sines and cosines (DDPM, arXiv 2006.11239), which pass through two layers and a third.
    """
    size = time["first.weight"].shape[1]
    steps = torch.arange(size // 2, device=x.device, dtype=torch.float32)
    angles = torch.as_tensor(level, device=x.device, dtype=torch.float32) * torch.exp(
        -math.log(PERIOD) * steps / (size // 2 - 1)
    )
    waves = torch.cat([angles.sin(), angles.cos()]).to(x)
    hidden = silu(linear(waves, time["first.weight"], time["first.bias"]))
    hidden = silu(linear(hidden, time["second.weight"], time["second.bias"]))
    scale, shift = linear(hidden, time["last.weight"], time["last.bias"]).chunk(2)
    return x * (1 + scale) + shift
