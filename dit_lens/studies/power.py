"""How many prompts decide which difference: said before a study is run, from a small one or from a known spread."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import ndtr, stdtrit
from scipy.stats import chi2

from dit_lens.arguments.checks import checked
from dit_lens.arguments.numbers import check_number
from dit_lens.errors import OpError, nearest
from dit_lens.studies.parts.transport_levels import REFERENCES
from dit_lens.studies.shared.result import Result

QUANTILES = (np.arange(2000) + 0.5) / 2000
MOST = 100_000  # prompts; a difference that needs more is none that a study finds


@checked
def power(
    pilot: Result | float,
    difference: float | None = None,
    *,
    measure: str | None = None,
    base: str = "top",
    prompts: int | None = None,
    power: float = 0.8,
    level: float = 0.95,
) -> pd.DataFrame:
    """How many prompts a study needs to decide a difference, and which difference so many prompts decide.

    >>> power(20.0, difference=10.0, prompts=16).round(1)  # differences spread by 20 grey levels over prompts
       spread  prompts  decides  difference  needs
    0    20.0       16     15.0        10.0     34

    Returns one row, or of a result one for every other arm:

    - arm: which ``base`` is compared with (of a result);
    - spread: standard deviation over prompts of the mean difference of a prompt;
    - prompts: how many there are;
    - decides: the smallest true difference that this many prompts find with the chance ``power``;
    - difference: the one that is asked for, or the mean that was observed;
    - needs: the least number of prompts that find it with that chance; NaN beyond 100,000.

    The arms of a result are as many comparisons, of which the first that Holm's correction looks at has to be the
    clearest: their levels are divided by their number. What stands beside them (the untouched images, the ceiling,
    collapses) is none of them. Where the pilot has few prompts its spread is itself uncertain.

    pilot: a result with arms (disruption, transfer, organisation ...), or a known spread.
    difference: the difference of interest, in the unit of the measure; None: of a result, the one it observed.
    measure: column of the result's table; None: "rmse", "specificity", "to_source" or "iou", the first
      that it has.
    base: the arm that is compared with the others.
    prompts: how many prompts are planned; None: as many as the result has.
    power: chance to find a true difference.
    level: coverage of the interval that decides.
    Raises OpError for a result without such arms or measure, and for a spread without a difference or prompts.
    Source: power of the paired t-test (Cohen 1988, section 2.4), exact but for rounding.
    """
    check_number("power", power, 0, 1, open_ends=True)
    check_number("level", level, 0, 1, open_ends=True)
    if prompts is not None:
        check_number("prompts", prompts, 2, MOST)
    if not isinstance(pilot, Result):
        check_number("pilot", pilot, 0, open_ends=True)
        if difference is None and prompts is None:
            raise OpError("a spread alone says nothing. Give difference= to learn how many prompts, or prompts=.")
        return pd.DataFrame([_answer(pilot, difference, prompts, power, 1 - level)])
    found = _pair(pilot, measure, base)
    lines = []
    for arm, pairs in found.items():
        mean = float(pairs.mean()) if difference is None else difference
        count, spread = prompts or len(pairs), float(pairs.std(ddof=1))
        lines.append({"arm": arm, **_answer(spread, mean, count, power, (1 - level) / len(found))})
    return pd.DataFrame(lines)


def _pair(result: Result, measure: str | None, base: str) -> dict[str, np.ndarray]:
    """Arm -> by how much ``base`` exceeds it in every prompt, over what they share of seeds."""
    table = result.table
    if "part" in table and ("effect" in table or "block" in table):  # whose rows are of several edits and parts
        raise OpError(
            f"a result of {result.study} asks several questions. Give the spread of one, such as "
            "power(result.summary['spread'].iloc[3], difference=0.1)."
        )
    usual = ("rmse", "specificity", "to_source", "iou")
    known = [name for name in usual if name in table and table[name].notna().any()]
    measure = measure or next(iter(known), None)
    if measure is None or measure not in table or not {"arm", "prompt", "seed"} <= set(table):
        raise OpError(
            f"this result of {result.study} has no measure {measure!r} of arms and prompts."
            f"{nearest(str(measure), list(table), 'Its columns:')}"
        )
    if base not in set(table["arm"]):
        raise OpError(f"no arm is called {base!r}.{nearest(base, sorted(set(table['arm'])))}")
    pairs = table.groupby(["prompt", "seed", "arm"])[measure].mean().unstack("arm")
    found = {
        str(arm): (pairs[base] - pairs[arm]).dropna().groupby("prompt").mean().to_numpy()
        for arm in pairs
        if arm not in (base, "untouched", "no-op", *REFERENCES)
    }
    few = {arm: len(values) for arm, values in found.items() if len(values) < 2}
    if few or not found:
        raise OpError(f"a spread takes two prompts or more, and {', '.join(few) or 'every arm'} shares fewer.")
    return found


def _answer(spread: float, difference: float | None, prompts: int | None, power: float, alpha: float) -> dict[str, Any]:
    line: dict[str, Any] = {"spread": spread}
    if prompts is not None:
        line |= {"prompts": prompts, "decides": _smallest_difference(prompts, power, alpha) * spread}
    if difference is not None:
        line |= {"difference": difference, "needs": _fewest_prompts(abs(difference) / spread, power, alpha)}
    return line


def _chance(effect: float, n: int, alpha: float) -> float:
    """The chance that the two-sided paired t-test finds an effect, in units of the spread."""
    # Of a given estimate of the spread, t is normal; the mean over estimates, as SciPy's noncentral t fails for n = 2.
    critical, shift = stdtrit(n - 1, 1 - alpha / 2) * _estimates(n), effect * math.sqrt(n)
    return float(np.mean(ndtr(shift - critical) + ndtr(-critical - shift)))


@lru_cache(128)  # the same for every effect that is tried
def _estimates(n: int) -> np.ndarray:
    """What n prompts may take the spread for, in units of it: equally likely each."""
    return np.sqrt(chi2.ppf(QUANTILES, n - 1) / (n - 1))


def _smallest_difference(n: int, power: float, alpha: float) -> float:
    low, high = 0.0, 1.0
    while _chance(high, n, alpha) < power:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if _chance(middle, n, alpha) >= power else (middle, high)
    return high


def _fewest_prompts(effect: float, power: float, alpha: float) -> float:
    if not effect or _chance(effect, MOST, alpha) < power:
        return math.nan
    low, high = 1, 2
    while _chance(effect, high, alpha) < power:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _chance(effect, middle, alpha) >= power else (middle, high)
    return high
