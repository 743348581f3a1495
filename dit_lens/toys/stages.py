"""The three stages of training a toy: what each trains, and its loss on a batch of scenes."""

from __future__ import annotations

from dataclasses import astuple
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dit_lens.toys.kinds import Kind
from dit_lens.toys.scenes import ATTRIBUTES, VALUES, Scene, draw, sample_scenes

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

CAPTION_DROPOUT = 0.1  # share of captions that are replaced by the empty one, for classifier-free guidance
KL_WEIGHT = 1e-6
NORMALISED = 256  # drawn images whose latents decide the VAE's constants
ATTRIBUTE_WORDS = (1, 2, 3, 4, 7, 8)  # indices of the attributes among the ten words of a caption


class Stage(Protocol):
    """A stage of training: the modules that it trains, and the loss of one batch."""

    name: str

    @property
    def net(self) -> nn.Module:
        """The modules that are trained."""
        ...

    def loss(self, scenes: list[Scene], first: int, noise: torch.Generator, /) -> Tensor:
        """Returns the loss of a batch. first: seed of the first drawing, as in :func:`draw_batch`. noise: its noise."""
        ...


class TextStage:
    """Text encoders learn to classify the attributes, from the features of every word and of the whole caption."""

    name = "text"

    def __init__(self, toy: Kind, pipe: DiffusionPipeline):
        self.toy, self.pipe = toy, pipe
        classes = 1 + sum(len(values) for values in VALUES.values())  # class 0: a word that is not an attribute
        self.word = nn.Linear(toy.TEXT_WIDTH, classes)
        self.caption = nn.ModuleDict({name: nn.Linear(toy.TEXT_WIDTH, len(of)) for name, of in VALUES.items()})
        encoders = toy.text_encoders(pipe)
        self.net = nn.ModuleDict({**encoders, "word": self.word, "caption": self.caption}).to(pipe.device)

    def loss(self, scenes: list[Scene], _first: int, _noise: torch.Generator) -> Tensor:
        """Returns the cross-entropy of the class of every word, plus that of each attribute given the caption."""
        words, caption = self.toy.features(self.toy.encode(self.pipe, [scene.caption for scene in scenes]))
        device = words.device
        values = torch.tensor([_value_indices(scene) for scene in scenes], device=device)  # [b, attribute]
        first_classes = torch.tensor(np.cumsum([1, *(len(v) for v in VALUES.values())])[:-1], device=device)
        labels = torch.zeros(words.shape[:2], dtype=torch.long, device=device)
        labels[:, [self.toy.FIRST_WORD + i for i in ATTRIBUTE_WORDS]] = values + first_classes
        whole = [F.cross_entropy(self.caption[name](caption), values[:, i]) for i, name in enumerate(ATTRIBUTES)]
        return F.cross_entropy(self.word(words).flatten(0, 1), labels.flatten()) + sum(whole) / len(whole)


class AutoencoderStage:
    """The VAE learns to reconstruct images from 4096 latents (beta-VAE with an L1 loss, Higgins et al. 2017)."""

    name = "autoencoder"

    def __init__(self, toy: Kind, pipe: DiffusionPipeline):
        self.toy, self.pipe = toy, pipe
        self.net = pipe.vae

    def loss(self, scenes: list[Scene], first: int, noise: torch.Generator) -> Tensor:
        """Returns the L1 error of reconstructions from sampled latents, plus the weighted KL divergence."""
        images = draw_batch(scenes, first, self.net.device)
        posterior = self.toy.posterior(self.pipe, images)
        latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=noise).to(images)
        return F.l1_loss(self.toy.decode(self.pipe, latents), images) + KL_WEIGHT * posterior.kl().mean()


class TransformerStage:
    """Rectified flow: the transformer learns the velocity noise - image at sigma (Esser et al., arXiv 2403.03206)."""

    name = "transformer"

    def __init__(self, toy: Kind, pipe: DiffusionPipeline):
        self.toy, self.pipe = toy, pipe
        self.net = pipe.transformer

    def loss(self, scenes: list[Scene], first: int, noise: torch.Generator) -> Tensor:
        """Returns the mean squared error of the velocity, at one random sigma per image."""
        n = len(scenes)
        keep_caption = torch.rand(n, generator=noise) >= CAPTION_DROPOUT
        with torch.no_grad():
            captions = [scene.caption if kept else "" for scene, kept in zip(scenes, keep_caption, strict=True)]
            text = self.toy.encode(self.pipe, captions)
            clean = self.toy.to_latents(self.pipe, draw_batch(scenes, first, self.net.device))
        eps = torch.randn(clean.shape, generator=noise).to(clean)
        # Logit-normal timesteps, shifted like those of the scheduler (Esser et al., section 3.1 and eq. 23).
        t = torch.sigmoid(torch.randn(n, generator=noise))
        sigma = (self.toy.SHIFT * t / (1 + (self.toy.SHIFT - 1) * t)).to(clean)
        noisy = torch.lerp(clean, eps, sigma[:, None, None, None])
        return F.mse_loss(self.toy.velocity(self.pipe, noisy, sigma, text), eps - clean)


STAGES: tuple[type[TextStage | AutoencoderStage | TransformerStage], ...] = (
    TextStage,
    AutoencoderStage,
    TransformerStage,
)


def draw_batch(scenes: list[Scene], first: int, device: torch.device | str) -> Tensor:
    """Draws scenes as [b, 3, 64, 64] in [-1, 1]; scene i with the seed ``first + i``."""
    drawn = np.stack([np.asarray(draw(scene, first + i).image) for i, scene in enumerate(scenes)])
    return torch.from_numpy(drawn).to(device).permute(0, 3, 1, 2) / 127.5 - 1


@torch.no_grad()
def normalise_latents(toy: Kind, pipe: DiffusionPipeline) -> None:
    """Sets the VAE's constants so that the latents of drawn images have mean 0 and variance 1."""
    images = draw_batch(sample_scenes(NORMALISED, seed=1), 0, pipe.device)
    toy.set_normalisation(pipe, toy.posterior(pipe, images).mode())


def _value_indices(scene: Scene) -> list[int]:
    """Returns the index of each attribute's value among ``VALUES``."""
    return [VALUES[name].index(value) for name, value in zip(ATTRIBUTES, astuple(scene), strict=True)]
