"""From the tables of ``carrier_or_detail`` to its lines of evidence: every part against its controls, and the verdict.

The rules are in :mod:`dit_lens.studies.parts.verdict`; here is what they are applied to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dit_lens.analysis.metrics import Interval
from dit_lens.studies.parts.channel_parts import PARTS
from dit_lens.studies.parts.information import Values, compare_halves, decode_attributes
from dit_lens.studies.parts.part_cells import ALL, ALONE
from dit_lens.studies.parts.verdict import (
    LIMITS,
    UNDECIDED,
    Answer,
    Thresholds,
    compare_controls,
    compare_parts,
    decide_necessity,
    decide_sufficiency,
    name_cell,
    take_shares,
)

if TYPE_CHECKING:
    import pandas as pd

SIDES = {"ablation": "necessity", "transport": "sufficiency"}
CEILINGS = {ALL: "ceiling", ALONE: "ceiling of the sites alone"}
DESTROYED = {"ablation": "destroyed when removed", "transport": "destroyed when moved"}
RATES = (0.0, 1.0)
COLUMNS = (
    "measure", "part", "arm", "says", "value", "value_low", "value_high", "control", "control_value", "excess",
    "excess_low", "excess_high", "p", "spread", "readable", "n", "why",
)  # fmt: skip

Effects = dict[str, np.ndarray]  # arm -> [p, s]


@dataclass(frozen=True)
class Tables:
    """The measurements of a study by prompt and seed.

    table: one row per image; columns measure, part, arm, draw, prompt, seed and the measures.
    prompts: the prompts, in order.
    seeds: the seeds, in order.
    """

    table: pd.DataFrame
    prompts: Sequence[str]
    seeds: Sequence[int]

    def arrange(self, measure: str, part: str, column: str) -> Effects:
        """A column of one edit of one part, [p, s] of every arm, draws averaged over those that have a value."""
        rows = self.table[(self.table["measure"] == measure) & (self.table["part"] == part)]
        found: Effects = {}
        for arm, lines in rows.groupby("arm", sort=False):
            means = lines.astype({column: float}).groupby(["prompt", "seed"])[column].mean().unstack("seed")
            found[str(arm)] = means.reindex(index=list(self.prompts), columns=list(self.seeds)).to_numpy(float)
        return found

    def readable(self, measure: str, part: str, arm: str = "top") -> float:
        """The share of an arm's images that are readable, of those that were before the edit; NaN without any."""
        destroyed = self.arrange(measure, part, "destroyed").get(arm, np.array([np.nan]))
        return float(1 - np.nanmean(destroyed)) if not np.isnan(destroyed).all() else np.nan


def weigh_edits(tables: Tables, thresholds: Thresholds) -> list[dict[str, Any]]:
    """Necessity and sufficiency of every part, of the mean against the residual, and the ceiling."""
    found = []
    for measure, side in SIDES.items():
        most = _find_most(tables, measure)
        if most is None:
            continue
        if measure == "transport":
            arms = tables.arrange(measure, "whole", "effect")
            found += [_describe_ceiling(tables, arm, thresholds) for arm in CEILINGS if arm in arms]
        effects = {part: tables.arrange(measure, part, "effect") for part in PARTS}
        answers = {
            part: _decide(tables, measure, part, arms, most, thresholds)
            for part, arms in effects.items()
            if "top" in arms
        }
        for part, answer in answers.items():
            line = _describe(side, part, effects[part], most, answer)
            found.append({**line, "readable": tables.readable(measure, part)})
        if {"mean", "residual"} <= answers.keys():
            both = [effects[part]["top"] for part in ("mean", "residual")]
            barred = [answers[part].why for part in ("mean", "residual") if not answers[part].control]
            found.append(_describe_difference(side, *both, most, barred, thresholds))
    return found


def weigh_destruction(tables: Tables, thresholds: Thresholds) -> list[dict[str, Any]]:
    """The share of images that every arm destroys, and whether the channels destroy more than their controls."""
    found = []
    for measure, name in DESTROYED.items():
        for part in PARTS:
            arms = tables.arrange(measure, part, "destroyed")
            if "top" not in arms:
                continue
            ones = np.ones_like(arms["top"])
            answer = compare_controls(arms["top"], _controls(arms), ones, thresholds.bound)
            found.append(_describe(name, part, arms, ones, answer, RATES))
            for arm, rate in arms.items() if part == "whole" else ():
                if arm != "top":
                    found.append(
                        {**_measure(take_shares(rate, ones, RATES)), "measure": name, "part": part, "arm": arm}
                    )
    return found


