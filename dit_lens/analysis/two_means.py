"""K-means into two clusters as scikit-learn computes it, all starts at once.

Between two centres only one number of a token decides: how much nearer the second one is. So each step of all starts is
two products of matrices, where scikit-learn goes through the tokens start by start. The same random numbers give the
same starts. Wherever rounding could decide otherwise than there, nothing is returned, and scikit-learn is asked.
"""

from __future__ import annotations

import numpy as np

STARTS = 10  # the best of which is kept
STEPS = 300
TOLERANCE = 1e-4  # of the mean variance: how far centres may still move at the end
CANDIDATES = 2  # for the second centre of a start
UNSURE = 1e-9  # of what is compared: differences up to this might be rounding


class _UnsureError(Exception):
    """Two numbers are so close that rounding may order them."""


def two_means(values: np.ndarray, seed: int) -> np.ndarray | None:
    """The labels of ``sklearn.cluster.KMeans(2, n_init=10, random_state=seed)``, or None where they are not sure.

    >>> two_means(np.array([[0.0], [0.1], [0.25], [0.75], [0.9], [1.03]]), 1).tolist()
    [0, 0, 0, 1, 1, 1]
    >>> two_means(np.array([[0.0], [0.5], [1.0]]), 0) is None
    True

    values: float64 [n, k]. seed: of the starts.
    """
    tolerance = TOLERANCE * np.var(values, axis=0).mean()
    centred = np.ascontiguousarray(values - values.mean(0))
    try:
        labels, inertia = _descend(centred, _choose_starts(centred, seed), tolerance)
        return labels[_choose_best(labels, inertia)].astype(np.int32)
    except _UnsureError:
        return None


def _choose_starts(x: np.ndarray, seed: int) -> np.ndarray:
    """Both centres of every start [start, 2, k], by k-means++ with two candidates (doi 10.5555/1283383.1283494)."""
    drawn = np.random.RandomState(seed).random_sample((STARTS, 1 + CANDIDATES))
    even = np.cumsum(np.full(len(x), 1.0) / len(x))
    first = np.searchsorted(even / even[-1], drawn[:, 0], side="right")
    norms = np.einsum("nk,nk->n", x, x)
    nearest = _measure(x[first], x, norms)  # [start, n]
    total = nearest.sum(1)
    summed = np.cumsum(nearest, axis=1)
    aims = drawn[:, 1:] * total[:, None]
    chosen = np.stack([np.searchsorted(one, aim) for one, aim in zip(summed, aims, strict=True)])
    if (chosen >= len(x)).any() or (total <= 0).any():
        raise _UnsureError
    above = np.take_along_axis(summed, chosen, 1)
    below = np.where(chosen > 0, np.take_along_axis(summed, np.maximum(chosen - 1, 0), 1), -np.inf)
    if np.minimum(above - aims, aims - below).min() <= UNSURE * total.max():
        raise _UnsureError
    potentials = [np.minimum(nearest, _measure(x[some], x, norms)).sum(1) for some in chosen.T]
    worse = potentials[1] < potentials[0]
    apart = (x[chosen[:, 0]] != x[chosen[:, 1]]).any(1)
    if (apart & (np.abs(potentials[0] - potentials[1]) <= UNSURE * total)).any():
        raise _UnsureError
    second = np.where(worse, chosen[:, 1], chosen[:, 0])
    return np.stack([x[first], x[second]], 1)


def _measure(centres: np.ndarray, x: np.ndarray, norms: np.ndarray) -> np.ndarray:
    """Squared distances [centre, n]. norms: of the tokens, squared."""
    distances = centres @ x.T
    distances *= -2
    distances += np.einsum("ck,ck->c", centres, centres)[:, None]
    distances += norms
    return np.maximum(distances, 0, out=distances)


def _descend(x: np.ndarray, centres: np.ndarray, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
    """Moves the centres of all starts until they stay. Labels bool [start, n], and the sum of squared distances.

    centres: [start, 2, k]. tolerance: how far they may still move at the end, squared.
    """
    with_one = np.concatenate([x, np.ones((len(x), 1))], 1)  # [n, k + 1]: sums of it are sums and numbers of tokens
    tokens, total = np.ascontiguousarray(with_one.T), with_one.sum(0)
    scale = UNSURE * np.einsum("nk,nk->n", x, x).max()
    labels = np.zeros((len(centres), len(x)), bool)
    going, centres, before = np.arange(len(centres)), centres.copy(), None
    for _ in range(STEPS):
        found = _assign(tokens, centres[going], scale)
        sums = found.astype(np.float64) @ with_one  # of the second cluster
        both = np.stack([total - sums, sums], 1)
        if both[..., -1].min() < 0.5:  # scikit-learn puts an empty cluster elsewhere
            raise _UnsureError
        moved = both[..., :-1] / both[..., -1:]
        shift = np.square(moved - centres[going]).sum((1, 2))
        centres[going] = moved
        same = np.zeros(len(going), bool) if before is None else (found == before).all(1)
        if (~same & (np.abs(shift - tolerance) <= UNSURE * tolerance)).any():
            raise _UnsureError
        stay = ~same & (shift <= tolerance)
        labels[going[same]] = found[same]
        if stay.any():
            labels[going[stay]] = _assign(tokens, centres[going[stay]], scale)
        left = ~(same | stay)
        going, before = going[left], found[left]
        if not len(going):
            return labels, _sum_distances(x, centres, labels)
    raise _UnsureError


def _assign(tokens: np.ndarray, centres: np.ndarray, scale: float) -> np.ndarray:
    """Which tokens are nearer to the second centre, bool [start, n]. tokens: [k + 1, n], the last row ones."""
    squares = np.square(centres).sum(2)
    weights = np.concatenate([2 * (centres[:, 1] - centres[:, 0]), (squares[:, 0] - squares[:, 1])[:, None]], 1)
    nearer = weights @ tokens
    found = nearer > 0
    if np.abs(nearer, out=nearer).min() <= scale:
        raise _UnsureError
    return found


def _sum_distances(x: np.ndarray, centres: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The sum of squared distances of tokens to their centres, for every start."""
    second = labels.astype(np.float64)
    sums, counts = second @ x, second.sum(1)
    both = np.stack([x.sum(0) - sums, sums], 1)  # [start, 2, k]
    sizes = np.stack([len(x) - counts, counts], 1)
    return np.square(x).sum() - 2 * (both * centres).sum((1, 2)) + (sizes * np.square(centres).sum(2)).sum(1)


def _choose_best(labels: np.ndarray, inertia: np.ndarray) -> int:
    """The start with the lowest sum of distances, the first of those that found the same clusters."""
    best = 0
    for number in range(1, len(labels)):
        alike = np.count_nonzero(labels[number] == labels[best])
        if alike in (0, labels.shape[1]):
            continue
        if abs(inertia[number] - inertia[best]) <= UNSURE * inertia[best]:
            raise _UnsureError
        best = number if inertia[number] < inertia[best] else best
    return best
