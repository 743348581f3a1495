"""What studies found, in plain words: sentences whose numbers are a result's own.

Whether a claim holds is decided by paired differences, see :func:`decide_claim`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

from dit_lens.analysis.metrics.intervals import holm
from dit_lens.studies.parts.chosen_block import CONTROLS, LEAST, NULLS, RIVALS, choose_block
from dit_lens.studies.parts.transport_levels import COLLAPSES, REFERENCES
from dit_lens.studies.shared.tables import compare_arms, summarise

if TYPE_CHECKING:
    from dit_lens.studies import Result


LEVEL = 0.05  # chance of a false alarm among the controls of a claim


class ControlComparison(NamedTuple):
    """The massive channels against the controls of equal size, by one measure.

    means: means of every arm, with intervals; indexed by arm.
    table: the measurements they are of, from which differences follow.
    measure: column of the measure.
    larger: whether the claim says that it is larger for the massive channels.
    form: format of its values.
    over: the arms that the claim is decided against.
    lacks: why nothing can be decided; "" if something can.
    """

    means: pd.DataFrame
    table: pd.DataFrame
    measure: str
    larger: bool = True
    form: str = ".1f"
    over: Sequence[str] = CONTROLS
    lacks: str = ""

    @property
    def verdict(self) -> str:
        """Whether the claim "holds", "fails" or "is undecided"."""
        if self.lacks:
            return "is undecided"
        return decide_claim(self.table, self.measure, over=self.over, larger=self.larger)

    @property
    def differences(self) -> pd.DataFrame:
        """By how much the massive channels exceed every arm of ``over``: see :func:`subtract_controls`."""
        return subtract_controls(self.table, self.measure, over=self.over)

    @property
    def brief(self) -> str:
        """The verdict, and the massive channels beside the strongest control."""
        if self.lacks:
            return f"{self.verdict}: {self.lacks}"
        column = self.means.reindex(list(self.over))[self.measure]
        arm = column.idxmax() if self.larger else column.idxmin()
        own, other = (format_interval(self.means.loc[one], self.measure, self.form) for one in ("top", arm))
        found = self.differences
        difference = format_interval(found.loc[arm], self.measure, f"+{self.form}")
        weakest = found["p_corrected"].max(skipna=False)
        return f"{self.verdict}: {own}; {arm} {other}; difference {difference}; largest p {_format_p(weakest)}"


def decide_claim(
    table: pd.DataFrame, measure: str, *, arm: str = "top", over: Sequence[str] = CONTROLS, larger: bool = True
) -> str:
    """Whether an arm lies beyond every control: "holds", "fails" or "is undecided".

    >>> import pandas as pd
    >>> arms = pd.DataFrame({"arm": ["top", "bottom"] * 4, "x": [5.0, 1.0, 7.0, 3.5, 6.0, 2.0, 9.0, 4.0]})
    >>> decide_claim(arms.assign(prompt=[*"aabbccdd"], seed=0), "x", over=["bottom"])
    'holds'

    Every control is compared over images of one prompt and seed, and the p-values are corrected for their number
    (Holm). A claim holds where the arm lies beyond every control, and fails where it lies on the other side of one,
    by the same corrected p-values of at most 0.05. A difference whose interval is not determined decides nothing.

    table: columns prompt, seed, arm and the measure.
    measure: column to compare.
    arm: the arm of the claim.
    over: its controls.
    larger: whether the claim says that the measure is larger for the arm.
    """
    found = subtract_controls(table, measure, arm, over).reindex(list(over))
    sign = np.sign(found[measure]) * (found["p_corrected"] <= LEVEL) * (1 if larger else -1)
    return "holds" if (sign > 0).all() else "fails" if (sign < 0).any() else "is undecided"


def subtract_controls(
    table: pd.DataFrame, measure: str, arm: str = "top", over: Sequence[str] = CONTROLS
) -> pd.DataFrame:
    """By how much an arm exceeds every control, with intervals and p-values; indexed by control.

    The columns are the measure with its ``_low``, ``_high`` and ``_p``, the numbers of
    :func:`~dit_lens.studies.shared.tables.compare_arms` and so of every summary, and p_corrected.

    table: columns prompt, seed, arm and the measure.
    measure: column to compare.
    arm: the arm that is compared with its controls.
    over: the controls.
    """
    some = table[table["arm"].isin([arm, *over])].assign(all=0)
    found = compare_arms(some, ["all"], [measure], base=arm).set_index("arm")
    found = found.rename(columns=lambda name: name.replace(f"_{arm}_minus", ""))
    return found.assign(p_corrected=holm(found[f"{measure}_p"]))


def format_interval(row: pd.Series, measure: str, form: str = ".1f") -> str:
    """A mean with its interval, such as "77.2 (74.7 to 82.0)"; the mean alone if there is no interval, or "unknown".

    row: row of a summary.
    measure: column of the mean.
    form: format of the numbers.
    """
    return write_interval(*(row[f"{measure}{bound}"] for bound in ("", "_low", "_high")), form)


def write_interval(value: float, low: float, high: float, form: str) -> str:
    """As :func:`format_interval`, of the numbers themselves; NaN where there is none."""
    value, low, high = (round(number, 9) + 0.0 for number in (value, low, high))  # no -0.0
    if math.isnan(value):
        return "unknown"
    bounds = "" if math.isnan(low) else f" ({low:{form}} to {high:{form}})"
    return f"{value:{form}}{bounds}"


def _format_p(p: float) -> str:
    """A p-value to two digits."""
    return "unknown" if math.isnan(p) else "below 0.001" if p < 0.001 else f"{p:.2g}"


def describe_readable(table: pd.DataFrame, arm: str) -> str:
    """How much of the prompts is right in the images of an arm that can be read back; of none, that none can.

    >>> import pandas as pd
    >>> table = pd.DataFrame({"arm": ["top", "top", "random"], "readable": [0, 0, 1], "fidelity": [0, 0, 0.8]})
    >>> describe_readable(table, "top"), describe_readable(table, "random")
    ('none of 2 images can be read back', '1 of 1 images can be read back, with 80% of the attributes right')

    table: columns arm, fidelity and readable, a line for each image.
    arm: the arm.
    """
    rows = table[table["arm"] == arm]
    read = rows[rows["readable"] > 0]
    if read.empty:
        return f"none of {len(rows)} images can be read back"
    right = read["fidelity"].mean()
    return f"{len(read)} of {len(rows)} images can be read back, with {right:.0%} of the attributes right"


def _describe_fidelity(table: pd.DataFrame, arm: str, fidelity: float) -> str:
    """The attributes that are right in all images of an arm, none in what cannot be read back, which is counted."""
    read = table.loc[table["arm"] == arm, "readable"] > 0 if "readable" in table else pd.Series(dtype=bool)
    if len(read) and not read.any():
        return " with no image that can be read back"
    count = "" if read.all() else f" ({read.sum()} of {len(read)} images can be read back)"
    return f" with {fidelity:.0%} of attributes right{count}"


def compare_damage(result: Result) -> ControlComparison:
    """How far ablation changes images: the comparison of a disruption."""
    rows = result.summary[result.summary["k"] > 0].set_index("arm")
    return ControlComparison(rows, result.table, "rmse")


def describe_disruption(result: Result) -> str:
    """What a disruption found."""
    rows = result.summary[result.summary["k"] > 0].set_index("arm")
    top, judged = rows.loc["top"], "fidelity" in rows
    changes = {
        arm: format_interval(row, "rmse") + (_describe_fidelity(result.table, str(arm), row["fidelity"]) * judged)
        for arm, row in rows.iterrows()
    }
    listed = ", ".join(f"{arm} {changes[arm]}" for arm in CONTROLS)
    equal = partial(decide_claim, result.table, arm="attenuated", over=["energy-matched"])
    by_pixels, by_attributes = equal("rmse"), equal("fidelity", larger=False) if judged else None
    norm = _describe_norm(result.table, rows)
    frozen = (
        f"; zeroing them while norms use the statistics they would have had, by {changes['norm-frozen']}"
        if "norm-frozen" in changes
        else ""
    )
    return (
        f"**The claim {compare_damage(result).verdict}.** Zeroing the top channels (energy share "
        f"{top['energy_share']:.2f}) changes images by {changes['top']}; {listed}.\n\n"
        f"{norm}: raising all other channels as the ablation would, with nothing removed, changes images by "
        f"{changes['rescaled']}; overwriting the top channels so that the norm's statistics stay, by "
        f"{changes['norm-kept']}{frozen}.\n\n"
        f"Size may be: no other channels hold as much energy (energy-matched reaches a share of "
        f"{rows.loc['energy-matched', 'energy_share']:.2f}). The top channels, scaled down until tokens move as far as "
        f"with those others zeroed (attenuated), change images by {changes['attenuated']}{_describe_doses(rows)}. "
        f"That they matter more for their size {by_pixels} by the change of pixels"
        f"{f' and {by_attributes} by the attributes' if by_attributes else ''}. Pushing tokens in one random "
        f"direction, as far as zeroing the top would, changes images by {changes['random-direction']}."
    )


def _describe_doses(rows: pd.DataFrame) -> str:
    """The energy that both edits of one size moved, where it was weighed; rows: of a disruption's summary, by arm."""
    if "dose" not in rows:
        return ""
    dose, other = rows.loc[["attenuated", "energy-matched"], "dose"]
    return f" (a share of {dose:.2f} of their energy was moved, and {other:.2f} with the others)"


