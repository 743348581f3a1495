"""Models that see images alone: how alike two are (DINO), and where the subject is (BiRefNet)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from dit_lens.analysis.metrics.pretrained import load_pretrained
from dit_lens.arguments.checks import checked
from dit_lens.errors import OpError, StoreError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

DINO, BIREFNET = "facebook/dinov2-base", "ZhengPeng7/BiRefNet"
SIDE = 1024  # pixels at which BiRefNet looks at an image
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, by which its input is normalised


class Dino:
    """A DINO model as a distance between images: 1 - cosine similarity of their class tokens, 0 for equal images."""

    def __init__(self, model: Any, processor: Any):
        self.model, self.processor = model.eval(), processor
        self.__name__ = "dino_distance"
        self.__qualname__ = f"Dino({model.name_or_path})"

    def __call__(self, a: Image, b: Image) -> float:
        return 1 - float(torch.cosine_similarity(self._embed(a), self._embed(b), dim=0))

    @torch.no_grad()
    def _embed(self, image: Image) -> Tensor:
        inputs = self.processor(images=image.convert("RGB"), return_tensors="pt")
        return self.model(**inputs.to(self.model.device, self.model.dtype)).last_hidden_state[0, 0].float()


@checked
def dino_distance(model: str | Path = DINO) -> Callable[[Image, Image], float]:
    """Loads a DINO model as an entry for ``distances=`` of a study: how alike two images are in what they show.

        dl.studies.disruption(lens, prompts, distances=["rmse", dl.metrics.dino_distance()])

    model: a folder or repository with a vision transformer of transformers whose first token is the image's (DINO,
        DINOv2, DINOv3), and its image processor.
    Raises StoreError if the model cannot be loaded.
    Source: the DINO score of DreamBooth, Ruiz et al. 2023, as a distance.
    """
    from transformers import AutoImageProcessor, AutoModel

    return Dino(*load_pretrained(model, "a DINO model with its image processor", AutoModel, AutoImageProcessor))


class BiRefNet:
    """BiRefNet as ``masks=`` of a study: called with an image and a prompt, it returns the subject, bool [h, w]."""

    def __init__(self, model: Any):
        self.model = model.eval()
        self.__qualname__ = f"BiRefNet({model.name_or_path})"

    @torch.no_grad()
    def __call__(self, image: Image, prompt: str = "") -> np.ndarray:  # noqa: ARG002 studies pass it
        pixels = torch.from_numpy(np.array(image.convert("RGB").resize((SIDE, SIDE), resample=2))).float() / 255
        normal = (pixels - torch.tensor(MEAN)) / torch.tensor(DEVIATION)
        parameter = next(self.model.parameters())
        found = self.model(normal.movedim(-1, 0)[None].to(parameter.device, parameter.dtype))
        # In evaluation it returns maps of growing size, of which the last is the answer.
        logits = found[-1] if isinstance(found, list | tuple) else found
        if not isinstance(logits, torch.Tensor) or logits.ndim != 4 or logits.shape[:2] != (1, 1):
            raise OpError(f"{self.__qualname__} does not return a map [1, 1, h, w], so it is no BiRefNet.")
        size = (image.height, image.width)
        chances = F.interpolate(logits.float().sigmoid().cpu(), size=size, mode="bilinear", align_corners=False)
        return (chances[0, 0] > 0.5).numpy()


@checked
def birefnet_masks(
    model: str | Path = BIREFNET, *, trust_remote_code: bool = False
) -> Callable[[Image, str], np.ndarray]:
    """Loads BiRefNet for ``masks=`` of ``organisation``: the subject of each image.

        masks = dl.metrics.birefnet_masks(trust_remote_code=True)
        dl.studies.organisation(lens, prompts, masks=masks)

    model: a folder or repository with BiRefNet, or another AutoModelForImageSegmentation that is called as it is.
    trust_remote_code: BiRefNet is no part of transformers: its class comes with its weights and is run. Look at it
        first, and pass True if you trust it.
    Raises StoreError if the model cannot be loaded, and OpError if its code may not run.
    Source: Zheng et al. 2024 (arXiv 2401.03407).
    """
    from transformers import AutoModelForImageSegmentation

    try:
        found = load_pretrained(model, "BiRefNet", AutoModelForImageSegmentation, trust_remote_code=trust_remote_code)
        return BiRefNet(*found)
    except StoreError as problem:
        if trust_remote_code or "trust_remote_code" not in str(problem):
            raise
        raise OpError(
            f"{model} comes with code of its own, which would run on this machine. Look at the .py files beside its "
            "weights; if you trust them, pass trust_remote_code=True (--trust-remote-code)."
        ) from problem
