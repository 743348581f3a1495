"""The interval of a mean over prompts x seeds, of many tables at once: numpy in, numpy out.

Letters: p prompt, s seed. Every seed is used with every prompt, so both are sampled: a new prompt brings an effect that
its seeds share, a new seed one that its prompts share, and each of their images one of its own.
"""

from __future__ import annotations

import numpy as np
from scipy.special import stdtrit

# The fewest prompts that must lie apart from the rest (at least a tenth as far from the median as the farthest); of
# fewer than six prompts, half.
FEWEST_EVENTS = 3
APART = 0.1

FEWEST_FOR_SKEW = 4  # prompts from which a skewness can be estimated at all
DIRICHLETS = 4000


def crossed_bounds(values: np.ndarray, level: float | np.ndarray = 0.95) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means of prompts' means and the bounds of their confidence intervals, NaN where they are not determined.

    >>> [bound.round(2).tolist() for bound in crossed_bounds(np.array([[1.0, 2.0], [2.0, 3.0], [4.0, 5.0]]))]
    [2.83, -4.57, 10.23]

    Squared half-widths add up: of the prompts' means by Student's t, corrected for their skewness, and, with the
    prompts' share taken out, of the seeds' by theirs. A component whose estimate is not above 0 is left out.

    values: [..., p, s], NaN for a missing cell; at least one cell of every prompt is there.
    level: coverage, between 0 and 1; of one table [p, s], several.
    Source: the random two-way model (Gao & Owen 2017, for missing cells); t corrected for skewness as in Hall (1992),
    "On the removal of skewness by transformation".
    """
    if values.shape[-2] == 1:
        values = np.swapaxes(values, -1, -2)  # of one prompt, seeds alone are sampled
        values = values[..., ~np.isnan(values).reshape(-1, values.shape[-2]).all(0), :]
    there = ~np.isnan(values)
    means = np.nanmean(values, -1)  # [..., p]
    mean, prompts = means.mean(-1), values.shape[-2]
    if prompts == 1:
        return mean, np.full(mean.shape, np.nan), np.full(mean.shape, np.nan)
    spread = np.sqrt(means.var(-1, ddof=1) / prompts)
    seed, noise, seeds = _seed_components(values, there)
    of_prompts = stdtrit(prompts - 1, (1 + level) / 2)  # what scipy.stats.t.ppf asks, which takes long to do so
    of_seeds = stdtrit(np.maximum(seeds - 1, 1), (1 + level) / 2)
    below, above = (_unskew(means, spread, of_prompts * sign) * sign for sign in (1, -1))
    # Where prompts vary no more than the noise of their own images, the seeds' means are all that varies.
    alone = (seed > 0) & (spread**2 <= noise)
    low, high = (
        np.sqrt(np.where(alone, of_seeds**2 * (seed + noise), (one * spread) ** 2 + of_seeds**2 * seed))
        for one in (below, above)
    )
    unknown = _count_events(means) < min(FEWEST_EVENTS, prompts // 2)
    return mean, np.where(unknown, np.nan, mean - low), np.where(unknown, np.nan, mean + high)


def bounded_bounds(
    means: np.ndarray, least: float, greatest: float, level: float | np.ndarray = 0.95
) -> tuple[np.ndarray, np.ndarray]:
    """The bounds of a mean of values that lie between two limits, however few of them differ.

    >>> [round(float(bound), 2) for bound in bounded_bounds(np.zeros(64), -1, 1)]
    [-0.06, 0.06]

    Of values 0 and 1 it is the interval of Clopper and Pearson. It covers more often than it says.

    means: [p], one value of every prompt.
    least, greatest: the limits of a value.
    level: coverage, between 0 and 1, or several.
    Source: Gaffke (2005); Learned-Miller & Thomas (2019), "A new confidence interval for the mean of a bounded random
    variable".
    """
    weights = np.random.default_rng(0).dirichlet(np.ones(len(means) + 1), DIRICHLETS)
    low, high = (
        np.quantile(weights @ np.append(np.sort(means), limit), (1 + sign * np.asarray(level)) / 2)
        for limit, sign in ((least, -1), (greatest, 1))
    )
    return np.minimum(low, means.mean()), np.maximum(high, means.mean())


def _seed_components(values: np.ndarray, there: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What seeds add to the variance of the mean, what the noise of single images does, and the number of seeds.

    Both are 0 where seeds cannot be told from noise: one seed, or every prompt with seeds of its own.
    """
    in_row, in_column = there.sum(-1, keepdims=True), there.sum(-2, keepdims=True)
    total = in_row.sum(-2, keepdims=True)
    filled = np.where(there, values, 0.0)

    def within(axis: tuple[int, ...], count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        centred = np.where(there, filled - filled.sum(axis, keepdims=True) / np.maximum(count, 1), 0.0)
        freedom = np.maximum(count - 1, 0).sum((-1, -2))
        return (centred**2).sum((-1, -2)) / np.maximum(freedom, 1), freedom

    of_rows, row_freedom = within((-1,), in_row)  # seeds and noise
    of_columns, column_freedom = within((-2,), in_column)  # prompts and noise
    of_all, _ = within((-1, -2), total)
    pairs = (total * (total - 1))[..., 0, 0]
    apart = [1 - (count * (count - 1)).sum((-1, -2)) / np.maximum(pairs, 1) for count in (in_row, in_column)]
    known = (row_freedom > 0) & (column_freedom > 0) & (apart[0] + apart[1] > 1)
    noise = apart[0] * of_columns + apart[1] * of_rows - of_all
    noise = np.where(known, np.maximum(noise, 0) / np.where(known, apart[0] + apart[1] - 1, 1), 0)
    seed = np.where(known, np.maximum(of_rows - noise, 0), 0)
    weights = there / in_row / values.shape[-2]
    seeds = (in_column > 0).sum((-1, -2))
    return seed * (weights.sum(-2) ** 2).sum(-1), noise * (weights**2).sum((-1, -2)), seeds


def _unskew(means: np.ndarray, spread: np.ndarray, quantile: np.ndarray) -> np.ndarray:
    """The quantile of (mean - truth) / spread where prompts' means are skewed: on the side of the tail a longer one.

    The other side is not shortened: of few prompts, the skewness is known too badly.
    """
    prompts = means.shape[-1]
    if prompts < FEWEST_FOR_SKEW:
        return quantile
    third = ((means - means.mean(-1, keepdims=True)) ** 3).sum(-1) / (prompts * (prompts - 1) * (prompts - 2))
    skew = third / np.where(spread > 0, spread, 1) ** 3
    flat = np.abs(skew) < 1e-6  # where the formula is 0 / 0
    safe = np.where(flat, 1, skew)
    unskewed = np.where(flat, quantile, 3 / safe * (np.cbrt(1 + safe * (quantile - safe / 6)) - 1))
    return np.sign(quantile) * np.maximum(np.abs(quantile), np.abs(unskewed))


def _count_events(means: np.ndarray) -> np.ndarray:
    """How many prompts lie apart from the median; none where all are equal but for rounding."""
    away = np.abs(means - np.median(means, -1, keepdims=True))
    farthest = away.max(-1, keepdims=True)
    real = farthest > 1e-9 * np.abs(means).max(-1, keepdims=True)
    return ((away > APART * farthest) & real).sum(-1)
