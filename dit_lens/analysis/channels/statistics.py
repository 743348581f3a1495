"""Statistics over channels: concentration of scores, overlap of sets, and running statistics over many batches.

Tensors in, numbers out. Letters: d channel, k chosen channels.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from dit_lens.arguments.checks import checked
from dit_lens.errors import OpError


@checked
def jaccard(a: Iterable[int], b: Iterable[int]) -> float:
    """Returns the Jaccard index of two sets of channels, |a & b| / |a | b|; 1 if both are empty.

    >>> jaccard([1, 2, 3], [2, 3, 4])
    0.5

    a, b: numbers of channels, from 0 up: of how many they are is not known here, so none can count from the end.
    Source: Jaccard (1912); equal to ``sklearn.metrics.jaccard_score`` of the two membership vectors.
    """
    first, second = set(a), set(b)
    if odd := sorted(c for c in first | second if c < 0):
        raise OpError(
            f"channel {odd[0]} counts from the end, but of how many channels is not known. Number them from 0 up, or "
            "compare by ChannelSet.jaccard, which knows the width."
        )
    return len(first & second) / len(first | second) if first | second else 1.0


def count_from_start(channels: Iterable[int], width: int, owner: str) -> list[int]:
    """Numbers of channels, negative ones counted from the end; OpError if one does not exist or is named twice.

    >>> count_from_start([-1, 0], 4, "The energy")
    [3, 0]

    channels: the numbers.
    width: how many channels there are.
    owner: of what, for the message.
    """
    given = list(channels)
    if any(not -width <= c < width for c in given):
        raise OpError(f"{owner} has channels 0 to {width - 1}; got {given}. Negative ones count from the end.")
    found = [c % width for c in given]
    if len(set(found)) < len(found):
        raise OpError(f"{owner} has channels 0 to {width - 1}, each allowed once; got {given}.")
    return found


@checked
def energy_share(energy: Tensor, channels: Iterable[int]) -> float:
    """Returns the share of the energy that some channels hold; 0 if the total is 0.

    >>> energy_share(torch.tensor([6.0, 1.0, 1.0]), [0])
    0.75

    energy: [d], mean square of each channel, not negative. channels: indices, each at most once; negative ones count
    from the end.
    Source: the concentration measure of SPARK (8 channels hold 68.8 % of the hidden-stream energy of its model).
    """
    values = to_vector(energy, "The energy").double()
    chosen = count_from_start(channels, len(values), "The energy")
    total = float(values.sum())
    return float(values[chosen].sum()) / total if total else 0.0


@checked
def top_median_ratio(scores: Tensor) -> float:
    """Returns the highest score divided by the median score: infinite if the median is 0, NaN if all scores are 0.

    >>> top_median_ratio(torch.tensor([1.0, 2.0, 50.0]))
    25.0

    scores: [d], not negative.
    Source: Sun et al., arXiv 2402.17762, call a ratio of about 1,000 (with |x| > 100) massive in language models.
    """
    values = to_vector(scores, "The scores")
    return ratio(float(values.max()), median_of(values))


@checked
def gini(values: Tensor) -> float:
    """Returns the Gini coefficient: 0 if all values are equal, (d - 1) / d if one channel holds everything.

    >>> gini(torch.tensor([0.0, 0.0, 0.0, 4.0]))
    0.75

    values: [d], not negative; 0 if all of them are 0. Raises OpError for negative values.
    Source: Gini (1912): the mean absolute difference of all pairs, divided by twice the mean.
    """
    ordered = to_vector(values, "The values").double().sort().values
    if float(ordered[0]) < 0:
        raise OpError("The Gini coefficient is defined for values >= 0. Take magnitudes or energies first.")
    total, d = float(ordered.sum()), len(ordered)
    # For sorted x, sum_ij |x_i - x_j| = 2 sum_i (2i - d - 1) x_i, so that no pairs need to be formed.
    index = torch.arange(1, d + 1, dtype=torch.float64)
    return float((2 * index - d - 1) @ ordered) / (d * total) if total else 0.0


@checked
def mad_outliers(scores: Tensor, threshold: float = 1000.0) -> tuple[int, ...]:
    """Returns the channels with a score over ``threshold`` median absolute deviations above the median, highest first.

    >>> mad_outliers(torch.tensor([1.0, 2.0, 3.0, 9000.0]))
    (3,)

    scores: [d]. The deviation is the median of |score - median|, without the factor 1.4826 that makes it estimate the
    standard deviation of normal data: ``scipy.stats.median_abs_deviation`` with its default ``scale=1``. If it is 0,
    every score above the median is an outlier.
    """
    values = to_vector(scores, "The scores").double()
    median = median_of(values)
    above = values - median
    deviation = median_of(above.abs())
    return tuple(c for c in rank_channels(values, descending=True) if above[c] > threshold * deviation)


def select_share(scores: Tensor, energy: Tensor, share: float) -> tuple[int, ...]:
    """Returns the channels with the highest scores, as few as hold a share of the energy, highest first.

    >>> select_share(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([9.0, 1.0, 4.0]), share=0.65)
    (0, 2)

    scores, energy: [d]. share: in (0, 1]. Returns no channel if the total energy is 0.
    """
    order, values = rank_channels(scores, descending=True), to_vector(energy, "The energy").double()
    held = values[list(order)].cumsum(0)
    if not float(held[-1]):
        return ()
    # min() because rounding could put share * total above the total, which the last entry must reach.
    return order[: int((held < min(share * float(held[-1]), float(held[-1]))).sum()) + 1]


def overlaps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns the Jaccard index of many pairs of sets of equal size, as float64 [...].

    >>> overlaps(np.array([[0, 1], [2, 3]]), np.array([1, 2]))
    array([0.33333333, 0.33333333])

    a, b: int [..., k], the channels of each set, all different, k >= 1; the leading axes broadcast.
    """
    shared = (a[..., :, None] == b[..., None, :]).any(-1).sum(-1)
    return shared / (a.shape[-1] + b.shape[-1] - shared)


