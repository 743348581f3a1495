"""An image's way through a run: how its latents lie under noise at every step, so that its activations can be read.

Two ways: the noised reference, a straight line from the noise of a seed to the image; and inversion, the ODE of the
flow run backwards. Both are kept as the velocities along them. A run whose velocity is swapped for these (all branches)
goes through the image's latents and ends at the image, whatever the model would have drawn.

Letters: s step, b image, n image token, d channel of a token of latents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dit_lens.analysis.metrics import rmse
from dit_lens.arguments.checks import checked
from dit_lens.arguments.signatures import sets
from dit_lens.core.request.division import Division, refuse_several_images
from dit_lens.core.request.ops import Read
from dit_lens.errors import FamilyError, OpError
from dit_lens.instruments.latents import as_latents_argument, decode_latents, encode_images, read_latents
from dit_lens.instruments.starts import Schedule, check_start, list_images, list_prompts, turn_off_guidance
from dit_lens.old_names import OldName, find_old_names, renamed_keywords

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from dit_lens.core.session import Session

__getattr__ = find_old_names(
    __name__,
    {
        "as_tokens": "dit_lens.instruments.latents.pack_latents",
        "autoencoder": "dit_lens.instruments.latents.find_autoencoder",
        "decode": "dit_lens.instruments.latents.decode_latents",
        "latents_of": "dit_lens.instruments.latents.encode_images",
        "tokens_of": "dit_lens.instruments.latents.read_latents",
        "unpacked": "dit_lens.families.layout.unpack",
    },
)


@dataclass(frozen=True)
class Inversion:
    """Where images come from, by the flow run backwards, and how well running it forward gives them back.

    noise: [b, ...], to be passed as ``latents=``.
    velocity: [s, b, n, d], the way from it to the image.
    latent_error: rmse of the latents after going forward again, over their own rms; one for each image.
    image_error: rmse (0 to 255) of the image drawn from them to the one drawn from the image's own latents.
    """

    noise: Tensor
    velocity: Tensor
    latent_error: tuple[float, ...]
    image_error: tuple[float, ...]

    picture_error = OldName("image_error")


@renamed_keywords(pictures="images")
@checked
@sets("prompt", "ops", "latents")
def invert(
    lens: Session, images: Image | Sequence[Image], prompts: Sequence[str] | str | None = "", **call: Any
) -> Inversion:
    """Runs the ODE of the flow backwards from images to noise.

    >>> from dit_lens import DiTLens
    >>> lens = DiTLens.toy()
    >>> prompt = "a big red circle left on a plain blue background"
    >>> image = lens.run(prompt, seed=0).images[0]
    >>> found = invert(lens, [image], prompt)
    >>> found.noise.shape, found.velocity.shape, found.image_error[0] < 25
    (torch.Size([1, 256, 16]), torch.Size([12, 1, 256, 16]), True)

    The scheduler's own steps in reverse order, by Euler, without guidance (which would not be undone): each takes the
    velocity at the noise level it goes to, which is the one the forward step starts at (the uncontrolled inversion of
    arXiv 2410.10792). Raises FamilyError if the sampler is not Euler's method on a flow, or if latents cannot be given
    to the pipeline.

    images: one or several, of the run's size: PIL, paths, or arrays as a run gives them (``output_type="np"``, "pt").
    prompts: of the images, one for all or one each; None where ``call`` has embeddings.
    call: the pipeline's arguments.
    """
    check_invertible(lens)
    images = list_images(images)
    prompts = list_prompts(prompts, images)
    refuse_several_images({**lens.defaults, **call}, "each image is inverted once")
    call = turn_off_guidance(lens, call)
    latents, grid = encode_images(lens, images, prompts, call)
    call |= {"seed": 0, "output_type": "latent"}
    with lens.quiet(), lens.engine.within(Schedule()):
        back = lens.run(prompts, [Read("velocity")], latents=as_latents_argument(lens, latents, grid), **call)
    noise = as_latents_argument(lens, read_latents(lens, back.latents, grid), grid)
    with lens.quiet():
        again = read_latents(lens, lens.run(prompts, latents=noise, **call).latents, grid)
    drawn, redrawn = decode_latents(lens, latents, grid), decode_latents(lens, again, grid)
    off = (again - latents).square().mean((1, 2)).sqrt() / latents.square().mean((1, 2)).sqrt()
    errors = np.atleast_1d(rmse(redrawn, drawn))
    return Inversion(noise, back["velocity"].flip(0), tuple(off.tolist()), tuple(map(float, errors)))


@renamed_keywords(pictures="images")
@checked
@sets("prompt", "ops")
def noised_reference(
    lens: Session, images: Image | Sequence[Image], *, seed: int, prompts: Sequence[str] | str | None = "", **call: Any
) -> Tensor:
    """The velocity along which images lie under the noise of a seed: x_t = (1 - s) x_0 + s noise at every step.

    >>> from dit_lens import DiTLens, Swap
    >>> lens = DiTLens.toy()
    >>> image = lens.run("a big red circle left on a plain blue background", seed=1, num_inference_steps=4).images[0]
    >>> way = noised_reference(lens, [image], seed=0, num_inference_steps=4)
    >>> drawn = lens.run("", [Swap("velocity", source=way, branch="both")], seed=0, num_inference_steps=4).images[0]
    >>> bool(rmse(drawn, image) < 10)  # as near as the autoencoder draws it
    True

    Returns float32 [1, b, n, d]: the same at every step. Raises OpError, before any denoising, if the scheduler does
    not sample a flow.

    images: as in :func:`invert`.
    seed: whose noise it is.
    prompts, call: of the run that the noise is for.
    """
    images = list_images(images)
    prompts = list_prompts(prompts, images)
    refuse_several_images({**lens.defaults, **call}, "each image lies under the noise of one row")
    check_flow(lens, prompts, call)
    latents, _ = encode_images(lens, images, prompts, call)
    division = Division.of(lens.pipe, lens.family)
    if not any(division.starts(name, value) for name, value in call.items()):  # all rows start from the same
        prompts, call = prompts and prompts[:1], division.share(call, [0], len(prompts or images))
    with lens.quiet():
        run = lens.run(prompts, [Read(["x0", "velocity"], steps=0)], seed=seed, **call)
    first, sign = run.sigmas[0], lens.family.prediction.sign
    # Flow matching (arXiv 2210.02747): x0 = x - s v. So the run starts from x = x0 + s v, and the velocity that leads
    # from there to the image is (x - image) / s.
    start = run["x0"].float()[0] + first * sign * run["velocity"].float()[0]  # [1 or b, n, d]
    return (sign * (start - latents) / first)[None]


def check_flow(lens: Session, prompts: Sequence[str] | None, call: Mapping[str, Any]) -> None:
    """Raises OpError for a run whose latents are not a blend of image and noise."""
    outline = lens.outline(prompts, **{"seed": 0, **call})
    if outline.kind != "flow":
        pipeline, scheduler = type(lens.pipe).__name__, type(lens.pipe.scheduler).__name__
        raise OpError(
            f"{pipeline} with {scheduler} predicts {outline.kind or 'no flow'}; an image's way through a run is known "
            "for flow matching only. Use a pipeline such as FLUX or SD3."
        )


def check_invertible(lens: Session) -> None:
    """Raises FamilyError for a pipeline that cannot be inverted."""
    instead = "use the noised reference (how='noised')"
    check_start(lens, "inversion runs FlowMatchEulerDiscreteScheduler backwards", instead)
    pipeline = lens.family.pipeline(type(lens.pipe))
    if pipeline.second_model or (pipeline.guidance is not None and pipeline.guidance.scale is None):
        raise FamilyError(
            f"{type(lens.pipe).__name__} always guides, and guidance is not undone by going backwards. "
            f"{instead[0].upper()}{instead[1:]}."
        )
