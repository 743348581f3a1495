"""Distances closer to the eye than grey levels, by well-kept libraries: SSIM, LPIPS, CLIP.

``ssim`` and ``lpips`` need ``pip install 'dit-lens[perceptual]'``; CLIP runs on transformers, which is there.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dit_lens.analysis.metrics.pixels import per_pair
from dit_lens.errors import OpError, StoreError

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image
    from torch import Tensor
    from transformers import CLIPModel, CLIPProcessor


def ssim(a: Any, b: Any) -> float | np.ndarray:
    """Structural similarity, 1 for equal images: Gaussian window (sigma 1.5, 11 pixels), mirrored borders.

    Takes and returns as ``metrics.rmse``; both sides longer than 5 pixels. Source: Wang et al. 2004. Raises OpError
    where torchmetrics is not installed.
    """
    measure = _needed("ssim", "torchmetrics.functional.image").structural_similarity_index_measure
    return per_pair(a, b, lambda x, y: float(measure(_batch(x), _batch(y), data_range=1.0)))


def lpips(a: Any, b: Any) -> float | np.ndarray:
    """LPIPS over AlexNet, 0 for equal images; its weights are downloaded once, by torchmetrics and torchvision.

    Takes and returns as ``metrics.rmse``. Source: Zhang et al. 2018. Raises OpError where torchmetrics or torchvision
    is not installed.
    """
    measure = _alexnet()
    return per_pair(a, b, lambda x, y: float(measure(_colour(_batch(x)), _colour(_batch(y)))))


class Clip:
    """A CLIP as a judge of prompts (called with image and prompt) and as a distance between images.

    ``clip(image, prompt)`` is {"clip": cosine of the two embeddings}; ``clip.distance(a, b)`` is 1 - cosine of two
    images' embeddings, 0 for equal ones. Embeddings are made one by one, without gradients.
    """

    def __init__(self, model: CLIPModel, processor: CLIPProcessor):
        self.model, self.processor = model.eval(), processor
        self.__qualname__ = f"Clip({model.name_or_path})"  # what a study's settings say of it

    def __call__(self, image: Image, prompt: str) -> dict[str, float]:
        return {"clip": _cosine(self._seen(image), self._said(prompt))}

    @property
    def distance(self) -> Callable[[Image, Image], float]:
        """How far two images lie apart, 0 to 2, as a function called ``clip_distance``."""

        def clip_distance(a: Image, b: Image) -> float:
            return 1 - _cosine(self._seen(a), self._seen(b))

        return clip_distance

    @torch.no_grad()
    def _seen(self, image: Image) -> Tensor:
        inputs = self.processor(images=image.convert("RGB"), return_tensors="pt").to(self.model.device)
        return self.model.get_image_features(**inputs).pooler_output[0]

    @torch.no_grad()
    def _said(self, prompt: str) -> Tensor:
        inputs = self.processor(text=prompt, return_tensors="pt", truncation=True).to(self.model.device)
        return self.model.get_text_features(**inputs).pooler_output[0]


def clip_judge(model: str | Path | CLIPModel, processor: CLIPProcessor | None = None) -> Clip:
    """A CLIP for ``judge=`` of a study; its ``distance`` goes into ``distances=``.

        clip = dl.metrics.clip_judge("openai/clip-vit-large-patch14")
        dl.studies.disruption(lens, prompts, judge=clip, distances=["ssim", clip.distance])

    model: a folder or repository with a CLIP and its processor, or a loaded CLIPModel with its processor. Prompts are
    cut at the length CLIP was made for (77 tokens). Source: CLIPScore, Hessel et al. 2021, without its factor of 2.5.
    Raises StoreError where nothing can be loaded, OpError for a model without a processor.
    """
    from transformers import CLIPModel, CLIPProcessor

    if isinstance(model, str | Path):
        try:
            return Clip(CLIPModel.from_pretrained(model), CLIPProcessor.from_pretrained(model))
        except (OSError, ValueError) as problem:
            raise StoreError(f"{model} could not be loaded as a CLIP and its processor: {problem}") from problem
    if processor is None:
        raise OpError("A loaded CLIPModel needs its processor: clip_judge(model, CLIPProcessor.from_pretrained(...)).")
    return Clip(model, processor)


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.cosine_similarity(a.float(), b.float(), dim=0))


def _batch(pixels: np.ndarray) -> Tensor:
    """[h, w] or [h, w, c] as [1, c, h, w], which torchmetrics takes."""
    image = torch.from_numpy(pixels)
    return (image[None] if image.ndim == 2 else image.movedim(-1, 0))[None]


def _colour(images: Tensor) -> Tensor:
    """Three channels in float32: grey repeated, alpha left out."""
    return images.float().expand(-1, 3, -1, -1) if images.shape[1] == 1 else images.float()[:, :3]


@cache
def _alexnet() -> Any:
    _needed("lpips", "torchvision")
    package = _needed("lpips", "torchmetrics.image.lpip")
    return package.LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True).eval()


def _needed(distance: str, module: str) -> Any:
    """A module of a package that not everybody installs."""
    try:
        return importlib.import_module(module)
    except ImportError as missing:
        raise OpError(
            f"{distance} is computed by {missing.name}, which is not installed: pip install "
            "'dit-lens[perceptual]'. rmse, psnr and mean_abs need nothing further."
        ) from missing
