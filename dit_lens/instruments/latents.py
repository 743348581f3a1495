"""Images, latents of the autoencoder and tokens of the transformer, and the ways between them.

    encode_images         images -> tokens
    decode_latents        tokens -> images
    read_latents          what a run returned -> tokens
    as_latents_argument   tokens -> what a pipeline takes as ``latents=``

Letters: b image, n image token, d channel of a token; c channel, h and w pixels of the autoencoder's latents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isqrt
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dit_lens.core.execution.at_weights import at_weights
from dit_lens.errors import FamilyError, OpError, PromptError
from dit_lens.families.layout import pack, regroup, unpack
from dit_lens.old_names import find_old_names

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image
    from torch import Tensor

    from dit_lens.core.session import Session

BATCH = 8  # images that go through the autoencoder together

__getattr__ = find_old_names(
    __name__,
    {
        "as_tokens": "pack_latents",
        "autoencoder": "find_autoencoder",
        "decode": "decode_latents",
        "tokens_of": "read_latents",
    },
)


def find_autoencoder(pipe: DiffusionPipeline) -> Any:
    """The pipeline's autoencoder; raises FamilyError if it has none."""
    vae = getattr(pipe, "vae", None)
    if vae is None:
        raise FamilyError(
            f"this {type(pipe).__name__} was loaded without its autoencoder, so latents cannot be drawn. Load it with "
            "vae=, or keep the latents: Read('blocks.*.img.x0')."
        )
    return vae


def check_autoencoder(lens: Session) -> None:
    """Raises FamilyError if the pipeline has no autoencoder, ExecutionError if it is out of reach on a server."""
    find_autoencoder(lens.pipe)
    lens.engine.check_weights("drawing latents needs")


@at_weights
@torch.no_grad()
def decode_latents(lens: Session, tokens: Tensor, grid: tuple[int, ...]) -> list[Image]:
    """Images of clean latents, as the pipeline's own autoencoder draws them after the last step.

    tokens: [b, n, d], as the transformer has them.
    grid: (h, w) of the tokens.
    """
    vae = find_autoencoder(lens.pipe)
    if len(grid) != 2:
        raise FamilyError(
            f"a grid of {' x '.join(map(str, grid))} tokens is a video, which is not drawn. Keep its latents."
        )
    images: list[Image] = []
    for some in tokens.split(BATCH):
        latents = unpack_latents(lens, some.to(vae.device, torch.float32), grid).to(vae.dtype)
        frames = lens.family.latents.frames
        drawn = vae.decode(latents[:, :, None] if frames else latents, return_dict=False)[0]
        drawn = drawn[:, :, 0] if frames else drawn
        images += _find_processor(lens.pipe).postprocess(drawn.float(), output_type="pil")
    return images


