"""Where the subject truly is: the masks that users give, checked and in one form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from dit_lens.analysis.arrays import to_numpy
from dit_lens.arguments.functions import name_of, takes
from dit_lens.arguments.numbers import list_entries
from dit_lens.core.runs.provenance import digest
from dit_lens.errors import OpError, show
from dit_lens.studies.shared.judges import choose_judge

if TYPE_CHECKING:
    from dit_lens.lens import DiTLens

Mask = np.ndarray | Image.Image
Masks = Sequence[Mask] | Callable[[Image.Image, str], Mask]


def check_masks(masks: Masks | None, lens: DiTLens, prompts: Sequence[str]) -> list[np.ndarray] | Callable | None:
    """Masks as bool arrays, one per prompt; a function as it is; None if a toy reads its images back.

    masks: what the user gave.
    lens: lens of the study.
    prompts: all prompts of the study.
    """
    if masks is None:
        if choose_judge(lens, prompts, None) is None:
            raise OpError(
                "the study must know where the subject is: pass masks=, a list of bool arrays or a function of image "
                "and prompt."
            )
        return None
    if callable(masks):
        if not takes(masks, 2):
            raise OpError(
                f"masks={name_of(masks)} cannot be called with an image and a prompt. Give it two parameters."
            )
        return masks
    listed = list_entries(masks)
    if listed is None or len(listed) != len(prompts):
        given = show(masks) if listed is None else len(listed)
        raise OpError(f"masks= takes one mask for every prompt, and got {given} for {len(prompts)} prompts.")
    return [as_mask(mask, f"masks[{i}]") for i, mask in enumerate(listed)]


def as_mask(mask: Any, name: str) -> np.ndarray:
    """A mask as a bool array; OpError if it is neither one nor an image.

    mask: bool [H, W] or a PIL image, of which white is the subject.
    name: what the mask is called in the message.
    """
    if isinstance(mask, Image.Image):
        return np.asarray(mask.convert("L")) > 127
    array = to_numpy(mask)
    if array.dtype != bool or array.ndim != 2:
        raise OpError(
            f"{name} must be a bool array [H, W] or a PIL image, and is {array.dtype} {list(array.shape)}. "
            "Compare it first: mask > 0."
        )
    return array


def digest_mask(mask: np.ndarray) -> str:
    """The shape of a mask and a digest of what is in it, for the settings of a study."""
    return f"{mask.shape} {digest(mask.tobytes())}"
