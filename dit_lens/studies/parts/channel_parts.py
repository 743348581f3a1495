"""The two parts of channels, their mean over the tokens and the residual around it: removed, moved, and at which dose.

Removing a part leaves what is the same for all images ("mean", the channel's mean over the study's images at that
step) or nothing ("zero"). Of the residual both are zero, as it has no mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from dit_lens.core.request.ops import Apply, MeanAblate, Op, Swap, TokenMean, Zero
from dit_lens.studies.parts.ablations import pick_arrays
from dit_lens.studies.parts.doses import group_sites, is_residual, predict_zeroing, weigh, weigh_way

if TYPE_CHECKING:
    from dit_lens.analysis.channels import ChannelSet
    from dit_lens.core.request.ops import Pattern
    from dit_lens.families import Anatomy

Part = Literal["whole", "mean", "residual"]
Removal = Literal["mean", "zero"]
FINAL_MODULATION = "final.img.mod"
PARTS: tuple[Part, ...] = ("whole", "mean", "residual")


def split(values: np.ndarray, part: str) -> np.ndarray:
    """A part of channels [..., n, k]: their token mean [..., 1, k], the residual around it, or the whole.

    >>> split(np.array([[1.0], [3.0]]), "mean").tolist(), split(np.array([[1.0], [3.0]]), "residual").tolist()
    ([[2.0]], [[-1.0], [1.0]])
    """
    mean = values.mean(-2, keepdims=True)
    return {"whole": values, "mean": mean, "residual": values - mean}[part]


def make_removal(site: Pattern, channels: ChannelSet, part: Part, kind: Removal, means: Mapping[str, Tensor]) -> Op:
    """The op that removes a part of channels from every image of a batch.

    site: sites of the channels.
    channels: channels of every site.
    part: "whole", "mean" or "residual".
    kind: what is left: "mean" or "zero".
    means: site -> [s, d], what "mean" leaves.
    """
    if part == "residual":
        return TokenMean(site, channels=channels, keep="mean")
    if kind == "zero":
        whole = part == "whole"
        return Zero(site, channels=channels) if whole else TokenMean(site, channels=channels, keep="residual")
    if part == "whole":
        return MeanAblate(site, channels=channels, mean=means)

    def exchange(x: Tensor, hook: Any) -> Tensor:
        new = means[hook.name][hook.step][list(channels[hook.name])].to(x)
        return x - x.mean(1, keepdim=True, dtype=torch.float32).to(x.dtype) + new

    return Apply(site, channels=channels, fn=exchange)


def make_move(site: Pattern, channels: ChannelSet | None, part: Part, target: int, source: int) -> Op:
    """The op that replaces a part of the target's channels by the source's, on the conditional branch.

    site: sites of the channels.
    channels: channels of every site; all by default.
    part: "whole", "mean" or "residual".
    target: row of the batch that is edited.
    source: row of the batch from which the part comes.
    """
    if part == "whole":
        return Swap(site, channels=channels, rows=target, source=f"row:{source}", branch="cond")

    def exchange(x: Tensor, _: Any) -> Tensor:
        mean = x.mean(1, keepdim=True, dtype=torch.float32).to(x.dtype)
        x[0] = x[0] - mean[0] + mean[1] if part == "mean" else mean[0] + x[1] - mean[1]
        return x

    return Apply(site, channels=channels, rows=[target, source], fn=exchange, branch="cond")


def make_ceiling(sites: Sequence[str], anatomy: Anatomy, target: int, source: int) -> list[Op]:
    """The ops that move all that makes the prediction: with all blocks' outputs, the target becomes the source.

    The channels of the sites are all moved, and with them what modulates the final norm, through which text enters
    beside the image stream.

    sites: names of the study's sites.
    anatomy: of the model.
    target: row of the batch that is edited.
    source: row of the batch from which everything comes.
    """
    beside = [FINAL_MODULATION] if modulates_end(anatomy) else []
    return [make_move([*sites, *beside], None, "whole", target, source)]


def modulates_end(anatomy: Anatomy) -> bool:
    """Whether something modulates the final norm that can be moved."""
    return FINAL_MODULATION in [site.name for site in anatomy.sites]


def weigh_removal(op: Op, sites: Sequence[str], anatomy: Anatomy, rows: Sequence[int], step: int) -> list[Op]:
    """A removal, and around it the ops that weigh its dose in every image.

    op: what :func:`make_removal` returned.
    sites: its sites.
    anatomy: of the model.
    rows: rows of the images.
    step: the denoising step at which it is weighed.
    """
    ops = [op]
    for stream in group_sites(sites, anatomy):
        for row in rows:
            ops = weigh(ops, stream, row, step)
    return ops


def weigh_move(
    edits: Sequence[Op],
    sites: Sequence[str],
    anatomy: Anatomy,
    rows: tuple[int, int],
    step: int,
    channels: ChannelSet | None = None,
    part: Part = "whole",
) -> list[Op]:
    """The move of one image, and around it the ops that weigh how much of the way to the source it goes.

    edits: what :func:`make_move` or :func:`make_ceiling` returned.
    sites: their sites.
    anatomy: of the model.
    rows: of the target, and of the source.
    step: the denoising step at which it is weighed.
    channels: those that are moved; all by default.
    part: the part of them that is.
    """
    take = {
        "whole": None,
        "mean": lambda way: way.mean(0, keepdim=True).expand_as(way),
        "residual": lambda way: way - way.mean(0, keepdim=True),
    }[part]
    ops = list(edits)
    for stream in group_sites(sites, anatomy):
        ops = weigh_way(ops, stream, rows, step, channels=channels, part=take)
    return ops


def predict_removal(
    arrays: Mapping[str, np.ndarray],
    row: int,
    channels: ChannelSet,
    sites: Sequence[Sequence[str]],
    part: Part,
    new: Mapping[str, np.ndarray],
) -> float:
    """The dose that a removal means to give an image, by its run without edits, averaged over sites.

    arrays: of the untouched cell: "row/energy at first/site" and "row/mean at first/site" -> [d].
    row: row of the image.
    channels: channels of every site.
    sites: those whose dose can be weighed, of every stream.
    part: the part that is removed.
    new: site -> [d], what is left of a mean.
    """
    energy, own = (pick_arrays(arrays, row, f"{name} at first") for name in ("energy", "mean"))
    taken = {
        site: (part != "mean") * (energy[site] - own[site] ** 2) + (part != "residual") * (own[site] - new[site]) ** 2
        for site in energy
    }
    found = [
        dose
        for stream in sites
        for dose in predict_zeroing(
            energy, {site: channels[site] for site in stream}, carried=is_residual(stream), part=taken
        ).values()
    ]
    return float(np.mean(found)) if found else np.nan
