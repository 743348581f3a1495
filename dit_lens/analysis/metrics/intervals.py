"""Confidence intervals of a mean, a paired difference and a proportion, as (mean, low, high)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import norm

from dit_lens.analysis.arrays import to_numpy
from dit_lens.analysis.metrics.crossed import DIRICHLETS, bounded_bounds, crossed_bounds
from dit_lens.arguments.checks import checked
from dit_lens.errors import OpError
from dit_lens.old_names import renamed_keywords, retired_keywords

LEAST_P = 1e-6  # below it a p-value says nothing but that


class Interval(NamedTuple):
    """An estimate with the bounds of its confidence interval, which are NaN if the data do not determine them."""

    mean: float
    low: float
    high: float


@renamed_keywords(groups="prompts")
@retired_keywords("seed", "n")
@checked
def mean_ci(
    values: Any,
    prompts: Any = None,
    seeds: Any = None,
    level: float = 0.95,
    limits: tuple[float, float] | None = None,
) -> Interval:
    """Returns the mean over prompts with its confidence interval, which is of new prompts and new seeds.

    >>> [round(x, 2) for x in mean_ci([[0.1, 0.2], [0.5, 0.6], [0.3, 0.5], [0.2, 0.2]])]
    [0.33, -0.33, 1.06]
    >>> mean_ci([[0.5], [0.5], [0.5]])  # equal values do not determine an interval
    Interval(mean=0.5, low=nan, high=nan)
    >>> [round(x, 2) for x in mean_ci([[0.5], [0.5], [0.5]], limits=(0, 1))]  # but limits do
    [0.5, 0.15, 0.85]

    Seeds are crossed with prompts: each is the same noise for all prompts, so two seeds say little about others if they
    differ. With one seed, the interval is of prompts only; with one prompt, of seeds only. The bounds are NaN for one
    value, for equal values, and where fewer than three prompts (of less than six, half) lie apart from the rest, unless
    ``limits`` are known. How often the interval covers the truth is measured in docs/concepts/statistics.md.

    values: [prompts, seeds], or [m] with ``prompts``; finite. For arms that share prompts and seeds, use
      :func:`paired_difference_ci`.
    prompts: [m], the prompt of each value. Every prompt has the same weight, however many values it has.
    seeds: [m], the seed of each value; those of one prompt and seed are averaged, and any may be missing. Without
      seeds, those of one prompt are averaged: each is taken to have noise of its own.
    level: coverage, between 0 and 1.
    limits: the least and the greatest value that is possible; the bounds stay between them.
    Raises OpError for NaN or infinite values, values beyond the limits and shapes that do not fit.
    Source: see ``dit_lens.analysis.metrics.crossed``.
    """
    _check_level(level)
    cells = _arrange_cells(np.asarray(to_numpy(values), dtype=np.float64), prompts, seeds)
    _check_limits(cells, limits)
    mean, low, high = (float(value) for value in crossed_bounds(cells, level))
    if limits is None:
        return Interval(mean, low, high)
    if math.isnan(low) and len(cells) > 1:
        low, high = bounded_bounds(np.nanmean(cells, 1), *limits, level)
    return Interval(mean, *(float(np.clip(bound, *limits)) for bound in (low, high)))


def mean_p(values: Any, prompts: Any = None, seeds: Any = None, limits: tuple[float, float] | None = None) -> float:
    """Returns the two-sided p-value of a mean of 0: the level at which :func:`mean_ci` would just reach it.

    >>> round(mean_p([[0.3], [0.2], [0.3], [0.5]]), 3), mean_p([[0.3], [0.3]])
    (0.014, nan)

    NaN where the interval is not determined; never below 1e-6, and where limits decide never below 1 / 4000.

    values, prompts, seeds, limits: as of :func:`mean_ci`.
    """
    cells = _arrange_cells(np.asarray(to_numpy(values), dtype=np.float64), prompts, seeds)
    _check_limits(cells, limits)
    if not math.isnan(float(crossed_bounds(cells)[1])):
        return _find_p(lambda p: crossed_bounds(cells, 1 - p)[1:])
    if limits is None or len(cells) == 1:
        return math.nan
    return max(_find_p(lambda p: bounded_bounds(np.nanmean(cells, 1), *limits, 1 - p)), 1 / DIRICHLETS)


def _find_p(bounds: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]) -> float:
    """The largest p whose interval, of level 1 - p, has 0 inside; ``bounds`` takes many at once."""
    least, most = math.log(LEAST_P), 0.0
    for _ in range(4):
        tried = np.linspace(least, most, 33)
        low, high = bounds(np.exp(tried))
        inside = np.flatnonzero((low <= 0) & (high >= 0))
        if not len(inside):
            return math.exp(least)
        last = int(inside.max())
        least, most = tried[last], tried[min(last + 1, 32)]
    return math.exp(least)


def holm(values: Sequence[float]) -> list[float]:
    """Returns p-values corrected for their number; NaN counts as a test, and stays NaN.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]

    Source: Holm (1979): the chance of any false alarm among them is at most the level.
    """
    p = np.asarray(values, dtype=np.float64)
    order = np.argsort(p)  # NaN last
    steps = np.arange(len(p), 0, -1) * np.nan_to_num(p[order], nan=1.0)
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return np.where(np.isnan(p), np.nan, corrected).tolist()


@retired_keywords("seed", "n")
@checked
def paired_difference_ci(a: Any, b: Any, level: float = 0.95, limits: tuple[float, float] | None = None) -> Interval:
    """Returns the mean of a - b with its :func:`mean_ci`, over pairs that share prompt and seed.

    >>> [round(x, 2) for x in paired_difference_ci([[0.5], [0.7], [0.9]], [[0.2], [0.5], [0.6]])]
    [0.27, 0.12, 0.41]

    a, b: [prompts, seeds], of the same prompts and seeds in the same order.
    level: coverage, between 0 and 1.
    limits: the least and the greatest difference that is possible.
    """
    first, second = (np.asarray(to_numpy(x), dtype=np.float64) for x in (a, b))
    if first.shape != second.shape:
        raise OpError(
            f"Pairs need equal shapes; got {first.shape} and {second.shape}. Run both arms on the same seeds."
        )
    with np.errstate(invalid="ignore"):  # the difference of two infinite PSNRs is NaN, for which mean_ci raises
        difference = first - second
    return mean_ci(difference, level=level, limits=limits)


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


def _arrange_cells(values: np.ndarray, prompts: Any, seeds: Any) -> np.ndarray:
    """Returns the mean of every prompt and seed, [prompts, seeds]; NaN where there is no value."""
    _check_finite(values)
    if prompts is None:
        if seeds is not None:
            raise OpError("seeds name the values of prompts. Give prompts= too, one name for each value.")
        if values.ndim != 2:
            raise OpError(
                f"Values must be [prompts, seeds]; got shape {list(values.shape)}. With one seed per prompt pass "
                "values[:, None]; with unequal numbers of seeds pass prompts= and seeds=."
            )
        return values
    row, rows = _number_labels("prompts", prompts, values)
    column, columns = _number_labels("seeds", seeds, values) if seeds is not None else _number_seeds(row, rows)
    total, count = np.zeros((rows, columns)), np.zeros((rows, columns))
    np.add.at(total, (row, column), values)
    np.add.at(count, (row, column), 1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _number_labels(name: str, given: Any, values: np.ndarray) -> tuple[np.ndarray, int]:
    """Returns the number of the label of every value, and how many labels there are."""
    labels = to_numpy(given, labels=True)
    if values.ndim != 1 or labels.shape != values.shape:
        raise OpError(
            f"With {name}, values and {name} must both be [m]; got shapes {list(values.shape)} and "
            f"{list(labels.shape)}. Name the {name[:-1]} of every value."
        )
    try:
        found, number = np.unique(labels, return_inverse=True)
    except TypeError as problem:  # entries without an order, such as numbers among texts
        raise OpError(f"{name} cannot be told apart: {problem}. Name every one by a text, or by a number.") from None
    return number, len(found)


def _number_seeds(row: np.ndarray, rows: int) -> tuple[np.ndarray, int]:
    """Values without seeds: those of one prompt are one cell, but of a single prompt each is a cell."""
    return (np.arange(len(row)), len(row)) if rows == 1 else (np.zeros_like(row), 1)


def _check_finite(values: np.ndarray) -> None:
    if not values.size:
        raise OpError("There are no values to average. Give [prompts, seeds] with at least one of each.")
    if not np.isfinite(values).all():
        where = np.argwhere(~np.isfinite(values))[0].tolist()
        raise OpError(
            f"{int((~np.isfinite(values)).sum())} of {values.size} values are NaN or infinite, the first at {where}. "
            "Leave them out explicitly, or use rmse instead of psnr, which is infinite for equal images."
        )


def _check_limits(cells: np.ndarray, limits: tuple[float, float] | None) -> None:
    if limits is None:
        return
    least, greatest = limits
    if not least < greatest:
        raise OpError(
            f"limits={least:g} and {greatest:g} have no value between them. Give the least and the greatest possible "
            "value."
        )
    if np.nanmin(cells) < least or np.nanmax(cells) > greatest:
        raise OpError(
            f"the values reach from {np.nanmin(cells):g} to {np.nanmax(cells):g}, beyond the limits {least:g} and "
            f"{greatest:g}. Give the "
            "least and the greatest possible value, or no limits."
        )


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise OpError(f"level={level:g} is not a valid coverage. Choose a value between 0 and 1, such as 0.95.")