def weigh_information(
    values: Mapping[str, Sequence[Values]],
    attributes: Sequence[Mapping[str, str]],
    prompts: int,
    thresholds: Thresholds,
) -> Iterator[dict[str, Any]]:
    """What is known of the prompt in every part of the channels, beside their controls; decoded of their first draws.

    values: arm -> the channels of each of its draws.
    attributes: attributes of every image's prompt; empty where they are not known.
    prompts: number of prompts.
    thresholds: what counts.
    """
    images = next(iter(values["top"][0].values())).shape[1]
    for part in PARTS if attributes and attributes[0] else ():
        read = {arm: decode_attributes(draws[0], part, attributes, prompts) for arm, draws in values.items()}
        effects = {arm: found[0] for arm, found in read.items() if found is not None}
        if read["top"] is None:  # no attribute can be held out
            break
        most = read["top"][1]
        answer = compare_controls(effects["top"], _controls(effects), most, thresholds.bound)
        yield _describe("decoding", part, effects, most, answer)
    for part in PARTS if prompts > 1 and images > prompts else ():  # of one seed all that varies is the prompt's
        shares = {arm: [compare_halves(one, part, prompts) for one in draws] for arm, draws in values.items()}
        if any(not len(one.values) for draws in shares.values() for one in draws):
            continue
        effects = {arm: np.mean([one.values for one in draws], 0)[:, None] for arm, draws in shares.items()}
        ones = np.ones_like(effects["top"])
        answer = compare_controls(effects["top"], _controls(effects), ones, thresholds.bound, None)
        yield {**_describe("variance", part, effects, ones, answer, None), "n": images}


def decide_verdicts(evidence: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The verdict on the channels, "overall", and on either part: a cell, or "undecided" with the answers there are.

    evidence: lines of evidence.
    """
    says = {(line["measure"], line["part"]): line["says"] for line in evidence if "says" in line}
    found = []
    for part in PARTS:
        need, bring = (says.get((side, part), UNDECIDED) for side in SIDES.values())
        name = "overall" if part == "whole" else part
        why = f"necessary: {need}, movable: {bring}"
        found.append({"measure": "verdict", "part": name, "says": name_cell(need, bring), "why": why})
    return found


def _controls(arms: Effects) -> Effects:
    return {arm: effect for arm, effect in arms.items() if arm not in ("top", ALL, ALONE)}


def _find_most(tables: Tables, measure: str) -> np.ndarray | None:
    """The most that could be had of every image: what it shows, or what moving all channels brings; None before that.

    Where no image has any, nothing can be had.
    """
    if measure == "transport":
        return tables.arrange(measure, "whole", "effect").get(ALL)
    return tables.arrange(measure, "whole", "possible").get("top")


def _decide(tables: Tables, measure: str, part: str, arms: Effects, most: np.ndarray, thresholds: Thresholds) -> Answer:
    readable = tables.readable(measure, part)
    if measure == "ablation":
        return decide_necessity(arms["top"], _controls(arms), most, readable, thresholds)
    missing = tables.arrange(measure, "whole", "possible")[ALL]
    alone = tables.arrange(measure, "whole", "effect").get(ALONE, most)
    return decide_sufficiency(arms["top"], _controls(arms), most, missing, readable, thresholds, alone)


def _describe_ceiling(tables: Tables, arm: str, thresholds: Thresholds) -> dict[str, Any]:
    """What moving everything gains, or all channels of the study's sites alone."""
    effects, possible = (tables.arrange("transport", "whole", column) for column in ("effect", "possible"))
    share = take_shares(effects[arm], possible[arm])
    reached = share.mean >= thresholds.ceiling
    return {
        "measure": CEILINGS[arm], "part": "whole", "arm": arm, **_measure(share),
        "readable": tables.readable("transport", "whole", arm), "says": "reached" if reached else "too low",
    }  # fmt: skip


def _describe(
    measure: str,
    part: str,
    arms: Effects,
    most: np.ndarray,
    answer: Answer,
    limits: tuple[float, float] | None = LIMITS,
) -> dict[str, Any]:
    """A line of evidence: what the channels do, and by how much more than the control that decides, where one can."""
    own = take_shares(arms["top"], most, limits)
    line = {"measure": measure, "part": part, "arm": "top", **_measure(own)}
    if name := answer.control:
        excess = take_shares(arms["top"] - arms[name], most, limits and LIMITS)
        control = take_shares(arms[name], most, limits)
        line |= {"control": name, "control_value": control.mean, "spread": excess.spread}
        line |= _bounds("excess", excess.interval())
    return {**line, "p": answer.p, "says": answer.says, "why": answer.why}


def _describe_difference(
    side: str,
    mean: np.ndarray,
    residual: np.ndarray,
    most: np.ndarray,
    barred: Sequence[str],
    thresholds: Thresholds,
) -> dict[str, Any]:
    """Which of the two parts does more; nothing is said where one of them cannot be judged.

    side: "necessity" or "sufficiency".
    mean, residual: their effects, [p, s].
    most: the most that could be had, [p, s].
    barred: why either cannot be judged.
    thresholds: what counts.
    """
    share = take_shares(mean - residual, most)
    says = UNDECIDED if barred else compare_parts(mean, residual, most, thresholds.bound)
    says = {"first": "mean", "second": "residual"}.get(says, says)
    line = {"measure": side, "part": "mean - residual", "arm": "top", "n": len(share.values), "spread": share.spread}
    return {**line, **_bounds("excess", share.interval()), "says": says, "why": barred[0] if barred else ""}


def _measure(share: Any) -> dict[str, Any]:
    return {**_bounds("value", share.interval()), "n": len(share.values)}


def _bounds(name: str, interval: Interval) -> dict[str, float]:
    return dict(zip((name, f"{name}_low", f"{name}_high"), interval, strict=True))