def _describe_norm(table: pd.DataFrame, rows: pd.DataFrame) -> str:
    """Zeroing is still destructive with the norm's statistics kept, and raising the others alone is not."""
    kept = decide_claim(table, "rmse", arm="norm-kept", over=["bottom", "random"]) == "holds"
    raised = rows.loc["rescaled", "rmse_high"] >= rows.loc["top", "rmse_low"] / 2
    return "The next norm is not the reason" if kept and not raised else "The next norm may be part of the reason"


LITERATURE = (12, 3072)  # channels that count as massive, of the width of FLUX: the reproduction's k


def describe_scale(k: int, width: int, overlap: float, ratio: float) -> str:
    """How the massive channels of a toy differ from those of the literature, in plain words.

    >>> print(describe_scale(8, 128, 0.39, 32.0)[:99])
    Unlike the literature's: k = 8 of 128 channels is 6.2 %, 16 times the share there (12 of 3,072, 0.4

    k: number of channels.
    width: number of all channels.
    overlap: mean Jaccard overlap of the top sets of two prompts.
    ratio: strongest over median score, mean over blocks.
    """
    their_k, their_width = LITERATURE
    share, theirs = k / width, their_k / their_width
    return (
        f"Unlike the literature's: k = {k} of {width} channels is {100 * share:.1f} %, {share / theirs:.0f} times the "
        f"share there ({their_k} of {their_width:,}, {100 * theirs:.1f} %); the top sets of two prompts overlap by "
        f"{overlap:.2f} (Jaccard), where the literature speaks of the same few channels for all prompts; the strongest "
        f"channel responds {ratio:.0f} times as strongly as the median one, and massive activations of language models "
        "up to 100,000 times (arXiv 2402.17762)."
    )


