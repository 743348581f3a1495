"""What a reader of a study of blocks must know, in sentences.

The noise floor, the doses, the comparisons that could not be made, what was found, and what could be found at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from dit_lens.analysis.metrics.intervals import mean_p
from dit_lens.studies.parts.block_damage import CONTROLS, LESS, LEVEL, UNJUDGED
from dit_lens.studies.parts.doses import AGREES, find_off
from dit_lens.studies.power import power

if TYPE_CHECKING:
    import pandas as pd

MOST = 3  # parts that a note names


def describe_blocks(
    table: pd.DataFrame, summary: pd.DataFrame, distances: Sequence[str], judged: Sequence[str]
) -> list[str]:
    """All notes of a study.

    table, summary: the study's.
    distances: measures that are distances to the untouched image.
    judged: measures that a judge gave.
    """
    if summary.empty:
        return ["no image was edited yet"]
    floor = table.loc[table["arm"] == "no-op", "rmse"].max()
    notes = [f"noise floor: an edit of no channel changes images by rmse {floor:g}", *_describe_doses(table)]
    attributes = [name for name in judged if name not in UNJUDGED]
    rows = summary[summary["measure"].isin(attributes or distances)]
    notes += [*_describe_missing(summary, attributes), *_describe_found(rows)]
    if "fidelity" in table:
        notes.append(f"untouched images: fidelity {table.loc[table['arm'] == 'untouched', 'fidelity'].mean():.3f}")
    return [*notes, *_describe_power(table, rows, judged=bool(attributes))]


def _describe_doses(table: pd.DataFrame) -> list[str]:
    """Which pieces and arms gave another dose than they intended."""
    means = table.groupby(["part", "block", "arm"], sort=False)[["dose_intended", "dose"]].mean()
    given = means.dropna()
    notes = [
        f"{arm} of {part} {block:g} moved {dose:.3g} of what it adds, and meant to move {meant:.3g}"
        for (part, block, arm), meant, dose in find_off(given).itertuples(name=None)
    ]
    if len(given) and not notes:
        notes = [f"every arm moved as much as it intended, within {AGREES:.0%}"]
    if len(lacking := means.index[means["dose"].isna()]):
        notes.append(f"doses were not weighed: {len(lacking)} of {len(means)} arms")
    return notes


def _describe_missing(summary: pd.DataFrame, attributes: Sequence[str]) -> Iterator[str]:
    """Which comparisons could not be made, and so what cannot be found. attributes: that a judge gave."""
    counts = summary.groupby("part", sort=False)[[f"{name}_n" for name in CONTROLS[:2]]].max()
    whys = ("no noise was drawn", "Give draws=1 or more"), ("there is no other block", "Give site= of several blocks")
    for (lacking, remedy), name in zip(whys, counts, strict=True):
        if alone := [str(part) for part in counts.index[counts[name] == 0]]:
            yield f"{', '.join(alone)}: {lacking} to compare with, so needed cannot be yes. {remedy}"
    specific = set(summary.loc[summary["specific"].notna(), "measure"])
    if alone := [name for name in attributes if name not in specific]:
        yield (
            f"{', '.join(alone)}: not compared with other attributes, which takes a judge who gives another one of the "
            "same image, both from 0 to 1"
        )


def _describe_found(rows: pd.DataFrame) -> Iterator[str]:
    """Of every measure, which parts do more damage than all controls, and how many are undecided."""
    alike: dict[str, list[str]] = {}  # what is said -> measures that it is said of
    for measure, some in rows.groupby("measure", sort=False):
        compared = "noise as large and other blocks"
        found, less = some["needed"] == "yes", some["needed"].isin(LESS)
        if some["specific"].notna().any():
            compared = "noise as large, other blocks and other attributes"
            found, less = found & (some["specific"] == "yes"), less | (some["specific"] == "no")
        told = [
            f"{line.part} {line.block} ({line.damage:.2f}, {line.noise:.2f} under noise)"
            for line in some[found].sort_values("damage", ascending=False).itertuples()
        ]
        told = [*told[:MOST], *([f"{len(told) - MOST} more"] if len(told) > MOST else [])]
        if unknown := int((~found & ~less).sum()):
            told.append(f"undecided of {unknown} of {len(some)} parts")
        alike.setdefault(f"beyond {compared}: {', '.join(told) or 'none'}", []).append(str(measure))
    yield from (f"damage ({', '.join(names)}) {text}" for text, names in alike.items())


def _describe_power(table: pd.DataFrame, rows: pd.DataFrame, *, judged: bool) -> Iterator[str]:
    """Which damage beyond noise so many prompts find, or why that is not known. judged: whether it is at most 1."""
    counts = {name: table.loc[table[name].notna(), "prompt"].nunique() for name in rows["measure"].unique()}
    for count in sorted(set(counts.values())):
        some = rows[rows["measure"].map(counts) == count]
        first = int(some.groupby(["part", "measure"])[list(CONTROLS)].count().sum(axis=1).max())
        yield f"power ({', '.join(some['measure'].unique())}): {_tell_power(some, count, first, judged=judged)}"


def _tell_power(some: pd.DataFrame, prompts: int, first: int, *, judged: bool) -> str:
    """The power of some measures. first: number of comparisons of one part and measure."""
    if prompts < 2:
        return "not known, as one prompt does not show how prompts differ. Give several"
    if not some["beyond_noise_n"].any():
        return "not known, as no noise was drawn"
    spread = some["spread"][some["spread"] > 0].median()
    if spread > 0:
        found = power(float(spread), prompts=prompts, level=1 - LEVEL / first)["decides"].iloc[0]
        beyond = ", more than can be lost," if judged and found > 1 else ""
        return (
            f"{prompts} prompts, whose damage beyond noise spreads by {spread:.2f} (median where it does), find one of "
            f"{found:.2f}{beyond} with a chance of 80 %, as the first of {first} comparisons"
        )
    told = f"not known, as damage beyond noise does not spread over {prompts} prompts"
    if not judged:
        return told
    p = mean_p(np.ones((prompts, 1)), limits=(-2.0, 2.0))  # of a difference of two losses, each from -1 to 1
    return (
        f"{told}. What is lost in every image, and in none under noise, would have p = {p:.2g}, not corrected for "
        f"{first} comparisons"
    )
