"""Maps as bytes: averaged to a coarser grid, scaled to 0 to 255, and summarised by range, mean and thumbnail."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from torch import Tensor

THUMB = 8  # tokens of the longer side of a thumbnail


def average_maps(values: Tensor, grid: tuple[int, int], coarse: tuple[int, int]) -> Tensor:
    """Reduces maps [..., n] to a coarser grid by averaging."""
    if grid == coarse:
        return values
    maps = values.reshape(-1, 1, *grid)
    return torch.nn.functional.adaptive_avg_pool2d(maps, coarse).reshape(*values.shape[:-1], prod(coarse))


def summarise_maps(values: np.ndarray, grid: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns ranges [e, s, g, k, 2], means [e, s, g, k] and thumbnails [e, s, g, k, h', w'] of [e, s, g, k, n].

    A thumbnail is averaged, and then scaled as its map is.
    """
    low, high = values.min(-1), values.max(-1)
    height, width = (min(side, max(1, round(side * THUMB / max(grid)))) for side in grid)
    pooled = average_maps(torch.from_numpy(values), grid, (height, width)).numpy()
    thumbs = _scale(pooled, low[..., None], high[..., None]).reshape(*values.shape[:-1], height, width)
    return np.stack([low, high], -1), values.mean(-1), thumbs


def quantise(values: np.ndarray) -> np.ndarray:
    """Scales each map to uint8, 0 its smallest and 255 its largest value; constant and missing maps become 0."""
    return _scale(values, values.min(-1, keepdims=True), values.max(-1, keepdims=True))


def _scale(values: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Scales low to 0 and high to 255, as uint8; 0 where they are equal or missing."""
    scaled = np.divide(values - low, high - low, out=np.zeros_like(values), where=high > low)
    return np.rint(255 * scaled).astype(np.uint8)
