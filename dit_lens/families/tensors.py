"""Tensors that are computed from those a module gives. Torch only: it travels to a server by source."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dit_lens.families.layout import (
    PlanMismatchError,
    from_tokens,
    pack,
    regroup,
    replace_tensor,
    select_stream,
    select_tensor,
    to_tokens,
    write_back,
)
from dit_lens.families.transfers import send

if TYPE_CHECKING:
    from dit_lens.families.locations import ImageTokens, Location, ReadoutRule

COLUMNS = 251  # sums that are made of a tensor's bits


def sum_bits(tensor: Tensor) -> Tensor:
    """Sums of every 251st element, as integers: a prime, so that exchanged rows or columns fall into other sums."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}
    bits = tensor.contiguous().flatten().view(integers[tensor.element_size()])
    whole = bits.numel() // COLUMNS * COLUMNS
    return torch.cat([bits[:whole].view(-1, COLUMNS).sum(0, dtype=torch.int64), bits[whole:].long()])


def compute_gate(value: Tensor, location: Location, module: Any) -> Tensor:
    """What a tensor is multiplied by before it is added to the residual: [row, 1 or token, channel].

    Where the gate is a sum of a parameter and the time embedding (PixArt's ``scale_shift_table``), both are added up
    here as the block does it.
    """
    if location["table"] is not None:
        name, number = location["table"]
        table = getattr(module, name)
        table = table.reshape(-1, table.shape[-1])
        # [row, part, channel], or of each token where tokens have times of their own
        value = value.reshape(len(value), -1, *table.shape)[:, :, number] + table[number].to(value.device)
    value = value.unsqueeze(1) if value.ndim == 2 else value
    if location["span"] is not None:
        value = value[..., location["span"][0] : location["span"][1]]
    return value.tanh() if location["tanh"] else value


def apply_to_part(module: Any, tensor: Tensor, location: Location) -> Tensor:
    """Applies a linear module to some channels of its input alone; its bias counts with the last of them.

    W [a, b] + bias = (W [a, 0]) + (W [0, b] + bias), so that the parts add up to what the module writes.
    """
    start, stop = location["half"] or (0, None)
    alone = torch.zeros_like(tensor)
    alone[..., start:stop] = tensor[..., start:stop]
    made = module(alone)
    return made if stop is None else made - module(torch.zeros_like(tensor[:1, :1]))


def read_out(
    model: Any,
    envoy: Any,
    inputs: tuple[tuple, dict],
    location: Location,
    tokens: Tensor,
    conditioning: Tensor | None,
    image: ImageTokens,
    rule: ReadoutRule,
) -> Tensor:
    """What the model would predict if a block were its last: the final norm and projection of the block's tokens.

    Calling nnsight's envoys runs their modules outside the order of the trace.

    model: ``get(path)`` gives a module of the pipeline.
    envoy: the final norm.
    inputs: the arguments it is called with in this forward pass.
    location: where image tokens lie in them.
    tokens: those to read out, [row, token, channel].
    conditioning: what shift and scale after the norm are made from, where no module applies them.
    image: where image tokens are in this forward pass.
    rule: what follows the norm.
    """
    entering = select_tensor(inputs, "input", location)
    replaced = to_tokens(entering, location).clone()
    rows = range(len(replaced))
    target, index = select_stream(replaced, location, image, rows)
    if index is None:
        target.copy_(tokens)
    else:
        write_back(replaced, tokens, index)
    args, kwargs = replace_tensor(inputs, "input", location, from_tokens(replaced, entering, location))
    x = envoy(*args, **kwargs)
    modules = [model.get(module) for module in rule["modules"]]
    if rule["passes_temb"]:
        if conditioning is None:
            raise PlanMismatchError("the first module after the final norm is to be given what nothing was kept of")
        x = modules.pop(0)(x, temb=conditioning.squeeze(1))
    elif conditioning is not None:
        shift, scale = final_shift_and_scale(model, conditioning, rule)
        x = (x * (1 + scale) + shift).to(tokens.dtype)
    for module in modules:
        x = module(x)
    x = x if isinstance(x, Tensor) else x[0]
    if x.ndim != 3:  # a module that puts the image together itself
        return pack(x, rule["axes"], rule["patch"])
    x = select_stream(x.transpose(0, 1) if location["sequence_first"] else x, location, image, rows)[0]
    if rule["order"] == "yxc":
        x = regroup(x, prod(rule["patch"]))
    return x


def final_shift_and_scale(model: Any, value: Tensor, rule: ReadoutRule) -> tuple[Tensor, Tensor]:
    """Shift and scale that the transformer applies itself, [row, 1 or token, channel] each."""
    if rule["table"] is not None:
        table = getattr(model.get("transformer"), rule["table"])
        return (table.reshape(2, 1, 1, -1).to(value.device) + value).unbind(0)
    both = model.get(rule["projection"])(torch.nn.functional.silu(value))
    return both.chunk(2, dim=-1)


def take(
    x: Tensor, rows: list[int] | None, tokens: list[int] | None, channels: list[int] | None, indices: dict
) -> Tensor:
    """The chosen elements of [row, token, channel]; None means all of an axis, and of every axis the tensor itself.

    x: the tensor.
    rows, tokens, channels: indices into its axes.
    indices: index tensors that were made before, by device.
    """
    chosen = [(axis, some) for axis, some in enumerate((rows, tokens, channels)) if some is not None]
    if not chosen:
        return x
    if len(chosen) == 1 and x.is_contiguous():  # twice as fast; of another layout the result would have another
        axis, some = chosen[0]
        return x.index_select(axis, index_tensor(some, x, indices))
    return x[outer_index(x, rows, tokens, channels, indices)]


def put_back(
    x: Tensor,
    new: Tensor,
    rows: list[int] | None,
    tokens: list[int] | None,
    channels: list[int] | None,
    indices: dict,
) -> None:
    """Writes ``new`` to the elements that :func:`take` gives of ``x``, whose other arguments are the same."""
    chosen = [(axis, some) for axis, some in enumerate((rows, tokens, channels)) if some is not None]
    if not chosen:
        x.copy_(new)
    elif len(chosen) == 1:
        axis, some = chosen[0]
        x.index_copy_(axis, index_tensor(some, x, indices), new)
    else:
        x[outer_index(x, rows, tokens, channels, indices)] = new


def outer_index(
    x: Tensor, rows: list[int] | None, tokens: list[int] | None, channels: list[int] | None, indices: dict
) -> tuple:
    """An outer index over [row, token, channel]; None means all of an axis.

    indices: index tensors that were made before, by device; each is made once in a run.

    x: the tensor.
    rows, tokens, channels: indices into its axes.
    """
    lists = [rows, tokens, channels]
    if sum(chosen is not None for chosen in lists) <= 1:
        return tuple(slice(None) if chosen is None else index_tensor(chosen, x, indices) for chosen in lists)
    whole = [range(size) if chosen is None else chosen for chosen, size in zip(lists, x.shape, strict=True)]
    r, t, c = (index_tensor(chosen, x, indices) for chosen in whole)
    return r[:, None, None], t[None, :, None], c[None, None, :]


def index_tensor(chosen: list[int] | range, x: Tensor, indices: dict) -> Tensor:
    """Chosen indices as a tensor on the device of ``x``."""
    key = (chosen if isinstance(chosen, range) else id(chosen), x.device)
    if key not in indices:  # the list is kept too, so that no other one comes to lie in its place
        indices[key] = (send(torch.as_tensor(list(chosen), dtype=torch.long), x.device), chosen)
    return indices[key][0]