def chance_jaccard(k: int, width: int) -> float:
    """Returns the expected Jaccard index of two random sets of k out of ``width`` channels.

    >>> round(chance_jaccard(12, 128), 3), chance_jaccard(5, 5)
    (0.051, 1.0)
    """
    from scipy.stats import hypergeom

    # The number of shared channels is hypergeometric; with m of them the index is m / (2k - m).
    shared = np.arange(k + 1)
    return float((hypergeom.pmf(shared, width, k, k) * shared / (2 * k - shared)).sum())


class RunningStats:
    """Mean, variance, mean square, minimum and maximum of every channel over any number of batches, in constant memory.

    >>> stats = RunningStats()
    >>> stats.update(torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
    >>> stats.update(torch.tensor([[5.0, 6.0]]))
    >>> stats.count, stats.mean.tolist(), stats.max.tolist()
    (3, [3.0, 2.0], [5.0, 6.0])

    Every statistic is [d] in float64 on the CPU.
    Source: the parallel update of Chan, Golub & LeVeque (1979), which is accurate for the variance of channels with a
    mean far from 0, for which E[x^2] - E[x]^2 loses all digits.
    """

    # Elements that are converted to float64 at a time: limits the temporary memory to 8 MB per copy.
    CHUNK = 2**20

    def __init__(self) -> None:
        self.count = 0
        self._mean = self._square_deviations = self._min = self._max = torch.empty(0, dtype=torch.float64)

    @checked
    def update(self, x: Tensor) -> None:
        """Adds a batch [*, d] of any floating dtype on any device. Raises OpError if d differs from earlier batches."""
        if x.ndim == 0 or not x.shape[-1] or not x.is_floating_point():
            raise OpError(f"Running statistics take floating-point values [*, d], and got {x.dtype} {list(x.shape)}.")
        rows = x.detach().reshape(-1, x.shape[-1])
        for part in rows.split(max(1, self.CHUNK // max(1, x.shape[-1]))):
            if len(part):
                # Apple's GPUs have no float64.
                self.merge(self._compute((part.cpu() if part.device.type == "mps" else part).double()))

    @checked
    def merge(self, other: RunningStats) -> None:
        """Adds all values of ``other``. Raises OpError if the two have different numbers of channels."""
        if other.count == 0:
            return
        if self.count and len(self._mean) != len(other._mean):
            raise OpError(
                f"These statistics are over {len(self._mean)} channels and the new values have {len(other._mean)}. "
                "Keep one RunningStats per site."
            )
        if self.count == 0:
            self._mean, self._square_deviations = other._mean, other._square_deviations
            self._min, self._max = other._min, other._max
        else:
            total = self.count + other.count
            delta = other._mean - self._mean
            self._mean = self._mean + delta * (other.count / total)
            between = delta.square() * (self.count * other.count / total)
            self._square_deviations = self._square_deviations + other._square_deviations + between
            self._min, self._max = torch.minimum(self._min, other._min), torch.maximum(self._max, other._max)
        self.count += other.count

    @property
    def mean(self) -> Tensor:
        """[d], of all values."""
        return self._require_values(self._mean)

    @property
    def variance(self) -> Tensor:
        """[d], the population variance (``ddof=0``): the sum of squared deviations divided by the count."""
        return self._require_values(self._square_deviations) / self.count

    @property
    def mean_square(self) -> Tensor:
        """[d], the ``energy`` of a ChannelSet."""
        return self.mean.square() + self.variance

    @property
    def min(self) -> Tensor:
        """[d], the smallest value."""
        return self._require_values(self._min)

    @property
    def max(self) -> Tensor:
        """[d], the largest value."""
        return self._require_values(self._max)

    def __repr__(self) -> str:
        return f"RunningStats: {self.count} values of each of {len(self._mean)} channels"

    def _require_values(self, values: Tensor) -> Tensor:
        if self.count == 0:
            raise OpError("These statistics have seen no values. Call update(x) first.")
        return values

    @staticmethod
    def _compute(rows: Tensor) -> RunningStats:
        """Returns the statistics of rows [n, d] alone."""
        stats = RunningStats()
        stats.count = len(rows)
        mean = rows.mean(0)
        stats._mean, stats._square_deviations = mean.cpu(), (rows - mean).square().sum(0).cpu()
        stats._min, stats._max = rows.amin(0).cpu(), rows.amax(0).cpu()
        return stats


def to_vector(values: Tensor, what: str) -> Tensor:
    """Copies one finite number per channel, [d], to float32 on the CPU. what: name of the values in errors."""
    vector = torch.as_tensor(values).detach().to("cpu", torch.float32, copy=True)
    if vector.ndim != 1 or not len(vector):
        raise OpError(f"{what} must be one number per channel, [d], but have shape {list(vector.shape)}.")
    if not bool(vector.isfinite().all()):
        bad = (~vector.isfinite()).nonzero()[:8, 0].tolist()
        raise OpError(
            f"{what} are not finite, first in channels {bad}. The run overflowed: repeat it in float32 or bfloat16."
        )
    return vector


def rank_channels(scores: Tensor, *, descending: bool) -> tuple[int, ...]:
    """Returns all channels in the order of their scores."""
    # A stable sort puts the lower of two channels with equal scores first on every machine; torch.topk does not.
    return tuple(to_vector(scores, "The scores").sort(descending=descending, stable=True).indices.tolist())


def median_of(values: Tensor) -> float:
    """Returns the median; for an even number of values, the mean of the two in the middle."""
    # torch.median returns the lower of the two.
    return float(np.median(values.double().numpy()))


def ratio(value: float, median: float) -> float:
    """Returns value / median: infinite if only the median is 0, NaN if both are 0."""
    return value / median if median else float("inf") if value else float("nan")
