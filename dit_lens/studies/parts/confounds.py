"""Edits that answer objections to zeroing massive channels: the size of the change, and the next norm.

Tensors are [row, token, channel]; ``top`` are the channels that would be zeroed. The functions are pure; the ops that
carry them out remember, within one forward pass, what they did at the site before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dit_lens.core.request.ops import Apply

if TYPE_CHECKING:
    from dit_lens.core.request.ops import Steps


def fill_top(x: Tensor, top: Sequence[int], seed: int = 0) -> Tensor:
    """Replaces the top channels by a fixed pattern with their own mean and variance, token by token.

    >>> x = torch.tensor([[[9.0, -3.0, 6.0, 4.0, 1.0]]])
    >>> new = fill_top(x, [0, 1, 2, 3])
    >>> new[..., 4].item(), torch.allclose(new.mean(), x.mean()), torch.allclose(new.square().mean(), x.square().mean())
    (1.0, True, True)

    A norm after it (LayerNorm or RMSNorm) sees the same statistics as before, so the other channels leave it unchanged.
    Two numbers per token remain of the top channels; with two channels that is nearly all, so take more.

    x: [row, token, channel].
    top: the channels that would be zeroed.
    seed: seed of the pattern.
    """
    old = x[..., list(top)].float()
    mean, spread = old.mean(-1, keepdim=True), old.std(-1, keepdim=True, correction=0)
    pattern = torch.linspace(-1, 1, len(top), dtype=torch.float32)
    pattern = pattern[torch.randperm(len(top), generator=torch.Generator().manual_seed(seed))]
    pattern = pattern / pattern.square().mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    new = x.clone()
    new[..., list(top)] = (mean + spread * pattern.to(x.device)).to(x.dtype)
    return new


def attenuate(x: Tensor, top: Sequence[int], size: Tensor) -> Tensor:
    """Scales the top channels by one factor, so that all tokens together move by a size; they are zeroed at most.

    >>> attenuate(torch.tensor([[[4.0, 3.0, 1.0]]]), [0, 1], torch.tensor([2.5]))[0, 0].tolist()
    [2.0, 1.5, 1.0]

    x: [row, token, channel].
    top: the channels that are scaled.
    size: the root of the summed squares by which each row moves, [row].
    """
    held = torch.linalg.vector_norm(x[..., list(top)].float(), dim=(-2, -1))
    factor = 1 - torch.where(held > 0, size / held, 0).clamp_max(1)
    new = x.clone()
    new[..., list(top)] = (x[..., list(top)] * factor[..., None, None]).to(x.dtype)
    return new


def make_push(x: Tensor, top: Sequence[int], seed: int = 0) -> Tensor:
    """A push for every token: in one random direction, as far as zeroing the top channels would move the token.

    >>> shift = make_push(torch.tensor([[[3.0, 4.0, 1.0, 0.0]]]), [0, 1])
    >>> round(shift.norm().item(), 4)
    5.0

    x: [row, token, channel].
    top: the channels that would be zeroed.
    seed: seed of the direction.
    """
    direction = torch.randn(x.shape[-1], generator=torch.Generator().manual_seed(seed)).to(x.device)
    size = torch.linalg.vector_norm(x[..., list(top)].float(), dim=-1, keepdim=True)
    return (size * direction / direction.norm()).to(x.dtype)


def make_attenuated_ops(
    channels: Mapping[str, Sequence[int]], others: Mapping[str, Sequence[int]], row: int, steps: Steps
) -> list[Apply]:
    """Keeps the top channels as much smaller as moves tokens as far as zeroing others would: see :func:`attenuate`.

    What zeroing takes from a channel at one site is lost at later ones, also where these zero other channels.

    channels: site -> channels that are scaled.
    others: site -> channels that would be zeroed.
    row: row of the batch that is edited.
    steps: denoising steps.
    """
    return [op for part in split_streams(channels) for op in _make_attenuated_ops(part, others, row, steps)]


def _make_attenuated_ops(
    channels: Mapping[str, Sequence[int]], others: Mapping[str, Sequence[int]], row: int, steps: Steps
) -> list[Apply]:
    first = next(iter(channels))
    lost: dict[str, Tensor] = {}  # by branch: what zeroing the others would have taken from tokens so far

    def shift(x: Tensor, hook: Any) -> Tensor:
        loss = torch.zeros_like(x) if hook.name == first else lost[hook.branch].clone()
        loss[..., list(others[hook.name])] = x[..., list(others[hook.name])]
        lost[hook.branch] = loss
        return attenuate(x, channels[hook.name], torch.linalg.vector_norm(loss.float(), dim=(-2, -1))) - x

    return make_shift_ops(channels, row, steps, shift)


def make_fill_ops(channels: Mapping[str, Sequence[int]], row: int, seed: int, steps: Steps) -> list[Apply]:
    """Zeroing with the norm's statistics kept: see :func:`fill_top`.

    channels: site -> channels that would be zeroed.
    row: row of the batch that is edited.
    seed: seed of the pattern.
    steps: denoising steps.
    """
    return make_shift_ops(channels, row, steps, lambda x, hook: fill_top(x, channels[hook.name], seed) - x)


def make_push_ops(channels: Mapping[str, Sequence[int]], row: int, seed: int, steps: Steps) -> list[Apply]:
    """Keeps every token as far from where it would be as zeroing would, in a random direction: see :func:`make_push`.

    channels: site -> channels that would be zeroed.
    row: row of the batch that is edited.
    seed: seed of the direction.
    steps: denoising steps.
    """
    return make_shift_ops(channels, row, steps, lambda x, hook: make_push(x, channels[hook.name], seed))


def make_shift_ops(
    channels: Mapping[str, Sequence[int]], row: int, steps: Steps, shift: Callable[[Tensor, Any], Tensor]
) -> list[Apply]:
    """Keeps every token away from where it would be, by a shift that is made anew at each site.

    Blocks pass on what they receive, so each site takes back the shift of the site before. Else shifts pile up: scaling
    by f at each of n blocks leaves f^n of what entered the first.

    channels: site -> channels, of which the sites count.
    row: row of the batch that is edited.
    steps: denoising steps.
    shift: (where tokens would be [row, token, channel], hook) -> by how much they are moved.
    """
    return [op for part in split_streams(channels) for op in _make_shift_ops(part, row, steps, shift)]


def _make_shift_ops(
    channels: Mapping[str, Sequence[int]], row: int, steps: Steps, shift: Callable[[Tensor, Any], Tensor]
) -> list[Apply]:
    first = next(iter(channels))
    shifts: dict[str, Tensor] = {}  # by branch, since branches take turns within a site

    def move(x: Tensor, hook: Any) -> Tensor:
        if hook.name != first:
            x = x - shifts[hook.branch]
        shifts[hook.branch] = shift(x, hook)
        return x + shifts[hook.branch]

    return [Apply(site, rows=row, steps=steps, fn=move) for site in channels]


def split_streams(channels: Mapping[str, Sequence[int]]) -> list[dict[str, Sequence[int]]]:
    """The channels of image and text sites apart: their tokens are others, and so is what is remembered of them.

    channels: site -> channels.
    """
    names = dict.fromkeys(site.split(".")[2] for site in channels)
    return [{site: top for site, top in channels.items() if site.split(".")[2] == name} for name in names]
