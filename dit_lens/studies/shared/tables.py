"""Tables of measurements: means with intervals, differences between arms, and a summary as people read it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from dit_lens.analysis.metrics.intervals import mean_ci, mean_p

# The least and the greatest value of measures whose name says it, for intervals of few events.
_FIDELITIES = ("fidelity", "fidelity_source", "fidelity_target", "fidelity_from", "fidelity_to")
LIMITS = dict.fromkeys((*_FIDELITIES, "changed", "kept", "iou", "jaccard", "energy_share"), (0.0, 1.0))

# Distances, of which the greatest value is far from any that occurs: the bounds of their means do not go below 0.
DISTANCES = ("rmse", "to_source", "to_target", "to_others", "to_mean", "to_grey", "inside", "outside")


def summarise(table: pd.DataFrame, by: Sequence[str], measures: Sequence[str]) -> pd.DataFrame:
    """Means of measures per group, with their 95 % intervals: see :func:`~dit_lens.analysis.metrics.mean_ci`.

    Returns one row per group: ``by``, n (number of measurements) and, for every measure, columns ``measure``,
    ``measure_low`` and ``measure_high``. Measurements that are missing everywhere in a group stay missing.

    table: one row per measurement; columns prompt, ``by``, the measures and, if there are any, seed.
    by: columns whose values a group shares.
    measures: columns to average.
    """
    lines = []
    for _, group in table.groupby(list(by), sort=False, dropna=False):
        line: dict[str, Any] = {name: group[name].iloc[0] for name in by} | {"n": len(group)}
        prompts, seeds = group["prompt"].to_numpy(), group["seed"].to_numpy() if "seed" in group else None
        for measure in measures:
            line |= _bounds(measure, group[measure].to_numpy(float), prompts, seeds, LIMITS.get(measure))
            if measure in DISTANCES and (group[measure].dropna() >= 0).all():
                line[f"{measure}_low"] = np.maximum(line[f"{measure}_low"], 0.0)  # NaN stays
        lines.append(line)
    return pd.DataFrame(lines)


def compare_arms(table: pd.DataFrame, by: Sequence[str], measures: Sequence[str], base: str = "top") -> pd.DataFrame:
    """By how much one arm exceeds every other, over pairs that share prompt and seed.

    >>> table = pd.DataFrame({"arm": ["top", "random", "random"], "draw": [0, 0, 1], "rmse": [9.0, 2.0, 4.0]})
    >>> compare_arms(table.assign(prompt="a", seed=0, k=4), ["k"], ["rmse"])[
    ...     ["k", "arm", "rmse_top_minus"]
    ... ].values.tolist()
    [[4, 'random', 6.0]]

    An arm's draws are averaged within a pair; intervals are as in :func:`summarise`. Returns one row per group and arm:
    ``by``, arm, and for every measure ``measure_{base}_minus`` with its ``_low`` and ``_high`` and, as ``_p``, the
    two-sided p-value of no difference, for one comparison; missing if the arms share no pair. Every verdict on a claim
    is made of these columns.

    table: one row per measurement; columns prompt, seed, arm, ``by`` and the measures.
    by: columns whose values a group shares, besides prompt and seed.
    measures: columns to compare.
    base: the arm that is compared with the others.
    """
    lines = []
    for _, group in table.groupby(list(by), sort=False):
        pairs = group.groupby(["prompt", "seed", "arm"], sort=False)[list(measures)].mean().unstack("arm")
        prompts, seeds = (pairs.index.get_level_values(name).to_numpy() for name in ("prompt", "seed"))
        for arm in group["arm"].unique():
            if arm == base or base not in group["arm"].to_numpy():
                continue
            line: dict[str, Any] = {name: group[name].iloc[0] for name in by} | {"arm": arm}
            for measure in measures:
                excess = (pairs[measure, base] - pairs[measure, arm]).to_numpy(float)
                limits = LIMITS.get(measure)
                limits = limits and (limits[0] - limits[1], limits[1] - limits[0])
                line |= _bounds(f"{measure}_{base}_minus", excess, prompts, seeds, limits, p=True)
            lines.append(line)
    return pd.DataFrame(lines)


def format_summary(summary: pd.DataFrame) -> pd.DataFrame:
    """Formats a summary for people: three digits, and a mean with its bounds in one column.

    >>> format_summary(pd.DataFrame({"arm": ["top"], "rmse": [77.123], "rmse_low": [75.0], "rmse_high": [82.04]}))
       arm           rmse
    0  top  77 (75 to 82)
    """
    names, bounds = list(summary), {}
    for i, name in enumerate(names):
        if tuple(names[i + 1 : i + 3]) in ((f"{name}_low", f"{name}_high"), ("low", "high")):
            bounds[name] = names[i + 1 : i + 3]
    inside = {bound for pair in bounds.values() for bound in pair}
    return pd.DataFrame(
        {
            name: [_format(*line) for line in summary[[name, *bounds.get(name, [])]].itertuples(index=False, name=None)]
            for name in names
            if name not in inside
        }
    )


def _format(value: Any, low: Any = None, high: Any = None) -> str:
    return _format_number(value) + (
        "" if pd.isna(low) or pd.isna(high) else f" ({_format_number(low)} to {_format_number(high)})"
    )


def _format_number(value: Any) -> str:
    if not isinstance(value, float):
        return "" if value is None else str(value)
    return "" if np.isnan(value) else f"{value:.0f}" if abs(value) >= 10 else f"{value:.3g}"


def _bounds(
    name: str,
    values: np.ndarray,
    prompts: np.ndarray,
    seeds: np.ndarray | None,
    limits: tuple[float, float] | None,
    *,
    p: bool = False,
) -> dict[str, float]:
    """The mean of what is there with its interval, as three columns, and its p-value; missing where nothing is."""
    there = ~np.isnan(values)
    if not there.any():
        return dict.fromkeys((name, f"{name}_low", f"{name}_high", *([f"{name}_p"] * p)), np.nan)
    values, prompts = values[there], prompts[there]
    seeds = seeds[there] if seeds is not None and pd.notna(seeds[there]).all() else None
    if limits is not None and not limits[0] <= values.min() <= values.max() <= limits[1]:
        limits = None  # another scale, of a user's judge
    found = mean_ci(values, prompts, seeds, limits=limits)
    line = dict(zip((name, f"{name}_low", f"{name}_high"), found, strict=True))
    return {**line, f"{name}_p": mean_p(values, prompts, seeds, limits)} if p else line
