"""Where values vary: shares of variance by factor and by interaction, in a full factorial design."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from dit_lens.errors import OpError


def variance_shares(values: np.ndarray, factors: Sequence[str]) -> dict[str, float]:
    """The share of variance that each factor and each interaction of factors explains.

    >>> prompt, seed = np.array([[0.0], [2.0]]), np.array([[0.0, 1.0]])
    >>> variance_shares(prompt + seed, ["prompt", "seed"])
    {'prompt': 0.8, 'seed': 0.2, 'prompt x seed': 0.0}

    Returns shares that sum to 1; all are 0 where nothing varies. values: [factor, ..., *], one value for every
    combination of levels; further axes (tokens, channels) are measured apart, around their own means, and their sums of
    squares are added: what varies from token to token alone counts nowhere. factors: the names of the leading axes.
    Source: the orthogonal decomposition of a balanced design without replicates (Fisher's ANOVA), in which the highest
    interaction is what is left.
    """
    data = np.asarray(values, np.float64)
    n = len(factors)
    if not 1 <= n <= data.ndim or not data.size:
        raise OpError(f"variance_shares takes one leading axis per factor, {n} of them, and got {list(data.shape)}.")
    if not np.isfinite(data).all():
        raise OpError("variance_shares takes finite values; some are NaN or infinite. The run overflowed.")
    axes = range(n)
    effects = {(): data.mean(tuple(axes), keepdims=True)}
    squares = {}
    for size in range(1, n + 1):
        for kept in itertools.combinations(axes, size):
            effect = data.mean(tuple(axis for axis in axes if axis not in kept), keepdims=True)
            for lower, part in effects.items():
                if set(lower) < set(kept):
                    effect = effect - part
            effects[kept] = effect
            repeats = np.prod([data.shape[axis] for axis in axes if axis not in kept])
            squares[" x ".join(factors[axis] for axis in kept)] = float(np.square(effect).sum() * repeats)
    total = sum(squares.values())
    floor = np.square(data).sum() * np.finfo(np.float64).eps  # rounding of the means is no variance
    return {name: square / total if total > floor else 0.0 for name, square in squares.items()}
