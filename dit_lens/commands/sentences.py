"""What studies found, in plain words: sentences whose numbers are a result's own, beside what is published.

Whether a claim holds is decided by intervals of paired differences, see :func:`beyond`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from dit_lens.studies.shared.result import paired

if TYPE_CHECKING:
    import pandas as pd

    from dit_lens.studies import Result


CONTROLS = ["bottom", "random", "energy-matched"]


class Contest(NamedTuple):
    """The massive channels against the controls of equal size, by one measure.

    means: of every arm, with intervals. table: the measurements they are of, from which differences follow.
    """

    means: pd.DataFrame
    table: pd.DataFrame
    measure: str
    larger: bool = True
    form: str = ".1f"

    @property
    def verdict(self) -> str:
        """Whether the claim "holds", "fails" or "is undecided"."""
        return beyond(self.table, self.measure, larger=self.larger)

    @property
    def brief(self) -> str:
        """The verdict, and the massive channels beside the strongest control."""
        column = self.means.loc[CONTROLS, self.measure]
        arm = column.idxmax() if self.larger else column.idxmin()
        own, other = (between(self.means.loc[one], self.measure, self.form) for one in ("top", arm))
        difference = between(differences(self.table, self.measure).loc[arm], self.measure, f"+{self.form}")
        return f"{self.verdict}: {own}; {arm} {other}; difference {difference}"


class Question(NamedTuple):
    """What a study asks. say: what a result of it says. published: what others found, and how far it compares."""

    title: str
    say: Callable[[Result], str]
    published: str


def beyond(
    table: pd.DataFrame, measure: str, *, arm: str = "top", over: Sequence[str] = CONTROLS, larger: bool = True
) -> str:
    """Whether an arm lies beyond every control: "holds", "fails" or "is undecided".

    >>> import pandas as pd
    >>> arms = pd.DataFrame({"arm": ["top", "bottom"] * 4, "x": [5.0, 1.0, 7.0, 3.5, 6.0, 2.0, 9.0, 4.0]})
    >>> beyond(arms.assign(prompt=[*"aabbccdd"], seed=0), "x", over=["bottom"])
    'holds'

    By the 95 % intervals of the differences between images of one prompt and seed: beyond 0 for every control, on
    the other side of it for one, or neither. table: prompt, seed, arm and the measure. larger: what the claim says.
    """
    found = differences(table, measure, arm, over)
    low, high = found[f"{measure}_low"], found[f"{measure}_high"]
    above, below = (low > 0).all(), (high < 0).all()
    if above if larger else below:
        return "holds"
    return "fails" if ((high < 0).any() if larger else (low > 0).any()) else "is undecided"


def differences(table: pd.DataFrame, measure: str, arm: str = "top", over: Sequence[str] = CONTROLS) -> pd.DataFrame:
    """By how much an arm exceeds every control, one line each, with intervals."""
    some = table[table["arm"].isin([arm, *over])].assign(all=0)
    found = paired(some, ["all"], [measure], base=arm).set_index("arm")
    return found.rename(columns=lambda name: name.replace(f"_{arm}_minus", ""))


def between(row: pd.Series, measure: str, form: str = ".1f") -> str:
    """A mean with its interval: "77.2 (74.7 to 82.0)"; alone where one sample gives no interval."""
    value, low, high = (row[f"{measure}{bound}"] for bound in ("", "_low", "_high"))
    bounds = "" if math.isnan(low) else f" ({low:{form}} to {high:{form}})"
    return f"{value:{form}}{bounds}"


def damage(result: Result) -> Contest:
    """How far ablation changes images, of a disruption."""
    rows = result.summary[result.summary["k"] > 0].set_index("arm")
    return Contest(rows, result.table, "rmse")


def critical(result: Result) -> str:
    """Claim 1, of a disruption."""
    rows = result.summary[result.summary["k"] > 0].set_index("arm")
    top, said = rows.loc["top"], "fidelity" in rows
    changes = {
        arm: between(row, "rmse") + (f" with {row['fidelity']:.0%} of attributes right" if said else "")
        for arm, row in rows.iterrows()
    }
    listed = ", ".join(f"{arm} {changes[arm]}" for arm in CONTROLS)
    equal = partial(beyond, result.table, arm="attenuated", over=["energy-matched"])
    fair, judged = equal("rmse"), equal("fidelity", larger=False) if said else None
    norm = _norm(result.table, rows)
    return (
        f"**The claim {damage(result).verdict}.** Zeroing the top channels (energy share "
        f"{top['energy_share']:.2f}) changes images by {changes['top']}; {listed}.\n\n"
        f"{norm}: raising all other channels as the ablation would, with nothing removed, changes images by "
        f"{changes['rescaled']}; overwriting the top channels so that the norm's statistics stay, by "
        f"{changes['norm-kept']}.\n\n"
        f"Size may be: no other channels hold as much energy (energy-matched reaches a share of "
        f"{rows.loc['energy-matched', 'energy_share']:.2f}). The top channels, scaled down until tokens move as far as "
        f"with those others zeroed (attenuated), change images by {changes['attenuated']}. That they matter more for "
        f"their size {fair} by the change of pixels{f' and {judged} by the attributes' if judged else ''}. Pushing "
        f"tokens in one random direction, as far as zeroing the top would, changes images by "
        f"{changes['random-direction']}."
    )


def _norm(table: pd.DataFrame, rows: pd.DataFrame) -> str:
    """Zeroing is still destructive with the norm's statistics kept, and raising the others alone is not."""
    kept = beyond(table, "rmse", arm="norm-kept", over=["bottom", "random"]) == "holds"
    raised = rows.loc["rescaled", "rmse_high"] >= rows.loc["top", "rmse_low"] / 2
    return "The next norm is not the reason" if kept and not raised else "The next norm may be part of the reason"


