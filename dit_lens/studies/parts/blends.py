"""What a transport is compared with: blends of the two images, of their latents, and of their prompts' embeddings.

Rows lie as in a transport: every source (even) is followed by its target (odd).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dit_lens.analysis.clusters import upsample
from dit_lens.errors import PromptError
from dit_lens.instruments.latents import decode_latents

if TYPE_CHECKING:
    from PIL.Image import Image

    from dit_lens.lens import DiTLens


def blend_images(source: Image, target: Image, strength: float, mask: np.ndarray | None = None) -> Image:
    """Blends two images in pixels: target (1 - strength) + source strength, everywhere or inside a mask.

    >>> from PIL import Image
    >>> black, white = Image.new("RGB", (2, 1)), Image.new("RGB", (2, 1), (200, 200, 200))
    >>> np.asarray(blend_images(white, black, 0.5, np.array([[True, False]])))[0, :, 0].tolist()
    [100, 0]

    source: image that weighs ``strength``.
    target: image that weighs the rest.
    strength: 0 to 1.
    mask: mask of the token grid, bool [h, w], or None for everywhere.
    """
    from PIL import Image

    one, other = (np.asarray(image, float) for image in (source, target))
    weight = strength * (np.ones(one.shape[:2]) if mask is None else upsample(mask, one.shape[:2]))[..., None]
    return Image.fromarray(np.rint(other + weight * (one - other)).astype(np.uint8))


def blend_latents(
    lens: DiTLens, tokens: Tensor, grid: tuple[int, ...], strength: float, masks: Sequence[np.ndarray] | None = None
) -> list[Image]:
    """Blends the final latents of targets with those of their sources, and decodes them to images.

    lens: lens on the model.
    tokens: tokens of the final latents, [b, n, d].
    grid: token grid, (h, w).
    strength: weight of the source, 0 to 1.
    masks: mask of every pair, bool [h, w], or None for everywhere.
    """
    sources, targets = tokens[0::2], tokens[1::2]
    weight = torch.full((*targets.shape[:2], 1), strength)
    if masks is not None:
        weight *= torch.from_numpy(np.stack([mask.ravel() for mask in masks]))[..., None]
    return decode_latents(lens, torch.lerp(targets, sources, weight), grid)


def blend_texts(texts: Mapping[str, Any], strength: float) -> dict[str, Any]:
    """Blends prompt embeddings: every target becomes target (1 - strength) + source strength; shapes stay.

    >>> blend_texts({"prompt_embeds": torch.tensor([[[8.0]], [[0.0]]]), "prompt": None}, 0.25)["prompt_embeds"].tolist()
    [[[8.0]], [[2.0]]]

    Masks of padding become the union of both. Raises PromptError for embeddings that are not tensors with one entry
    per row.

    texts: what ``lens.encode`` returns for sources and targets in turn.
    strength: weight of the source, 0 to 1.
    """
    rows = {len(value) for value in texts.values() if isinstance(value, Tensor)}
    odd = [name for name, value in texts.items() if value is not None and not isinstance(value, Tensor)]
    if len(rows) != 1 or odd:
        raise PromptError(
            f"embeddings of this pipeline cannot be blended: {', '.join(odd or texts)} hold no tensor with one entry "
            "per row."
        )
    return {name: None if value is None else _blend(value, strength) for name, value in texts.items()}


def explain_no_prompt_blend(lens: DiTLens, prompts: Sequence[str], call: Mapping[str, Any]) -> str:
    """Why the prompts of a pipeline cannot be blended; empty if they can.

    lens: lens on the model.
    prompts: a source and a target prompt.
    call: other arguments of the pipeline.
    """
    try:
        blend_texts(lens.encode(prompts, **call), 0.5)
    except PromptError as problem:
        return str(problem)
    return ""


def _blend(value: Tensor, strength: float) -> Tensor:
    source, target = value[0::2], value[1::2]
    new = value.clone()
    new[1::2] = torch.lerp(target, source, strength) if value.is_floating_point() else torch.maximum(target, source)
    return new
