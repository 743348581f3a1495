"""Damage at equal energy: every arm against the curve of the top channels of the same image, and what that says."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pandas as pd

from dit_lens.analysis.metrics.intervals import holm
from dit_lens.studies.shared.tables import compare_arms, format_summary

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


def summarise_comparison(table: pd.DataFrame, by: Sequence[str], measures: Sequence[str]) -> pd.DataFrame:
    """By how much the top channels exceed every arm at equal energy, with intervals: see ``compare_arms``.

    Returns one row for every arm and ``by``: these, and for every measure ``measure_top_minus`` with its ``_low``,
    ``_high`` and ``_p``. Rows of one image are averaged.

    table: as :func:`compare_with_top` returned it.
    by: columns whose values a group shares, besides the arm.
    measures: columns to compare.
    """
    found = table.loc[~table["arm"].isin(WITHOUT), ["arm", *by]].drop_duplicates()
    for measure in measures:
        known = table.dropna(subset=[f"{measure}_top_minus"])
        known = known.assign(against=known["arm"], **{measure: known[measure].astype(float)})
        top = known.assign(arm="top", **{measure: known[measure] + known[f"{measure}_top_minus"]})
        both = pd.concat([known.assign(arm="other"), top])
        contrasts = compare_arms(both, ("against", *by), [measure])
        if len(contrasts):
            contrasts = contrasts.drop(columns="arm").rename(columns={"against": "arm"})
            found = found.merge(contrasts, on=["arm", *by], how="left")
    return found


def describe_comparison(table: pd.DataFrame) -> list[str]:
    """What the comparison at equal energy says in words, over all levels of each image; nothing without arms.

    table: as :func:`compare_with_top` returned it.
    """
    compared = table[~table["arm"].isin(WITHOUT)]
    if compared.empty:
        return []
    notes = []
    if missing := int(compared["rmse_top_minus"].isna().sum()):
        notes.append(
            f"{missing} of {len(compared)} measurements are compared with nothing: top never removed as much energy"
        )
    found = summarise_comparison(table, (), ["rmse"])
    if "rmse_top_minus" not in found:
        return notes
    found = found.dropna(subset=["rmse_top_minus"])
    shown = format_summary(found)
    differences = zip(shown["arm"], shown["rmse_top_minus"], strict=True)
    text = ", ".join(f"{more} more than {arm}" for arm, more in differences)
    notes.append(f"at equal energy top changes images by rmse {text} (paired, mean over levels)")
    return [*notes, _answer(found[found["arm"].isin(OTHERS)])]


def _answer(found: pd.DataFrame) -> str:
    """Channels, directions or undecided: one sentence. One arm above top is enough, so p-values are corrected."""
    arms = found["arm"].tolist()
    if not arms:
        return "channels or directions? not asked: no arm removes directions that are no channels"
    certain = np.asarray(holm(found["rmse_top_minus_p"])) < 0.05
    above, below = (certain & (sign * found["rmse_top_minus"].to_numpy() > 0) for sign in (-1, 1))
    if above.any():
        names = ", ".join(itertools.compress(arms, above))
        return f"channels or directions? directions: at equal energy more than top changes images: {names}"
    if below.all():
        return f"channels or directions? channels: at equal energy top changes images more than {', '.join(arms)}"
    return "channels or directions? undecided: at equal energy no basis is above top for certain, and not all are below"