def stable(result: Result) -> str:
    """Overlaps of sets, of a stability study."""
    means = result.summary.groupby("over")["jaccard"].mean()
    chance = result.summary["chance"].iloc[0]
    words = {"prompts": "prompts", "seeds": "seeds", "steps": "steps", "sites": "blocks"}
    listed = ", ".join(f"{means[over]:.2f} over {name}" for over, name in words.items() if over in means)
    return f"Mean Jaccard overlap of top sets: {listed} (chance {chance:.2f})."


def born(result: Result) -> str:
    """The strongest writers, of a births study."""
    top = result.summary[result.summary["arm"] == "top"]
    writers = top[~top["point"].isin(["rest"])].nlargest(3, "share")
    listed = ", ".join(f"{_writer(row)} {between(row, 'share', '.2f')}" for _, row in writers.iterrows())
    return f"The largest direct contributions to the massive channels' final token means: {listed}."


def _writer(row: pd.Series) -> str:
    """A point of a block, or what enters the first."""
    if math.isnan(row["block"]):
        return "what enters the first block"
    return f"{'all' if row['point'] == 'block' else row['point']} of block {row['block']:.0f}"


def _best_block(result: Result) -> tuple[int, pd.DataFrame]:
    """The block where the top channels' clusters fit best, and the arms of an organisation there."""
    rows = result.summary.rename(columns={"low": "iou_low", "high": "iou_high"})
    best = int(rows[rows["arm"] == "top"].set_index("block")["iou"].idxmax())
    return best, rows[rows["block"] == best].set_index("arm")


def overlap(result: Result) -> Contest:
    """How well clusters fit the subject, of an organisation, at the best block of the top channels."""
    best, at = _best_block(result)
    return Contest(at, result.table[result.table["block"] == best], "iou", form=".2f")


def organised(result: Result) -> str:
    """Claim 2, of an organisation, at the block where the top channels' clusters fit best."""
    best, at = _best_block(result)
    others = [arm for arm in at.index if arm not in ("top", *CONTROLS)]
    listed = ", ".join(f"{arm} {between(at.loc[arm], 'iou', '.2f')}" for arm in CONTROLS)
    beside = ", ".join(f"{arm} {between(at.loc[arm], 'iou', '.2f')}" for arm in others)
    return (
        f"**At its best block ({best}) the claim {overlap(result).verdict}.** Mean IoU of the top "
        f"channels' clusters with the subject: {between(at.loc['top'], 'iou', '.2f')}; {listed}; chance "
        f"{at.loc['top', 'chance']:.2f}; with the subjects of other prompts {at.loc['top', 'others']:.2f}. What knows "
        f"nothing of massive channels reaches, at the same block: {beside}. The block was chosen by the top arm, which "
        "favours it."
    )


def _at_full_strength(rows: pd.DataFrame) -> pd.DataFrame:
    """The lines of a transfer everywhere in the image."""
    rows = rows[~rows["masked"].astype(bool)]
    return rows[rows["strength"] == rows["strength"].max()]


def nearness(result: Result) -> Contest:
    """How near the moved image is to its source, of a transfer."""
    at = _at_full_strength(result.summary).set_index("arm")
    return Contest(at, _at_full_strength(result.table), "to_source", larger=False)


