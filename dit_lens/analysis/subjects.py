"""Where the subject is, from how far tokens lie from those on the border of the image; knows no model.

Letters: n image token, k chosen channels, h w token grid.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dit_lens.analysis.arrays import border_of, to_numpy
from dit_lens.analysis.clusters import normalise
from dit_lens.arguments.checks import checked
from dit_lens.errors import OpError, show

LEAST_SPREAD = 0.05  # of a normalised channel on the border, so that one that is constant there does not decide alone


@checked
def distance_from_border(x: Any, grid: tuple[int, ...], method: str = "minmax") -> np.ndarray:
    """How far every token lies from those on the border of the image, float64 [h, w].

    >>> image = np.outer([0, 0, 1, 0, 0], [0, 0, -1, 0, 0])
    >>> int(distance_from_border(image.reshape(25, 1), (5, 5)).argmax())
    12

    Root mean square over channels of the distance to the border's mean, in standard deviations of the border; so a
    channel that varies there already counts less, and its sign does not matter.

    x: [n, k], the chosen channels of the image tokens, row by row.
    grid: (h, w) with h * w == n.
    method: how channels are scaled first, as in ``clusters.normalise``.
    Source: the border as a sample of the background (Wei, Wen, Zhu & Sun, ECCV 2012), here of channels, not colours.
    """
    tokens, border = normalise(x, method), border_of(grid).ravel()
    if len(tokens) != border.size:
        raise OpError(f"The grid must be (h, w) with h * w = {len(tokens)} tokens; got {tuple(grid)}.")
    mean, spread = tokens[border].mean(0), tokens[border].std(0)
    return np.sqrt((((tokens - mean) / (spread + LEAST_SPREAD)) ** 2).mean(1)).reshape(grid)


@checked
def threshold(values: Any) -> float:
    """The value that parts numbers in two classes which differ most; half-way between the two values around it.

    >>> threshold([0.1, 0.2, 0.0, 0.9, 1.0])
    0.55

    values: at least two numbers, of any shape. Where all are equal, that number.
    Source: Otsu (1979): the largest variance between the classes.
    """
    found = np.sort(np.asarray(to_numpy(values), dtype=np.float64).ravel())
    if found.size < 2 or not np.isfinite(found).all():
        raise OpError(f"threshold takes at least two finite numbers, and got {show(values)}.")
    below = np.arange(1, found.size)
    sums = np.cumsum(found)
    apart = sums[:-1] / below - (sums[-1] - sums[:-1]) / (found.size - below)
    best = int((below * (found.size - below) * apart**2).argmax())
    return float((found[best] + found[best + 1]) / 2)
