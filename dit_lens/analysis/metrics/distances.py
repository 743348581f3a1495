"""Distances between images, in grey levels from 0 to 255.

An image is a PIL image, or an array or tensor of uint8 in [0, 255] or floats in [0, 1].
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from dit_lens.analysis.metrics.perceptual import lpips, ssim
from dit_lens.analysis.metrics.pixels import apply_pairwise
from dit_lens.arguments.functions import takes
from dit_lens.arguments.numbers import as_plain, list_entries
from dit_lens.errors import OpError, nearest, show

Distance = Callable[[Any, Any], Any]

LEVELS = 255


def rmse(a: Any, b: Any) -> float | np.ndarray:
    """Returns the root mean square difference in grey levels: 0 for equal images, 255 between black and white.

    >>> black, white = np.zeros((2, 2, 3), np.uint8), np.full((2, 2, 3), 255, np.uint8)
    >>> rmse(black, white)
    255.0
    >>> rmse([black, black], [black, white]).tolist()
    [0.0, 255.0]

    Returns a float for two images, and float64 [b] for two lists or two batches [b, h, w, c].
    a, b: images of the same shape. Raises OpError if shapes, numbers of images or ranges of values differ.
    """
    return apply_pairwise(a, b, lambda x, y: LEVELS * _rmse(x, y))


def psnr(a: Any, b: Any) -> float | np.ndarray:
    """Returns the peak signal-to-noise ratio in dB, -20 log10(rmse / 255): infinite for equal images.

    >>> psnr(np.zeros((2, 2)), np.full((2, 2), 0.1))
    20.0

    a, b: as in :func:`rmse`.
    """
    return apply_pairwise(a, b, lambda x, y: -20 * math.log10(error) if (error := _rmse(x, y)) else math.inf)


def mean_abs(a: Any, b: Any) -> float | np.ndarray:
    """Returns the mean absolute difference in grey levels, 0 to 255.

    >>> mean_abs(np.zeros((1, 2)), np.array([[0.5, 1.0]]))
    191.25

    a, b: as in :func:`rmse`.
    """
    return apply_pairwise(a, b, lambda x, y: LEVELS * float(np.abs(x - y).mean()))


DISTANCES: dict[str, Distance] = {"rmse": rmse, "psnr": psnr, "mean_abs": mean_abs, "ssim": ssim, "lpips": lpips}


def distances(chosen: str | Distance | Sequence[str | Distance]) -> dict[str, Distance]:
    """Returns name -> distance, after calling each on two small images, so that mistakes appear before a study runs.

    >>> def darkest(a, b):
    ...     return float(min(np.min(a), np.min(b)))
    >>> list(distances(["rmse", darkest]))
    ['rmse', 'darkest']

    chosen: one or more of the names in ``DISTANCES`` and of functions (PIL image, PIL image) -> number.
    Raises OpError for an unknown name, for two distances of one name, for a distance that needs a package that is not
    installed, and for a function that does not return a number.
    """
    found: dict[str, Distance] = {}
    listed = [chosen] if isinstance(chosen, str) or callable(chosen) else list_entries(chosen)
    for one in [chosen] if listed is None else listed:
        if not callable(one) and (not isinstance(one, str) or one not in DISTANCES):
            raise OpError(
                f"{show(one)} is not a valid distance.{nearest(one, DISTANCES)} A function of two images is also "
                "accepted."
            )
        name = one if isinstance(one, str) else getattr(one, "__name__", type(one).__name__)
        distance = DISTANCES[one] if isinstance(one, str) else one
        if found.setdefault(name, distance) != distance or DISTANCES.get(name, distance) != distance:
            theirs = "this library's" if name in DISTANCES else "another one"
            raise OpError(
                f"two distances are called {name!r}, and a table has one column for each name: a function of yours and "
                f"{theirs}. Give yours a name of its own, such as fn.__name__ = 'mine'."
            )
    black, grey = (Image.new("RGB", (64, 64), (level,) * 3) for level in (0, 128))
    for name, distance in found.items():
        if not takes(distance, 2):
            raise OpError(f"The distance {name!r} cannot be called with two images. Give it two parameters.")
        measure_distance(name, distance, black, grey)
    return found


def measure_distance(name: str, distance: Distance, a: Any, b: Any) -> float:
    """The distance of two images as a float, whatever type of number it is; OpError if it is none.

    name: name of the distance, for the message.
    distance: function of two images.
    a, b: the images.
    """
    answer = as_plain(distance(a, b))
    if not isinstance(answer, numbers.Real):
        raise OpError(f"The distance {name!r} of two images must be a number, but it returned {show(answer)}.")
    return float(answer)


def measure_distances(distances: Mapping[str, Distance], a: Any, b: Any) -> dict[str, float]:
    """All distances of two images by name; an infinite one, as psnr of equal images, has no mean and is NaN."""
    found = {name: measure_distance(name, distance, a, b) for name, distance in distances.items()}
    return {name: value if math.isfinite(value) else math.nan for name, value in found.items()}


def _rmse(a: np.ndarray, b: np.ndarray) -> float:
    return math.sqrt(float(np.square(a - b).mean()))
