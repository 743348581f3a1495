"""What nearness to a source is worth: against other sources, against a collapse, and against all that can be moved.

A picture that turns into the mean of all pictures, or grey, comes nearer to every source. So nearness counts as far as
a picture is nearer to its own source than to those of other pairs:

    specificity = RMSE to other sources, on average - RMSE to its own source

A collapse has none, on average over pairs, however near it comes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dit_lens.analysis.metrics import rmse
from dit_lens.studies.shared.keys import ImageKey

if TYPE_CHECKING:
    import pandas as pd
    from PIL.Image import Image

COLLAPSES = ("mean-picture", "grey")  # arms that show what a picture would be worth that shows nothing of a pair
REFERENCES = (*COLLAPSES, "ceiling")  # arms of no strength of their own
LEAST_CEILING = 0.2  # of the way to the source: with less, shares of it mean nothing
_PAIR = ["prompt", "seed"]


@dataclass(frozen=True)
class Levels:
    """The pictures of one seed that others are compared with.

    others: number of a pair -> the sources of other pairs, but those that show its own source or target.
    mean: the mean of all untouched pictures.
    grey: mid grey.
    """

    others: Mapping[int, tuple[Image, ...]]
    mean: Image
    grey: Image

    def measure(self, image: Image, number: int) -> dict[str, float]:
        """How far a picture of a pair lies from other sources, from the mean picture and from grey."""
        others = self.others[number]
        return {
            "to_others": float(np.mean(rmse([image] * len(others), others))) if others else np.nan,
            "to_mean": float(rmse(image, self.mean)),
            "to_grey": float(rmse(image, self.grey)),
        }


def find_levels(images: Mapping[str, Image], seed: int) -> Levels:
    """The levels of a seed, from the untouched pictures of all pairs.

    images: by the texts of their keys; arms "source" and "target" of every pair.
    seed: seed of the noise.
    """
    from PIL import Image

    keys = [(key, image) for text, image in images.items() if (key := ImageKey.parse(text)) and key.seed == seed]
    ends = {arm: {key.item: image for key, image in keys if key.arm == arm} for arm in ("source", "target")}
    seen = {arm: {number: image.tobytes() for number, image in some.items()} for arm, some in ends.items()}
    others = {
        number: tuple(
            ends["source"][other]
            for other, shown in seen["source"].items()
            if other != number and shown not in (seen["source"][number], seen["target"][number])
        )
        for number in ends["source"]
    }
    pictures = [np.asarray(image.convert("RGB"), float) for some in ends.values() for image in some.values()]
    mean = Image.fromarray(np.mean(pictures, 0).round().astype(np.uint8))
    return Levels(others, mean, Image.new("RGB", mean.size, (128, 128, 128)))


def add_shares(table: pd.DataFrame) -> pd.DataFrame:
    """The table with what nearness is worth, per picture, against the untouched picture of its pair and seed.

    Adds ``specificity`` (how much nearer it is to its own source than to others), ``share`` (what it comes nearer to
    its source, of what the ceiling does; missing where that is less than a fifth of the way) and ``fidelity_gain``
    (what the judge finds more of the source; missing where it cannot read the picture).

    table: rows of a transport, the untouched ones and the ceiling included.
    """
    if "to_others" not in table:  # measured by an earlier release
        return table
    start = table[table["arm"] == "untouched"].drop_duplicates(_PAIR).set_index(_PAIR)
    if start.empty:  # interrupted early
        return table.assign(specificity=np.nan, share=np.nan, fidelity_gain=np.nan)
    at = table.set_index(_PAIR).index
    before = start[["to_source", "fidelity_source"]].astype(float).reindex(at).reset_index(drop=True)
    now = table[["to_source", "fidelity_source"]].astype(float).reset_index(drop=True)
    nearer = before - now
    ceiling = table[table["arm"] == "ceiling"].drop_duplicates(_PAIR).set_index(_PAIR)
    most = before["to_source"] - ceiling["to_source"].astype(float).reindex(at).reset_index(drop=True)
    read = table["readable"].astype(float).to_numpy() != 0 if "readable" in table else np.ones(len(table), bool)
    return table.assign(
        specificity=table["to_others"].astype(float) - table["to_source"].astype(float),
        share=(nearer["to_source"] / most.where(most >= LEAST_CEILING * before["to_source"])).to_numpy(),
        fidelity_gain=np.where(read, -nearer["fidelity_source"], np.nan),
    )


def describe_levels(table: pd.DataFrame, why_no_modulation: str) -> list[str]:
    """Notes on what nearness is worth: the ceiling, a collapse, and the specificity of every arm.

    table: of a study, with :func:`add_shares`.
    why_no_modulation: why nothing but the image stream is moved by the ceiling; "" if what modulates it is.
    """
    if "to_others" not in table:
        return []
    whole = table[~table["masked"].astype(bool)]
    means = whole.groupby("arm", sort=False)[["to_source", "specificity"]].mean()
    notes, start = [], means["to_source"].get("untouched", np.nan)
    if "ceiling" in means.index:
        left = means.loc["ceiling", "to_source"]
        what = "all channels" if why_no_modulation else "all channels, and what modulates the final norm"
        notes.append(
            f"the ceiling, {what}, brings pictures from {start:.1f} to {left:.1f} of their source (RMSE)"
            + (f"; {why_no_modulation}" if why_no_modulation else "")
        )
        pairs = whole[whole["arm"] == "ceiling"]
        small = int(pairs["share"].isna().sum())
        if small:
            notes.append(
                f"shares of the ceiling mean nothing for {small} of {len(pairs)} pictures, which it brings less than "
                f"{LEAST_CEILING:.0%} of the way"
            )
    levels = [f"{arm} {means.loc[arm, 'to_source']:.1f}" for arm in COLLAPSES if arm in means.index]
    if levels:
        notes.append(f"a collapse lies as near to the sources as this (RMSE): {', '.join(levels)}")
    if table["to_others"].isna().all():
        notes.append("there is no other source, so that nothing tells a transport from a collapse: give several pairs")
    return notes


def take_levels(images: Sequence[Mapping[str, Image]], seeds: Sequence[int]) -> dict[int, Levels]:
    """The levels of every seed.

    images: of the untouched cells of all batches.
    seeds: seeds of the noise.
    """
    every = {text: image for some in images for text, image in some.items()}
    return {seed: find_levels(every, seed) for seed in dict.fromkeys(seeds)}
