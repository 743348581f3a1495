"""Damage at equal energy: every arm against the curve of the top channels of the same image, and what that says."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from dit_lens.analysis.metrics import bootstrap_ci
from dit_lens.studies.shared.tables import format_summary, summarise

OTHERS = ("rotation", "components", "mean-direction")  # directions that are no channels
WITHOUT = ("untouched", "no-op", "top")  # arms that are not compared


def compare_with_top(table: pd.DataFrame, measures: Sequence[str]) -> pd.DataFrame:
    """Adds by how much the top channels exceed every arm where they remove the same share of the energy.

    >>> rows = [("untouched", 0.0, 0.0), ("top", 0.2, 10.0), ("top", 0.4, 30.0), ("rotation", 0.3, 5.0)]
    >>> table = pd.DataFrame(rows, columns=["arm", "energy_share", "rmse"]).assign(prompt="a", seed=0)
    >>> compare_with_top(table, ["rmse"])["rmse_top_minus"].tolist()
    [nan, nan, nan, 15.0]

    The curve of the top channels is linear between what was run, and is not extended: what lies outside is missing.

    table: one row per measurement; columns prompt, seed, arm, energy_share and the measures.
    measures: columns to compare; columns ``measure_top_minus`` are added.
    """
    table = table.copy()
    for measure in measures:
        found = pd.Series(np.nan, table.index)
        for _, image in table.groupby(["prompt", "seed"], sort=False):
            run = image[image["arm"].isin(("untouched", "top"))]
            curve = run.dropna(subset=[measure]).groupby("energy_share")[measure].mean()
            others = image.loc[~image["arm"].isin(WITHOUT)]
            if len(curve):
                at = np.interp(others["energy_share"], curve.index, curve, left=np.nan, right=np.nan)
                found[others.index] = at - others[measure].astype(float)
        table[f"{measure}_top_minus"] = found
    return table


def describe_comparison(table: pd.DataFrame) -> list[str]:
    """What the comparison at equal energy says in words, averaged over levels within each image; nothing without arms.

    table: as :func:`compare_with_top` returned it.
    """
    compared = table[~table["arm"].isin(WITHOUT)]
    if compared.empty:
        return []
    notes, column = [], "rmse_top_minus"
    missing = int(compared[column].isna().sum())
    if missing:
        notes.append(
            f"{missing} of {len(compared)} measurements are compared with nothing: top never removed as much energy"
        )
    known = compared.dropna(subset=[column])
    if known.empty:
        return notes
    means = known.groupby(["prompt", "seed", "arm"], sort=False, as_index=False)[column].mean()
    shown = format_summary(summarise(means, ("arm",), [column]))
    differences = ", ".join(f"{more} more than {arm}" for arm, more in zip(shown["arm"], shown[column], strict=True))
    notes.append(f"at equal energy top changes images by rmse {differences} (paired, mean over levels)")
    return [*notes, _answer(means[means["arm"].isin(OTHERS)], column)]


def _answer(means: pd.DataFrame, column: str) -> str:
    """Channels, directions or undecided: one sentence."""
    arms = list(dict.fromkeys(means["arm"]))
    if not arms:
        return "channels or directions? not asked: no arm removes directions that are no channels"
    # One arm above top is enough for an answer, so each is held to a stricter level (Bonferroni).
    bounds = {}
    for arm in arms:
        of_arm = means[means["arm"] == arm]
        bounds[arm] = bootstrap_ci(
            of_arm[column].to_numpy(float), groups=of_arm["prompt"].to_numpy(), level=1 - 0.05 / len(arms)
        )
    if above := [arm for arm in arms if bounds[arm].high < 0]:
        return f"channels or directions? directions: at equal energy more than top changes images: {', '.join(above)}"
    if all(bounds[arm].low > 0 for arm in arms):
        return f"channels or directions? channels: at equal energy top changes images more than {', '.join(arms)}"
    return "channels or directions? undecided: at equal energy no basis is above top for certain, and not all are below"
