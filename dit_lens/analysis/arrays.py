"""Conversion of what users pass as arrays: numpy arrays, tensors of any dtype and device, lists."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def to_numpy(x: Any) -> np.ndarray:
    """Converts a tensor, array or nested list to numpy; bfloat16 becomes float32."""
    if isinstance(x, torch.Tensor):
        # numpy has no bfloat16.
        x = (x.float() if x.dtype == torch.bfloat16 else x).detach().cpu().numpy()
    return np.asarray(x)
