"""Tensors that are computed from those a module gives. Torch only: it travels to a server by source."""

from __future__ import annotations

from math import prod
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from dit_lens.families.layout import (
    closed,
    fetch,
    opened,
    packed,
    regrouped,
    replaced,
    stream_of,
)


def gate_of(value: Tensor, part: dict[str, Any], module: Any) -> Tensor:
    """What a tensor is multiplied by before it is added to the residual: [row, 1 or token, channel]."""
    if part["table"] is not None:
        name, number = part["table"]
        table = getattr(module, name)
        table = table.reshape(-1, table.shape[-1])
        value = value.reshape(len(value), len(table), -1)[:, number : number + 1] + table[number]
    value = value.unsqueeze(1) if value.ndim == 2 else value
    if part["span"] is not None:
        value = value[..., part["span"][0] : part["span"][1]]
    return value.tanh() if part["tanh"] else value


def half_of(module: Any, tensor: Tensor, part: dict[str, Any]) -> Tensor:
    """What a linear module makes of some channels of its input alone; its bias counts with the last of them."""
    start, stop = part["half"]
    alone = torch.zeros_like(tensor)
    alone[..., start:stop] = tensor[..., start:stop]
    made = module(alone)
    return made if stop is None else made - module(torch.zeros_like(tensor[:1, :1]))


def read_out(
    model: Any,
    envoy: Any,
    inputs: tuple[tuple, dict],
    part: dict[str, Any],
    held: dict[str, Tensor],
    image: SimpleNamespace,
    rule: dict[str, Any],
) -> Tensor:
    """What the model would predict if a block were its last: the final norm and projection of the block's tokens.

    Calling nnsight's envoys runs their modules outside the order of the trace.
    """
    entering = fetch(inputs, "input", part)
    tokens = opened(entering, part).clone()
    rows = range(len(tokens))
    target, place = stream_of(tokens, part, image, rows)
    if place is None:
        target.copy_(held[part["readout"]])
    else:
        tokens[place] = held[part["readout"]]
    args, kwargs = replaced(inputs, "input", part, closed(tokens, entering, part))
    x = envoy(*args, **kwargs)
    modules = [model.get(module) for module in rule["modules"]]
    if rule["told"]:
        x = modules.pop(0)(x, temb=held["shift"].squeeze(1))
    elif "shift" in held:
        shift, scale = shift_of(model, held["shift"], rule)
        x = (x * (1 + scale) + shift).to(held[part["readout"]].dtype)
    for module in modules:
        x = module(x)
    x = x if isinstance(x, Tensor) else x[0]
    if x.ndim != 3:  # a module that puts the image together itself
        return packed(x, rule["axes"], rule["patch"])
    x = stream_of(x.transpose(0, 1) if part["turned"] else x, part, image, rows)[0]
    if rule["order"] == "yxc":
        x = regrouped(x, prod(rule["patch"]))
    return x


def shift_of(model: Any, value: Tensor, rule: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Shift and scale that the transformer applies itself, [row, 1 or token, channel] each."""
    if rule["table"] is not None:
        table = getattr(model.get("transformer"), rule["table"])
        return (table.reshape(2, 1, 1, -1) + value).unbind(0)
    both = model.get(rule["projection"])(torch.nn.functional.silu(value))
    return both.chunk(2, dim=-1)
