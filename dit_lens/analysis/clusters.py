"""Are the chosen channels organised in space? Tokens are clustered by their channel values; a cluster becomes a mask.

Knows no model: numpy arrays or tensors in, numpy arrays out. Letters: n image token, k chosen channels, h w token grid,
H W image, m masks, t truths, p prompts. Method: Claim 2 of arXiv 2605.13974 with the choices of its public
reproduction (min-max per channel, K = 2, the hotter cluster in front), each of which is an argument here.
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
import torch
from PIL import Image
from scipy.stats import hypergeom

from dit_lens.errors import OpError, nearest

METHODS = ("minmax", "robust")
POLARITIES = ("heat", "border")

# A cluster of fewer tokens than this share is a few outliers that captured it, not a region of the image.
DEGENERATE_SHARE = 0.01

# Prompts up to which all orders of a permutation test are counted: 720.
_ENUMERATED = 6


@dataclass(frozen=True, eq=False, repr=False)
class Segmentation:
    """What the clusters of one site say about the image.

    mask: bool [h, w], the foreground. labels: int [h, w], the cluster of each token, 0 the coldest.
    sizes: tokens per cluster. degenerate: a cluster holds under 1 % of the tokens, so the mask means little.
    heat: [h, w], the sum of the normalised channels, from 0 to k.
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


def segment(
    x: Any,
    grid: tuple[int, ...],
    *,
    n_clusters: int = 2,
    polarity: str = "heat",
    method: str = "minmax",
    seed: int = 0,
) -> Segmentation:
    """Clusters the tokens of one image and picks the foreground.

    >>> image = np.outer([0, 0, 1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 0, 0, 0])
    >>> found = segment(image.reshape(64, 1), (8, 8))
    >>> found
    Segmentation: grid 8 x 8, foreground 9 of 64 tokens, clusters (55, 9)
    >>> iou(found.mask, image > 0)
    1.0

    x: [n, k], the chosen channels of the image tokens, row by row. grid: (h, w) with h * w == n.
    n_clusters, method, seed: as in ``cluster``. polarity: as in ``foreground``; a massive channel that is negative on
    the subject turns heat around, and "border" does not mind.
    Raises OpError for values, grids or choices that do not fit.
    """
    tokens = _tokens(x)
    _check_grid(grid, len(tokens))
    _choice(polarity, POLARITIES, "polarity")
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


def normalise(x: Any, method: str = "minmax") -> np.ndarray:
    """Brings every channel to [0, 1] over the tokens; a constant channel becomes 0.

    >>> normalise([[1.0, 7.0], [3.0, 7.0], [2.0, 7.0]]).tolist()
    [[0.0, 0.0], [1.0, 0.0], [0.5, 0.0]]

    Returns float64 [n, k]. x: [n, k], finite.
    method: "minmax", or "robust", which first clips each channel at its 1st and 99th percentile over tokens, so that a
    few outlier tokens do not flatten the others.
    """
    _choice(method, METHODS, "method")
    tokens = _tokens(x)
    if method == "robust":
        tokens = np.clip(tokens, *np.percentile(tokens, [1, 99], axis=0))
    low, high = tokens.min(0), tokens.max(0)
    return np.divide(tokens - low, high - low, out=np.zeros_like(tokens), where=high > low)


def cluster(x: Any, n_clusters: int = 2, seed: int = 0, method: str = "minmax") -> np.ndarray:
    """K-means of the tokens in the space of their normalised channels.

    >>> cluster([[0.0], [10.0], [0.2], [9.0]]).tolist()
    [0, 1, 0, 1]

    Returns int [n], clusters numbered by mean heat (the sum of the normalised channels), 0 the coldest.
    x: [n, k]. n_clusters: 2 to n. seed: of K-means, whose best of 10 starts is kept. method: as in ``normalise``.
    Where fewer distinct tokens than clusters exist, clusters stay empty.
    """
    from sklearn.cluster import KMeans  # a second that everything else in dit_lens need not pay
    from sklearn.exceptions import ConvergenceWarning

    values = normalise(x, method)
    if not 2 <= n_clusters <= len(values):
        raise OpError(f"n_clusters={n_clusters} was asked of {len(values)} tokens. Choose from 2 to {len(values)}.")
    with warnings.catch_warnings():
        # Fewer distinct tokens than clusters; the sizes say so, and Segmentation.degenerate.
        warnings.simplefilter("ignore", ConvergenceWarning)
        labels = KMeans(n_clusters, n_init=10, random_state=seed).fit_predict(values)
    order = np.argsort(_mean_heat(labels, values.sum(1), n_clusters), kind="stable")
    return np.argsort(order)[labels]


