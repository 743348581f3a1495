"""Clusters image tokens by the values of chosen channels, turns a cluster into a mask, and compares masks.

Independent of any model: numpy arrays or tensors in, numpy arrays out. Letters: n image token, k chosen channels, h w
token grid, H W image in pixels, m masks, t true masks, p prompts.

Method: Claim 2 of arXiv 2605.13974 with the settings of its public reproduction (min-max normalisation per channel,
K-means with K = 2, the cluster with the larger mean heat is the foreground); each of them is an argument here. Which
cluster is in front is decided by the border unless "heat" is asked for, since massive channels may be negative.
"""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from scipy.stats import hypergeom

from dit_lens.analysis.arrays import border_of, to_numpy
from dit_lens.analysis.two_means import two_means
from dit_lens.arguments.checks import checked
from dit_lens.arguments.numbers import check_number
from dit_lens.errors import OpError, check_choice, show

LARGEST = 2**28  # pixels of a mask: 16,384 x 16,384
MOST_PERMUTATIONS = 1_000_000

METHODS = ("minmax", "robust")
POLARITIES = ("border", "heat")

# A cluster with a smaller share of the tokens consists of a few outliers and is not a region of the image.
DEGENERATE_SHARE = 0.01

# Up to this many prompts a permutation test goes through all orders (6! = 720).
_EXHAUSTIVE = 6


@dataclass(frozen=True, eq=False, repr=False)
class Segmentation:
    """The clusters of one site's tokens, and the mask that they give.

    mask: bool [h, w], the foreground.
    labels: int [h, w], the cluster of each token, numbered from the lowest mean heat.
    sizes: number of tokens in each cluster.
    degenerate: whether a cluster has less than 1 % of the tokens, so that the mask is not meaningful.
    heat: float64 [h, w], the sum of the normalised channels, from 0 to k.
    """

    mask: np.ndarray
    labels: np.ndarray
    sizes: tuple[int, ...]
    degenerate: bool
    heat: np.ndarray

    def __repr__(self) -> str:
        h, w = self.mask.shape
        found = f"foreground {int(self.mask.sum())} of {h * w} tokens, clusters {self.sizes}"
        flag = ", DEGENERATE: a cluster under 1 % of the tokens" if self.degenerate else ""
        return f"Segmentation: grid {h} x {w}, {found}{flag}"


@checked
def segment(
    x: Any,
    grid: tuple[int, ...],
    *,
    n_clusters: int = 2,
    polarity: str = "border",
    method: str = "minmax",
    seed: int = 0,
) -> Segmentation:
    """Clusters the tokens of one image and chooses the foreground.

    >>> image = np.outer([0, 0, 1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 0, 0, 0])
    >>> found = segment(image.reshape(64, 1), (8, 8))
    >>> found
    Segmentation: grid 8 x 8, foreground 9 of 64 tokens, clusters (55, 9)
    >>> iou(found.mask, image > 0)
    1.0

    x: [n, k], the chosen channels of the image tokens, row by row.
    grid: (h, w) with h * w == n.
    n_clusters: number of clusters, as in :func:`cluster`.
    polarity: "border" or "heat", as in :func:`foreground`. A massive channel that is negative on the subject inverts
      the heat; "border" is unaffected.
    method: "minmax" or "robust", as in :func:`normalise`.
    seed: seed of K-means.
    Raises OpError for values, grids or settings that do not fit.
    """
    tokens = _to_tokens(x)
    _check_grid(grid, len(tokens))
    check_choice(polarity, POLARITIES, "polarity")
    heat = normalise(tokens, method).sum(1)
    labels = cluster(tokens, n_clusters, seed, method)
    sizes = tuple(np.bincount(labels, minlength=n_clusters).tolist())
    return Segmentation(
        mask=foreground(labels, heat, grid, polarity),
        labels=labels.reshape(grid),
        sizes=sizes,
        degenerate=min(sizes) < DEGENERATE_SHARE * len(tokens),
        heat=heat.reshape(grid),
    )


@checked
def normalise(x: Any, method: str = "minmax") -> np.ndarray:
    """Scales every channel to [0, 1] over the tokens; a constant channel becomes 0.

    >>> normalise([[1.0, 7.0], [3.0, 7.0], [2.0, 7.0]]).tolist()
    [[0.0, 0.0], [1.0, 0.0], [0.5, 0.0]]

    Returns float64 [n, k].
    x: [n, k], finite.
    method: "minmax" as in ``sklearn.preprocessing.MinMaxScaler``, or "robust", which first clips each channel to its
      1st and 99th percentile over tokens, so that a few outlier tokens do not compress the range of the others.
    """
    check_choice(method, METHODS, "method")
    tokens = _to_tokens(x)
    if method == "robust":
        tokens = np.clip(tokens, *np.percentile(tokens, [1, 99], axis=0))
    low, high = tokens.min(0), tokens.max(0)
    return np.divide(tokens - low, high - low, out=np.zeros_like(tokens), where=high > low)


