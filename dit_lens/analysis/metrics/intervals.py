"""Confidence intervals of a mean, a paired difference and a proportion, as (mean, low, high)."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import norm

from dit_lens.analysis.arrays import to_numpy
from dit_lens.arguments.checks import checked
from dit_lens.errors import OpError

MOST_RESAMPLES = 1_000_000


class Interval(NamedTuple):
    """An estimate with the bounds of its confidence interval, which are NaN if the data do not determine them."""

    mean: float
    low: float
    high: float


@checked
def bootstrap_ci(values: Any, groups: Any = None, seed: int = 0, n: int = 2000, level: float = 0.95) -> Interval:
    """Returns the mean over prompts with its hierarchical bootstrap interval.

    >>> [round(x, 2) for x in bootstrap_ci([[0.125, 0.25], [0.5, 0.625]])]
    [0.38, 0.16, 0.59]
    >>> bootstrap_ci([[0.1]])  # one value does not determine an interval
    Interval(mean=0.1, low=nan, high=nan)

    With one prompt, the interval covers the variation over seeds only; with one seed per prompt, over prompts only.

    values: [prompts, seeds], or [m] with ``groups`` if prompts have unequal numbers of seeds; finite. For arms that
      share prompts and seeds, use :func:`paired_difference_ci`.
    groups: [m], the prompt of each value. Every prompt has the same weight, however many seeds it has.
    seed: seed of the resampling.
    n: number of resamples.
    level: coverage, between 0 and 1.
    Raises OpError for NaN or infinite values and for shapes that do not fit.
    Source: percentile interval of the hierarchical bootstrap (Saravanan, Berman & Sober 2020): prompts are drawn with
    replacement, then seeds within each drawn prompt.
    """
    _check_level(level)
    if not 1 <= n <= MOST_RESAMPLES:
        raise OpError(f"n={n:,} resamples were asked for. Use 1,000 to {MOST_RESAMPLES:,}.")
    rows, counts = _group_by_prompt(np.asarray(to_numpy(values), dtype=np.float64), groups)
    mean = float((rows.sum(1) / counts).mean())
    if rows.size == 1:
        return Interval(mean, math.nan, math.nan)
    rng = np.random.default_rng(seed)
    prompts = rng.integers(len(rows), size=(n, len(rows), 1))
    drawn = (rng.random((n, *rows.shape)) * counts[prompts]).astype(np.int64)  # [n, prompts, seeds]
    # Rows are padded to the longest; of every drawn prompt, only as many seeds count as it has.
    kept = np.arange(rows.shape[1]) < counts[prompts]
    means = (np.where(kept, rows[prompts, drawn], 0).sum(2) / counts[prompts[..., 0]]).mean(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, float(low), float(high))


@checked
def paired_difference_ci(a: Any, b: Any, seed: int = 0, n: int = 2000, level: float = 0.95) -> Interval:
    """Returns the mean of a - b with its :func:`bootstrap_ci`, over pairs that share prompt and seed.

    >>> paired_difference_ci([[0.5, 0.75], [1.0, 1.25]], [[0.25, 0.5], [0.75, 1.0]])
    Interval(mean=0.25, low=0.25, high=0.25)

    a, b: [prompts, seeds], of the same prompts and seeds in the same order.
    seed: seed of the resampling.
    n: number of resamples.
    level: coverage, between 0 and 1.
    """
    first, second = (np.asarray(to_numpy(x), dtype=np.float64) for x in (a, b))
    if first.shape != second.shape:
        raise OpError(
            f"Pairs need equal shapes; got {first.shape} and {second.shape}. Run both arms on the same seeds."
        )
    with np.errstate(invalid="ignore"):  # the difference of two infinite PSNRs is NaN, for which bootstrap_ci raises
        difference = first - second
    return bootstrap_ci(difference, seed=seed, n=n, level=level)


@checked
def wilson(successes: int, n: int, level: float = 0.95) -> Interval:
    """Returns a proportion with its Wilson score interval, which lies within [0, 1] and exists for 0 and n successes.

    >>> [round(x, 3) for x in wilson(9, 10)]
    [0.9, 0.596, 0.982]

    successes: number of successes, 0 to n. n: number of trials, at least 1. level: coverage, between 0 and 1.
    Source: Wilson (1927), without continuity correction; equal to ``scipy.stats.binomtest(successes,
    n).proportion_ci(method="wilson")``.
    """
    _check_level(level)
    if n < 1 or not 0 <= successes <= n:
        raise OpError(f"{successes} successes in {n} trials were given. Give n >= 1 and successes from 0 to n.")
    z = float(norm.ppf((1 + level) / 2))
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    # With 0 or n successes a bound is exactly 0 or 1, which rounding errors would miss.
    return Interval(p, 0.0 if successes == 0 else centre - half, 1.0 if successes == n else centre + half)


def _group_by_prompt(values: np.ndarray, groups: Any) -> tuple[np.ndarray, np.ndarray]:
    """Returns the values as [prompts, seeds], padded with 0, and the number of seeds of each prompt."""
    _check_finite(values)
    if groups is None:
        if values.ndim != 2:
            raise OpError(
                f"Values must be [prompts, seeds]; got shape {list(values.shape)}. With one seed per prompt pass "
                "values[:, None]; with unequal numbers of seeds pass groups."
            )
        return values, np.full(len(values), values.shape[1])
    labels = to_numpy(groups, labels=True)
    if values.ndim != 1 or labels.shape != values.shape:
        raise OpError(
            f"With groups, values and groups must both be [m]; got shapes {list(values.shape)} and "
            f"{list(labels.shape)}. Name the prompt of every value."
        )
    try:
        _, prompt, counts = np.unique(labels, return_inverse=True, return_counts=True)
    except TypeError as problem:  # entries without an order, such as numbers among texts
        raise OpError(f"groups cannot be told apart: {problem}. Name every prompt by a text, or by a number.") from None
    rows = np.zeros((len(counts), counts.max()))
    for i in range(len(counts)):
        rows[i, : counts[i]] = values[prompt == i]
    return rows, counts


def _check_finite(values: np.ndarray) -> None:
    if not values.size:
        raise OpError("There are no values to average. Give [prompts, seeds] with at least one of each.")
    if not np.isfinite(values).all():
        where = np.argwhere(~np.isfinite(values))[0].tolist()
        raise OpError(
            f"{int((~np.isfinite(values)).sum())} of {values.size} values are NaN or infinite, the first at {where}. "
            "Leave them out explicitly, or use rmse instead of psnr, which is infinite for equal images."
        )


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise OpError(f"level={level:g} is not a valid coverage. Choose a value between 0 and 1, such as 0.95.")