def transferable(result: Result) -> str:
    """Claim 3, of a transfer, everywhere and at full strength."""
    at = _at_full_strength(result.summary).set_index("arm")
    listed = ", ".join(f"{arm} {between(at.loc[arm], 'to_source')}" for arm in CONTROLS)
    blends = [arm for arm in ("pixel-blend", "latent-blend", "prompt-blend") if arm in at.index]
    untouched = result.summary[result.summary["arm"] == "untouched"]
    says = ", ".join(f"{arm} {at.loc[arm, 'matched_says_target']:.2f}" for arm in blends)
    return (
        f"**The claim {nearness(result).verdict}.** Source and target lie {untouched['to_source'].iloc[0]:.1f} apart. "
        f"Moving the top channels leaves the image {between(at.loc['top'], 'to_source')} from the source; {listed}; "
        f"all channels {at.loc['all', 'to_source']:.1f}. The moved image shows "
        f"{at.loc['top', 'says_source']:.0%} of the source's attributes and {at.loc['top', 'says_target']:.0%} of the "
        f"target's.\n\n"
        f"Of the change of the prediction, {at.loc['top', 'direct_share']:.0%} is read out directly by the final norm "
        f"and projection; without the last quarter of the blocks the image is "
        f"{between(at.loc['top-early'], 'to_source')} from the source. Where plain blends come equally near to the "
        f"source, they keep of the target's attributes: {says}."
    )


def located(result: Result) -> str:
    """The strongest cells of a map of patches, and whether attribution foretells it."""
    best = result.summary.nlargest(3, "effect")
    cells = ", ".join(f"{row['column']} at {row['row']} {between(row, 'effect', '.2f')}" for _, row in best.iterrows())
    agrees = " ".join(f"{note[0].upper()}{note[1:]}." for note in result.notes if note.startswith("attribution"))
    return (
        f"Each cell alone, swapped at all steps, carries the target this far towards the source (1 is there), at its "
        f"largest: {cells}. {agrees}"
    )


def carrier(result: Result) -> str:
    """The verdict, of carrier_or_detail, and what it rests on."""
    rows = result.summary.set_index(["measure", "part"])
    edits = ", ".join(
        f"{words} {between(rows.loc[(measure, 'whole')], 'value', '.2f')} (strongest control "
        f"{rows.loc[(measure, 'whole'), 'control']:.2f})"
        for measure, words in (("ablation", "attributes lost when removed"), ("transport", "gained when moved"))
    )
    return (
        f"**Verdict: {rows.loc[('verdict', 'overall'), 'says']}.** {edits}. The token mean alone: "
        f"{rows.loc[('verdict', 'mean'), 'says']}; the spatial residual alone: "
        f"{rows.loc[('verdict', 'residual'), 'says']}."
    )


CLAIMS = {
    "disruption": ("claim 1, critical: RMSE of ablation", damage),
    "organisation": ("claim 2, organised: IoU with the subject", overlap),
    "transfer": ("claim 3, movable: RMSE to the source", nearness),
}
QUESTIONS = {
    "stability": Question(
        "Are they the same channels everywhere?",
        stable,
        "SPARK calls a set stable from a mean overlap of 0.9 of successive aggregates on.",
    ),
    "births": Question(
        "Where are they written?",
        born,
        "2510.11538 finds AdaLN gates that spike at massive dimensions (SD3: 810).",
    ),
    "disruption": Question(
        "Claim 1: are they critical?",
        critical,
        "The paper: zeroing the top channels collapses the image, zeroing low-statistic ones hardly matters. Its k, "
        "layers and steps are not stated.",
    ),
    "organisation": Question(
        "Claim 2: are they organised in space?",
        organised,
        "The reproduction aims, on FLUX.2-klein, at a peak mIoU of about 0.5 near layer 10 and bottom-k flat at about "
        "0.2; its one stored measurement (FLUX.1-schnell, 4 prompts) did not show it: top 0.082, random 0.186, bottom "
        "0.184.",
    ),
    "transfer": Question(
        "Claim 3: can they be moved?",
        transferable,
        "The paper: moving the channels takes the image towards the source and keeps much of the target. Strength, "
        "layers and steps are not stated.",
    ),
    "patching": Question(
        "Where do they act?",
        located,
        "Attribution patching is a first-order estimate of patching (Syed et al., arXiv 2310.10348); where the two "
        "disagree, patching is right.",
    ),
    "carrier_or_detail": Question(
        "Carrier or detail knob?",
        carrier,
        "2605.13974: massive channels carry the prompt. 2510.11538 and 2607.02968: they are nearly independent of it "
        "and tune detail.",
    ),
}
