"""What is known of the prompt in channels, whether or not anything reads it: decoding, and variance over prompts.

Both are beside the verdict: a channel may hold what no later block reads. Every part of the channels is compared with
the same part of equally many others. Values are kept as a token mean and means over the cells of a coarse grid.

Letters: s step, m image (all prompts of a seed, then those of the next), c cell, k channel.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from dit_lens.analysis.metrics.decoding import find_held_out, predict_held_out
from dit_lens.studies.parts.verdict import Shares, take_shares

POOLED = 4  # a side of the coarse grid has at most so many cells

Values = Mapping[str, np.ndarray]  # site -> [s, m, 1 + c, k]


def pool_tokens(values: np.ndarray, grid: tuple[int, ...]) -> np.ndarray:
    """The mean over the tokens, and the means over the cells of a coarse grid: [..., n, k] -> [..., 1 + c, k].

    >>> pool_tokens(np.arange(8.0).reshape(8, 1), (2, 4))[:, 0].tolist()
    [3.5, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]

    values: channels of every token; of a video the grids of its frames follow each other.
    grid: token grid, (h, w) with what stands before it.
    """
    h, w = grid[-2:]
    rows, columns = (np.arange(side) * min(POOLED, side) // side for side in (h, w))
    cell = np.tile((rows[:, None] * min(POOLED, w) + columns).ravel(), values.shape[-2] // (h * w))
    weights = np.eye(cell.max() + 1)[:, cell]
    return np.concatenate(
        [values.mean(-2, keepdims=True), (weights / weights.sum(1, keepdims=True)) @ values], -2, dtype=np.float32
    )


def take_part(pooled: np.ndarray, part: str) -> np.ndarray:
    """A part of pooled channels [..., 1 + c, k]: the mean [..., 1, k], the cells, or the cells without the mean."""
    mean, cells = pooled[..., :1, :], pooled[..., 1:, :]
    return {"whole": cells, "mean": mean, "residual": cells - mean}[part]


def decode_attributes(
    values: Values, part: str, attributes: Sequence[Mapping[str, str]], prompts: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """How many attributes of every image a linear decoder reads from channels, which never saw the image's prompt.

    Returns the share that is right beyond the guess of the commonest value, and the most that this could be, [p, s]
    each, averaged over attributes, sites and steps; None where no attribute can be held out.

    values: the channels.
    part: the part that is read.
    attributes: name -> value, of every image.
    prompts: number of prompts.
    """
    groups = np.arange(len(attributes)) % prompts
    right: list[np.ndarray] = []
    possible: list[np.ndarray] = []
    for name in attributes[0]:
        labels = np.array([one[name] for one in attributes])
        kept = find_held_out(labels, groups)
        if not kept.any():
            continue
        guess = np.unique(labels[kept], return_counts=True)[1].max() / kept.sum()
        for x in values.values():
            for step in x:
                features = take_part(step, part).reshape(len(step), -1)[kept].astype(np.float64)
                found = predict_held_out(features, labels[kept], groups[kept]) == labels[kept]
                right.append(_spread(found - guess, kept))
                possible.append(_spread(np.full(kept.sum(), 1 - guess), kept))
    if not right:
        return None
    return _average(right).reshape(-1, prompts).T, _average(possible).reshape(-1, prompts).T


def compare_halves(values: Values, part: str, prompts: int) -> Shares:
    """The share of channels' variance that depends on the prompt, by what the halves of a study have in common.

    >>> noise = np.random.default_rng(0).normal(size=(1, 2 * 400, 2, 3))
    >>> abs(compare_halves({"blocks.0.img": noise}, "mean", 400).mean) < 0.1
    True

    Of every prompt, the product of its deviations from the mean of all prompts in one seed and in another, over the
    mean of their squares: noise of single images, which an analysis of variance without replicates counts as
    interaction, has products of either sign. 1 where all that varies is the prompt's, 0 where nothing is. All pairs of
    seeds are such halves. Averaged over sites and steps.

    values: the channels, of two prompts and two seeds or more.
    part: the part.
    prompts: number of prompts.
    Source: split-half reliability; of the one-way random model it is the intraclass correlation (Fisher 1925).
    """
    shares = []
    for x in values.values():
        for step in x:
            one = take_part(step, part)
            by_seed = one.reshape(-1, prompts, one.shape[-2] * one.shape[-1]).astype(np.float64)
            apart = by_seed - by_seed.mean(1, keepdims=True)
            shared = np.mean([(a * b).sum(-1) for a, b in itertools.combinations(apart, 2)], 0)
            every = np.square(apart).sum(-1).mean(0)
            scale = every.mean()
            shares.append((shared, every) if scale == 0 else (shared / scale, every / scale))
    common, total = (np.mean(some, 0)[:, None] for some in zip(*shares, strict=True))
    return take_shares(common, total, None)


def _spread(values: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Values of the images that are kept, NaN for the others: [m]."""
    found = np.full(len(kept), np.nan)
    found[kept] = values
    return found


def _average(values: Sequence[np.ndarray]) -> np.ndarray:
    """The mean over what is there of every image; NaN where nothing is."""
    stacked = np.stack(values)
    there = ~np.isnan(stacked)
    return np.where(there.any(0), np.nansum(stacked, 0) / np.maximum(there.sum(0), 1), np.nan)
