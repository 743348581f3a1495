"""Tensors that are computed from those a module gives. Torch only: it travels to a server by source."""

from __future__ import annotations

from math import prod
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from dit_lens.families.layout import (
    from_tokens,
    pack,
    regroup,
    replace_tensor,
    select_stream,
    select_tensor,
    to_tokens,
)


def compute_gate(value: Tensor, part: dict[str, Any], module: Any) -> Tensor:
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


def apply_to_part(module: Any, tensor: Tensor, part: dict[str, Any]) -> Tensor:
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
    entering = select_tensor(inputs, "input", part)
    tokens = to_tokens(entering, part).clone()
    rows = range(len(tokens))
    target, place = select_stream(tokens, part, image, rows)
    if place is None:
        target.copy_(held[part["readout"]])
    else:
        tokens[place] = held[part["readout"]]
    args, kwargs = replace_tensor(inputs, "input", part, from_tokens(tokens, entering, part))
    x = envoy(*args, **kwargs)
    modules = [model.get(module) for module in rule["modules"]]
    if rule["passes_temb"]:
        x = modules.pop(0)(x, temb=held["shift"].squeeze(1))
    elif "shift" in held:
        shift, scale = final_shift_and_scale(model, held["shift"], rule)
        x = (x * (1 + scale) + shift).to(held[part["readout"]].dtype)
    for module in modules:
        x = module(x)
    x = x if isinstance(x, Tensor) else x[0]
    if x.ndim != 3:  # a module that puts the image together itself
        return pack(x, rule["axes"], rule["patch"])
    x = select_stream(x.transpose(0, 1) if part["sequence_first"] else x, part, image, rows)[0]
    if rule["order"] == "yxc":
        x = regroup(x, prod(rule["patch"]))
    return x


def final_shift_and_scale(model: Any, value: Tensor, rule: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Shift and scale that the transformer applies itself, [row, 1 or token, channel] each."""
    if rule["table"] is not None:
        table = getattr(model.get("transformer"), rule["table"])
        return (table.reshape(2, 1, 1, -1) + value).unbind(0)
    both = model.get(rule["projection"])(torch.nn.functional.silu(value))
    return both.chunk(2, dim=-1)