@checked
def cluster(x: Any, n_clusters: int = 2, seed: int = 0, method: str = "minmax") -> np.ndarray:
    """Clusters tokens by K-means in the space of their normalised channels.

    >>> cluster([[0.0], [10.0], [0.2], [9.0]]).tolist()
    [0, 1, 0, 1]

    Returns int [n], the cluster of each token; clusters are numbered by mean heat (the sum of the normalised channels),
    from the lowest. If there are fewer distinct tokens than clusters, some clusters are empty.

    x: [n, k], the channels of the tokens.
    n_clusters: number of clusters, 2 to n.
    seed: seed of K-means (``sklearn.cluster.KMeans``), which keeps the best of 10 starts; below 2**32.
    method: "minmax" or "robust", as in :func:`normalise`.
    """
    values = normalise(x, method)
    check_number("seed", seed, 0, 2**32 - 1)
    if not 2 <= n_clusters <= len(values):
        raise OpError(
            f"n_clusters={n_clusters} was asked for, but there are {len(values)} tokens. Choose 2 to {len(values)}."
        )
    labels = two_means(values, seed) if n_clusters == 2 else None
    if labels is None:
        labels = _ask_sklearn(values, n_clusters, seed)
    order = np.argsort(_mean_heat(labels, values.sum(1), n_clusters), kind="stable")
    return np.argsort(order)[labels]


def _ask_sklearn(values: np.ndarray, n_clusters: int, seed: int) -> np.ndarray:
    from sklearn.cluster import KMeans  # takes a second to import, which the rest of dit_lens does not need
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        # sklearn warns of fewer distinct tokens than clusters; here Segmentation.sizes and .degenerate show it.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return KMeans(n_clusters, n_init=10, random_state=seed).fit_predict(values)


@checked
def foreground(labels: Any, heat: Any, grid: tuple[int, ...], polarity: str = "border") -> np.ndarray:
    """Chooses the foreground among clusters.

    >>> foreground([0, 1, 1, 0], [0.1, 0.9, 0.7, 0.2], (2, 2), "heat").tolist()
    [[False, True], [True, False]]

    Returns the mask, bool [h, w].
    labels: int [n] or [h, w], the cluster of each token.
    heat: [n] or [h, w], the heat of each token.
    grid: (h, w) with h * w == n.
    polarity: "border": the cluster with the most tokens on the border of the grid is the background (if equal, the one
      with the lower mean heat), and all others are the foreground. "heat": the cluster with the highest mean heat is
      the foreground.
    """
    check_choice(polarity, POLARITIES, "polarity")
    names, numbers = np.unique(to_numpy(labels).ravel(), return_inverse=True)
    heats = to_numpy(heat).ravel()
    _check_grid(grid, numbers.size)
    if heats.size != numbers.size:
        raise OpError(f"There are {numbers.size} labels and {heats.size} values of heat. Give one of each per token.")
    means = _mean_heat(numbers, heats, len(names))
    if polarity == "heat":
        return (numbers == means.argmax()).reshape(grid)
    on_border = np.bincount(numbers[border_of(grid).ravel()], minlength=len(names))
    background = np.lexsort((means, -on_border))[0]
    return (numbers != background).reshape(grid)


