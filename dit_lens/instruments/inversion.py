"""An image's way through a run: how its latents lie under noise at every step, so that its activations can be read.

Two ways: the noised reference, a straight line from the noise of a seed to the image; and inversion, the ODE of the
flow run backwards. Both are kept as the velocities along them. A run whose velocity is swapped for these (all branches)
goes through the image's latents and ends at the image, whatever the model would have drawn.

Letters: s step, b image, n image token, d channel of a token of latents.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isqrt
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dit_lens.analysis.metrics import rmse
from dit_lens.core.request.ops import Read
from dit_lens.errors import FamilyError, OpError
from dit_lens.families.layout import unpack
from dit_lens.instruments.latents import as_tokens, autoencoder, decode, tokens_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image
    from torch import Tensor

    from dit_lens.lens import DiTLens

# What the source of prepare_latents says where latents that were given go to the transformer as they are, and where
# they are an image whose pixels become the tokens.
_TAKEN = (
    r"if latents is not None:\n(\s+latent_image_ids = .*\n)?\s+return latents\.to\("
    r"|else:\n(\s+if latents\.shape != shape:\n\s+raise .*\n)?\s+latents = latents\.to\(.*\n+\s+return latents\b"
)
_FLATTENED = (
    r"else:\n\s+latents = latents\.to\(.*\n+(\s+latent_ids = .*\n)+\n?\s+latents = self\._pack_latents\(latents\)"
)


@dataclass(frozen=True)
class Inversion:
    """Where images come from, by the flow run backwards, and how well running it forward gives them back.

    noise: [b, ...], to be passed as ``latents=``. velocity: [s, b, n, d], the way from it to the image.
    latent_error: rmse of the latents after going forward again, over their own rms, per image. image_error: rmse
    (0 to 255) of the image drawn from them to the one drawn from the image's own latents.
    """

    noise: Tensor
    velocity: Tensor
    latent_error: tuple[float, ...]
    image_error: tuple[float, ...]


def invert(lens: DiTLens, images: Sequence[Image], prompts: Sequence[str] | str | None = "", **call: Any) -> Inversion:
    """Runs the ODE of the flow backwards from images to noise.

    >>> from dit_lens import DiTLens
    >>> lens = DiTLens.toy()
    >>> prompt = "a big red circle left on a plain blue background"
    >>> image = lens.run(prompt, seed=0).images[0]
    >>> found = invert(lens, [image], prompt)
    >>> found.noise.shape, found.velocity.shape, found.image_error[0] < 25
    (torch.Size([1, 256, 16]), torch.Size([12, 1, 256, 16]), True)

    The scheduler's own steps in reverse order, by Euler, without guidance (which would not be undone): each takes the
    velocity at the noise level it goes to, which is the one the forward step starts at. images: PIL, of the run's
    size. prompts: what the model is told of them, one for all or one each; None where ``call``, the pipeline's
    arguments, has embeddings.
    Raises FamilyError where the sampler is no Euler of a flow, or where latents cannot be given to the pipeline.
    """
    check_invertible(lens)
    prompts = _each(prompts, images)
    call = {**call, **_unguided(lens)}
    latents, grid = latents_of(lens, images, prompts, call)
    call |= {"seed": 0, "output_type": "latent"}
    with lens.quiet(), _backwards(lens.pipe):
        back = lens.run(prompts, [Read("velocity")], latents=_given(lens, latents, grid), **call)
    noise = _given(lens, tokens_of(lens, back.latents, grid), grid)
    with lens.quiet():
        again = tokens_of(lens, lens.run(prompts, latents=noise, **call).latents, grid)
    drawn, redrawn = decode(lens, latents, grid), decode(lens, again, grid)
    off = (again - latents).square().mean((1, 2)).sqrt() / latents.square().mean((1, 2)).sqrt()
    errors = np.atleast_1d(rmse(redrawn, drawn))
    return Inversion(noise, back["velocity"].flip(0), tuple(off.tolist()), tuple(map(float, errors)))


def noised_reference(
    lens: DiTLens, images: Sequence[Image], *, seed: int, prompts: Sequence[str] | str | None = "", **call: Any
) -> Tensor:
    """The velocity along which images lie under the noise of a seed: x_t = (1 - s) x_0 + s noise at every step.

    >>> from dit_lens import DiTLens, Swap
    >>> lens = DiTLens.toy()
    >>> image = lens.run("a big red circle left on a plain blue background", seed=1, num_inference_steps=4).images[0]
    >>> way = noised_reference(lens, [image], seed=0, num_inference_steps=4)
    >>> drawn = lens.run("", [Swap("velocity", source=way, branch="both")], seed=0, num_inference_steps=4).images[0]
    >>> bool(rmse(drawn, image) < 10)  # as near as the autoencoder draws it
    True

    Returns float32 [1, b, n, d]: the same at every step. images: PIL, of the run's size. prompts and call: of the run
    the noise is for. Raises OpError, before any denoising, where the scheduler is none of a flow.
    """
    prompts = _each(prompts, images)
    check_flow(lens, prompts, call)
    latents, _ = latents_of(lens, images, prompts, call)
    with lens.quiet():
        run = lens.run(prompts and prompts[:1], [Read(["x0", "velocity"], steps=0)], seed=seed, **call)
    first, sign = run.sigmas[0], lens.family.sign
    noise = run["x0"].float()[0] + first * sign * run["velocity"].float()[0]  # [1, n, d]
    return (sign * (noise - latents) / first)[None]


def check_flow(lens: DiTLens, prompts: Sequence[str] | None, call: Mapping[str, Any]) -> None:
    """Refuses a run whose latents are no blend of image and noise."""
    when, _ = lens.planned(prompts, **{"seed": 0, **call})
    if when.kind != "flow":
        raise OpError(
            f"{type(lens.pipe).__name__} with {type(lens.pipe.scheduler).__name__} predicts {when.kind or 'no flow'}; "
            "an image's way through a run is known for flow matching only. Use a pipeline such as FLUX or SD3."
        )


def check_invertible(lens: DiTLens) -> None:
    """Refuses a pipeline whose run cannot be gone backwards."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipe = lens.pipe
    scheduler = pipe.scheduler
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler) or scheduler.config.stochastic_sampling:
        raise FamilyError(
            f"inversion runs FlowMatchEulerDiscreteScheduler backwards, and this pipeline samples with "
            f"{'noise of its own' if hasattr(scheduler, 'time_shift') else type(scheduler).__name__}. Exchange it, or "
            "use the noised reference (how='noised')."
        )
    if lens.anatomy.grid_rule["axes"] not in ("tokens", "bchw", "list") or not _taken(lens, f"{_TAKEN}|{_FLATTENED}"):
        raise FamilyError(
            f"{type(pipe).__name__} does not pass latents= to its transformer as they are, so inverted noise cannot be "
            "given to it. Use the noised reference (how='noised')."
        )
    guidance, known = lens.family.guidance_of(pipe), inspect.signature(type(pipe).__call__).parameters
    elsewhere = guidance is None and "guidance_scale" in known and lens.family.embedded is None  # by another model
    if elsewhere or (guidance is not None and guidance.scale is None):
        raise FamilyError(
            f"{type(pipe).__name__} always guides, and guidance is not undone by going backwards. Use the noised "
            "reference (how='noised')."
        )


