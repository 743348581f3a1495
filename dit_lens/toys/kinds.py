"""The kinds of toys: one module each, which says all that training has to know of its pipeline."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Protocol, cast

from dit_lens.errors import StoreError, nearest

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
    from torch import Tensor, nn

KINDS = ("flux", "flux2", "qwen-image", "sana")
SHARES = {"text": 0.02, "autoencoder": 0.06, "transformer": 0.92}  # of the training time


class Kind(Protocol):
    """What the module of a toy offers. Latents are [b, c, h, w] in every kind, packed only for the transformer.

    TITLE: the model's name, for the card. NOTES: what else the card says. CALL: the pipeline's arguments, stored with
    the toy. SHIFT: of the noise schedule, in training as in the scheduler. FIRST_WORD: where the caption's first word
    stands among the words of :meth:`features`. TEXT_WIDTH: how wide they are. SHARES: of the stages in the time.
    """

    TITLE: str
    NOTES: str
    CALL: dict[str, Any]
    SHIFT: float
    FIRST_WORD: int
    TEXT_WIDTH: int
    SHARES: dict[str, float]

    def build(self, seed: int = 0, /) -> DiffusionPipeline:
        """The pipeline, untrained."""
        ...

    def text_encoders(self, pipe: Any, /) -> dict[str, nn.Module]:
        """The text encoders, by the names they have in checkpoints."""
        ...

    def encode(self, pipe: Any, captions: list[str], /) -> dict[str, Tensor]:
        """The conditioning of a batch of captions, as the transformer's own keyword arguments."""
        ...

    def features(self, text: dict[str, Tensor], /) -> tuple[Tensor, Tensor]:
        """Of an encoded batch: every word [b, word, c], and the caption as a whole [b, c]."""
        ...

    def posterior(self, pipe: Any, images: Tensor, /) -> DiagonalGaussianDistribution:
        """What the autoencoder makes of images [b, 3, y, x]."""
        ...

    def decode(self, pipe: Any, latents: Tensor, /) -> Tensor:
        """Images of samples of the posterior."""
        ...

    def normalise(self, pipe: Any, modes: Tensor, /) -> None:
        """Sets the autoencoder's own constants so that the transformer sees latents of mean 0 and variance 1."""
        ...

    def to_latents(self, pipe: Any, images: Tensor, /) -> Tensor:
        """The mode of the posterior, in the units the transformer sees."""
        ...

    def velocity(self, pipe: Any, latents: Tensor, sigma: Tensor, text: dict[str, Tensor], /) -> Tensor:
        """The predicted velocity of noisy latents at ``sigma`` [b] in [0, 1]."""
        ...


def kind(name: str) -> Kind:
    """The module of a toy.

    >>> kind("qwen-image").TITLE
    'Qwen-Image'
    """
    if name not in KINDS:
        raise StoreError(f"there is no kind of toy called {name!r}.{nearest(name, KINDS)}")
    return cast("Kind", importlib.import_module(f"dit_lens.toys.{name.replace('-', '_')}"))
