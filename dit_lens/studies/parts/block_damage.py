"""What images lose without each piece of the blocks, against noise as large, the other blocks and the other attributes.

Arrays are [b, m], over blocks and over images (prompt and seed); what was not measured is NaN.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from dit_lens.analysis.metrics.intervals import holm, mean_ci, mean_p
from dit_lens.studies.parts.block_pieces import NOISE

LEVEL = 0.05
UNJUDGED = ("readable", "fidelity")  # what a judge says of the whole image, and not of one attribute
LESS = ("less than noise", "less than other blocks")  # what damage that is no more than its controls is called
CONTROLS = ("beyond_noise", "beyond_blocks", "beyond_attributes")

Limits = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Damage:
    """What images lose by one measure, for every block that has a part.

    images: (prompt, seed) of every image.
    blocks: the blocks.
    untouched: what is measured in the untouched images, [m]; None for a distance to them.
    lost: without the part, [b, m].
    noise: under noise as large, [b, m].
    limits: the least and the greatest damage that is possible; None where that is not known.
    """

    images: pd.MultiIndex
    blocks: Sequence[int]
    untouched: np.ndarray | None
    lost: np.ndarray
    noise: np.ndarray
    limits: Limits | None

    @property
    def beyond_blocks(self) -> np.ndarray:
        """By how much the damage of each block exceeds the mean of all others, [b, m]."""
        rest = [np.delete(self.lost, i, 0) for i in range(len(self.lost))]
        return self.lost - np.stack([_mean_there(others) for others in rest])


def summarise_damage(
    table: pd.DataFrame, distances: Sequence[str], judged: Sequence[str], ablation: str
) -> pd.DataFrame:
    """One row for every part, measure and block: the damage, by how much it exceeds each control, and what that says.

    table: the study's.
    distances: measures that are distances to the untouched image.
    judged: measures of one image, which damage lowers.
    ablation: the arm in which a part is taken out.
    """
    lines: list[dict[str, Any]] = []
    for part in table["part"].dropna().unique():
        some = table[(table["part"] == part) | (table["arm"] == "untouched")]
        found = {name: _find_damage(some, name, ablation, judged=name in judged) for name in (*distances, *judged)}
        attributes = [name for name in judged if name not in UNJUDGED and found[name].limits is not None]
        for name, damage in found.items():
            others = [found[other].lost for other in attributes if other != name] if name in attributes else []
            rows = list(_compare_blocks(damage, others))
            _decide(rows)
            lines += [{"part": part, "measure": name, **row} for row in rows]
    return pd.DataFrame(lines)


def _find_damage(some: pd.DataFrame, measure: str, ablation: str, *, judged: bool) -> Damage:
    """The damage of one part by one measure. some: rows of the table of this part, and of the untouched images."""
    clean = some[some["arm"] == "untouched"].set_index(["prompt", "seed"])
    edited = some[some["arm"] != "untouched"]
    blocks = [int(block) for block in edited["block"].unique()]
    untouched = clean[measure].to_numpy(float) if judged else None

    def lay_out(arm: str) -> np.ndarray:
        rows = edited[edited["arm"] == arm]
        if rows.empty:
            return np.full((len(blocks), len(clean)), np.nan)
        means = rows.groupby(["block", "prompt", "seed"])[measure].mean().unstack(["prompt", "seed"])
        values = means.reindex(index=blocks, columns=clean.index).to_numpy(float)
        return values if untouched is None else untouched - values

    limited = judged and some[measure].dropna().between(0, 1).all()
    return Damage(
        images=clean.index,
        blocks=blocks,
        untouched=untouched,
        lost=lay_out(ablation),
        noise=lay_out(NOISE),
        limits=(-1.0, 1.0) if limited else None,
    )


def _mean_there(values: Any) -> np.ndarray:
    """The mean over the first axis of what is there; NaN where nothing is."""
    there = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.nansum(values, 0) / there.sum(0)


def _compare_blocks(damage: Damage, others: Sequence[np.ndarray]) -> Iterator[dict[str, Any]]:
    """The damage of every block, and by how much it exceeds its controls. others: that of the other attributes."""
    nothing = np.full_like(damage.lost, np.nan)
    excess = {
        "beyond_noise": damage.lost - damage.noise,
        "beyond_blocks": damage.beyond_blocks,
        "beyond_attributes": damage.lost - _mean_there(others) if others else nothing,
    }
    double = None if damage.limits is None else (2 * damage.limits[0], 2 * damage.limits[1])
    for i, block in enumerate(damage.blocks):
        there = ~np.isnan(damage.lost[i])
        line: dict[str, Any] = {"block": block, "n": int(there.sum())}
        known = damage.untouched is not None and there.any()
        line["untouched"] = float(damage.untouched[there].mean()) if known else np.nan
        line |= _estimate("damage", damage.lost[i], damage.images, damage.limits)
        if damage.untouched is None:
            line["damage_low"] = np.maximum(line["damage_low"], 0.0)  # NaN stays
        line["noise"] = float(np.nanmean(damage.noise[i])) if np.isfinite(damage.noise[i]).any() else np.nan
        for name in CONTROLS:
            line |= _estimate(name, excess[name][i], damage.images, double, p=True)
            line[f"{name}_n"] = int((~np.isnan(excess[name][i])).sum())
        line["spread"] = _find_spread(excess["beyond_noise"][i], damage.images)
        yield line


def _decide(rows: Sequence[dict[str, Any]]) -> None:
    """Adds to the rows of one part and measure p-values corrected for their number, and what they say."""
    asked = [(row, name) for row in rows for name in CONTROLS if not np.isnan(row[name])]
    corrected = holm([row[f"{name}_p"] for row, name in asked])
    signs: dict[tuple[int, str], float] = {}
    for (row, name), p in zip(asked, corrected, strict=True):
        row[f"{name}_p"] = p
        signs[row["block"], name] = float(np.sign(row[name])) if p <= LEVEL else 0.0
    for row in rows:
        noise, blocks = (signs.get((row["block"], name), 0.0) for name in CONTROLS[:2])
        row["needed"] = LESS[0] if noise < 0 else LESS[1] if blocks < 0 else _answer(min(noise, blocks))
        beyond = signs.get((row["block"], CONTROLS[2]))
        row["specific"] = None if beyond is None else _answer(beyond)


def _answer(sign: float) -> str:
    return {1.0: "yes", 0.0: "undecided", -1.0: "no"}[sign]


def _estimate(
    name: str, values: np.ndarray, images: pd.MultiIndex, limits: Limits | None, *, p: bool = False
) -> dict[str, float]:
    """The mean of what is there with its interval, and with its p-value where that is asked for."""
    there = ~np.isnan(values)
    keys = (name, f"{name}_low", f"{name}_high")
    if not there.any():
        return dict.fromkeys((*keys, *([f"{name}_p"] * p)), np.nan)
    prompts, seeds = (images.get_level_values(level).to_numpy()[there] for level in ("prompt", "seed"))
    line: dict[str, float] = dict(zip(keys, mean_ci(values[there], prompts, seeds, limits=limits), strict=True))
    return {**line, f"{name}_p": mean_p(values[there], prompts, seeds, limits)} if p else line


def _find_spread(values: np.ndarray, images: pd.MultiIndex) -> float:
    """The standard deviation over prompts of their means over seeds; NaN for fewer than two."""
    means = pd.Series(values, index=images).dropna().groupby("prompt").mean()
    return float(means.std()) if len(means) > 1 else np.nan
