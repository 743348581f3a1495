"""Images as arrays of pixels, for distances between images.

An image is a PIL image, or an array or tensor of uint8 in [0, 255] or floats in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from dit_lens.analysis.arrays import to_numpy
from dit_lens.errors import OpError


def apply_pairwise(a: Any, b: Any, distance: Callable[[np.ndarray, np.ndarray], float]) -> float | np.ndarray:
    """Computes a distance between two images, or between the pairs of two lists or batches: a float, or float64 [b].

    distance: takes two float64 arrays of the same shape, [h, w] or [h, w, c], in [0, 1].
    Raises OpError if sizes, numbers of images or ranges of values differ.
    """
    first, second = _is_batch(a), _is_batch(b)
    if first != second:
        raise OpError(
            "An image cannot be compared with a list of images. Give two images, or two lists of equal length."
        )
    if not first:
        return distance(*_to_pair(a, b))
    if len(a) != len(b):
        raise OpError(f"{len(a)} images cannot be compared with {len(b)}. Give two lists of equal length.")
    return np.array([distance(*_to_pair(x, y)) for x, y in zip(a, b, strict=True)], dtype=np.float64)


def _is_batch(images: Any) -> bool:
    return isinstance(images, list | tuple) or getattr(images, "ndim", 0) == 4


def _to_pair(a: Any, b: Any) -> tuple[np.ndarray, np.ndarray]:
    first, second = _to_pixels(a), _to_pixels(b)
    if first.shape != second.shape:
        raise OpError(
            f"The images have shapes {list(first.shape)} and {list(second.shape)}. Resize or convert one first; "
            "a distance between images of different shapes is not defined."
        )
    return first, second


def _to_pixels(image: Any) -> np.ndarray:
    """Converts an image to float64 in [0, 1]."""
    if isinstance(image, Image.Image):
        # The values of other modes, such as indices into a palette, are not brightness.
        image = image if image.mode in ("L", "RGB", "RGBA") else image.convert("RGB")
    pixels = to_numpy(image)
    if pixels.ndim not in (2, 3) or not pixels.size:
        raise OpError(f"An image must have two or three dimensions; got shape {list(pixels.shape)}.")
    if pixels.dtype == np.uint8:
        return pixels / 255
    if not np.issubdtype(pixels.dtype, np.floating):
        raise OpError(
            f"An image must be uint8 in [0, 255] or floating point in [0, 1]; got {pixels.dtype}. Convert it first."
        )
    if not (pixels.min() >= 0 and pixels.max() <= 1):
        raise OpError(
            f"A floating-point image must be in [0, 1]; this one is in [{pixels.min():.3g}, {pixels.max():.3g}]. "
            "Divide by 255, or map [-1, 1] with (x + 1) / 2; a NaN means that the run overflowed."
        )
    return pixels.astype(np.float64)
