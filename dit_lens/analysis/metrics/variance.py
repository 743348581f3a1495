"""Analysis of variance: shares of the variance by factor and interaction, in a full factorial design."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from dit_lens.errors import OpError


def variance_shares(values: np.ndarray, factors: Sequence[str]) -> dict[str, float]:
    """Returns the share of the variance that each factor and each interaction of factors explains.

    >>> prompt, seed = np.array([[0.0], [2.0]]), np.array([[0.0, 1.0]])
    >>> variance_shares(prompt + seed, ["prompt", "seed"])
    {'prompt': 0.8, 'seed': 0.2, 'prompt x seed': 0.0}

    The shares sum to 1, or all are 0 if nothing varies.

    values: [factor, ..., *], one value for every combination of levels. Each element of the further axes (tokens,
      channels) is analysed separately, around its own mean, and the sums of squares are added; differences between
      tokens or channels therefore do not count.
    factors: names of the leading axes.
    Source: eta squared of Fisher's ANOVA for a balanced design without replicates, in which the interaction of all
    factors is the residual.
    """
    data = np.asarray(values, np.float64)
    n = len(factors)
    if not 1 <= n <= data.ndim or not data.size:
        raise OpError(f"variance_shares takes one leading axis per factor, {n} in all; got shape {list(data.shape)}.")
    if not np.isfinite(data).all():
        raise OpError("variance_shares takes finite values; some are NaN or infinite. The run overflowed.")
    axes = range(n)
    effects = {(): data.mean(tuple(axes), keepdims=True)}
    squares = {}
    for size in range(1, n + 1):
        for kept in itertools.combinations(axes, size):
            # The mean over the other factors, minus the grand mean and the effects of all subsets of these factors.
            effect = data.mean(tuple(axis for axis in axes if axis not in kept), keepdims=True)
            for lower, part in effects.items():
                if set(lower) < set(kept):
                    effect = effect - part
            effects[kept] = effect
            repeats = np.prod([data.shape[axis] for axis in axes if axis not in kept])
            squares[" x ".join(factors[axis] for axis in kept)] = float(np.square(effect).sum() * repeats)
    total = sum(squares.values())
    floor = np.square(data).sum() * np.finfo(np.float64).eps  # rounding errors of the means are not variance
    return {name: square / total if total > floor else 0.0 for name, square in squares.items()}