def foreground(labels: Any, heat: Any, grid: tuple[int, ...], polarity: str = "heat") -> np.ndarray:
    """The mask that some clusters make.

    >>> foreground([0, 1, 1, 0], [0.1, 0.9, 0.7, 0.2], (2, 2)).tolist()
    [[False, True], [True, False]]

    Returns bool [h, w]. labels: int [n]. heat: [n]. grid: (h, w) with h * w == n.
    polarity: "heat": the cluster with the largest mean heat is foreground. "border": the cluster with the most tokens
    on the border of the grid is background (of equals, the colder), and all others are foreground.
    """
    _choice(polarity, POLARITIES, "polarity")
    names, numbers = np.unique(_array(labels), return_inverse=True)
    warmth = _array(heat)
    _check_grid(grid, numbers.size)
    if warmth.size != numbers.size:
        raise OpError(f"There are {numbers.size} labels and {warmth.size} heats. Give one of each per token.")
    means = _mean_heat(numbers, warmth, len(names))
    if polarity == "heat":
        return (numbers == means.argmax()).reshape(grid)
    edge = np.ones(grid, dtype=bool)
    edge[1:-1, 1:-1] = False
    on_border = np.bincount(numbers[edge.ravel()], minlength=len(names))
    background = np.lexsort((means, -on_border))[0]
    return (numbers != background).reshape(grid)


