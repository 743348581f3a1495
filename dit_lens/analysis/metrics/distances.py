"""How far images lie apart, and how sure a mean is.

Images are PIL images, or arrays and tensors of uint8 in [0, 255] or floats in [0, 1]. Distances are in grey
levels, 0 to 255, whatever the images came as. Intervals are (mean, low, high).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from dit_lens.analysis.metrics.perceptual import lpips, ssim
from dit_lens.analysis.metrics.pixels import per_pair
from dit_lens.errors import OpError, nearest

Distance = Callable[[Any, Any], Any]

LEVELS = 255


def rmse(a: Any, b: Any) -> float | np.ndarray:
    """Root mean square difference in grey levels: 0 for equal images, 255 for black and white.

    >>> black, white = np.zeros((2, 2, 3), np.uint8), np.full((2, 2, 3), 255, np.uint8)
    >>> rmse(black, white)
    255.0
    >>> rmse([black, black], [black, white]).tolist()
    [0.0, 255.0]

    Returns a float for a pair of images and float64 [b] for two lists or two batches of four dimensions.
    a, b: images of one size and layout. Raises OpError when sizes, numbers or ranges differ.
    """
    return per_pair(a, b, lambda x, y: LEVELS * _rmse(x, y))


def psnr(a: Any, b: Any) -> float | np.ndarray:
    """Peak signal-to-noise ratio in dB, -20 log10(rmse / 255); infinite for equal images. Takes what ``rmse`` takes.

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
    """Distances by the names of their columns; each is tried on two small images, so that a mistake shows here.

    >>> def darkest(a, b):
    ...     return float(min(np.min(a), np.min(b)))
    >>> list(distances(["rmse", darkest]))
    ['rmse', 'darkest']

    chosen: names in ``DISTANCES``, or functions of two images (PIL) that return a number.
    Raises OpError for unknown names, what needs a package that is not installed, and functions that return no number.
    """
    found: dict[str, Distance] = {}
    for one in [chosen] if isinstance(chosen, str) or callable(chosen) else chosen:
        if isinstance(one, str) and one not in DISTANCES:
            raise OpError(f"There is no distance {one!r}.{nearest(one, DISTANCES)} A function of two images will do.")
        name = one if isinstance(one, str) else getattr(one, "__name__", type(one).__name__)
        found[name] = DISTANCES[one] if isinstance(one, str) else one
    black, grey = (Image.new("RGB", (64, 64), (level,) * 3) for level in (0, 128))
    for name, distance in found.items():
        if not np.isscalar(answer := distance(black, grey)) or isinstance(answer, str):
            raise OpError(f"The distance {name!r} of two images is to be a number, and it returned {answer!r}.")
    return found


def _rmse(a: np.ndarray, b: np.ndarray) -> float:
    return math.sqrt(float(np.square(a - b).mean()))
