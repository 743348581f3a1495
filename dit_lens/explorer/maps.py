"""Maps as bytes: averaged to a coarser grid, scaled to 0 to 255, and summarised by range, mean and thumbnail."""

from __future__ import annotations

from math import prod

import numpy as np
import torch
from torch import Tensor

THUMB = 8  # tokens of the longer side of a thumbnail


def average_maps(values: Tensor, grid: tuple[int, int], coarse: tuple[int, int]) -> Tensor:
    """Reduces maps [..., n] to a coarser grid by averaging."""
    if grid == coarse:
        return values
    maps = values.reshape(-1, 1, *grid)
    return torch.nn.functional.adaptive_avg_pool2d(maps, coarse).reshape(*values.shape[:-1], prod(coarse))


def summarise_maps(values: np.ndarray, grid: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns ranges [e, s, g, k, 2], means [e, s, g, k] and thumbnails [e, s, g, k, h', w'] of [e, s, g, k, n]."""
    ranges = np.stack([values.min(-1), values.max(-1)], -1)
    height, width = (min(side, max(1, round(side * THUMB / max(grid)))) for side in grid)
    maps = torch.from_numpy(quantise(values)).reshape(-1, 1, *grid).float()
    thumbs = torch.nn.functional.adaptive_avg_pool2d(maps, (height, width)).round().to(torch.uint8)
    return ranges, values.mean(-1), thumbs.reshape(*values.shape[:-1], height, width).numpy()


def quantise(values: np.ndarray) -> np.ndarray:
    """Scales each map to uint8, 0 its smallest and 255 its largest value; constant and missing maps become 0."""
    low, high = values.min(-1, keepdims=True), values.max(-1, keepdims=True)
    scaled = np.divide(values - low, high - low, out=np.zeros_like(values), where=high > low)
    return np.rint(255 * scaled).astype(np.uint8)
