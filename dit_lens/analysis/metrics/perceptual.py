"""Perceptual distances and judges, computed by established libraries: SSIM, LPIPS, CLIP.

``ssim`` and ``lpips`` need ``pip install 'dit-lens[perceptual]'``; CLIP uses transformers, which is always installed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dit_lens.analysis.metrics.pixels import apply_pairwise
from dit_lens.analysis.metrics.pretrained import load_pretrained
from dit_lens.errors import OpError

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image
    from torch import Tensor
    from transformers import CLIPModel, CLIPProcessor


def ssim(a: Any, b: Any) -> float | np.ndarray:
    """Returns the structural similarity, 1 for equal images: Gaussian window (sigma 1.5, 11 pixels), mirrored borders.

    a, b: as in :func:`dit_lens.metrics.rmse`; height and width must be above 5 pixels.
    Raises OpError if torchmetrics is not installed. Source: Wang et al. 2004.
    """
    measure = _import("ssim", "torchmetrics.functional.image").structural_similarity_index_measure

    def compare(x: np.ndarray, y: np.ndarray) -> float:
        _check_size("ssim", x, 6)
        return float(measure(_to_batch(x), _to_batch(y), data_range=1.0))

    return apply_pairwise(a, b, compare)


def lpips(a: Any, b: Any) -> float | np.ndarray:
    """Returns LPIPS with AlexNet, 0 for equal images; torchmetrics and torchvision download its weights once.

    a, b: as in :func:`dit_lens.metrics.rmse`.
    Raises OpError if torchmetrics or torchvision is not installed. Source: Zhang et al. 2018.
    """
    measure = _load_lpips()

    def compare(x: np.ndarray, y: np.ndarray) -> float:
        _check_size("lpips", x, 31)  # what AlexNet's strides leave a pixel of
        if x.ndim == 3 and x.shape[-1] not in (1, 3, 4):
            raise OpError(f"lpips takes grey, RGB or RGBA images; these have {x.shape[-1]} channels.")
        return float(measure(_to_rgb(_to_batch(x)), _to_rgb(_to_batch(y))))

    return apply_pairwise(a, b, compare)


class Clip:
    """A CLIP model as a judge (called with an image and a prompt) and as a distance between images.

    ``clip(image, prompt)`` returns {"clip": cosine similarity of the two embeddings}; ``clip.distance(a, b)`` returns
    1 - cosine similarity of the embeddings of two images, 0 for equal images.
    """

    def __init__(self, model: CLIPModel, processor: CLIPProcessor):
        self.model, self.processor = model.eval(), processor
        self.__qualname__ = f"Clip({model.name_or_path})"  # the judge's name in the settings of a study

    def __call__(self, image: Image, prompt: str) -> dict[str, float]:
        return {"clip": _cosine(self.embed(image), self._embed_text(prompt))}

    @property
    def distance(self) -> Callable[[Image, Image], float]:
        """The distance between two images, 0 to 2, as a function with the name ``clip_distance``."""

        def clip_distance(a: Image, b: Image) -> float:
            return 1 - _cosine(self.embed(a), self.embed(b))

        return clip_distance

    @torch.no_grad()
    def embed(self, image: Image) -> Tensor:
        """The embedding of an image, [d]; not normalised."""
        inputs = self.processor(images=image.convert("RGB"), return_tensors="pt").to(self.model.device)
        return self.model.get_image_features(**inputs).pooler_output[0]

    @torch.no_grad()
    def _embed_text(self, prompt: str) -> Tensor:
        inputs = self.processor(text=prompt, return_tensors="pt", truncation=True).to(self.model.device)
        return self.model.get_text_features(**inputs).pooler_output[0]


def clip_judge(model: str | Path | CLIPModel, processor: CLIPProcessor | None = None) -> Clip:
    """Loads a CLIP model for ``judge=`` of a study; its ``distance`` is an entry for ``distances=``.

        clip = dl.metrics.clip_judge("openai/clip-vit-large-patch14")
        dl.studies.disruption(lens, prompts, judge=clip, distances=["ssim", clip.distance])

    Prompts are truncated to the length that the model was trained with (77 tokens).

    model: a folder or repository with a CLIP model and its processor, or a loaded CLIPModel.
    processor: the processor of a loaded CLIPModel.
    Raises StoreError if the model cannot be loaded, and OpError for a loaded model without a processor.
    Source: CLIPScore, Hessel et al. 2021, without its factor of 2.5.
    """
    from transformers import CLIPModel, CLIPProcessor

    if isinstance(model, str | Path):
        return Clip(*load_pretrained(model, "a CLIP model with its processor", CLIPModel, CLIPProcessor))
    if processor is None:
        raise OpError("A loaded CLIPModel needs its processor: clip_judge(model, CLIPProcessor.from_pretrained(...)).")
    return Clip(model, processor)


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.cosine_similarity(a.float(), b.float(), dim=0))


def _check_size(distance: str, pixels: np.ndarray, least: int) -> None:
    """Raises OpError for images that are too small. least: pixels of the shorter side."""
    height, width = pixels.shape[:2]
    if min(height, width) < least:
        raise OpError(
            f"{distance} needs images of {least} x {least} pixels or more; these have {height} x {width}. An image is "
            "[h, w] or [h, w, c], with its channels last. Enlarge both, or use rmse."
        )


def _to_batch(pixels: np.ndarray) -> Tensor:
    """Converts [h, w] or [h, w, c] to [1, c, h, w], the layout of torchmetrics."""
    image = torch.from_numpy(pixels)
    return (image[None] if image.ndim == 2 else image.movedim(-1, 0))[None]


def _to_rgb(images: Tensor) -> Tensor:
    """Converts to three channels in float32: repeats grey, drops alpha."""
    return images.float().expand(-1, 3, -1, -1) if images.shape[1] == 1 else images.float()[:, :3]


@cache
def _load_lpips() -> Any:
    _import("lpips", "torchvision")
    package = _import("lpips", "torchmetrics.image.lpip")
    return package.LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True).eval()


def _import(distance: str, module: str) -> Any:
    """Imports a module of an optional package, for a distance that needs it."""
    try:
        return importlib.import_module(module)
    except ImportError as missing:
        raise OpError(
            f"{distance} is computed by {missing.name}, which is not installed: pip install "
            "'dit-lens[perceptual]'. rmse, psnr and mean_abs need no further package."
        ) from missing
