"""What the figures of studies share: summaries checked, intervals as error bars, n in words.

``summary`` is a study's ``result.summary``; an interval that is NaN (of a single sample) is not drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dit_lens.errors import OpError
from dit_lens.plots.theme import Look

if TYPE_CHECKING:
    import pandas as pd


def error_bars(rows: pd.DataFrame, column: str, look: Look) -> dict[str, Any] | None:
    """The error bars of a column with bounds; None if every bound is missing.

    rows: rows of a summary.
    column: the column; its bounds are ``column_low`` and ``column_high``.
    look: look of the arm, for the colour.
    """
    mean, low, high = (column_values(rows, name) for name in (column, f"{column}_low", f"{column}_high"))
    if not np.isfinite(high - low).any():
        return None
    return {
        "type": "data",
        "symmetric": False,
        "array": high - mean,
        "arrayminus": mean - low,
        "thickness": 1.2,
        "width": 3,
        "color": look.colour,
    }


def column_values(rows: pd.DataFrame, name: str) -> np.ndarray:
    """A column as float64; NaN if the summary lacks it."""
    return rows[name].to_numpy(float) if name in rows else np.full(len(rows), np.nan)


def check_summary(summary: pd.DataFrame, needed: Sequence[str]) -> pd.DataFrame:
    """A copy of a summary with numbers as floats (a loaded result has None for NaN); OpError if columns are missing.

    summary: summary of a study.
    needed: columns that the figure needs.
    """
    check_columns(summary, needed)
    text = {"arm", "masked", "block", "level", "run"}
    try:
        return summary.assign(**{name: summary[name].astype(float) for name in summary if name not in text})
    except (TypeError, ValueError) as problem:
        raise OpError(
            f"The summary has something other than numbers in a column of numbers: {problem}. Pass the summary of the "
            "study that this figure is of."
        ) from problem


def check_columns(summary: pd.DataFrame, needed: Sequence[str]) -> list[str]:
    """The names of columns, after a check that the summary has them, and rows."""
    if missing := [name for name in needed if name not in summary]:
        raise OpError(
            f"The summary lacks {', '.join(missing)}; it has {', '.join(map(str, summary.columns))}. "
            "Pass the summary of the study that this figure is of."
        )
    if summary.empty:
        raise OpError("The summary has no rows, so there is nothing to draw.")
    return list(needed)


def describe_n(table: pd.DataFrame) -> str:
    """How many measurements a point stands for, in words."""
    low, high = int(table["n"].min()), int(table["n"].max())
    return f"n = {low} per point" if low == high else f"n = {low} to {high} per point"
