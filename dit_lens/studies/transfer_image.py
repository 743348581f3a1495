"""Transport from an image: subject-driven generation without training. The image takes the place of a source."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from dit_lens.analysis.metrics import rmse
from dit_lens.core.request.ops import Branch, Swap
from dit_lens.errors import OpError, nearest
from dit_lens.instruments.inversion import check_flow, check_invertible, invert, latents_of, noised_reference
from dit_lens.instruments.latents import decode
from dit_lens.studies.parts.transport import ChannelsFrom, Lockstep, Transport, carry_out
from dit_lens.studies.shared.arguments import as_pairs, as_seeds, as_tuple
from dit_lens.studies.shared.arms import DRAWS
from dit_lens.studies.shared.cells import Cell
from dit_lens.studies.shared.checkpoints import Cells
from dit_lens.studies.shared.drawing import Batch, batches
from dit_lens.studies.shared.judges import Judge, judge_for
from dit_lens.studies.shared.protocols import with_protocols
from dit_lens.studies.transfer import assemble as assemble_transfer

if TYPE_CHECKING:
    from PIL.Image import Image

    from dit_lens.core.request.ops import Mask, Pattern, Steps
    from dit_lens.lens import DiTLens
    from dit_lens.studies.parts.transport import MaskFrom
    from dit_lens.studies.shared.result import Result

How = Literal["noised", "inverted"]
_ERRORS = ("autoencoder_error", "latent_error", "image_error")


@with_protocols
def transfer_image(
    lens: DiTLens,
    pairs: Sequence[tuple[Image, str]],
    *,
    how: How = "noised",
    captions: Sequence[str] | None = None,
    k: int | Sequence[int] = 12,
    strengths: float | Sequence[float] = (0.25, 0.5, 0.75, 1.0),
    seeds: int | Sequence[int] = (0,),
    draws: int = DRAWS,
    channels_from: ChannelsFrom = "source",
    mask_from: MaskFrom | Mask = "source",
    mask_block: int | None = None,
    score: str = "|mean|",
    site: Pattern = "blocks.*.img",
    steps: Steps = None,
    branch: Branch = "cond",
    judge: Judge | None = None,
    batch_size: int | None = None,
    out: str | Path | None = None,
    **call: Any,
) -> Result:
    """Moves k channels of each image, as the model sees it on its way out of noise, into a target prompt's drawing.

    >>> from dit_lens import DiTLens
    >>> lens = DiTLens.toy()
    >>> image = lens.run("a big red circle left on a plain blue background", seed=1).images[0]
    >>> pair = (image, "a small white cross right on a plain green background")
    >>> result = transfer_image(lens, [pair], k=4, strengths=[1.0], mask_from=None, draws=1, num_inference_steps=2)
    >>> result.notes[-1]
    'the autoencoder alone gives the images back with rmse ...'

    pairs: (PIL image of the run's size, target prompt). how: where the image's latents lie at each step. "noised":
    the noised reference, x_t = (1 - s) x_0 + s noise with the scheduler's own s and the target's own noise. "inverted":
    the flow run backwards from the image without guidance; source and target then start from the noise it ends at,
    so there is one seed. captions: what the model, and a judge, is told of each image; nothing by default.
    The rest, the arms and the table are those of :func:`dit_lens.studies.transfer`, without prompt-blend; ``to_source``
    is the distance to the image as the autoencoder gives it back. Lines of the arm "reconstruction" hold, per
    image, ``autoencoder_error`` (rmse to the image given) and, for inversion, how far going forward again ends from
    the image: ``latent_error`` (over the rms of the latents) and ``image_error`` (rmse, 0 to 255).
    Raises OpError or FamilyError, before any denoising, where the model is no flow, or cannot be inverted.
    Source: the image-conditioned application of arXiv 2605.13974, which does not say how the image is noised.
    """
    pairs = as_pairs(pairs, "image")
    images, targets = [image for image, _ in pairs], [target for _, target in pairs]
    captions = [""] * len(pairs) if captions is None else list(captions)
    if len(captions) != len(pairs):
        raise OpError(f"captions= lists {len(captions)} texts for {len(pairs)} images. Give one each, or none.")
    seeds = as_seeds(seeds)
    prompts = [prompt for pair in zip(captions, targets, strict=True) for prompt in pair]
    _check(lens, how, images, captions, prompts, seeds, call)
    ks = tuple(sorted(as_tuple(k)))
    judge = judge_for(lens, [prompt for prompt in prompts if prompt], judge)
    transport = Transport(
        lens,
        ks,
        as_tuple(strengths),
        draws,
        score,
        site,
        steps,
        branch,
        channels_from,
        mask_from,
        mask_block,
        judge,
        False,
    )
    transport.check(prompts, call)
    settings = {
        "images": [hashlib.sha256(image.tobytes()).hexdigest()[:16] for image in images],
        "targets": targets,
        "captions": captions,
        "how": how,
        "seeds": seeds,
        "batch_size": batch_size,
        "call": call,
        **transport.settings(),
    }
    parts = batches(targets, seeds, batch_size)
    with Cells("transfer_image", settings, lens=lens, total=len(parts) * (1 + transport.count), out=out) as cells:
        for part in parts:
            told = [captions[i] for i in part.rows]
            labels = tuple(f"{captions[i] or f'image {i}'} -> {targets[i]}" for i in part.rows)
            make = partial(_way, lens, how, [images[i] for i in part.rows], told, part, labels, call)
            way = cells.get(f"{part.key}/way", make)
            carry_out(cells, transport, _lockstep(part, way, told, labels, call))
        return cells.result()


def assemble(settings: Mapping[str, Any], cells: Sequence[Cell]) -> Result:
    """The result of the cells so far."""
    import pandas as pd

    result = assemble_transfer(settings, cells, study="transfer_image")
    lines = pd.DataFrame([line for cell in cells for line in cell.lines if line.get("arm") == "reconstruction"])
    result.table = pd.concat([result.table, lines], ignore_index=True)
    means = lines[[name for name in _ERRORS if name in lines]].mean()
    if settings["how"] == "inverted":
        result.notes.append(
            f"inverted and run forward again, latents are off by {means['latent_error']:.1%} of their size and "
            f"images by rmse {means['image_error']:.1f}"
        )
    result.notes.append(f"the autoencoder alone gives the images back with rmse {means['autoencoder_error']:.1f}")
    return result


def _check(
    lens: DiTLens,
    how: str,
    images: Sequence[Image],
    captions: Sequence[str],
    prompts: Sequence[str],
    seeds: Sequence[int],
    call: Mapping[str, Any],
) -> None:
    if how not in ("noised", "inverted"):
        raise OpError(f"how={how!r} does not exist.{nearest(str(how), ('noised', 'inverted'))}")
    check_flow(lens, prompts, call)
    if how == "inverted":
        check_invertible(lens)
        if len(seeds) > 1:
            raise OpError("an inverted image brings its own noise, so seeds change nothing. Pass one.")
    latents_of(lens, images, captions, call)


def _way(
    lens: DiTLens,
    how: How,
    images: Sequence[Image],
    captions: Sequence[str],
    part: Batch,
    labels: Sequence[str],
    call: Mapping[str, Any],
) -> Cell:
    """The images' way through the steps, and how well it ends at the images."""
    latents, grid = latents_of(lens, images, captions, call)
    drawn = decode(lens, latents, grid)
    errors: dict[str, Any] = {"autoencoder_error": rmse(drawn, [one.convert("RGB") for one in images])}
    if how == "inverted":
        found = invert(lens, images, captions, **call)
        arrays = {"velocity": found.velocity.float().numpy(), "noise": found.noise.float().cpu().numpy()}
        errors |= {"latent_error": found.latent_error, "image_error": found.image_error}
    else:
        velocity = noised_reference(lens, images, seed=part.seed, prompts=part.prompts, **call)
        arrays = {"velocity": velocity.numpy()}
    lines = [
        {"prompt": label, "seed": part.seed, "arm": "reconstruction"}
        | {name: float(values[i]) for name, values in errors.items()}
        for i, label in enumerate(labels)
    ]
    return Cell(lines, arrays=arrays)


def _lockstep(
    part: Batch, way: Cell, captions: Sequence[str], labels: tuple[str, ...], call: Mapping[str, Any]
) -> Lockstep:
    """Source rows that go the images' way, whatever the model predicts for them, beside their targets."""
    velocity = torch.from_numpy(way.arrays["velocity"])  # [s or 1, b, n, d]
    ops = [Swap("velocity", source=velocity[:, i : i + 1], rows=2 * i, branch="both") for i in range(velocity.shape[1])]
    start = {}
    if "noise" in way.arrays:
        start["latents"] = torch.from_numpy(np.repeat(way.arrays["noise"], 2, axis=0))
    return Lockstep(
        part.key,
        part.seed,
        part.rows,
        prompts=tuple(prompt for pair in zip(captions, part.prompts, strict=True) for prompt in pair),
        labels=labels,
        captions=tuple(captions),
        ops=tuple(ops),
        call={**call, **start},
    )
