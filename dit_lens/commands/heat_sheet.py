"""A sheet of what channels show of one image, laid out as the paper's Fig. 3: heat and mask, by arm and block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from dit_lens import plots
from dit_lens.analysis.channels import top_channels
from dit_lens.analysis.clusters import ious, normalise, upsample
from dit_lens.core.request.ops import Read
from dit_lens.plots.word_maps import paint
from dit_lens.studies.parts.clustering import ClusteringOptions
from dit_lens.studies.shared.arms import add_controls, make_score_reads
from dit_lens.toys.scenes import recognise_scene

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from dit_lens.core.runs.run import Run
    from dit_lens.lens import DiTLens

SITE = "blocks.*.img"
ARMS = ("top", "bottom", "random")
DIMMED = 0.25  # of an image outside its mask


def draw_heat_sheet(lens: DiTLens, prompts: Sequence[str], *, k: int, **call: Any) -> go.Figure:
    """Heat and mask of the top, bottom and random channels of the first image that can be read back, at every block.

    Heat is the sum of the channels, each scaled to its own range over tokens, at the last step; masks are those of
    ``studies.organisation``.

    lens: lens on a toy.
    prompts: prompts to choose from, drawn with seed 0.
    k: number of channels of an arm.
    call: other arguments of the pipeline.
    """
    reads = [Read(SITE, steps=-1, name="x"), *make_score_reads(SITE, "|mean|", -1)]
    for prompt in prompts:
        with lens.quiet():
            run = lens.run(prompt, reads, seed=0, **call)
        found = recognise_scene(run.images[0])
        if found.scene is not None:
            break
    return _draw(run, prompt, k, found.mask if found.scene is not None else None)


def _draw(run: Run, prompt: str, k: int, truth: np.ndarray | None) -> go.Figure:
    """The sheet of a run. truth: where the subject is, bool [H, W]; None if no image could be read back."""
    score, rms = ({site: value[0, 0].float() for site, value in run[name].items()} for name in ("score", "rms"))
    top = top_channels(score, {site: value.square() for site, value in rms.items()}, k, "|mean|")
    arms = {arm.name: arm.sets[0] for arm in add_controls([top], 1, 0, [prompt])}
    options = ClusteringOptions(n_clusters=2, method="minmax", polarity="distance")
    image, rows, labels, scores = run.images[0].convert("RGB"), [], [], []
    for arm in ARMS:
        tokens = [run["x"][site][0, 0][:, list(arms[arm][site])].float().numpy() for site in run["x"]]
        masks = np.stack([options.cluster(x, run.grid).mask for x in tokens])
        rows.append([image, *(paint(normalise(x).sum(1).reshape(run.grid), image.size) for x in tokens)])
        rows.append([_dim(image, truth), *(_dim(image, upsample(mask, (image.height, image.width))) for mask in masks)])
        labels += [f"{arm}: heat", f"{arm}: mask"]
        if truth is not None:
            scores.append(f"{arm} {ious(masks, truth[None]).mean():.2f}")
    small = f"k = {k}; below the image: its subject, as read back" + (
        f"; mean IoU over blocks: {', '.join(scores)}" if scores else ""
    )
    columns = ["image", *(f"block {site.split('.')[1]}" for site in run["x"])]
    return plots.sheet(rows, labels, columns, title=prompt, subtitle=small)


def _dim(image: Image.Image, mask: np.ndarray | None) -> Image.Image:
    """An image that fades to grey outside of a mask, bool [H, W]; as it is without one."""
    if mask is None:
        return image
    pixels = np.asarray(image, dtype=np.float32)
    faded = DIMMED * pixels + (1 - DIMMED) * 200
    return Image.fromarray(np.where(mask[..., None], pixels, faded).round().astype(np.uint8))
