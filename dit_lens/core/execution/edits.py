"""What each kind of edit makes of the elements it chose. Torch only: it travels to a server by source."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from dit_lens.families.layout import (
    PlanMismatchError,
)


def new_values(
    old: Tensor, stream: Tensor, action: dict[str, Any], hook: SimpleNamespace, given: dict[str, Any], indices: dict
) -> Tensor | None:
    """What an action makes of the elements it chose; None leaves them as they are."""
    kind = action["kind"]
    if kind == "Zero":
        return torch.zeros_like(old)
    if kind == "Scale":
        return old * action["factor"]
    if kind == "Add":
        return old + given[action["key"]].to(old)
    if kind == "Put":
        return put(old, action, given[action["key"]])
    if kind == "CopyRow":
        return copy_row(old, stream, action, indices)
    if kind == "TokenMean":
        return token_mean(old, action["keep"])
    if kind == "Apply":
        return apply(old, given[action["key"]], hook)
    raise PlanMismatchError(f"unknown edit {kind!r}")


def put(old: Tensor, action: dict[str, Any], source: Tensor) -> Tensor:
    """Elements of a given tensor [step, row, token, channel], whose axes of size 1 stand for all."""
    source = source[min(action["at"], source.shape[0] - 1)]
    source = source if source.shape[0] == 1 else source[action["source_rows"]]
    return source.to(old).expand_as(old)


def copy_row(old: Tensor, stream: Tensor, action: dict[str, Any], indices: dict) -> Tensor:
    """The same tokens and channels of another row of the batch."""
    where = index(stream, action["source_rows"], action["tokens"], action["channels"], indices)
    return stream[where].expand_as(old).clone()


def token_mean(old: Tensor, keep: str) -> Tensor:
    """Each channel's mean over the chosen tokens, or what is left without it."""
    mean = old.mean(1, keepdim=True, dtype=torch.float32).to(old.dtype)
    return mean.expand_as(old) if keep == "mean" else old - mean


def apply(old: Tensor, fn: Any, hook: SimpleNamespace) -> Tensor | None:
    """What a function of the user's makes of a copy."""
    new = fn(old.clone(), hook)
    if new is None:
        return None
    if tuple(new.shape) != tuple(old.shape):
        raise PlanMismatchError(
            f"the function applied at {hook.name} returned shape {list(new.shape)} for {list(old.shape)}"
        )
    return new.to(old)


def index(
    x: Tensor, rows: list[int] | None, tokens: list[int] | None, channels: list[int] | None, indices: dict
) -> tuple:
    """An outer index over [row, token, channel]; None means all of an axis. Index tensors are made once per device."""
    lists = [rows, tokens, channels]
    if sum(chosen is not None for chosen in lists) <= 1:
        return tuple(slice(None) if chosen is None else on_device(chosen, x, indices) for chosen in lists)
    whole = [range(size) if chosen is None else chosen for chosen, size in zip(lists, x.shape, strict=True)]
    r, t, c = (on_device(chosen, x, indices) for chosen in whole)
    return r[:, None, None], t[None, :, None], c[None, None, :]


def on_device(chosen: list[int] | range, x: Tensor, indices: dict) -> Tensor:
    """Chosen indices as a tensor on the device of ``x``."""
    key = (chosen if isinstance(chosen, range) else id(chosen), x.device)
    if key not in indices:
        indices[key] = torch.as_tensor(list(chosen), dtype=torch.long, device=x.device)
    return indices[key]
