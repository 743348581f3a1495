"""One forward pass over images of one's own, at a chosen noise level: features without drawing anything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from dit_lens.core.request.division import refuse_several_images
from dit_lens.errors import ExecutionError, OpError
from dit_lens.instruments.latents import as_latents_argument, encode_images
from dit_lens.instruments.starts import Schedule, check_start, list_images, list_prompts, turn_off_guidance

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from dit_lens.core.request.ops import Op
    from dit_lens.core.runs.run import Run
    from dit_lens.core.session import Session

INSTEAD = "draw a run, and take the step that is nearest (run.sigmas)"
CLOSE = 1e-4  # of noise levels, which pipelines round to half precision and back


def encode_image(lens: Session, images: Image | Sequence[Image], prompt: Any = "", **call: Any) -> Tensor:
    """See :meth:`dit_lens.DiTLens.encode_image`."""
    images = list_images(images)
    check_start(lens, "latents are for FlowMatchEulerDiscreteScheduler", INSTEAD)
    latents, grid = encode_images(lens, images, list_prompts(prompt, images), call)
    return as_latents_argument(lens, latents, grid)


def forward(
    lens: Session,
    images: Image | Sequence[Image],
    prompt: Any = "",
    ops: Sequence[Op] | Op = (),
    *,
    sigma: float,
    seed: int = 0,
    **call: Any,
) -> Run:
    """See :meth:`dit_lens.DiTLens.forward`."""
    if not 0 < float(torch.tensor(sigma, dtype=torch.float32)) <= 1:  # as pipelines hold it
        raise OpError(f"sigma={sigma!r} is no noise level: above 0 (nearly clean) up to 1 (noise alone).")
    check_start(lens, "noise levels are set in FlowMatchEulerDiscreteScheduler", INSTEAD)
    refuse_several_images({**lens.defaults, **call}, "each image passes once")
    images = list_images(images)
    prompts = list_prompts(prompt, images)
    call = {**turn_off_guidance(lens, call), "num_inference_steps": 1}
    latents, grid = encode_images(lens, images, prompts, call)
    noise = torch.randn(latents[:1].shape, generator=torch.Generator().manual_seed(seed))  # the same for every image
    # Flow matching (arXiv 2210.02747): x_t = (1 - s) x_0 + s noise
    start = as_latents_argument(lens, (1 - sigma) * latents + sigma * noise, grid)

    with lens.quiet(), lens.engine.within(Schedule(once=sigma)):
        run = lens.run(prompts, ops, latents=start, seed=seed, **call)
    if run.sigmas is None or len(run.sigmas) != 1 or abs(run.sigmas[0] - sigma) > CLOSE:
        raise ExecutionError(
            f"{type(lens.pipe).__name__} was to pass once at noise level {sigma:g}, but passed at "
            f"{', '.join(f'{one:.4g}' for one in run.sigmas or ())}. Take latents= and sigmas= of a run instead."
        )
    return run
