"""Transport from an image: subject-driven generation without training. The image takes the place of a source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch

from dit_lens.analysis.metrics import rmse
from dit_lens.arguments.lists import as_seeds
from dit_lens.core.request.ops import Branch, Swap
from dit_lens.core.runs.provenance import digest
from dit_lens.errors import OpError, check_choice
from dit_lens.instruments.inversion import check_flow, check_invertible, invert, noised_reference
from dit_lens.instruments.latents import decode_latents, encode_images
from dit_lens.plots import transfer_image_figure
from dit_lens.studies.parts.transport import ChannelsFrom, PairBatch, plan_transport
from dit_lens.studies.parts.transport_cells import run_transport
from dit_lens.studies.shared.arguments import as_pairs, find_meant
from dit_lens.studies.shared.arms import DRAWS
from dit_lens.studies.shared.batches import PromptBatch, StudyCall, divide_call, make_batches
from dit_lens.studies.shared.cells import Cell
from dit_lens.studies.shared.checkpoints import StudyCheckpoints
from dit_lens.studies.shared.judges import Judge, choose_judge
from dit_lens.studies.shared.protocols import with_protocols
from dit_lens.studies.shared.registry import study
from dit_lens.studies.transfer import assemble as assemble_transfer

if TYPE_CHECKING:
    from PIL.Image import Image

    from dit_lens.core.request.ops import Mask, Pattern, Steps
    from dit_lens.lens import DiTLens
    from dit_lens.studies.parts.transport import MaskFrom
    from dit_lens.studies.shared.result import Result

How = Literal["noised", "inverted"]
_ERRORS = ("autoencoder_error", "latent_error", "image_error")


def assemble(settings: Mapping[str, Any], cells: Sequence[Cell]) -> Result:
    """The result of the cells so far."""
    result = assemble_transfer(settings, cells, name="transfer_image")
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


@study(
    question="Can they be moved from an image?",
    assemble=assemble,
    figure=transfer_image_figure,
)
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
    """Moves k channels of each image, under the noise of every step, into the generation of a target prompt.

    >>> from dit_lens import DiTLens
    >>> lens = DiTLens.toy()
    >>> image = lens.run("a big red circle left on a plain blue background", seed=1, num_inference_steps=4).images[0]
    >>> pair = (image, "a small white cross right on a plain green background")
    >>> result = transfer_image(lens, [pair], k=4, strengths=[1.0], mask_from=None, draws=1, num_inference_steps=1)
    >>> result.notes[-1]
    'the autoencoder alone gives the images back with rmse ...'

    At each step the image's latents lie under the noise of that step. ``how`` they come there:

    - "noised": the noised reference, x_t = (1 - s) x_0 + s noise with the scheduler's own s and the target's own noise;
    - "inverted": the flow run backwards from the image without guidance; source and target then start from the noise it
      ends at, so there is one seed.

    Arms and table are those of :func:`dit_lens.studies.transfer`, without prompt-blend; ``to_source`` is the distance
    to the image as the autoencoder gives it back. Rows of the arm "reconstruction" hold, per image,
    ``autoencoder_error`` (rmse to the image given) and, for inversion, how far going forward again ends from the image:
    ``latent_error`` (over the rms of the latents) and ``image_error`` (rmse, 0 to 255).
    Raises OpError or FamilyError, before any denoising, if the model is not a flow, or cannot be inverted.

    lens: lens on the model.
    pairs: pairs (image of the run's size, target prompt); the image of PIL, a path of one, or an array.
    how: "noised" or "inverted".
    captions: prompt of each image, for the model and for a judge; "" by default.
    k: one or several numbers of channels, up to the width; those above half of it have no controls.
    strengths: one or several in (0, 1].
    seeds: seeds of the noise; every pair is run with each.
    draws: number of random controls.
    channels_from: whose top channels are moved; "union" moves both.
    mask_from: whose subject is the mask: "source", "target" or "both"; or a drawing, bool [H, W]; None leaves masked
      arms out.
    mask_block: block whose tokens are clustered for the mask; two thirds down by default.
    score: reduction by which channels are ranked, or "relevance": how much the prediction depends on them.
    site: sites whose channels are moved.
    steps: denoising steps at which they are moved; all by default.
    branch: "cond" or "both".
    judge: function (image, prompt) -> {"fidelity": number, ...}; toys read scenes back by themselves.
    batch_size: number of pairs that run together; all by default.
    out: folder for finished cells, from which the same call continues.
    call: other arguments of the pipeline.

    Source: the image-conditioned application of arXiv 2605.13974, which does not say how the image is noised.
    """
    pairs = as_pairs(pairs, "image")
    images, targets = [image for image, _ in pairs], [target for _, target in pairs]
    captions = [""] * len(pairs) if captions is None else list(captions)
    if len(captions) != len(pairs):
        raise OpError(f"captions= lists {len(captions)} texts for {len(pairs)} images. Give one each, or none.")
    seeds = as_seeds(seeds)
    prompts = [prompt for pair in zip(captions, targets, strict=True) for prompt in pair]
    divided = divide_call(lens, call, len(prompts))
    _check(lens, how, images, captions, prompts, seeds, divided)
    judge = choose_judge(lens, [prompt for prompt in prompts if prompt], judge)
    transport = plan_transport(
        prompts, call, lens=lens, k=k, strengths=strengths, draws=draws, score=score, site=site, steps=steps,
        branch=branch, channels_from=channels_from, mask_from=mask_from, mask_block=mask_block, judge=judge,
    )  # fmt: skip
    settings = {
        "images": [digest(image.tobytes()) for image in images],
        "targets": targets,
        "captions": captions,
        "how": how,
        "seeds": seeds,
        "batch_size": batch_size,
        "call": call,
        **transport.settings(),
    }
    batches = make_batches(targets, seeds, batch_size)
    total = len(batches) * (1 + transport.cells_per_batch)
    first = batches[0].rows
    meant = find_meant(lens, prompts[: 2 * len(first)], divided.of_pairs(first), site, steps)
    with StudyCheckpoints("transfer_image", settings, lens=lens, total=total, out=out, meant=meant) as cells:
        found = []
        for batch in batches:
            some = [images[i] for i in batch.rows]
            texts = [captions[i] for i in batch.rows]
            labels = tuple(f"{captions[i] or f'image {i}'} -> {targets[i]}" for i in batch.rows)
            make = partial(_find_trajectory, lens, how, some, texts, batch, labels, divided)
            found.append((batch, cells.get(f"{batch.key}/way", make), texts, labels))
        run_transport(cells, transport, [_make_pairs(*one, divided) for one in found])
        return cells.result()


def _check(
    lens: DiTLens,
    how: str,
    images: Sequence[Image],
    captions: Sequence[str],
    prompts: Sequence[str],
    seeds: Sequence[int],
    call: StudyCall,
) -> None:
    """Raises what would go wrong, before anything is drawn.

    lens: lens on the model.
    how: "noised" or "inverted".
    images: the images.
    captions: prompt of each image.
    prompts: captions and targets in turn.
    seeds: seeds of the noise.
    call: other arguments of the pipeline, for captions and targets in turn.
    """
    check_choice(how, ("noised", "inverted"), "value of how")
    check_flow(lens, prompts, call.arguments)
    if how == "inverted":
        check_invertible(lens)
        if len(seeds) > 1:
            raise OpError("an inverted image brings its own noise, so seeds change nothing. Pass one.")
    encode_images(lens, images, captions, call.of(range(0, len(prompts), 2)))


def _find_trajectory(
    lens: DiTLens,
    how: How,
    images: Sequence[Image],
    captions: Sequence[str],
    batch: PromptBatch,
    labels: Sequence[str],
    call: StudyCall,
) -> Cell:
    """The velocities that lead to the images at every step, and how well they end there.

    lens: lens on the model.
    how: "noised" or "inverted".
    images: the images.
    captions: prompt of each image.
    batch: the target prompts that run beside them, and the seed.
    labels: names of the pairs in the table.
    call: other arguments of the pipeline, for captions and targets in turn.
    """
    sources, targets = (call.of([2 * i + end for i in batch.rows]) for end in (0, 1))
    latents, grid = encode_images(lens, images, captions, sources)
    decoded = decode_latents(lens, latents, grid)
    errors: dict[str, Any] = {"autoencoder_error": rmse(decoded, [one.convert("RGB") for one in images])}
    if how == "inverted":
        found = invert(lens, images, captions, **sources)
        arrays = {"velocity": found.velocity.float().numpy(), "noise": found.noise.float().cpu().numpy()}
        errors |= {"latent_error": found.latent_error, "image_error": found.image_error}
    else:
        velocity = noised_reference(lens, images, seed=batch.seed, prompts=batch.prompts, **targets)
        arrays = {"velocity": velocity.numpy()}
    lines = [
        {"prompt": label, "seed": batch.seed, "arm": "reconstruction"}
        | {name: float(values[i]) for name, values in errors.items()}
        for i, label in enumerate(labels)
    ]
    return Cell(lines, arrays=arrays)


def _make_pairs(
    batch: PromptBatch, trajectory: Cell, captions: Sequence[str], labels: tuple[str, ...], call: StudyCall
) -> PairBatch:
    """Source rows that follow the images' trajectory, whatever the model predicts for them, beside their targets.

    batch: the target prompts, and the seed.
    trajectory: what :func:`_find_trajectory` returned.
    captions: prompt of each image.
    labels: names of the pairs in the table.
    call: other arguments of the pipeline, for captions and targets in turn.
    """
    velocity = torch.from_numpy(trajectory.arrays["velocity"])  # [s or 1, b, n, d]
    ops = [Swap("velocity", source=velocity[:, i : i + 1], rows=2 * i, branch="both") for i in range(velocity.shape[1])]
    start = {}
    if "noise" in trajectory.arrays:
        start["latents"] = torch.from_numpy(np.repeat(trajectory.arrays["noise"], 2, axis=0))
    return PairBatch(
        key=batch.key,
        seed=batch.seed,
        numbers=batch.rows,
        prompts=tuple(prompt for pair in zip(captions, batch.prompts, strict=True) for prompt in pair),
        labels=labels,
        captions=tuple(captions),
        ops=tuple(ops),
        call={**call.of_pairs(batch.rows), **start},
    )
