"""Damage at equal energy: every arm against the curve of the top channels of the same image, and what that says."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pandas as pd

from dit_lens.analysis.metrics.intervals import holm
from dit_lens.studies.parts.transport_levels import REFERENCES
from dit_lens.studies.shared.tables import compare_arms, format_summary, summarise

OTHERS = ("rotation", "components", "mean-direction")  # directions that are no channels
LEVEL = 0.05
WITHOUT = ("untouched", "no-op", "top", *REFERENCES)  # arms that are not compared


def compare_with_top(table: pd.DataFrame, measures: Sequence[str], share: str = "energy_share") -> pd.DataFrame:
    """Adds by how much the top channels exceed every arm where they remove the same share of the energy.

    >>> rows = [("untouched", 0.0, 0.0), ("top", 0.2, 10.0), ("top", 0.4, 30.0), ("rotation", 0.3, 5.0)]
    >>> table = pd.DataFrame(rows, columns=["arm", "energy_share", "rmse"]).assign(prompt="a", seed=0)
    >>> compare_with_top(table, ["rmse"])["rmse_top_minus"].tolist()
    [nan, nan, nan, 15.0]

    The curve of the top channels is linear between what was run, and is not extended: what lies outside is missing.

    table: one row per measurement; columns prompt, seed, arm, energy_share and the measures.
    measures: columns to compare; columns ``measure_top_minus`` are added.
    share: column of the share of the energy.
    """
    table = table.copy()
    for measure in measures:
        found = pd.Series(np.nan, table.index)
        for _, image in table.groupby(["prompt", "seed"], sort=False):
            run = image[image["arm"].isin(("untouched", "top"))]
            curve = run.dropna(subset=[measure, share]).groupby(share)[measure].mean()
            others = image.loc[~image["arm"].isin(WITHOUT)]
            if len(curve):
                at = np.interp(others[share], curve.index, curve, left=np.nan, right=np.nan)
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
    others = found[found["arm"].isin(OTHERS)]
    arms = others["arm"].tolist()
    if not arms:
        return [*notes, "channels or directions? not asked: no arm removes directions that are no channels"]
    says, above = decide(others, "rmse")
    words = {
        "directions": f"at equal energy more than top changes images: {', '.join(above)}",
        "channels": f"at equal energy top changes images more than {', '.join(arms)}",
        "undecided": "at equal energy no basis is above top for certain, and not all are below",
    }
    return [*notes, f"channels or directions? {says}: {words[says]}"]


def describe_moves(table: pd.DataFrame) -> list[str]:
    """What moving directions says in words, over all levels of each image; nothing where none were moved.

    table: as :func:`compare_with_top` returned it, by specificity.
    """
    if "specificity_top_minus" not in table:
        return []
    moved = table[~table["arm"].isin(("untouched", "no-op", *REFERENCES))]
    found = format_summary(summarise(moved.dropna(subset=["specificity"]), ("arm",), ["specificity"]))
    told = ", ".join(f"{arm} {value}" for arm, value in zip(found["arm"], found["specificity"], strict=True))
    said = f"moved, images are nearer to their own source than to others by rmse {told}"
    notes = [f"{said} (mean over levels; a collapse by 0)"]
    compared = summarise_comparison(table, (), ["specificity"])
    others = compared[compared["arm"].isin(OTHERS)]
    if "specificity_top_minus" not in compared or others["specificity_top_minus"].isna().all():
        return notes
    others = others.dropna(subset=["specificity_top_minus"])
    says, above = decide(others, "specificity")
    words = {
        "directions": f"at equal energy nearer to their own source than with top: {', '.join(above)}",
        "channels": f"at equal energy top brings images nearer to their own source than {', '.join(others['arm'])}",
        "undecided": "at equal energy no basis is above top for certain, and not all are below",
    }
    return [*notes, f"channels or directions, moved? {says}: {words[says]}"]


def decide(others: pd.DataFrame, measure: str) -> tuple[str, list[str]]:
    """Channels, directions or undecided, and the arms that are above top for certain.

    One arm above top is enough, so p-values are corrected (Holm).

    others: one row for every arm that is no channels, as :func:`summarise_comparison` returned it.
    measure: what is compared.
    """
    certain = np.asarray(holm(others[f"{measure}_top_minus_p"])) < LEVEL
    above, below = (certain & (sign * others[f"{measure}_top_minus"].to_numpy() > 0) for sign in (-1, 1))
    names = list(itertools.compress(others["arm"], above))
    return ("directions" if names else "channels" if below.all() else "undecided"), names
