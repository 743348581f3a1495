"""What studies found, as the numbers of a model report: verdicts with differences, ceilings, concentration."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dit_lens.analysis.metrics import mean_ci
from dit_lens.commands.chapters import CHAPTERS

if TYPE_CHECKING:
    import pandas as pd

    from dit_lens.commands.sentences import ControlComparison
    from dit_lens.studies import Result

SIDES = {
    "necessity": "necessary: share of attributes lost without them",
    "sufficiency": "movable: share of what all channels gain",
}
COMPARISONS = {chapter.name: chapter for chapter in CHAPTERS if chapter.compare}


def find_verdicts(results: Mapping[str, Result]) -> list[dict[str, Any]]:
    """The verdicts of studies, as model reports have them. results: study -> its result."""
    found = []
    for name, result in results.items():
        if (chapter := COMPARISONS.get(name)) is not None and chapter.compare is not None:
            found.append({"claim": chapter.claim, "study": name, **_describe(chapter.compare(result))})
        elif name == "carrier_or_detail":
            found += [{"study": name, "measure": None, **line} for line in _describe_carrier(result)]
    return found


def _describe_carrier(result: Result) -> list[dict[str, Any]]:
    """The verdict of a carrier_or_detail, and the two answers that it is made of."""
    rows = result.summary.set_index(["measure", "part"])
    overall = rows.loc[("verdict", "overall")]
    verdict = {"verdict": str(overall["says"]), "reason": str(overall["why"]), "value": None, "differences": []}
    found = [{"claim": "carrier or detail", **verdict}]
    for side, claim in SIDES.items():
        if (side, "whole") not in rows.index:
            continue
        row = rows.loc[(side, "whole")]
        line = {"from": str(row["control"]), "estimate": _estimate(row, "excess"), "p": None}
        differences = [{**line, "p_corrected": _number(row["p"])}] if isinstance(row["control"], str) else []
        answer = {"verdict": str(row["says"]), "reason": str(row["why"]), "value": _estimate(row, "value")}
        found.append({"claim": claim, **answer, "differences": differences})
    return found


def _describe(comparison: ControlComparison) -> dict[str, Any]:
    measure, controls = comparison.measure, comparison.differences
    if comparison.lacks:
        nothing = {"reason": comparison.lacks, "value": None, "differences": []}
        return {"measure": measure, "verdict": comparison.verdict, **nothing}
    return {
        "measure": measure,
        "verdict": comparison.verdict,
        "reason": None,
        "value": _estimate(comparison.means.loc["top"], measure),
        "differences": [
            {
                "from": str(arm),
                "estimate": _estimate(row, measure),
                "p": _number(row[f"{measure}_p"]),
                "p_corrected": _number(row["p_corrected"]),
            }
            for arm, row in controls.iterrows()
        ],
    }


def find_weakest(differences: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The difference with the largest corrected p-value, or with none that is known; None without any difference.

    differences: those of a verdict.
    """
    known = [one for one in differences if one["estimate"] is not None and one["estimate"]["mean"] is not None]
    return max(known, key=lambda one: math.inf if one["p_corrected"] is None else one["p_corrected"], default=None)


def find_ceiling(results: Mapping[str, Result]) -> list[dict[str, Any]]:
    """What the best that can be looks like: untouched images for a judge, all channels moved for transport."""
    found = []
    if "disruption" in results and "fidelity" in results["disruption"].table:
        table = results["disruption"].table
        rows = table[table["arm"] == "untouched"].dropna(subset=["fidelity"])
        if len(rows):
            mean, low, high = mean_ci(
                rows["fidelity"].to_numpy(float), rows["prompt"].to_numpy(), rows["seed"].to_numpy(), limits=(0, 1)
            )
            line = {"mean": _number(mean), "low": _number(low), "high": _number(high)}
            found.append({"study": "disruption", "what": "fidelity of untouched images", "estimate": line})
    if "transfer" in results:
        rows = results["transfer"].summary
        at = rows[rows["arm"] == "ceiling"]
        if len(at):
            line, what = _estimate(at.iloc[0], "to_source"), "RMSE to the source with all moved that can be"
            found.append({"study": "transfer", "what": what, "estimate": line})
    if "carrier_or_detail" in results:
        rows = results["carrier_or_detail"].summary
        for _, row in rows[rows["measure"].str.startswith("ceiling")].iterrows():
            what = f"share of the missing attributes that all channels gain ({row['measure']})"
            found.append({"study": "carrier_or_detail", "what": what, "estimate": _estimate(row, "value")})
    return found


def find_energy_share(results: Mapping[str, Result]) -> float | None:
    """The share of energy that the massive channels hold, mean over blocks and images."""
    if "disruption" not in results:
        return None
    rows = results["disruption"].summary
    rows = rows[(rows["arm"] == "top") & (rows["k"] > 0)]
    return _number(rows["energy_share"].mean()) if len(rows) else None


def _estimate(row: pd.Series, measure: str) -> dict[str, float | None]:
    """A mean with its interval, of the columns of a measure."""
    return {name: _number(row[f"{measure}{end}"]) for name, end in (("mean", ""), ("low", "_low"), ("high", "_high"))}


def _number(value: Any) -> float | None:
    """A number as JSON has it."""
    value = float(value)
    return value if math.isfinite(value) else None
