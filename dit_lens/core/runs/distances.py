"""How far apart what two runs have read is: by the numbers of steps, branches, rows, tokens and channels."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import torch

from dit_lens.families.sites import Site

if TYPE_CHECKING:
    from torch import Tensor

    from dit_lens.core.runs.reading import Reading

Pair: TypeAlias = "tuple[Tensor, Tensor]"  # what both runs have read of one row and branch

MOST_TOLD = 8  # numbers in a reason
SELECTIONS = ("steps", "branches", "both", "rows", "tokens", "shape_of_grid")


class _Uncomparable(Exception):  # noqa: N818 not an error: why two reads are left apart
    pass


def relative_distance(one: Tensor, two: Tensor) -> float:
    """|one - two| / |one|, which is 0 only where they are equal."""
    if torch.equal(one, two):
        return 0.0
    one, two = one.double(), two.double()
    return max(float((one - two).norm() / one.norm().clamp_min(1e-30)), sys.float_info.min)


def read_distances(a: Sequence[Reading], b: Sequence[Reading]) -> tuple[dict[str, float], dict[str, str]]:
    """For every read, as "name/site" or "site", the relative L2 distance, and what is not compared and why.

    a, b: the reads of two runs.
    """
    ours, theirs = ({(read.name, site): read for read in reads for site in read.tensors} for reads in (a, b))
    distances, odd = {}, {}
    for name, site in dict.fromkeys([*ours, *theirs]):
        key, (one, other) = f"{name}/{site}".lstrip("/"), (ours.get((name, site)), theirs.get((name, site)))
        if one is None or other is None:
            odd[key] = f"only {'the second' if one is None else 'the first'} run has read it"
            continue
        try:
            distances[key], told = _compare(one, other, site)
        except _Uncomparable as why:
            told = [str(why)]
        if told:
            odd[key] = "; ".join(told)
    return distances, odd


def _compare(a: Reading, b: Reading, site: str) -> tuple[float, list[str]]:
    """How far two reads of a site are apart, and which numbers only one of them has."""
    if a.reduce != b.reduce:
        raise _Uncomparable(f"read with reduce={a.reduce!r} and with reduce={b.reduce!r}")
    if a.total_steps != b.total_steps:
        raise _Uncomparable(f"{a.total_steps} steps and {b.total_steps}, which are at other noise levels")
    one, two = a.tensors[site], b.tensors[site]
    if all(getattr(a, name) == getattr(b, name) for name in SELECTIONS) and (
        a.channels[site] == b.channels[site] and one.shape == two.shape and _same_masks(a, b, site)
    ):
        return _distance_of_equals(a, one, two), []
    if a.is_ranked:
        raise _Uncomparable("ranks of channels are compared only where both reads are of the same")
    told: list[str] = []
    steps = _common(a.steps, b.steps, "steps", told)
    rows = _common(a.rows, b.rows, "rows", told)
    branches = _common(a.branches, b.branches, "branches", told)
    ours, theirs = a.by_branch(site), b.by_branch(site)
    axis = -1 if a.reduce is None else 1  # of one row and branch, [step, token, channel] or [step, channel, ...]
    channels = _common(_numbers(a, site, axis), _numbers(b, site, axis), "channels", told)
    pairs = []
    for branch in branches:
        for row in rows:
            pair = (_row_of(a, ours, branch, row), _row_of(b, theirs, branch, row))
            tokens = _common_tokens((a, b), pair, site, (branch, row), told)
            pairs.append(
                tuple(
                    _take(value, tokens[i], [_numbers(read, site, axis).index(one) for one in channels], axis)[
                        [read.steps.index(step) for step in steps]
                    ]
                    for i, (read, value) in enumerate(zip((a, b), pair, strict=True))
                )
            )
    if any(one.shape != two.shape for one, two in pairs):
        raise _Uncomparable(f"shapes {list(one.shape)} and {list(two.shape)}")
    flat = [torch.cat([pair[i].flatten() for pair in pairs]) for i in (0, 1)]
    if not flat[0].numel():
        raise _Uncomparable("they have no token in common")
    return relative_distance(*flat), list(dict.fromkeys(told))


def _distance_of_equals(read: Reading, one: Tensor, two: Tensor) -> float:
    """The distance of two reads of the same numbers."""
    if read.is_ranked and not torch.equal(one, two):
        raise _Uncomparable("other channels are the largest, or in another order; ranks have no distance")
    return relative_distance(one, two)


def _same_masks(a: Reading, b: Reading, site: str) -> bool:
    one, two = a.masks.get(site), b.masks.get(site)
    return (one is None and two is None) or (one is not None and two is not None and torch.equal(one, two))


def _common(one: Sequence, two: Sequence, what: str, told: list[str]) -> list:
    """The numbers that both have. told: receives which only one has."""
    shared = [number for number in one if number in set(two)]
    text = f"{what} {_some(one)} and {_some(two)}"
    if not shared:
        raise _Uncomparable(f"{text} have none in common")
    if len(shared) < max(len(one), len(two)):
        told.append(f"{text} share only {_some(shared)}")
    return shared


def _some(numbers: Sequence) -> str:
    if len(numbers) > 2 and list(numbers) == list(range(len(numbers))):
        return f"0 to {len(numbers) - 1}"
    return ", ".join(map(str, numbers[:MOST_TOLD])) + (" ..." if len(numbers) > MOST_TOLD else "")


def _numbers(read: Reading, site: str, axis: int) -> list[int]:
    """The channels of a read; axis: theirs, of one row and branch."""
    kept = read.channels[site]
    value = read.tensors[site]
    return list(range(value.shape[-1 if axis == -1 else 2 + read.both])) if kept is None else list(kept)


def _row_of(read: Reading, of_branches: dict, branch: str, row: int) -> Tensor:
    """[step, token, channel] of one row and branch, or [step, channel, ...] after a reduction."""
    return of_branches[branch][:, read.rows.index(row)]


def _take(value: Tensor, tokens: list[int] | None, channels: list[int], axis: int) -> Tensor:
    value = value if tokens is None else value[:, tokens]
    return value.index_select(axis, torch.tensor(channels, dtype=torch.long))


def _common_tokens(
    reads: tuple[Reading, Reading], pair: Pair, site: str, where: tuple[str, int], told: list[str]
) -> tuple[list[int] | None, list[int] | None]:
    """The positions of the tokens that both reads have as data in one row and branch; None for all, where reduced.

    where: the branch and row.
    told: receives which only one has.
    """
    named = [_tokens_of(read, *where) for read in reads]
    if reads[0].reduce is not None:
        if named[0] != named[1] and (None in named or sorted(named[0] or ()) != sorted(named[1] or ())):
            raise _Uncomparable("they are reduced over other tokens")
        return None, None
    if Site.parse(site).is_image and reads[0].shape_of_grid != reads[1].shape_of_grid:
        raise _Uncomparable(f"token grids {reads[0].shape_of_grid} and {reads[1].shape_of_grid}")
    if named == [None, None] and pair[0].shape[1] != pair[1].shape[1]:
        raise _Uncomparable(f"{pair[0].shape[1]} tokens and {pair[1].shape[1]}")
    numbers = [list(range(value.shape[1])) if some is None else some for some, value in zip(named, pair, strict=True)]
    held = []
    for read, some in zip(reads, numbers, strict=True):
        mask = _mask_of(read, site, *where)
        held.append([token for i, token in enumerate(some) if mask is None or mask[i]])
    shared = [token for token in held[0] if token in set(held[1])]
    if len(shared) < max(map(len, held)):
        told.append(f"tokens {_some(held[0])} and {_some(held[1])} share only {_some(shared) or 'none'}")
    ours, theirs = ([some.index(token) for token in shared] for some in numbers)
    return ours, theirs


def _tokens_of(read: Reading, branch: str, row: int) -> list[int] | None:
    tokens = read.tokens[branch][read.rows.index(row)] if isinstance(read.tokens, dict) else read.tokens
    return None if tokens is None else list(tokens)


def _mask_of(read: Reading, site: str, branch: str, row: int) -> list[bool] | None:
    mask = read.masks.get(site)
    if mask is None:
        return None
    of_branch = mask[("cond", "uncond").index(branch)] if read.both else mask
    return of_branch[read.rows.index(row)].tolist()
