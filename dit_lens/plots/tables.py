"""What the figures of studies share: summaries checked, intervals as error bars, n in words.

``summary`` is a study's ``result.summary``; where an interval is NaN (a single sample) none is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dit_lens.errors import OpError
from dit_lens.plots.theme import Look

if TYPE_CHECKING:
    import pandas as pd


def errors(rows: pd.DataFrame, column: str, look: Look) -> dict[str, Any] | None:
    """Error bars for a column with bounds; none at all where every bound is missing."""
    mean, low, high = (floats(rows, name) for name in (column, f"{column}_low", f"{column}_high"))
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


def floats(rows: pd.DataFrame, name: str) -> np.ndarray:
    """A column as float64, NaN where the summary lacks it."""
    return rows[name].to_numpy(float) if name in rows else np.full(len(rows), np.nan)


def checked(summary: pd.DataFrame, needed: Sequence[str]) -> pd.DataFrame:
    """A copy with numbers as floats (a loaded result has None for NaN), after checking that the columns are there."""
    if missing := [name for name in needed if name not in summary]:
        raise OpError(
            f"The summary lacks {', '.join(missing)}; it has {', '.join(map(str, summary.columns))}. "
            "Pass the summary of the study that this figure is of."
        )
    if summary.empty:
        raise OpError("The summary has no rows, so there is nothing to draw.")
    text = {"arm", "masked", "block"}
    return summary.assign(**{name: summary[name].astype(float) for name in summary if name not in text})


def n_of(table: pd.DataFrame) -> str:
    """How many measurements a point stands for, in words."""
    low, high = int(table["n"].min()), int(table["n"].max())
    return f"n = {low} per point" if low == high else f"n = {low} to {high} per point"