def find_overlap(result: Result) -> float:
    """The mean overlap of the top sets of two prompts. result: of a stability study."""
    rows = result.summary
    return float(rows.loc[rows["over"] == "prompts", "jaccard"].mean())


def describe_stability(result: Result) -> str:
    """What a stability study found."""
    means = result.summary.groupby("over")["jaccard"].mean()
    chance = result.summary["chance"].iloc[0]
    words = {"prompts": "prompts", "seeds": "seeds", "steps": "steps", "sites": "blocks"}
    listed = ", ".join(f"{means[over]:.2f} over {name}" for over, name in words.items() if over in means)
    return f"Mean Jaccard overlap of top sets: {listed} (chance {chance:.2f})."


def describe_write_attribution(result: Result) -> str:
    """What a write_attribution found: the strongest writers."""
    top = result.summary[result.summary["arm"] == "top"]
    writers = top[~top["point"].isin(["rest"])].nlargest(3, "share")
    listed = ", ".join(f"{_name_writer(row)} {format_interval(row, 'share', '.2f')}" for _, row in writers.iterrows())
    return f"The largest direct contributions to the massive channels' final token means: {listed}."


def _name_writer(row: pd.Series) -> str:
    """A point of a block, or what enters the first."""
    if math.isnan(row["block"]):
        return "what enters the first block"
    return f"{'all' if row['point'] == 'block' else row['point']} of block {row['block']:.0f}"