@at_weights
@torch.no_grad()
def encode_images(
    lens: Session, images: Sequence[Image], prompts: Sequence[str] | None, call: Mapping[str, Any]
) -> tuple[Tensor, tuple[int, int]]:
    """The clean latents of images, float32 [b, n, d] with channels as (latent channel, y, x), and their grid (h, w).

    The mode of the autoencoder's posterior; the inverse of :func:`decode_latents`. Raises OpError, before anything
    runs, for images of another size than the run's.

    images: PIL, of one size.
    prompts: of the run, one for each image; None where ``call`` has embeddings.
    call: the pipeline's arguments in the run.
    """
    vae, frames = find_autoencoder(lens.pipe), lens.family.latents.frames
    if odd := [image for image in images if not hasattr(image, "convert")]:
        raise OpError(f"{odd[0]!r} is not an image. Open it first: PIL.Image.open(path).")
    sizes = {image.size for image in images}
    if len(sizes) != 1:
        raise OpError(f"images have sizes {sorted(sizes)}. Give at least one, and all of one size.")
    pixels = torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images]))
    pixels = (pixels.permute(0, 3, 1, 2) / 127.5 - 1).to(vae.device, vae.dtype)  # as VaeImageProcessor.preprocess
    encoded = vae.encode(pixels[:, :, None] if frames else pixels)
    latents = (encoded.latent if hasattr(encoded, "latent") else encoded.latent_dist.mode()).float()
    latents = latents[:, :, 0] if frames else latents
    side = isqrt(lens.anatomy.latent_width // latents.shape[1])
    grid = (latents.shape[2] // side, latents.shape[3] // side)
    _check_size(lens, images[0], grid, prompts, call, len(images))
    return pack_latents(lens, latents).cpu(), grid


def pack_latents(lens: Session, latents: Tensor) -> Tensor:
    """The autoencoder's latents [b, c, h, w] as the transformer's tokens [b, n, d]."""
    side = isqrt(lens.anatomy.latent_width // latents.shape[1])
    tokens = pack(_normalise(lens, latents, "channel"), "bchw", [1, side, side])
    if lens.family.latents.packing == "yxc":
        tokens = regroup(tokens, latents.shape[1])
    return _normalise(lens, tokens, "token")


def unpack_latents(lens: Session, tokens: Tensor, grid: tuple[int, ...]) -> Tensor:
    """The inverse of :func:`pack_latents`, on a grid (h, w): how much a token packs follows from its channels."""
    channels = lens.pipe.vae.config.get(lens.family.latents.channels)
    if channels is None:
        raise _refuse_autoencoder(lens, f"count their channels as {lens.family.latents.channels}")
    side = isqrt(tokens.shape[-1] // channels)
    if channels * side * side != tokens.shape[-1]:
        raise FamilyError(
            f"tokens of {tokens.shape[-1]} channels cannot be made of patches of the autoencoder's {channels}."
        )
    tokens = _denormalise(lens, tokens, "token")
    if lens.family.latents.packing == "yxc":
        tokens = regroup(tokens, side * side)
    h, w = grid
    like = torch.empty(len(tokens), channels, h * side, w * side, device="meta")
    return _denormalise(lens, unpack(tokens, like, "bchw", [1, side, side]), "channel")


def read_latents(lens: Session, latents: Tensor | None, grid: tuple[int, ...]) -> Tensor:
    """What a run returned as latents, on its grid (h, w), as float32 tokens [b, n, d]."""
    if latents is not None and lens.family.pipeline(type(lens.pipe)).returns_latents == "vae":
        latents = pack_latents(lens, latents.float())
    elif latents is not None and latents.ndim == 4:
        side = latents.shape[-1] // grid[-1]
        latents = pack(latents, "bchw", [1, side, side])
    if latents is None or latents.ndim != 3:
        shape = None if latents is None else list(latents.shape)
        raise FamilyError(f"final latents of shape {shape} are neither tokens nor images, so they cannot be drawn.")
    return latents.float().cpu()


def as_latents_argument(lens: Session, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Tokens [b, n, d] on a grid (h, w) in the form in which the pipeline takes ``latents=``."""
    if lens.family.pipeline(type(lens.pipe)).takes_latents == "flattened":
        return tokens.transpose(1, 2).unflatten(2, grid)
    rule = lens.anatomy.grid_rule
    axes = "bchw" if rule["axes"] == "list" else rule["axes"]  # the pipeline makes a list of one tensor in every step
    _, *patch = rule["patch"]
    channels = tokens.shape[-1] // (patch[0] * patch[1])
    like = torch.empty(len(tokens), channels, grid[0] * patch[0], grid[1] * patch[1], device="meta")
    return unpack(tokens, like, axes, rule["patch"])


def _normalise(lens: Session, x: Tensor, each: str) -> Tensor:
    """What the transformer sees of latents [b, c, h, w] (each "channel") or tokens [b, n, d] (each "token")."""
    config, by = lens.pipe.vae.config, lens.family.latents.normalised
    if by == "factor" and each == "channel":  # as FluxImg2ImgPipeline._encode_vae_image
        return (x - (config.get("shift_factor") or 0.0)) * (config.get("scaling_factor") or 1.0)
    if by != each:
        return x
    mean, deviation = _find_statistics(lens, x)
    return (x - mean) / deviation


def _denormalise(lens: Session, x: Tensor, each: str) -> Tensor:
    """The inverse of :func:`_normalise`."""
    config, by = lens.pipe.vae.config, lens.family.latents.normalised
    if by == "factor" and each == "channel":  # as FluxPipeline.__call__, after the last step
        return x / (config.get("scaling_factor") or 1.0) + (config.get("shift_factor") or 0.0)
    if by != each:
        return x
    mean, deviation = _find_statistics(lens, x)
    return x * deviation + mean


def _find_statistics(lens: Session, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation by which latents are normalised, in the form of ``like``.

    "channel": as in QwenImagePipeline.__call__, [c, 1, 1]. "token": as in Flux2Pipeline.__call__, [d].
    """
    vae, by = lens.pipe.vae, lens.family.latents.normalised
    norm = getattr(vae, lens.family.latents.statistics or "", None)
    if not (norm is not None if by == "token" else vae.config.get("latents_mean") is not None):
        raise _refuse_autoencoder(lens, f"have the statistics of each {by}")
    if norm is not None:
        deviation = torch.sqrt(norm.running_var + vae.config.batch_norm_eps)
        return norm.running_mean.to(like), deviation.to(like)
    mean, deviation = (like.new_tensor(vae.config[name]) for name in ("latents_mean", "latents_std"))
    return mean[:, None, None], deviation[:, None, None]


def _refuse_autoencoder(lens: Session, what: str) -> FamilyError:
    return FamilyError(
        f"the autoencoder of {lens.family.name} must {what}, and the {type(lens.pipe.vae).__name__} of this pipeline "
        "does not. Load the pipeline with its own autoencoder."
    )


def _find_processor(pipe: DiffusionPipeline) -> Any:
    from diffusers.image_processor import VaeImageProcessor

    return getattr(pipe, "image_processor", None) or VaeImageProcessor()


def _check_size(
    lens: Session,
    image: Image,
    grid: tuple[int, int],
    prompts: Sequence[str] | None,
    call: Mapping[str, Any],
    count: int,
) -> None:
    """Refuses images that are not as many as those of the run, or whose tokens have another grid."""
    outline = lens.outline(prompts, **{"seed": 0, **call})
    expected = outline.grid
    if outline.rows != count:
        raise PromptError(f"the call is of {outline.rows} images, and {count} are given. Give one for each.")
    if expected is not None and tuple(expected) != grid:
        w, h = image.size
        wanted = (w * expected[1] // grid[1], h * expected[0] // grid[0])
        raise OpError(
            f"the image is {w} x {h} pixels, and the run draws {wanted[0]} x {wanted[1]}. Resize it "
            f"(image.resize({wanted})), or pass height= and width=."
        )
