"""What users pass as arrays (numpy arrays, tensors of any dtype and device, lists), and the border of a grid."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from dit_lens.errors import OpError, show

NUMBERS = "biuf"  # numpy's kinds of bools, integers and floats


def to_numpy(x: Any, *, labels: bool = False) -> np.ndarray:
    """Converts a tensor, array or nested list of numbers to numpy; bfloat16 and float8 become float32.

    x: what the user gave. Raises OpError if it is not an array of real numbers.
    labels: whether its entries may be names of any kind.
    """
    try:
        if isinstance(x, torch.Tensor):
            # numpy has neither bfloat16 nor float8.
            plain = x.dtype in (torch.float16, torch.float32, torch.float64) or not x.is_floating_point()
            x = (x if plain else x.float()).detach().cpu().numpy()
        array = np.asarray(x)
    except (TypeError, ValueError, RuntimeError, OverflowError) as problem:  # ragged lists, tensors on no device
        raise OpError(f"{show(x)} is not an array of numbers: {problem}. Give equally long rows.") from problem
    if not labels and array.dtype.kind not in NUMBERS:
        raise OpError(f"{show(x)} holds {array.dtype}, which is not real numbers. Give an array or a tensor of them.")
    return array


def border_of(grid: tuple[int, ...]) -> np.ndarray:
    """Which tokens lie on the border of a grid: bool [h, w]."""
    edge = np.ones(grid, dtype=bool)
    edge[1:-1, 1:-1] = False
    return edge
