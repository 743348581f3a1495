"""The block at which claim 2 is judged: chosen on one half of the prompts, and judged on the other.

The best of several blocks is partly the luckiest. Chosen and judged by the same prompts, it would favour the arm that
it was chosen by.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd

from dit_lens.studies.shared.streams import make_stream
from dit_lens.studies.shared.tables import compare_arms, format_summary

LEAST = 2  # prompts of a half: one has no interval, and its best block is its own
# What top has to exceed: channels of equal number, and what finds a subject without massive channels.
CONTROLS = ("bottom", "random", "energy-matched")
NULLS = ("component", "centre", "other prompts")
RIVALS = (*CONTROLS, *NULLS)
CHOOSES, JUDGES = "chooses", "judges"


@dataclass(frozen=True)
class ChosenBlock:
    """A block, and the measurements that may judge it.

    step: its denoising step.
    block: its number.
    table: its rows, of the prompts that judge; the arm "other prompts" has the IoU of top's masks with the subjects of
      all other prompts.
    chosen_on: number of prompts that it was chosen on; 0 where there was nothing to choose.
    """

    step: int
    block: int
    table: pd.DataFrame
    chosen_on: int

    @property
    def judged_on(self) -> int:
        """The number of prompts that judge."""
        return int(self.table["prompt"].nunique())


def choose_halves(prompts: Iterable[str]) -> dict[str, str]:
    """Which prompts choose a block and which judge it: prompt -> "chooses" or "judges".

    >>> sorted(choose_halves(["a red fox", "a blue fox", "a fox"]).values())
    ['chooses', 'judges', 'judges']

    A stream of random numbers of its own orders the prompts, so neither their order nor anything else in the study
    decides. Of an odd number the larger part judges.

    prompts: all prompts of the study.
    """
    drawn = sorted(set(prompts), key=lambda prompt: make_stream("half", prompt))
    return {prompt: CHOOSES if i < len(drawn) // 2 else JUDGES for i, prompt in enumerate(drawn)}


def choose_block(table: pd.DataFrame) -> ChosenBlock | None:
    """The block, and step, of the highest mean IoU of the top channels; None where the prompts are too few to judge it.

    A study of a single block and step has nothing to choose, so all of its prompts judge.

    table: measurements of an organisation: columns prompt, seed, step, block, arm, iou, iou_other_prompts, half.
    """
    top = table[table["arm"] == "top"]
    places = top[["step", "block"]].drop_duplicates()
    alone = len(places) == 1
    chooses = top[top["half"] == CHOOSES]
    n = 0 if alone else int(chooses["prompt"].nunique())
    if not alone and n < LEAST:
        return None
    means = (top if alone else chooses).groupby(["step", "block", "prompt"])["iou"].mean().groupby(level=[0, 1]).mean()
    step, block = means.idxmax()
    at = table[(table["step"] == step) & (table["block"] == block)]
    at = at if alone else at[at["half"] == JUDGES]
    own = at[at["arm"] == "top"]
    others = own.assign(arm="other prompts", iou=own["iou_other_prompts"]).dropna(subset=["iou"])
    return ChosenBlock(int(step), int(block), pd.concat([at, others], ignore_index=True), n)


def describe_choice(table: pd.DataFrame) -> str:
    """How the block was chosen, and by how much top exceeds its rivals there, for people.

    table: as in :func:`choose_block`.
    """
    found = choose_block(table)
    if found is None:
        prompts, blocks = table["prompt"].nunique(), table["block"].nunique()
        return (
            f"{prompts} readable prompt{'' if prompts == 1 else 's'} cannot choose one of {blocks} blocks and judge "
            f"it: give {2 * LEAST} or more, or name the block beforehand, such as "
            f"site='blocks.{table['block'].iloc[-1]}.img'"
        )
    compared = compare_arms(found.table.assign(all=0), ["all"], ["iou"])
    said = format_summary(compared).set_index("arm")["iou_top_minus"].reindex(RIVALS).dropna()
    where = f"block {found.block}"
    where += f" at step {found.step}" if table["step"].nunique() > 1 else ""
    how = f"chosen on {found.chosen_on} prompts and judged on the other {found.judged_on}"
    how = how if found.chosen_on else f"named beforehand and judged on {found.judged_on} prompts"
    listed = ", ".join(f"{value} above {arm}" for arm, value in said.items())
    return f"{where}, {how}: the IoU of top lies {listed} (paired)"
