"""Statistics over channels: how concentrated scores are, how far sets overlap, and running figures of any length.

Pure: tensors in, numbers out. Letters: d channel, k chosen channels.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from dit_lens.errors import OpError


def jaccard(a: Iterable[int], b: Iterable[int]) -> float:
    """Shared channels over all channels of two sets; 1 for two empty sets.

    >>> jaccard([1, 2, 3], [2, 3, 4])
    0.5
    """
    first, second = set(a), set(b)
    return len(first & second) / len(first | second) if first | second else 1.0


def energy_share(energy: Tensor, channels: Iterable[int]) -> float:
    """The share of squared energy that some channels hold; 0 where there is no energy.

    >>> energy_share(torch.tensor([6.0, 1.0, 1.0]), [0])
    0.75

    energy: [d], mean square per channel, not negative. channels: indices, each once.
    Source: SPARK's concentration measure (8 channels hold 68.8 % of the hidden-stream energy of its model).
    """
    values = vector(energy, "The energy").double()
    chosen = list(channels)
    if any(not 0 <= c < len(values) for c in chosen):
        raise OpError(f"The energy has channels 0 to {len(values) - 1}; got {chosen}.")
    total = float(values.sum())
    return float(values[chosen].sum()) / total if total else 0.0


def top_median_ratio(scores: Tensor) -> float:
    """The highest score over the median score.

    >>> top_median_ratio(torch.tensor([1.0, 2.0, 50.0]))
    25.0

    scores: [d], not negative. Infinite when the median is 0, and NaN when every score is.
    Source: Sun et al., arXiv 2402.17762, call about 1,000 massive (with |x| > 100) in language models.
    """
    values = vector(scores, "The scores")
    return ratio(float(values.max()), median_of(values))


def gini(values: Tensor) -> float:
    """How unequally values are spread over channels: 0 when all are equal, (d - 1) / d when one holds everything.

    >>> gini(torch.tensor([0.0, 0.0, 0.0, 4.0]))
    0.75

    values: [d], not negative. All zero counts as equal. Raises OpError for negative values.
    Source: Gini's mean difference over twice the mean, in its sorted form.
    """
    ordered = vector(values, "The values").double().sort().values
    if float(ordered[0]) < 0:
        raise OpError("The Gini coefficient is defined for values >= 0. Take magnitudes or energies first.")
    total, d = float(ordered.sum()), len(ordered)
    index = torch.arange(1, d + 1, dtype=torch.float64)
    return float((2 * index - d - 1) @ ordered) / (d * total) if total else 0.0


def mad_outliers(scores: Tensor, threshold: float = 1000.0) -> tuple[int, ...]:
    """Channels whose score lies more than ``threshold`` median absolute deviations above the median, highest first.

    >>> mad_outliers(torch.tensor([1.0, 2.0, 3.0, 9000.0]))
    (3,)

    scores: [d]. The deviation is the plain median of |score - median|, without the factor 1.4826 of normal data.
    Where it is 0 every score above the median is an outlier.
    """
    values = vector(scores, "The scores").double()
    median = median_of(values)
    above = values - median
    return tuple(c for c in ranked(values, descending=True) if above[c] > threshold * median_of(above.abs()))


def share_holders(scores: Tensor, energy: Tensor, share: float) -> tuple[int, ...]:
    """As few of the channels with the highest scores as hold a share of the energy, highest first.

    >>> share_holders(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([9.0, 1.0, 4.0]), share=0.65)
    (0, 2)

    scores, energy: [d]. share: in (0, 1]. No channel where there is no energy.
    """
    order, values = ranked(scores, descending=True), vector(energy, "The energy").double()
    held = values[list(order)].cumsum(0)
    if not float(held[-1]):
        return ()
    # The last entry is the whole, which rounding must not put out of reach.
    return order[: int((held < min(share * float(held[-1]), float(held[-1]))).sum()) + 1]


def overlaps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The Jaccard overlap of sets of equal size, many at once.

    >>> overlaps(np.array([[0, 1], [2, 3]]), np.array([1, 2]))
    array([0.33333333, 0.33333333])

    a, b: [..., k] channels, without repeats in a set, at least one; the leading axes broadcast.
    """
    shared = (a[..., :, None] == b[..., None, :]).any(-1).sum(-1)
    return shared / (a.shape[-1] + b.shape[-1] - shared)