@torch.no_grad()
def latents_of(
    lens: DiTLens, images: Sequence[Image], prompts: Sequence[str] | None, call: Mapping[str, Any]
) -> tuple[Tensor, tuple[int, int]]:
    """The clean latents of images, float32 [b, n, d] with channels as (latent channel, y, x), and their grid (h, w).

    The mode of the autoencoder's posterior; the inverse of :func:`decode`. Raises OpError, before
    anything runs, for images of another size than the run's.
    """
    vae = autoencoder(lens.pipe)
    if odd := [image for image in images if not hasattr(image, "convert")]:
        raise OpError(f"{odd[0]!r} is no image. Open it first: PIL.Image.open(path).")
    sizes = {image.size for image in images}
    if len(sizes) != 1:
        raise OpError(f"images have sizes {sorted(sizes)}. Give at least one, and all of one size.")
    pixels = torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images]))
    pixels = (pixels.permute(0, 3, 1, 2) / 127.5 - 1).to(vae.device, vae.dtype)
    film = vae.config.get("latents_mean") is not None and vae.config.get("z_dim")
    found = vae.encode(pixels[:, :, None] if film else pixels)
    latents = (found.latent if hasattr(found, "latent") else found.latent_dist.mode()).float()
    if film:
        mean, spread = (latents.new_tensor(vae.config[name])[:, None, None] for name in ("latents_mean", "latents_std"))
        latents = (latents[:, :, 0] - mean) / spread
    elif not hasattr(vae, "bn"):
        latents = (latents - (vae.config.get("shift_factor") or 0.0)) * (vae.config.get("scaling_factor") or 1.0)
    side = isqrt(lens.anatomy.latent_width // latents.shape[1])
    grid = (latents.shape[2] // side, latents.shape[3] // side)
    _check_size(lens, images[0], grid, prompts, call)
    return as_tokens(lens, latents).cpu(), grid


def _check_size(
    lens: DiTLens, image: Image, grid: tuple[int, int], prompts: Sequence[str] | None, call: Mapping[str, Any]
) -> None:
    _, plan = lens.planned(prompts, **{"seed": 0, **call})
    expected = plan.program["expected"]
    if expected is not None and tuple(expected) != grid:
        w, h = image.size
        wanted = (w * expected[1] // grid[1], h * expected[0] // grid[0])
        raise OpError(
            f"the image is {w} x {h} pixels, and the run draws {wanted[0]} x {wanted[1]}. Resize it "
            f"(image.resize({wanted})), or pass height= and width=."
        )


def _each(prompts: Sequence[str] | str | None, images: Sequence[Image]) -> list[str] | None:
    """A prompt for every image, where there are prompts."""
    if prompts is None:
        return None
    return [prompts] * len(images) if isinstance(prompts, str) else list(prompts)


def _given(lens: DiTLens, latents: Tensor, grid: tuple[int, int]) -> Tensor:
    """Latents as ``latents=`` of the pipeline takes them."""
    if _taken(lens, _FLATTENED):
        return latents.transpose(1, 2).unflatten(2, grid)
    rule = lens.anatomy.grid_rule
    axes = "bchw" if rule["axes"] == "list" else rule["axes"]  # a list is made of one tensor for every step
    _, *patch = rule["patch"]
    channels = latents.shape[-1] // (patch[0] * patch[1])
    like = torch.empty(len(latents), channels, grid[0] * patch[0], grid[1] * patch[1], device="meta")
    return unpack(latents, like, axes, rule["patch"])


def _taken(lens: DiTLens, form: str) -> bool:
    """Whether the pipeline takes ``latents=`` in a form, by its source."""
    prepare = getattr(type(lens.pipe), "prepare_latents", None)
    return prepare is not None and re.search(form, inspect.getsource(prepare)) is not None


def _unguided(lens: DiTLens) -> dict[str, Any]:
    """The argument with which a pipeline makes conditional calls only."""
    guidance = lens.family.guidance_of(lens.pipe)
    return {} if guidance is None or guidance.scale is None else {guidance.scale: guidance.above}


@contextmanager
def _backwards(pipe: DiffusionPipeline) -> Generator[None]:
    """The pipeline with its scheduler's steps in reverse order, from clean to noise."""
    forward = pipe.scheduler
    scheduler = type(forward).from_config(forward.config)  # of the same class: pipelines ask for it
    ahead = scheduler.set_timesteps

    @functools.wraps(ahead)  # pipelines look at what it takes
    def set_timesteps(*args: Any, **kwargs: Any) -> None:
        ahead(*args, **kwargs)
        scheduler.timesteps, scheduler.sigmas = scheduler.timesteps.flip(0), scheduler.sigmas.flip(0)

    scheduler.set_timesteps = set_timesteps
    pipe.scheduler = scheduler
    try:
        yield
    finally:
        pipe.scheduler = forward
