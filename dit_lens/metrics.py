"""How far pictures lie apart, and how sure a mean is.

Pictures are PIL images, or arrays and tensors of uint8 in [0, 255] or floats in [0, 1]. Distances are in grey
levels, 0 to 255, whatever the pictures came as. Intervals are (mean, low, high).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from scipy.stats import norm

from dit_lens.errors import OpError, nearest
from dit_lens.perceptual import Clip, clip_judge, lpips, ssim
from dit_lens.pixels import array, per_pair

__all__ = [
    "DISTANCES",
    "Clip",
    "Distance",
    "Interval",
    "bootstrap_ci",
    "clip_judge",
    "distances",
    "lpips",
    "mean_abs",
    "paired_difference_ci",
    "psnr",
    "rmse",
    "ssim",
    "wilson",
]

Distance = Callable[[Any, Any], Any]

LEVELS = 255


class Interval(NamedTuple):
    """An estimate with the bounds of its confidence interval; bounds are NaN where the data cannot give any."""

    mean: float
    low: float
    high: float


def rmse(a: Any, b: Any) -> float | np.ndarray:
    """Root mean square difference in grey levels: 0 for equal pictures, 255 for black and white.

    >>> black, white = np.zeros((2, 2, 3), np.uint8), np.full((2, 2, 3), 255, np.uint8)
    >>> rmse(black, white)
    255.0
    >>> rmse([black, black], [black, white]).tolist()
    [0.0, 255.0]

    Returns a float for a pair of pictures and float64 [b] for two lists or two batches of four dimensions.
    a, b: pictures of one size and layout. Raises OpError when sizes, numbers or ranges differ.
    """
    return per_pair(a, b, lambda x, y: LEVELS * _rmse(x, y))


def psnr(a: Any, b: Any) -> float | np.ndarray:
    """Peak signal-to-noise ratio in dB, -20 log10(rmse / 255); infinite for equal pictures. Takes what ``rmse`` takes.

    >>> psnr(np.zeros((2, 2)), np.full((2, 2), 0.1))
    20.0
    """
    return per_pair(a, b, lambda x, y: -20 * math.log10(error) if (error := _rmse(x, y)) else math.inf)


def mean_abs(a: Any, b: Any) -> float | np.ndarray:
    """Mean absolute difference in grey levels, 0 to 255. Takes and returns as ``rmse``.

    >>> mean_abs(np.zeros((1, 2)), np.array([[0.5, 1.0]]))
    191.25
    """
    return per_pair(a, b, lambda x, y: LEVELS * float(np.abs(x - y).mean()))


DISTANCES: dict[str, Distance] = {"rmse": rmse, "psnr": psnr, "mean_abs": mean_abs, "ssim": ssim, "lpips": lpips}


def distances(chosen: str | Distance | Sequence[str | Distance]) -> dict[str, Distance]:
    """Distances by the names of their columns; each is tried on two small pictures, so that a mistake shows here.

    >>> def darkest(a, b):
    ...     return float(min(np.min(a), np.min(b)))
    >>> list(distances(["rmse", darkest]))
    ['rmse', 'darkest']

    chosen: names in ``DISTANCES``, or functions of two pictures (PIL) that return a number.
    Raises OpError for unknown names, what needs a package that is not installed, and functions that return no number.
    """
    found: dict[str, Distance] = {}
    for one in [chosen] if isinstance(chosen, str) or callable(chosen) else chosen:
        if isinstance(one, str) and one not in DISTANCES:
            raise OpError(f"There is no distance {one!r}.{nearest(one, DISTANCES)} A function of two pictures will do.")
        name = one if isinstance(one, str) else getattr(one, "__name__", type(one).__name__)
        found[name] = DISTANCES[one] if isinstance(one, str) else one
    black, grey = (Image.new("RGB", (64, 64), (level,) * 3) for level in (0, 128))
    for name, distance in found.items():
        if not np.isscalar(answer := distance(black, grey)) or isinstance(answer, str):
            raise OpError(f"The distance {name!r} of two pictures is to be a number, and it returned {answer!r}.")
    return found


def bootstrap_ci(values: Any, groups: Any = None, seed: int = 0, n: int = 2000, level: float = 0.95) -> Interval:
    """The mean over prompts with its hierarchical bootstrap interval.

    >>> [round(x, 2) for x in bootstrap_ci([[0.125, 0.25], [0.5, 0.625]])]
    [0.38, 0.16, 0.59]
    >>> bootstrap_ci([[0.1]])  # one value: no interval, and none is made up
    Interval(mean=0.1, low=nan, high=nan)

    values: [prompts, seeds]; or, where prompts have unequal numbers of seeds, [m] with groups. Finite. Give paired
        differences where arms share prompts and seeds (``paired_difference_ci``).
    groups: [m], the prompt of each value. Every prompt weighs the same, however many seeds it has.
    seed: of the resampling. n: resamples. level: coverage, between 0 and 1.
    With one prompt the interval speaks of its seeds only; with one seed per prompt, of prompts only.
    Raises OpError for NaN or infinite values and shapes that do not fit.
    Source: percentile interval of the hierarchical bootstrap (Saravanan, Berman & Sober 2020): prompts are drawn with
    replacement, then seeds within each drawn prompt.
    """
    _check_level(level)
    if n < 1:
        raise OpError(f"n={n} resamples were asked. Take 1,000 or more.")
    rows, counts = _by_prompt(np.asarray(array(values), dtype=np.float64), groups)
    mean = float((rows.sum(1) / counts).mean())
    if rows.size == 1:
        return Interval(mean, math.nan, math.nan)
    rng = np.random.default_rng(seed)
    prompts = rng.integers(len(rows), size=(n, len(rows), 1))
    drawn = (rng.random((n, *rows.shape)) * counts[prompts]).astype(np.int64)  # [n, prompts, seeds]
    # Rows are padded to the longest; as many seeds are drawn as the drawn prompt has.
    kept = np.arange(rows.shape[1]) < counts[prompts]
    means = (np.where(kept, rows[prompts, drawn], 0).sum(2) / counts[prompts[..., 0]]).mean(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, float(low), float(high))


def paired_difference_ci(a: Any, b: Any, seed: int = 0, n: int = 2000, level: float = 0.95) -> Interval:
    """The mean of a - b with its interval, over pairs that share prompt and seed.

    >>> paired_difference_ci([[0.5, 0.75], [1.0, 1.25]], [[0.25, 0.5], [0.75, 1.0]])
    Interval(mean=0.25, low=0.25, high=0.25)

    a, b: [prompts, seeds], the same prompts and seeds in the same order. The rest as in ``bootstrap_ci``.
    """
    first, second = (np.asarray(array(x), dtype=np.float64) for x in (a, b))
    if first.shape != second.shape:
        raise OpError(
            f"Pairs need equal shapes, and got {first.shape} and {second.shape}. Run both arms on the same seeds."
        )
    with np.errstate(invalid="ignore"):  # two infinite PSNRs differ by NaN, which bootstrap_ci refuses
        difference = first - second
    return bootstrap_ci(difference, seed=seed, n=n, level=level)


def wilson(successes: int, n: int, level: float = 0.95) -> Interval:
    """A proportion with its Wilson score interval, which stays inside [0, 1] and works for 0 and n successes.

    >>> [round(x, 3) for x in wilson(9, 10)]
    [0.9, 0.596, 0.982]

    successes: 0 to n. n: trials, at least 1. Source: Wilson (1927), without continuity correction.
    """
    _check_level(level)
    if n < 1 or not 0 <= successes <= n:
        raise OpError(f"{successes} successes of {n} trials were given. Give n >= 1 and successes from 0 to n.")
    z = float(norm.ppf((1 + level) / 2))
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    # At 0 and n successes the bounds are 0 and 1 exactly; rounding would leave them a hair off.
    return Interval(p, 0.0 if successes == 0 else centre - half, 1.0 if successes == n else centre + half)


def _rmse(a: np.ndarray, b: np.ndarray) -> float:
    return math.sqrt(float(np.square(a - b).mean()))


def _by_prompt(values: np.ndarray, groups: Any) -> tuple[np.ndarray, np.ndarray]:
    """Values as [prompts, seeds], padded with 0, and the number of seeds of each prompt."""
    _check_finite(values)
    if groups is None:
        if values.ndim != 2:
            raise OpError(
                f"Values are [prompts, seeds], and got {list(values.shape)}. With one seed per prompt write "
                "values[:, None]; with unequal numbers of seeds give groups."
            )
        return values, np.full(len(values), values.shape[1])
    labels = array(groups)
    if values.ndim != 1 or labels.shape != values.shape:
        raise OpError(
            f"With groups, values and groups are [m] alike, and got {list(values.shape)} and {list(labels.shape)}. "
            "Name the prompt of every value."
        )
    _, prompt, counts = np.unique(labels, return_inverse=True, return_counts=True)
    rows = np.zeros((len(counts), counts.max()))
    for i in range(len(counts)):
        rows[i, : counts[i]] = values[prompt == i]
    return rows, counts


def _check_finite(values: np.ndarray) -> None:
    if not values.size:
        raise OpError("There are no values to average. Give [prompts, seeds] with at least one of each.")
    if not np.isfinite(values).all():
        where = np.argwhere(~np.isfinite(values))[0].tolist()
        raise OpError(
            f"{int((~np.isfinite(values)).sum())} of {values.size} values are NaN or infinite, the first at {where}. "
            "Leave them out by name, or use rmse instead of psnr, which is infinite for equal pictures."
        )


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise OpError(f"level={level} is no coverage. Choose between 0 and 1, as in 0.95.")