def chance_jaccard(k: int, width: int) -> float:
    """The Jaccard overlap that two random sets of k of ``width`` channels have on average.

    >>> round(chance_jaccard(12, 128), 3), chance_jaccard(5, 5)
    (0.051, 1.0)
    """
    from scipy.stats import hypergeom

    shared = np.arange(k + 1)
    return float((hypergeom.pmf(shared, width, k, k) * shared / (2 * k - shared)).sum())


class RunningStats:
    """Mean, mean square, least and greatest of every channel over any number of batches, in constant memory.

    >>> stats = RunningStats()
    >>> stats.update(torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
    >>> stats.update(torch.tensor([[5.0, 6.0]]))
    >>> stats.count, stats.mean.tolist(), stats.max.tolist()
    (3, [3.0, 2.0], [5.0, 6.0])

    Every statistic is [d] in float64 on the CPU. Source: the parallel update of Chan, Golub & LeVeque (1979), which
    keeps the variance of channels with a mean far from 0, where E[x^2] - E[x]^2 would cancel.
    """

    # Rows that become float64 at a time, in elements: bounds the scratch memory at 8 MB a copy.
    _CHUNK = 2**20

    def __init__(self) -> None:
        self.count = 0
        self._mean = self._square_deviations = self._min = self._max = torch.empty(0, dtype=torch.float64)

    def update(self, x: Tensor) -> None:
        """Adds a batch [*, d] of any floating dtype on any device. Raises OpError when d is not that of the others."""
        if x.ndim == 0 or not x.is_floating_point():
            raise OpError(f"Running statistics take floating-point values [*, d], and got {x.dtype} {list(x.shape)}.")
        rows = x.detach().reshape(-1, x.shape[-1])
        for part in rows.split(max(1, self._CHUNK // max(1, x.shape[-1]))):
            if len(part):
                # Apple's GPUs have no float64.
                self.merge(self._of((part.cpu() if part.device.type == "mps" else part).double()))

    def merge(self, other: RunningStats) -> None:
        """Adds everything that ``other`` has seen. Raises OpError when the two count different channels."""
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
        """[d], over all values seen."""
        return self._seen(self._mean)

    @property
    def variance(self) -> Tensor:
        """[d], of all values seen: squared deviations over their count."""
        return self._seen(self._square_deviations) / self.count

    @property
    def mean_square(self) -> Tensor:
        """[d]: the energy that ChannelSet takes."""
        return self.mean.square() + self.variance

    @property
    def min(self) -> Tensor:
        """[d], the least value seen."""
        return self._seen(self._min)

    @property
    def max(self) -> Tensor:
        """[d], the greatest value seen."""
        return self._seen(self._max)

    def __repr__(self) -> str:
        return f"RunningStats: {self.count} values of each of {len(self._mean)} channels"

    def _seen(self, values: Tensor) -> Tensor:
        if self.count == 0:
            raise OpError("These statistics have seen no values. Call update(x) first.")
        return values

    @staticmethod
    def _of(rows: Tensor) -> RunningStats:
        stats = RunningStats()
        stats.count = len(rows)
        mean = rows.mean(0)
        stats._mean, stats._square_deviations = mean.cpu(), (rows - mean).square().sum(0).cpu()
        stats._min, stats._max = rows.amin(0).cpu(), rows.amax(0).cpu()
        return stats


def vector(values: Tensor, what: str) -> Tensor:
    """A float32 copy on the CPU of one finite number per channel."""
    vector = torch.as_tensor(values).detach().to("cpu", torch.float32, copy=True)
    if vector.ndim != 1 or not len(vector):
        raise OpError(f"{what} must be one number per channel, [d], and have shape {list(vector.shape)}.")
    if not bool(vector.isfinite().all()):
        bad = (~vector.isfinite()).nonzero()[:8, 0].tolist()
        raise OpError(
            f"{what} are not finite, first in channels {bad}. The run overflowed: repeat it in float32 or bfloat16."
        )
    return vector


def ranked(scores: Tensor, *, descending: bool) -> tuple[int, ...]:
    """Channels in the order of their scores."""
    # Stable, so that equal scores go to the lower channel on every machine; torch.topk promises no order.
    return tuple(vector(scores, "The scores").sort(descending=descending, stable=True).indices.tolist())


def median_of(values: Tensor) -> float:
    """The median, which between two middle values is their mean."""
    # torch.median takes the lower of two middle values, numpy their mean.
    return float(np.median(values.double().numpy()))


def ratio(value: float, median: float) -> float:
    """A value over a median: infinite over 0, and NaN where both are 0."""
    return value / median if median else float("inf") if value else float("nan")
