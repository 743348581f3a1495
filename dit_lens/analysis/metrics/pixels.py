"""Images as arrays: PIL images, or arrays and tensors of uint8 in [0, 255] or floats in [0, 1], one or many."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image

from dit_lens.errors import OpError


def per_pair(a: Any, b: Any, distance: Callable[[np.ndarray, np.ndarray], float]) -> float | np.ndarray:
    """A distance between two images, or between the pairs of two lists or batches: a float, or float64 [b].

    distance: takes two float64 arrays of one shape, [h, w] or [h, w, c], in [0, 1].
    Raises OpError when sizes, numbers or ranges differ.
    """
    first, second = _is_batch(a), _is_batch(b)
    if first != second:
        raise OpError(
            "An image was to be compared with a list of images. Give two images, or two lists of equal length."
        )
    if not first:
        return distance(*_pair(a, b))
    if len(a) != len(b):
        raise OpError(f"{len(a)} images were to be compared with {len(b)}. Give as many of one as of the other.")
    return np.array([distance(*_pair(x, y)) for x, y in zip(a, b, strict=True)], dtype=np.float64)


def _is_batch(images: Any) -> bool:
    return isinstance(images, list | tuple) or getattr(images, "ndim", 0) == 4


def _pair(a: Any, b: Any) -> tuple[np.ndarray, np.ndarray]:
    first, second = _pixels(a), _pixels(b)
    if first.shape != second.shape:
        raise OpError(
            f"The images have shapes {list(first.shape)} and {list(second.shape)}. Resize or convert one first; "
            "a distance over differing sizes means nothing."
        )
    return first, second


def _pixels(image: Any) -> np.ndarray:
    """float64 in [0, 1]."""
    if isinstance(image, Image.Image):
        # Palette indices and the like are no brightness.
        image = image if image.mode in ("L", "RGB", "RGBA") else image.convert("RGB")
    pixels = array(image)
    if pixels.ndim not in (2, 3) or not pixels.size:
        raise OpError(f"An image has two or three dimensions, and got {list(pixels.shape)}.")
    if pixels.dtype == np.uint8:
        return pixels / 255
    if not np.issubdtype(pixels.dtype, np.floating):
        raise OpError(
            f"An image is uint8 in [0, 255] or floating point in [0, 1], and got {pixels.dtype}. Convert it first."
        )
    if not (pixels.min() >= 0 and pixels.max() <= 1):
        raise OpError(
            f"A floating-point image lies in [0, 1], and this one in [{pixels.min():.3g}, {pixels.max():.3g}]. "
            "Divide by 255, or map [-1, 1] with (x + 1) / 2; a NaN says that the run overflowed."
        )
    return pixels.astype(np.float64)


def array(x: Any) -> np.ndarray:
    """Whatever holds numbers, as numpy."""
    if isinstance(x, torch.Tensor):
        # numpy has no bfloat16.
        x = (x.float() if x.dtype == torch.bfloat16 else x).detach().cpu().numpy()
    return np.asarray(x)
