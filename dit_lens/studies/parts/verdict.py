"""From measurements to a verdict: does a prompt need some channels, and do they move it? Knows no model.

Two questions are answered apart. *Necessity*: the share of a prompt's attributes that is lost when the channels are
removed. *Sufficiency*: what is gained of a source's attributes when the channels are moved from it, as a share of what
moving all channels gains, the ceiling. Each compares the channels with controls of equal number, image by image:

    share = mean(effect of the channels - effect of the control) / mean(the most that could be had)

- **yes**: the share lies beyond every control by more than ``bound``;
- **no**: it lies beyond some control by less than ``bound``: that much of an effect is excluded;
- **undecided**: neither is shown, or what the answer would rest on is not there (see ``Thresholds``).

Shown means by a p-value of at most 0.05 of a share that equals the bound, two-sided and after Holm's correction over
the controls. Where both questions are answered, the answers name one of four cells.

Arrays are [p, s], prompt and seed; NaN where an image cannot be judged.

Sources: Schuirmann (1987), two one-sided tests: an effect is shown to be absent where the interval lies inside bounds
that were named before; a minimum-effect test is the same from the other side (Murphy & Myors 1999). Holm (1979). A
ratio of means is linearised: Cochran (1977), section 2.11.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dit_lens.analysis.metrics import Interval, mean_ci
from dit_lens.analysis.metrics.intervals import holm, mean_p
from dit_lens.arguments.checks import checked_fields

LEVEL = 0.05  # chance of a false answer of each question
LIMITS = (-1.0, 1.0)  # of shares of attributes, lost or gained
UNDECIDED = "undecided"
CELLS = {
    ("yes", "yes"): "necessary and movable",
    ("yes", "no"): "necessary, not movable",
    ("no", "yes"): "movable, not necessary",
    ("no", "no"): "neither",
}


@checked_fields
@dataclass(frozen=True)
class Thresholds:
    """What counts, stated beforehand.

    bound: share of the attributes by which channels must exceed every control, and below which an effect counts as
      none.
    ceiling: least share of the source's missing attributes that moving all channels must gain; below it nothing is
      said of moving some.
    readable: least share of the edited images in which something can be recognised; below it those that are left are
      a selection, and nothing is said of their attributes.
    """

    bound: float = 0.1
    ceiling: float = 0.8
    readable: float = 0.5


class Answer(NamedTuple):
    """The answer to one question.

    says: "yes", "no" or "undecided".
    why: the reason in words.
    control: the control that decides: of a yes the one that is exceeded least, of a no the one that is most surely not
      exceeded.
    p: the corrected p-value of that control; NaN if there is none.
    """

    says: str
    why: str
    control: str = ""
    p: float = np.nan


class Shares(NamedTuple):
    """Effects of single images as shares of the most that could be had, on average.

    values: [m], the images that have both; their mean over prompts is the ratio of the means.
    prompts: [m], number of the prompt of each.
    seeds: [m], number of the seed of each.
    limits: no value can lie beyond; None if that is not known.
    """

    values: np.ndarray
    prompts: np.ndarray
    seeds: np.ndarray
    limits: tuple[float, float] | None

    def interval(self) -> Interval:
        """The mean share with its 95 % interval."""
        if not len(self.values):
            return Interval(np.nan, np.nan, np.nan)
        return mean_ci(self.values, self.prompts, self.seeds, limits=self.limits)

    def p_at(self, share: float) -> float:
        """The two-sided p-value of a share: the level at which the interval just reaches it."""
        if not len(self.values):
            return np.nan
        limits = self.limits and (self.limits[0] - share, self.limits[1] - share)
        return mean_p(self.values - share, self.prompts, self.seeds, limits)

    @property
    def mean(self) -> float:
        """The mean over prompts of their means over seeds; NaN without values."""
        return _mean_of_prompts(self.values, self.prompts) if len(self.values) else np.nan

    @property
    def spread(self) -> float:
        """The standard deviation over prompts of their means over seeds; NaN for fewer than two."""
        means = [self.values[self.prompts == prompt].mean() for prompt in np.unique(self.prompts)]
        return float(np.std(means, ddof=1)) if len(means) > 1 else np.nan


def take_shares(effect: np.ndarray, most: np.ndarray, limits: tuple[float, float] | None = LIMITS) -> Shares:
    """Effects as shares of what could be had.

    >>> take_shares(np.array([[0.2], [0.4]]), np.array([[0.5], [1.0]])).interval().mean
    0.4

    Each value is the ratio r of the means plus what its image contributes to it, (effect - r most) / mean(most): so
    the interval of their mean is that of the ratio, to first order.

    effect: [p, s].
    most: [p, s]; their mean is above 0, else there are no shares.
    limits: the least and the greatest possible effect; None if that is not known.
    """
    there = ~np.isnan(effect) & ~np.isnan(most)
    prompts, seeds = np.nonzero(there)
    some, possible = effect[there], most[there]
    scale = _mean_of_prompts(possible, prompts) if len(some) else 0.0
    if not scale > 0:
        nothing = np.zeros(0)
        return Shares(nothing, nothing, nothing, None)
    ratio = _mean_of_prompts(some, prompts) / scale
    values = ratio + (some - ratio * possible) / scale
    if limits is not None:
        taken = ratio * possible.min(), ratio * possible.max()
        low, high = ratio + (limits[0] - max(taken)) / scale, ratio + (limits[1] - min(taken)) / scale
        limits = min(low, float(values.min())), max(high, float(values.max()))  # but for rounding, inside anyway
    return Shares(values, prompts, seeds, limits)


def compare_controls(
    top: np.ndarray,
    controls: Mapping[str, np.ndarray],
    most: np.ndarray,
    bound: float = Thresholds().bound,
    limits: tuple[float, float] | None = LIMITS,
) -> Answer:
    """Whether channels exceed every control by more than a bound, some control by less, or neither is shown.

    >>> rng = np.random.default_rng(0)
    >>> lost, noise = rng.uniform(0.3, 0.5, (16, 2)), rng.uniform(0, 0.1, (16, 2))
    >>> compare_controls(lost, {"bottom": noise}, np.ones((16, 2))).says
    'yes'
    >>> compare_controls(noise, {"bottom": noise[::-1]}, np.ones((16, 2))).says
    'no'

    top: effects of the channels, [p, s].
    controls: name -> effects of equally many others, [p, s], draws averaged.
    most: the most that could be had, [p, s].
    bound: share that counts as an effect.
    limits: of a difference of two effects; None if they are not known.
    """
    excess = {name: take_shares(top - control, most, limits) for name, control in controls.items()}
    if not excess:
        return Answer(UNDECIDED, "there are no controls")
    raw = {name: one.p_at(bound) for name, one in excess.items()}
    p = dict(zip(raw, holm(list(raw.values())), strict=True))
    sign = {name: np.sign(one.mean - bound) for name, one in excess.items()}
    below = [name for name in p if sign[name] < 0 and p[name] <= LEVEL]
    if below:
        control = min(below, key=lambda name: (p[name], excess[name].mean))
        return Answer("no", f"at most {bound:g} more than {control}", control, p[control])
    if all(sign[name] > 0 and p[name] <= LEVEL for name in p):
        control = min(p, key=lambda name: excess[name].mean)
        return Answer("yes", f"more than {bound:g} beyond every control", control, p[control])
    unknown = [name for name in p if np.isnan(p[name])]
    open_ = unknown or [name for name in p if not (sign[name] > 0 and p[name] <= LEVEL)]
    control = min(open_, key=lambda name: np.nan_to_num(excess[name].mean, nan=-np.inf))
    if unknown:
        n = len(np.unique(excess[control].prompts))
        return Answer(UNDECIDED, f"{n} prompts give no interval against {control}", control)
    low, high = excess[control].interval()[1:]
    return Answer(UNDECIDED, f"{low:.2f} to {high:.2f} more than {control}", control, p[control])


def compare_parts(one: np.ndarray, other: np.ndarray, most: np.ndarray, bound: float = Thresholds().bound) -> str:
    """Which of two parts has the larger effect: "first", "second", "equal" within the bound, or "undecided".

    >>> compare_parts(np.full((8, 1), 0.9), np.linspace(0, 0.1, 8)[:, None], np.ones((8, 1)))
    'first'

    one, other: effects of the parts, [p, s].
    most: the most that could be had, [p, s].
    bound: share that counts as a difference.
    """
    _, low, high = take_shares(one - other, most).interval()
    if low > bound or high < -bound:
        return "first" if low > bound else "second"
    return "equal" if -bound <= low and high <= bound else UNDECIDED


def decide_necessity(
    top: np.ndarray, controls: Mapping[str, np.ndarray], most: np.ndarray, readable: float, thresholds: Thresholds
) -> Answer:
    """Whether a prompt's attributes need the channels.

    top: share of the attributes that is lost without the channels, [p, s]; NaN in images that are not readable.
    controls: name -> the same without equally many others.
    most: share of the attributes that the untouched image shows, [p, s].
    readable: share of the images that are readable without the channels.
    thresholds: what counts.
    """
    if not readable >= thresholds.readable:
        return Answer(UNDECIDED, f"only {readable:.0%} of the images are readable without them")
    return compare_controls(top, controls, most, thresholds.bound)


def decide_sufficiency(
    top: np.ndarray,
    controls: Mapping[str, np.ndarray],
    every: np.ndarray,
    missing: np.ndarray,
    readable: float,
    thresholds: Thresholds,
    alone: np.ndarray | None = None,
) -> Answer:
    """Whether moving the channels moves a source's attributes.

    top: share of the source's attributes that is gained, [p, s]; NaN in images that are not readable.
    controls: name -> the same for equally many others.
    every: the same for all channels, and what reaches the prediction beside them: the most that can be moved.
    missing: share of the source's attributes that the untouched target lacks, [p, s].
    readable: share of the images that are readable with the channels moved.
    thresholds: what counts.
    alone: the same for all channels and nothing beside them; None where nothing is. What even these do not move says no
      word against some of them.
    """
    ceiling = take_shares(every, missing).mean
    if not ceiling >= thresholds.ceiling:
        return Answer(
            UNDECIDED, f"moving all channels gains {ceiling:.2f} of what is missing, below {thresholds.ceiling:g}"
        )
    if not readable >= thresholds.readable:
        return Answer(UNDECIDED, f"only {readable:.0%} of the images are readable with them moved")
    answer = compare_controls(top, controls, every, thresholds.bound)
    reached = ceiling if alone is None else take_shares(alone, missing).mean
    if answer.says == "no" and not reached >= thresholds.ceiling:
        why = f"{answer.why}, but all channels of these sites alone gain {reached:.2f}, below {thresholds.ceiling:g}"
        return Answer(UNDECIDED, why, answer.control, answer.p)
    return answer


def name_cell(necessity: str, sufficiency: str) -> str:
    """The verdict of two answers.

    >>> name_cell("yes", "no"), name_cell("yes", "undecided")
    ('necessary, not movable', 'undecided')
    """
    return CELLS.get((necessity, sufficiency), UNDECIDED)


def _mean_of_prompts(values: np.ndarray, prompts: np.ndarray) -> float:
    count = np.bincount(prompts)
    return float((np.bincount(prompts, values)[count > 0] / count[count > 0]).mean())