def compare_overlap(result: Result) -> ControlComparison:
    """How well clusters fit the subject: the comparison of an organisation, at a block that other prompts chose."""
    found, lacks = choose_block(result.table), ""
    table = result.table if found is None else found.table  # of all blocks where none can be chosen
    if found is None:
        n = table["prompt"].nunique()
        lacks = f"{n} readable prompts cannot choose a block and judge it ({2 * LEAST} or more can)"
    means = summarise(table, ["arm"], ["iou"]).set_index("arm")
    return ControlComparison(means, table, "iou", form=".2f", over=RIVALS, lacks=lacks)


def describe_organisation(result: Result) -> str:
    """What an organisation found, at a block that half of the prompts chose and the others judge."""
    compared, found = compare_overlap(result), choose_block(result.table)
    if found is None:
        return f"**The claim {compared.verdict}:** {compared.lacks}."
    at = {arm: format_interval(row, "iou", ".2f") for arm, row in compared.means.iterrows()}
    controls, nulls, beside = (
        ", ".join(f"{arm} {at[arm]}" for arm in arms if arm in at)
        for arms in (CONTROLS, NULLS, [arm for arm in at if arm not in ("top", *RIVALS)])
    )
    chosen = f"{found.chosen_on} prompts chose it, by the top channels, and the other {found.judged_on} judge"
    chosen = chosen if found.chosen_on else f"It was named beforehand, and {found.judged_on} prompts judge"
    chance = found.table.loc[found.table["arm"] == "top", "chance"].mean()
    return (
        f"**At block {found.block} the claim {compared.verdict}.** {chosen}. Mean IoU of the top channels' masks with "
        f"the subject: {at['top']}; {controls}; chance {chance:.2f}. What needs no massive channels has to be exceeded "
        f"too: {nulls} (component: the first principal component of all channels; centre: a disc; other prompts: the "
        f"same masks on the subjects of other prompts). Beside them, at the same block: {beside}."
    )


