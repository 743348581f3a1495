"""From measurements to a verdict: is a part of the massive channels a carrier of the prompt, or a knob of detail?

Knows no model. The rules are fixed before the numbers are seen: see :class:`Thresholds` and :func:`decide_verdict`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dit_lens.analysis.metrics import Interval, mean_ci
from dit_lens.analysis.metrics.decoding import decode_labels
from dit_lens.analysis.metrics.variance import variance_shares
from dit_lens.arguments.checks import checked_fields

if TYPE_CHECKING:
    import pandas as pd

PARTS = ("whole", "mean", "residual")
CAUSAL, INFORMATION = ("ablation", "transport"), ("decoding", "variance")
POOLED = 4  # the residual is decoded on a grid of this many cells a side


@checked_fields
@dataclass(frozen=True)
class Thresholds:
    """What counts, stated beforehand; every piece of evidence is at most 1, and 0 without an effect.

    carrier: from here on an edit speaks for a carrier (if its excess over the strongest control has an interval above
      0), and information is present.
    detail: up to here an edit speaks for a detail knob, and information is absent.
    change: least change of the image by an ablation (rmse, 0 to 255) that makes channels a knob of anything.
    """

    carrier: float = 0.3
    detail: float = 0.1
    change: float = 0.5


def split(values: np.ndarray, part: str) -> np.ndarray:
    """A part of channels [..., n, k]: their token mean [..., 1, k], the residual around it, or the whole.

    >>> split(np.array([[1.0], [3.0]]), "mean").tolist(), split(np.array([[1.0], [3.0]]), "residual").tolist()
    ([[2.0]], [[-1.0], [1.0]])
    """
    mean = values.mean(-2, keepdims=True)
    return {"whole": values, "mean": mean, "residual": values - mean}[part]


def weigh_edits(lines: pd.DataFrame, column: str, thresholds: Thresholds) -> list[dict[str, Any]]:
    """For every part what an edit of it does, beside the control that does most.

    lines: columns arm, part, draw, prompt, seed and the effect, of the arm "top" in its parts and of the controls as
      wholes.
    column: column of the effect.
    thresholds: what counts.
    """
    effects = lines.dropna(subset=[column]).groupby(["arm", "part", "prompt", "seed"])[column].mean()
    controls = [arm for arm in lines["arm"].unique() if arm != "top"]
    present = [arm for arm in controls if (arm, "whole") in effects.index.droplevel(["prompt", "seed"])]
    strongest = max(present, key=lambda arm: effects[arm, "whole"].mean(), default=None)
    found = []
    for part in PARTS:
        if ("top", part) not in effects.index.droplevel(["prompt", "seed"]):
            continue
        top = effects["top", part]
        value, low, high = _estimate_mean(top)
        line: dict[str, Any] = {"part": part, "value": value, "value_low": low, "value_high": high, "n": len(top)}
        excess = np.nan
        if strongest is not None:
            control = effects[strongest, "whole"].reindex(top.index)
            over = _estimate_mean(top - control)
            excess = over.mean if np.isnan(over.low) else over.low
            line |= {"control": control.mean(), "strongest control": strongest}
        found.append({**line, "says": _rate_effect(value, excess, high, thresholds)})
    return found


def weigh_decoding(
    values: Mapping[str, Mapping[str, np.ndarray]],
    attributes: Sequence[Mapping[str, str]],
    groups: Sequence[int],
    grid: tuple[int, ...],
    thresholds: Thresholds,
) -> list[dict[str, Any]]:
    """For every part how well attributes of unseen prompts can be read from it: mean skill at the best site and step.

    Every arm may choose its best site and step, so the choice favours none.

    values: arm -> site -> [s, m, n, k] of m images.
    attributes: attributes of every image's prompt, name -> value.
    groups: number of every image's prompt; a prompt is never in training and test at once.
    grid: token grid, (h, w).
    thresholds: what counts.
    """
    found = []
    for part in PARTS:
        skills = {
            arm: [
                _skill(_features(x[step], part, grid), attributes, groups)
                for x in sites.values()
                for step in range(len(x))
            ]
            for arm, sites in values.items()
        }
        best = {arm: float(np.nanmax(some)) for arm, some in skills.items() if not np.all(np.isnan(some))}
        if "top" not in best:
            continue
        strongest = max((arm for arm in best if arm != "top"), key=lambda arm: best[arm], default=None)
        line: dict[str, Any] = {"part": part, "value": best["top"], "n": len(groups)}
        if strongest is not None:
            line |= {"control": best[strongest], "strongest control": strongest}
        found.append({**line, "says": _rate_information(best["top"], thresholds)})
    return found


def weigh_variance(
    values: Mapping[str, Mapping[str, np.ndarray]], prompts: int, thresholds: Thresholds
) -> list[dict[str, Any]]:
    """For every part the share of its variance, within a step, that depends on the prompt, alone or with the seed.

    Layout that follows from prompt and noise together is in their interaction, so it counts. The main effect of the
    step is left out: that channels grow over the steps says nothing.

    values: arm -> site -> [s, seed * prompt, n, k].
    prompts: number of prompts.
    thresholds: what counts.
    """
    found = []
    for part in PARTS:
        shares = {
            arm: np.mean([_prompt_share(x, part, prompts) for x in sites.values()]) for arm, sites in values.items()
        }
        strongest = max((arm for arm in shares if arm != "top"), key=lambda arm: shares[arm], default=None)
        line: dict[str, Any] = {"part": part, "value": float(shares["top"])}
        if strongest is not None:
            line |= {"control": float(shares[strongest]), "strongest control": strongest}
        found.append({**line, "says": _rate_information(line["value"], thresholds)})
    return found


def decide_verdict(evidence: pd.DataFrame, changes: Mapping[str, float], thresholds: Thresholds) -> dict[str, str]:
    """The verdict on every part, and "overall".

    A part is a carrier when both edits say so and the prompt's information is present in it by some measure; a detail
    knob when both edits say so and its ablation changes the image at all; else it is undecided. Information alone
    decides nothing: a channel may hold what no later block reads. Overall it is "both" when one part is a carrier and
    another a detail knob.

    evidence: columns measure, part, says.
    changes: part -> rmse of its ablation.
    thresholds: what counts.
    """
    parts = {}
    for part in PARTS:
        says = evidence[evidence["part"] == part].set_index("measure")["says"].to_dict()
        causal = {says.get(measure) for measure in CAUSAL}
        informed = [says[measure] for measure in INFORMATION if measure in says]
        if causal == {"carrier"} and ("present" in informed or not informed):
            parts[part] = "carrier"
        elif causal == {"detail"} and changes.get(part, 0.0) >= thresholds.change:
            parts[part] = "detail"
        else:
            parts[part] = "undecided"
    both = {"carrier", "detail"} <= set(parts.values())
    return {**parts, "overall": "both" if both else parts["whole"]}


def _estimate_mean(effects: pd.Series) -> Interval:
    """The mean of effects, indexed by prompt and seed, with its interval."""
    prompts, seeds = (effects.index.get_level_values(name).to_numpy() for name in ("prompt", "seed"))
    return mean_ci(effects.to_numpy(), prompts, seeds)


def _rate_effect(value: float, excess: float, high: float, thresholds: Thresholds) -> str:
    if value >= thresholds.carrier and excess > 0:
        return "carrier"
    upper = value if np.isnan(high) else high
    return "detail" if upper <= thresholds.detail else "neither"


def _rate_information(value: float, thresholds: Thresholds) -> str:
    if value >= thresholds.carrier:
        return "present"
    return "absent" if value <= thresholds.detail else "weak"


def _features(x: np.ndarray, part: str, grid: tuple[int, ...]) -> np.ndarray:
    """[m, n, k] as features of a decoder [m, d]: the mean as it is, the rest averaged over cells of a coarse grid."""
    kept = split(x, part)
    if part == "mean":
        return kept.reshape(len(x), -1)
    h, w = grid[-2:]
    rows, columns = (np.arange(side) * min(POOLED, side) // side for side in (h, w))
    cell = np.tile((rows[:, None] * min(POOLED, w) + columns).ravel(), kept.shape[1] // (h * w))
    weights = np.eye(cell.max() + 1)[:, cell]
    return ((weights / weights.sum(1, keepdims=True)) @ kept).reshape(len(x), -1)


def _skill(features: np.ndarray, attributes: Sequence[Mapping[str, str]], groups: Sequence[int]) -> float:
    """Mean skill over the attributes that can be held out, below chance counted as none; NaN where none can."""
    found = [decode_labels(features, [one[name] for one in attributes], groups) for name in attributes[0]]
    skills = [max(0.0, one.skill) for one in found if one is not None]
    return float(np.mean(skills)) if skills else np.nan


def _prompt_share(x: np.ndarray, part: str, prompts: int) -> float:
    steps, images, _, k = x.shape
    values = split(x, part).reshape(steps, images // prompts, prompts, -1, k)
    return float(
        np.mean(
            [sum(s for name, s in variance_shares(v, ("seed", "prompt")).items() if "prompt" in name) for v in values]
        )
    )