def upsample(mask: Any, size: tuple[int, int]) -> np.ndarray:
    """The nearest-neighbour enlargement of a token grid to an image, of any dtype.

    >>> upsample(np.array([[True, False]]), (2, 4)).tolist()
    [[True, True, False, False], [True, True, False, False]]

    mask: [h, w]. size: (H, W) of the image, in pixels; pixel centres decide, as in torch's "nearest-exact".
    """
    grid = _array(mask)
    if grid.ndim != 2 or min(size) < 1:
        raise OpError(f"upsample takes a grid [h, w] and a size of at least 1 x 1, and got {grid.shape} and {size}.")
    rows, columns = ((2 * np.arange(to) + 1) * n // (2 * to) for n, to in zip(grid.shape, size, strict=True))
    return grid[rows[:, None], columns]


def to_grid(mask: Any, grid: tuple[int, int]) -> np.ndarray:
    """A mask of an image on the token grid: a token is in it when at least half of its pixels are.

    >>> to_grid(np.eye(4, dtype=bool), (2, 2)).tolist()
    [[True, False], [False, True]]

    mask: bool [H, W], a drawing or a segmentation at any size. grid: (h, w), such as ``run.grid``. Returns bool [h, w].
    """
    h, w = grid
    covered = Image.fromarray(_mask(mask, "mask").astype(np.float32)).resize((w, h), Image.Resampling.BOX)
    return np.asarray(covered) >= 0.5


def iou(a: Any, b: Any) -> float:
    """Intersection over union of two masks; 1 for two empty ones.

    >>> iou(np.array([True, True, False]), np.array([True, False, False]))
    0.5

    a, b: bool arrays of one shape. Raises OpError for other dtypes (a label map is no mask) and unequal shapes.
    """
    first, second = _mask(a, "a"), _mask(b, "b")
    if first.shape != second.shape:
        raise OpError(
            f"The masks have shapes {first.shape} and {second.shape}. "
            "Bring the token grid to the image with upsample(mask, size)."
        )
    union = int((first | second).sum())
    return int((first & second).sum()) / union if union else 1.0


def ious(masks: Any, truths: Any) -> np.ndarray:
    """The IoU of every mask of a token grid, enlarged as by ``upsample``, with every truth in pixels: float64 [m, t].

    >>> mask = np.array([[True, False]])
    >>> ious([mask, ~mask], [upsample(mask, (4, 4))]).tolist()
    [[1.0], [0.0]]

    masks: bool [m, h, w]. truths: bool [t, H, W]. One product of matrices over tokens, for as many pairs as there are.
    """
    found, true = _mask(masks, "masks"), _mask(truths, "truths")
    if found.ndim != 3 or true.ndim != 3:
        raise OpError(f"Masks [m, h, w] and truths [t, H, W] are compared, not {found.shape} and {true.shape}.")
    n = found[0].size
    token = upsample(np.arange(n).reshape(found.shape[1:]), true.shape[1:]).ravel()
    area = np.bincount(token, minlength=n)
    covered = np.stack([np.bincount(token[one.ravel()], minlength=n) for one in true]).astype(float)  # [t, n]
    flat = found.reshape(len(found), n).astype(float)
    both = flat @ covered.T
    union = (flat @ area)[:, None] + covered.sum(1) - both
    return np.divide(both, union, out=np.ones_like(both), where=union > 0)


def chance_iou(truth: Any, size: int, *, oracle: bool = False) -> float:
    """The IoU to expect of a mask with ``size`` pixels strewn at random, each set of pixels as likely as any other.

    >>> chance_iou(np.array([True, False]), 1), chance_iou(np.array([True, False]), 1, oracle=True)
    (0.5, 1.0)

    truth: bool array of T true among N pixels. size: 0 to N. oracle: of the better of the mask and its complement.
    Exact: the overlap I is hypergeometric (N, T, size), and I / (T + size - I) is summed over it. Masks strewn over
    the tokens of a grid and then upsampled have nearly the same level where the grid resolves the truth.
    """
    mask = _mask(truth, "truth")
    total, true = mask.size, int(mask.sum())
    if not 0 <= size <= total:
        raise OpError(f"A random mask of {size} pixels was asked, and the truth has {total}. Choose from 0 to {total}.")
    return _expected_iou(total, true, size, oracle)


def permutation_p(scores: Any, *, seed: int = 0, n: int = 5000) -> float:
    """How often masks fit as well as they do when they are dealt out to the prompts anew.

    >>> permutation_p(np.eye(3))  # one of the 6 orders fits as well: the true one
    0.16666666666666666

    scores: [p, p], the IoU of the mask of prompt i with the truth of prompt j. The statistic is the mean of the
    diagonal. Up to 6 prompts all orders are counted; beyond, ``n`` drawn ones and the true one.
    """
    table = _array(scores).astype(np.float64)
    if table.ndim != 2 or table.shape[0] != table.shape[1]:
        raise OpError(f"Scores are [p, p], every mask with every truth, and got {list(table.shape)}.")
    p = len(table)
    if p <= _ENUMERATED:
        orders = np.array(list(itertools.permutations(range(p))))
    else:
        drawn = np.random.default_rng(seed).permuted(np.tile(np.arange(p), (n, 1)), axis=1)
        orders = np.concatenate([np.arange(p)[None], drawn])
    means = table[np.arange(p), orders].mean(1)
    return float((means >= means[0] - 1e-12).mean())


@functools.lru_cache(maxsize=4096)  # masks of one size are many: baselines are as large as the mask they stand beside
def _expected_iou(total: int, true: int, size: int, oracle: bool) -> float:
    overlap = _likely(total, true, size)
    score = _overlap_iou(overlap, true, size)
    if oracle:
        score = np.maximum(score, _overlap_iou(true - overlap, true, total - size))
    return float(hypergeom.pmf(overlap, total, true, size) @ score)


def _likely(total: int, true: int, size: int) -> np.ndarray:
    """The overlaps of two random sets that have any weight: what lies beyond adds less than rounding does."""
    mean, share = size * true / total, true / total
    reach = 12 * math.sqrt(mean * (1 - share) * (total - size) / max(total - 1, 1)) + 50
    low, high = max(0, size + true - total), min(true, size)
    return np.arange(max(low, math.floor(mean - reach)), min(high, math.ceil(mean + reach)) + 1)


def _overlap_iou(overlap: np.ndarray, true: int, size: int) -> np.ndarray:
    union = true + size - overlap
    return np.divide(overlap, union, out=np.ones(len(overlap)), where=union > 0)


def _array(x: Any) -> np.ndarray:
    if isinstance(x, torch.Tensor):
        # numpy has no bfloat16.
        x = (x.float() if x.dtype == torch.bfloat16 else x).detach().cpu().numpy()
    return np.asarray(x)


def _tokens(x: Any) -> np.ndarray:
    tokens = _array(x).astype(np.float64)
    if tokens.ndim != 2 or 0 in tokens.shape:
        raise OpError(f"Tokens are [n, k] with at least one token and one channel, and got {list(tokens.shape)}.")
    if not np.isfinite(tokens).all():
        bad = np.flatnonzero(~np.isfinite(tokens).all(0))[:8].tolist()
        raise OpError(
            f"The tokens are not finite, first in channels {bad} of the {tokens.shape[1]} given. The run overflowed."
        )
    return tokens


def _mask(x: Any, name: str) -> np.ndarray:
    mask = _array(x)
    if mask.dtype != bool:
        raise OpError(f"{name} must be a bool mask, and has dtype {mask.dtype}. Compare it first: {name} > 0.")
    return mask


def _mean_heat(labels: np.ndarray, heat: np.ndarray, n_clusters: int) -> np.ndarray:
    sizes = np.bincount(labels, minlength=n_clusters)
    sums = np.bincount(labels, weights=heat, minlength=n_clusters)
    # An empty cluster is the coldest.
    return np.divide(sums, sizes, out=np.full(n_clusters, -np.inf), where=sizes > 0)


def _check_grid(grid: Sequence[int], n: int) -> None:
    if len(grid) != 2 or grid[0] * grid[1] != n:
        raise OpError(f"A grid (h, w) with h * w = {n} tokens is needed, and got {tuple(grid)}.")


def _choice(asked: str, known: tuple[str, ...], what: str) -> None:
    if asked not in known:
        raise OpError(f"There is no {what} {asked!r}.{nearest(str(asked), known)}")