@checked
def upsample(mask: Any, size: tuple[int, int]) -> np.ndarray:
    """Enlarges a token grid to the size of an image by nearest-neighbour interpolation, for any dtype.

    >>> upsample(np.array([[True, False]]), (2, 4)).tolist()
    [[True, True, False, False], [True, True, False, False]]

    mask: [h, w]. size: (H, W) of the image, in pixels. Pixel centres are aligned, as in the mode "nearest-exact" of
    ``torch.nn.functional.interpolate``.
    """
    grid = to_numpy(mask)
    if grid.ndim != 2 or not grid.size or min(size) < 1:
        raise OpError(f"upsample takes a grid [h, w] and a size of at least 1 x 1; got {grid.shape} and {size}.")
    _check_pixels(size)
    # The centre of pixel i of N lies in cell floor((i + 1/2) n / N).
    rows, columns = ((2 * np.arange(to) + 1) * n // (2 * to) for n, to in zip(grid.shape, size, strict=True))
    return grid[rows[:, None], columns]


@checked
def to_grid(mask: Any, grid: tuple[int, int]) -> np.ndarray:
    """Reduces a mask in pixels to the token grid: a token is inside if at least half of its pixels are.

    >>> to_grid(np.eye(4, dtype=bool), (2, 2)).tolist()
    [[True, False], [False, True]]

    Returns bool [h, w]. mask: bool [H, W], such as a drawing or a segmentation, of any size. grid: (h, w), such as
    ``run.grid``.
    """
    h, w = grid
    if min(grid) < 1:
        raise OpError(f"grid={grid} has no tokens. Give (h, w) of the run, such as run.grid.")
    _check_pixels(grid)
    pixels = _to_mask(mask, "mask")
    if pixels.ndim != 2 or not pixels.size:
        raise OpError(f"to_grid takes a mask [H, W] of at least one pixel; got shape {list(pixels.shape)}.")
    covered = Image.fromarray(pixels.astype(np.float32)).resize((w, h), Image.Resampling.BOX)
    return np.asarray(covered) >= 0.5


@checked
def iou(a: Any, b: Any) -> float:
    """Returns the intersection over union of two masks; 1 if both are empty.

    >>> iou(np.array([True, True, False]), np.array([True, False, False]))
    0.5

    a, b: bool arrays of the same shape. Raises OpError for other dtypes (a map of labels is not a mask) and for
    different shapes.
    """
    first, second = _to_mask(a, "a"), _to_mask(b, "b")
    if first.shape != second.shape:
        raise OpError(
            f"The masks have shapes {first.shape} and {second.shape}. "
            "Bring the token grid to the image with upsample(mask, size)."
        )
    union = int((first | second).sum())
    return int((first & second).sum()) / union if union else 1.0


@checked
def ious(masks: Any, truths: Any) -> np.ndarray:
    """Returns the IoU of every mask on a token grid with every true mask in pixels, as float64 [m, t].

    >>> mask = np.array([[True, False]])
    >>> ious([mask, ~mask], [upsample(mask, (4, 4))]).tolist()
    [[1.0], [0.0]]

    masks: bool [m, h, w], compared as :func:`upsample` enlarges them. truths: bool [t, H, W].
    """
    found, true = _to_mask(masks, "masks"), _to_mask(truths, "truths")
    if found.ndim != 3 or true.ndim != 3:
        raise OpError(f"ious takes masks [m, h, w] and truths [t, H, W]; got shapes {found.shape} and {true.shape}.")
    # Counting true pixels per token first turns all intersections into one matrix product, without enlarging any mask.
    n = found[0].size
    token = upsample(np.arange(n).reshape(found.shape[1:]), true.shape[1:]).ravel()
    area = np.bincount(token, minlength=n)
    covered = np.stack([np.bincount(token[mask.ravel()], minlength=n) for mask in true]).astype(float)  # [t, n]
    flat = found.reshape(len(found), n).astype(float)
    both = flat @ covered.T
    union = (flat @ area)[:, None] + covered.sum(1) - both
    return np.divide(both, union, out=np.ones_like(both), where=union > 0)


@checked
def chance_iou(truth: Any, size: int, *, oracle: bool = False) -> float:
    """Returns the expected IoU of a random mask of ``size`` pixels: the chance level of a mask of that size.

    >>> chance_iou(np.array([True, False]), 1), chance_iou(np.array([True, False]), 1, oracle=True)
    (0.5, 1.0)

    The value is exact for a mask drawn uniformly among all masks with ``size`` of the N pixels: its intersection I with
    the truth (T pixels) has a hypergeometric distribution (N, T, size), over which I / (T + size - I) is averaged.
    Random masks of tokens, enlarged to pixels, have nearly the same level if the grid is fine enough for the truth.

    truth: bool array, the true mask. size: number of pixels, 0 to N. oracle: expects the higher IoU of the random mask
    and its complement, the chance level of a method that may choose either.
    """
    mask = _to_mask(truth, "truth")
    total, true = mask.size, int(mask.sum())
    if not 0 <= size <= total:
        raise OpError(
            f"A random mask of {size} pixels was asked for, but the truth has {total}. Choose from 0 to {total}."
        )
    return _expected_iou(total, true, size, oracle)


@checked
def permutation_p(scores: Any, *, seed: int = 0, n: int = 5000) -> float:
    """Returns the p-value of a permutation test: do masks fit the truth of their own prompt better than of others?

    >>> permutation_p(np.eye(3))  # of the 6 permutations, only the identity has such a high mean
    0.16666666666666666

    The statistic is the mean of the diagonal; p is the share of permutations of the prompts with at least that mean, as
    in ``scipy.stats.permutation_test`` with ``permutation_type="pairings"``. All permutations are counted for up to 6
    prompts, otherwise ``n`` random ones and the identity.

    scores: [p, p], the IoU of the mask of prompt i with the truth of prompt j.
    seed: seed of the random permutations.
    n: number of random permutations.
    """
    check_number("n", n, 1, MOST_PERMUTATIONS)
    table = to_numpy(scores).astype(np.float64)
    if not np.isfinite(table).all():
        raise OpError("Some scores are NaN or infinite. Leave their prompts out.")
    if not table.size or table.ndim != 2 or table.shape[0] != table.shape[1]:
        raise OpError(f"Scores must be [p, p], every mask with every truth; got shape {list(table.shape)}.")
    p = len(table)
    if p <= _EXHAUSTIVE:
        orders = np.array(list(itertools.permutations(range(p))))
    else:
        drawn = np.random.default_rng(seed).permuted(np.tile(np.arange(p), (n, 1)), axis=1)
        orders = np.concatenate([np.arange(p)[None], drawn])
    means = table[np.arange(p), orders].mean(1)
    return float((means >= means[0] - 1e-12).mean())  # 1e-12: equal means may differ by rounding


def _check_pixels(size: Sequence[int]) -> None:
    if math.prod(size) > LARGEST:
        raise OpError(f"{size[0]:,} x {size[1]:,} is larger than any image. Give a size of at most {LARGEST:,} pixels.")


@functools.lru_cache(maxsize=4096)  # many masks have the same size, such as a mask and its random baselines
def _expected_iou(total: int, true: int, size: int, oracle: bool) -> float:
    overlap = _likely_overlaps(total, true, size)
    score = _iou_of_sizes(overlap, true, size)
    if oracle:
        score = np.maximum(score, _iou_of_sizes(true - overlap, true, total - size))
    return float(hypergeom.pmf(overlap, total, true, size) @ score)


def _likely_overlaps(total: int, true: int, size: int) -> np.ndarray:
    """Returns the overlaps of two random sets within 12 standard deviations: all others add less than rounding does."""
    mean, share = size * true / total, true / total
    # The variance of a hypergeometric distribution.
    reach = 12 * math.sqrt(mean * (1 - share) * (total - size) / max(total - 1, 1)) + 50
    low, high = max(0, size + true - total), min(true, size)
    return np.arange(max(low, math.floor(mean - reach)), min(high, math.ceil(mean + reach)) + 1)


def _iou_of_sizes(overlap: np.ndarray, true: int, size: int) -> np.ndarray:
    union = true + size - overlap
    return np.divide(overlap, union, out=np.ones(len(overlap)), where=union > 0)


def _to_tokens(x: Any) -> np.ndarray:
    """Converts to float64 [n, k] and checks that all values are finite."""
    tokens = to_numpy(x).astype(np.float64)
    if tokens.ndim != 2 or 0 in tokens.shape:
        raise OpError(f"Tokens must be [n, k] with at least one token and channel; got shape {list(tokens.shape)}.")
    if not np.isfinite(tokens).all():
        bad = np.flatnonzero(~np.isfinite(tokens).all(0))[:8].tolist()
        raise OpError(
            f"The tokens are not finite, first in channels {bad} of the {tokens.shape[1]} given. The run overflowed."
        )
    return tokens


def _to_mask(x: Any, name: str) -> np.ndarray:
    mask = to_numpy(x)
    if not mask.ndim:
        raise OpError(f"{name} must be a bool mask, but is the single value {show(x)}. Give an array.")
    if mask.dtype != bool:
        raise OpError(f"{name} must be a bool mask, but has dtype {mask.dtype}. Compare it first: {name} > 0.")
    return mask


def _mean_heat(labels: np.ndarray, heat: np.ndarray, n_clusters: int) -> np.ndarray:
    """Returns the mean heat of each cluster, [n_clusters]; -inf for an empty one, so that it is numbered first."""
    sizes = np.bincount(labels, minlength=n_clusters)
    sums = np.bincount(labels, weights=heat, minlength=n_clusters)
    return np.divide(sums, sizes, out=np.full(n_clusters, -np.inf), where=sizes > 0)


def _check_grid(grid: Sequence[int], n: int) -> None:
    if len(grid) != 2 or grid[0] * grid[1] != n:
        raise OpError(f"The grid must be (h, w) with h * w = {n} tokens; got {tuple(grid)}.")
