"""Clean latents to images: what a pipeline does after its last step, for latents that were read inside."""

from __future__ import annotations

from math import isqrt
from typing import TYPE_CHECKING, Any

import torch

from dit_lens.core.request.call import needs_weights
from dit_lens.errors import FamilyError
from dit_lens.families.layout import pack, regroup, unpack

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image
    from torch import Tensor

    from dit_lens.lens import DiTLens

BATCH = 8  # images that go through the autoencoder together


@torch.no_grad()
def decode(lens: DiTLens, tokens: Tensor, grid: tuple[int, ...]) -> list[Image]:
    """Images of clean latents, as the pipeline's own autoencoder draws them.

    tokens: [image, token, channel] on ``grid`` (h, w), as the transformer has them.
    """
    vae = autoencoder(lens.pipe)
    if len(grid) != 2:
        raise FamilyError(
            f"a grid of {' x '.join(map(str, grid))} tokens is a video, which is not drawn. Keep its latents."
        )
    images: list[Image] = []
    for some in tokens.split(BATCH):
        latents = _scaled(vae, _latents(lens, some.to(vae.device, torch.float32), grid))
        drawn = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
        drawn = drawn[:, :, 0] if drawn.ndim == 5 else drawn
        images += _processor(lens.pipe).postprocess(drawn.float(), output_type="pil")
    return images


def autoencoder(pipe: DiffusionPipeline) -> Any:
    """The pipeline's autoencoder; FamilyError where it has none."""
    vae = getattr(pipe, "vae", None)
    if vae is None:
        raise FamilyError(
            f"this {type(pipe).__name__} was loaded without its autoencoder, so latents cannot be drawn. Load it with "
            "vae=, or keep the latents: Read('blocks.*.img.x0')."
        )
    needs_weights(pipe, "drawing latents needs")
    return vae


def _latents(lens: DiTLens, tokens: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Tokens as [image, channel, H, W]. The packing follows from the number of the autoencoder's channels."""
    vae: Any = lens.pipe.vae
    channels = vae.config.get("latent_channels") or vae.config.get("z_dim")
    side = isqrt(tokens.shape[-1] // channels)
    if channels * side * side != tokens.shape[-1]:
        raise FamilyError(f"tokens of {tokens.shape[-1]} channels are no patches of the autoencoder's {channels}.")
    if hasattr(vae, "bn"):
        mean, deviation = _statistics(vae, tokens)
        tokens = tokens * deviation + mean
    if lens.family.packing == "yxc":
        tokens = regroup(tokens, side * side)
    h, w = grid
    like = torch.empty(len(tokens), channels, h * side, w * side, device="meta")
    return unpack(tokens, like, "bchw", [1, side, side])


def _scaled(vae: Any, latents: Tensor) -> Tensor:
    """Latents as the autoencoder takes them."""
    config = vae.config
    if config.get("latents_mean") is not None and config.get("z_dim"):  # video autoencoders: one frame
        mean, deviation = (
            torch.tensor(config[name]).view(1, -1, 1, 1, 1).to(latents) for name in ("latents_mean", "latents_std")
        )
        return latents[:, :, None] * deviation + mean
    if hasattr(vae, "bn"):
        return latents
    return latents / (config.get("scaling_factor") or 1.0) + (config.get("shift_factor") or 0.0)


def _processor(pipe: DiffusionPipeline) -> Any:
    from diffusers.image_processor import VaeImageProcessor

    return getattr(pipe, "image_processor", None) or VaeImageProcessor()


def as_tokens(lens: DiTLens, latents: Tensor) -> Tensor:
    """The autoencoder's latents [image, channel, H, W] as the transformer's tokens: the inverse of ``_latents``."""
    vae: Any = lens.pipe.vae
    side = isqrt(lens.anatomy.latent_width // latents.shape[1])
    tokens = pack(latents, "bchw", [1, side, side])
    if lens.family.packing == "yxc":
        tokens = regroup(tokens, latents.shape[1])
    if hasattr(vae, "bn"):
        mean, deviation = _statistics(vae, tokens)
        tokens = (tokens - mean) / deviation
    return tokens


def _statistics(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of a token's channels, by which FLUX.2's autoencoder normalises packed latents."""
    deviation = torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps)
    return vae.bn.running_mean.to(like), deviation.to(like)


def tokens_of(lens: DiTLens, latents: Tensor | None, grid: tuple[int, ...]) -> Tensor:
    """What a run returned for latents, on its grid (h, w), as float32 tokens [b, n, d]."""
    if latents is not None and type(lens.pipe).__name__ in lens.family.returns_vae_latents:
        latents = as_tokens(lens, latents.float())
    elif latents is not None and latents.ndim == 4:
        side = latents.shape[-1] // grid[-1]
        latents = pack(latents, "bchw", [1, side, side])
    if latents is None or latents.ndim != 3:
        shape = None if latents is None else list(latents.shape)
        raise FamilyError(f"final latents of shape {shape} are neither tokens nor images, so they cannot be drawn.")
    return latents.float().cpu()
