"""Edits that answer two objections to zeroing massive channels: the next norm, and the size of the change.

Tensors are [row, token, channel]; ``top`` are the channels that would be zeroed. The functions are pure; the ops that
carry them out remember, within one forward pass, what they did at the site before.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
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


def raise_others(x: Tensor, top: Sequence[int]) -> Tensor:
    """Raises all channels but the top, as much as the next norm raises them when the top are zeroed.

    >>> raise_others(torch.tensor([[[4.0, 3.0, 0.0]]]), [0])[0, 0].tolist()
    [4.0, 5.0, 0.0]

    The factor of a token is its norm over the norm of what the zeroing leaves: that of RMSNorm, and of LayerNorm but
    for the shift of its mean. The norm that reads the result takes part of it back, since the top are still there and
    all it gives out has one length: with a share s of the energy in the top, the others come out 1 / sqrt(1 - s^2)
    times as large as without an edit and the top 1 / sqrt(1 + s) times; zeroing makes it 1 / sqrt(1 - s) for the
    others. No input of a norm does more while it keeps the top.
    """
    rest = x.float().clone()
    rest[..., list(top)] = 0
    whole, left = (torch.linalg.vector_norm(part.float(), dim=-1, keepdim=True) for part in (x, rest))
    new = (x * torch.where(left > 0, whole / left, 1)).to(x.dtype)
    new[..., list(top)] = x[..., list(top)]
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


def make_fill_ops(channels: Mapping[str, Sequence[int]], row: int, seed: int, steps: Steps) -> list[Apply]:
    """Zeroing with the norm's statistics kept: see :func:`fill_top`.

    channels: site -> channels that would be zeroed.
    row: row of the batch that is edited.
    seed: seed of the pattern.
    steps: denoising steps.
    """
    return [
        Apply(site, rows=row, steps=steps, fn=lambda x, _, top=top: fill_top(x, top, seed))
        for site, top in channels.items()
    ]


def make_push_ops(channels: Mapping[str, Sequence[int]], row: int, seed: int, steps: Steps) -> list[Apply]:
    """Keeps every token as far from where it would be as zeroing would, in a random direction: see :func:`make_push`.

    Blocks pass on what they receive, so each site takes back the push of the site before.

    channels: site -> channels that would be zeroed.
    row: row of the batch that is edited.
    seed: seed of the direction.
    steps: denoising steps.
    """
    return [op for part in _split_streams(channels) for op in _make_push_ops(part, row, seed, steps)]


def _make_push_ops(channels: Mapping[str, Sequence[int]], row: int, seed: int, steps: Steps) -> list[Apply]:
    first = next(iter(channels))
    pushes: dict[str, Tensor] = {}  # by branch, since branches take turns within a site

    def push(x: Tensor, hook: Any) -> Tensor:
        if hook.name != first:
            x = x - pushes[hook.branch]
        pushes[hook.branch] = make_push(x, channels[hook.name], seed)
        return x + pushes[hook.branch]

    return [Apply(site, rows=row, steps=steps, fn=push) for site in channels]


def make_raise_ops(
    channels: Mapping[str, Sequence[int]], row: int, steps: Steps, sites: Collection[str]
) -> list[Apply]:
    """What reads a site sees the others raised as zeroing would raise them, and the top kept: see :func:`raise_others`.

    The residual stream itself stays: a block's output is given without what its input was raised by, so that factors
    do not pile up from block to block.

    channels: site -> channels that would be zeroed.
    row: row of the batch that is edited.
    steps: denoising steps.
    sites: names of the model's sites; the next block's input and the final norm's are edited.
    """
    return [op for part in _split_streams(channels) for op in _make_raise_ops(part, row, steps, sites)]


def _make_raise_ops(
    channels: Mapping[str, Sequence[int]], row: int, steps: Steps, sites: Collection[str]
) -> list[Apply]:
    raised: dict[str, Tensor] = {}  # by branch
    ops = []
    for site, top in channels.items():

        def lift(x: Tensor, hook: Any, top: Sequence[int] = top) -> Tensor:
            new = raise_others(x, top)
            raised[hook.branch] = new - x
            return new

        def lower(x: Tensor, hook: Any) -> Tensor:
            return x - raised[hook.branch]

        reader, after = find_reader(site, sites)
        if reader:
            ops.append(Apply(reader, rows=row, steps=steps, fn=lift))
        if after:
            ops.append(Apply(after, rows=row, steps=steps, fn=lower))
    return ops


def _split_streams(channels: Mapping[str, Sequence[int]]) -> list[dict[str, Sequence[int]]]:
    """The channels of image and text sites apart: their tokens are others, and so is what is remembered of them."""
    names = dict.fromkeys(site.split(".")[2] for site in channels)
    return [{site: top for site, top in channels.items() if site.split(".")[2] == name} for name in names]


def find_reader(site: str, sites: Collection[str]) -> tuple[str | None, str | None]:
    """What reads a block's output, and where that is passed on: the next block with the stream, or the final norm.

    The last block's text is read by nothing.
    """
    _, block, stream = site.split(".")
    later = (other.split(".") for other in sites if other.endswith(f".{stream}.resid_pre"))
    if number := min((int(other[1]) for other in later if int(other[1]) > int(block)), default=None):
        return f"blocks.{number}.{stream}.resid_pre", f"blocks.{number}.{stream}"
    return (f"final.{stream}", None) if f"final.{stream}" in sites else (None, None)
