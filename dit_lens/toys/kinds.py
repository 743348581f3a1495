"""The kinds of toys: modules that implement :class:`Kind`, all that training needs to know of a pipeline."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Protocol, cast

from dit_lens.errors import StoreError, nearest

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
    from torch import Tensor, nn

KINDS = ("flux", "flux2", "qwen-image", "sana")


class Kind(Protocol):
    """Interface of a toy's module. Latents are [b, c, h, w] in every kind, and are packed only for the transformer.

    TITLE: name of the model, for the model card.
    NOTES: further text for the model card.
    CALL: default arguments of the pipeline's call, stored with the toy.
    SHIFT: shift of the noise schedule, in training and in the scheduler.
    FIRST_WORD: index of the caption's first word among the words of :meth:`features`.
    TEXT_WIDTH: width of the features of a word.
    """

    TITLE: str
    NOTES: str
    CALL: dict[str, Any]
    SHIFT: float
    FIRST_WORD: int
    TEXT_WIDTH: int

    def build(self, seed: int = 0, /) -> DiffusionPipeline:
        """Builds the untrained pipeline."""
        ...

    def text_encoders(self, pipe: Any, /) -> dict[str, nn.Module]:
        """Returns name in checkpoints -> text encoder."""
        ...

    def encode(self, pipe: Any, captions: list[str], /) -> dict[str, Tensor]:
        """Encodes a batch of captions as keyword arguments of the transformer."""
        ...

    def features(self, text: dict[str, Tensor], /) -> tuple[Tensor, Tensor]:
        """Returns, of an encoded batch, the features of every word [b, word, c] and of the whole caption [b, c]."""
        ...

    def posterior(self, pipe: Any, images: Tensor, /) -> DiagonalGaussianDistribution:
        """Returns the posterior of the autoencoder for images [b, 3, y, x] in [-1, 1]."""
        ...

    def decode(self, pipe: Any, latents: Tensor, /) -> Tensor:
        """Decodes samples of the posterior to images [b, 3, y, x] in [-1, 1]."""
        ...

    def set_normalisation(self, pipe: Any, modes: Tensor, /) -> None:
        """Sets the constants of the autoencoder so that the transformer's latents have mean 0 and variance 1.

        modes: modes of the posteriors of many images.
        """
        ...

    def to_latents(self, pipe: Any, images: Tensor, /) -> Tensor:
        """Returns the normalised mode of the posterior: the latents that the transformer works on."""
        ...

    def velocity(self, pipe: Any, latents: Tensor, sigma: Tensor, text: dict[str, Tensor], /) -> Tensor:
        """Predicts the velocity of noisy latents.

        pipe: the pipeline.
        latents: normalised, noisy latents [b, c, h, w].
        sigma: noise level [b], in [0, 1].
        text: encoded captions, from :meth:`encode`.
        """
        ...


def kind(name: str) -> Kind:
    """Returns the module of a kind of toy.

    >>> kind("qwen-image").TITLE
    'Qwen-Image'
    """
    if name not in KINDS:
        raise StoreError(f"there is no kind of toy named {name!r}.{nearest(name, KINDS)}")
    return cast("Kind", importlib.import_module(f"dit_lens.toys.{name.replace('-', '_')}"))
