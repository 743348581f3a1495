"""Images, of whatever type they are: PIL's own, numpy's, torch's, or a file."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from dit_lens.arguments.paths import expand_user

if TYPE_CHECKING:
    from PIL.Image import Image

WORDS = "an image: of PIL, a path of one, or an array [h, w, c] or tensor [c, h, w] of uint8, or of floats from 0 to 1"
CHANNELS = (1, 3, 4)  # grey, RGB, RGBA


def to_image(value: Any) -> Image | None:
    """One image as PIL has it; None for what is none.

    >>> import numpy as np, torch
    >>> to_image(np.zeros((2, 4, 3))).size, to_image(torch.ones(3, 2, 4)).getpixel((0, 0))
    ((4, 2), (255, 255, 255))

    value: an image of PIL stays as it is. Floats are rounded to 256 levels, as diffusers does where it gives PIL.
    """
    if any(kind.__module__ == "PIL.Image" and kind.__name__ == "Image" for kind in type(value).__mro__):
        return value
    if isinstance(value, str | os.PathLike):
        return _open(value)
    if not isinstance(getattr(value, "shape", None), tuple):
        return None
    return _from_array(value)


def _open(path: Any) -> Image | None:
    from PIL import Image

    try:
        with Image.open(expand_user(path)) as image:
            image.load()
            return image.copy()
    except (OSError, ValueError, TypeError, SyntaxError, Image.DecompressionBombError):
        return None


def _from_array(value: Any) -> Image | None:
    import numpy as np
    from PIL import Image

    of_torch = hasattr(value, "detach")
    try:
        pixels = np.asarray(value.detach().cpu().float() if of_torch and value.is_floating_point() else value)
    except (TypeError, ValueError, RuntimeError, AttributeError):  # without values
        return None
    if pixels.ndim == 3 and pixels.shape[0 if of_torch else -1] not in CHANNELS:
        of_torch = not of_torch  # in the other's order
    if pixels.ndim == 3 and of_torch:
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim not in (2, 3) or not pixels.size or (pixels.ndim == 3 and pixels.shape[-1] not in CHANNELS):
        return None
    if pixels.dtype.kind == "f" and pixels.min() >= 0 and pixels.max() <= 1:  # not so with a NaN
        pixels = (pixels * 255).round().astype(np.uint8)
    if pixels.dtype != np.uint8:
        return None
    return Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels))