def _select_full_strength(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of a transfer at full strength, everywhere in the image."""
    rows = rows[~rows["masked"].astype(bool)]
    strength = rows.loc[rows["arm"] == "top", "strength"].max()
    return rows[(rows["strength"] == strength) | rows["arm"].isin(REFERENCES)]


def compare_distance(result: Result) -> ControlComparison:
    """How much nearer the moved image is to its own source than to others: the comparison of a transfer.

    A collapse to the mean picture or to grey comes nearer to every source, and has to be exceeded as the controls have.
    """
    at, table = _select_full_strength(result.summary).set_index("arm"), _select_full_strength(result.table)
    if "specificity" not in table:  # measured by an earlier release
        return ControlComparison(at, table, "to_source", larger=False)
    lacks = "there are no other sources to compare with" if table["specificity"].isna().all() else ""
    return ControlComparison(at, table, "specificity", over=(*CONTROLS, *COLLAPSES), lacks=lacks)


def describe_transfer(result: Result) -> str:
    """What a transfer found, everywhere in the image and at full strength."""
    at = _select_full_strength(result.summary).set_index("arm")
    listed = ", ".join(f"{arm} {format_interval(at.loc[arm], 'to_source')}" for arm in CONTROLS)
    blends = [arm for arm in ("pixel-blend", "latent-blend", "prompt-blend") if arm in at.index]
    untouched = result.summary[result.summary["arm"] == "untouched"]
    kept = ", ".join(f"{arm} {at.loc[arm, 'matched_fidelity_target']:.2f}" for arm in blends)
    return (
        f"**The claim {compare_distance(result).verdict}.** Source and target lie "
        f"{untouched['to_source'].iloc[0]:.1f} apart. Moving the top channels leaves the image "
        f"{format_interval(at.loc['top'], 'to_source')} from the source; {listed}; all channels "
        f"{at.loc['all', 'to_source']:.1f}.{_describe_specificity(at)} The moved image shows "
        f"{at.loc['top', 'fidelity_source']:.0%} of the source's attributes and "
        f"{at.loc['top', 'fidelity_target']:.0%} of the target's{_count_readable(result.table)}.\n\n"
        f"Of the change of the prediction, {at.loc['top', 'direct_share']:.0%} is read out directly by the final norm "
        f"and projection; without the last quarter of the blocks the image is "
        f"{format_interval(at.loc['top-early'], 'to_source')} from the source. Where plain blends come equally "
        f"near to the source, they keep of the target's attributes: {kept}."
    )


def _count_readable(table: pd.DataFrame) -> str:
    """How many of the moved images of top can be read back, where not all can: of the others nothing is right."""
    rows = _select_full_strength(table)
    read = rows.loc[rows["arm"] == "top", "readable"] > 0 if "readable" in rows else pd.Series(dtype=bool)
    return "" if read.all() else f" ({read.sum()} of {len(read)} can be read back)"


def _describe_specificity(at: pd.DataFrame) -> str:
    """How much of the nearness is to the own source; at: of a transfer's summary, by arm."""
    if "specificity" not in at or "ceiling" not in at.index:
        return ""
    listed = ", ".join(
        f"{arm} {format_interval(at.loc[arm], 'specificity')}" for arm in ("top", *CONTROLS, *COLLAPSES, "ceiling")
    )
    if at["specificity"].isna().all():
        listed = "with one pair that is unknown"
    near = ", ".join(f"{arm} {at.loc[arm, 'to_source']:.1f}" for arm in (*COLLAPSES, "ceiling"))
    return (
        f" A collapse would lie as near as this: {near} (ceiling: all channels, and what modulates the final norm). So "
        f"the claim goes by how much nearer an image is to its own source than to those of other pairs: {listed}. Of "
        f"what the ceiling comes nearer, top comes {at.loc['top', 'share']:.0%}."
    )


def describe_patching(result: Result) -> str:
    """What a patching found: the strongest cells, and how well attribution predicts the map."""
    best = result.summary.nlargest(3, "effect")
    cells = ", ".join(
        f"{row['column']} at {row['row']} {format_interval(row, 'effect', '.2f')}" for _, row in best.iterrows()
    )
    agrees = " ".join(f"{note[0].upper()}{note[1:]}." for note in result.notes if note.startswith("attribution"))
    pairs = result.table["pair"].nunique()
    return (
        "Each cell alone, swapped at all steps, carries the target this far towards the source (1 is there), mean over "
        f"{pairs} pairs, at its largest: {cells}. {_describe_groups(result.summary)}{agrees}"
    )


def _describe_groups(summary: pd.DataFrame) -> str:
    """At how many blocks the top channels carry the target farther than each other group of as many, for certain."""
    if "effect_top_minus_p" not in summary:
        return ""
    rivals = summary[summary["column"].isin(["bottom", "random"])]
    certain = rivals["effect_top_minus"].gt(0) & pd.Series(holm(rivals["effect_top_minus_p"]), rivals.index).lt(0.05)
    beyond = certain.groupby(rivals["row"]).all()
    return (
        f"Top channels carry it farther than bottom and random ones at {int(beyond.sum())} of {len(beyond)} blocks "
        f"(p below 0.05, Holm over blocks and groups). "
    )


def describe_carrier_or_detail(result: Result) -> str:
    """What carrier_or_detail found: the verdict, and what it rests on."""
    rows = result.summary.set_index(["measure", "part"])
    answers = []
    for measure, question, words in (
        ("necessity", "Needed", "attributes lost when they are removed"),
        ("sufficiency", "Movable", "gained when they are moved, as a share of what all channels gain"),
    ):
        row = rows.loc[(measure, "whole")]
        control = f"{row['control']} {row['control_value']:.2f}, " if isinstance(row["control"], str) else ""
        answers.append(
            f"{question}: {row['says']} ({row['why']}); {words} {format_interval(row, 'value', '.2f')}, {control}"
            f"{row['readable']:.0%} of the images readable."
        )
    ceiling = format_interval(rows.loc[("ceiling", "whole")], "value", ".2f")
    return (
        f"**Verdict: {rows.loc[('verdict', 'overall'), 'says']}.** {' '.join(answers)} All channels gain {ceiling} of "
        f"what is missing. The token mean alone: {rows.loc[('verdict', 'mean'), 'says']}; the spatial residual alone: "
        f"{rows.loc[('verdict', 'residual'), 'says']}."
    )
