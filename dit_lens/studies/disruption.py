"""Claim 1: are massive channels critical? Ablate them, and as many others, and see what becomes of the image."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from dit_lens.analysis.channels import ChannelSet
from dit_lens.analysis.metrics import Distance
from dit_lens.analysis.metrics.distances import distances as distances_of
from dit_lens.core.request.ops import MeanAblate, Op, Read, Scale, Swap, Zero
from dit_lens.errors import OpError, PromptError, nearest
from dit_lens.studies.parts.confounds import fill_ops, push_ops, rescale_ops
from dit_lens.studies.shared.arguments import as_prompts, as_seeds, as_tuple, check_k, share_of_width
from dit_lens.studies.shared.arms import DRAWS, Arm, control_arms, kept_scores, score_ops, sets_of
from dit_lens.studies.shared.cells import Cell
from dit_lens.studies.shared.checkpoints import Cells
from dit_lens.studies.shared.drawing import Batch, Drawing, batches, begins_late
from dit_lens.studies.shared.judges import Judge, judge_for, judged
from dit_lens.studies.shared.protocols import with_protocols
from dit_lens.studies.shared.result import Result, paired, readable, summarise

if TYPE_CHECKING:
    from PIL.Image import Image

    from dit_lens.core.request.ops import Pattern, Steps
    from dit_lens.lens import DiTLens

Ablation = Literal["zero", "mean", "resample"]
Distances = Sequence["str | Distance"]
CONFOUNDS = ("attenuated", "norm-kept", "rescaled", "random-direction")


@with_protocols
def disruption(
    lens: DiTLens,
    prompts: str | Sequence[str],
    *,
    k: int | Sequence[int] = 12,
    seeds: int | Sequence[int] = (0,),
    draws: int = DRAWS,
    score: str = "|mean|",
    site: Pattern = "blocks.*.img",
    steps: Steps = None,
    ablation: Ablation = "zero",
    confounds: bool = True,
    distances: Distances = ("rmse", "psnr"),
    judge: Judge | None = None,
    batch_size: int | None = None,
    out: str | Path | None = None,
    **call: Any,
) -> Result:
    """Ablates the top-k channels and their controls, on the same prompts and seeds.

    >>> from dit_lens import DiTLens
    >>> result = disruption(
    ...     DiTLens.toy(), "a big red circle left on a plain blue background", k=4, draws=1, num_inference_steps=2
    ... )
    >>> sorted(result.summary["arm"])
    ['attenuated', 'bottom', 'energy-matched', 'no-op', 'norm-kept', 'random', 'random-direction', 'rescaled', 'top']

    Every image's own sets come from its clean run, averaged over all its steps, and stay fixed. All arms of a batch
    run at one batch shape. Arms: no-op (an edit of no channel, which must change nothing), top, bottom, random
    (``draws`` of them; each one map of channels for all blocks) and energy-matched (other channels, with energy as near
    as can be). Arms for what else could explain the damage, unless ``confounds=False``:

    - attenuated: the top channels scaled down just as far as zeroing the energy-matched ones moves the tokens;
    - norm-kept: the top channels overwritten by a fixed pattern that leaves the next norm's statistics as they were;
    - rescaled: nothing removed, all other channels raised as the next norm would raise them;
    - random-direction: every token pushed in one random direction, as far as zeroing would move it.

    k: one or several sizes. steps: when channels are ablated. ablation: "zero"; "mean", in every branch by the
    channel's mean over the study's own prompts and seeds at that step (conditional branch); "resample", by the values
    of another prompt of the batch under the same noise. Confounds are of zeroing, so they run with it alone, and where
    ``site`` is the output of blocks. distances: to the untouched image, names or functions of two images (see
    ``metrics.distances``); rmse is always among them. judge: ``fn(image, prompt) -> {name: number}``, such as
    ``metrics.clip_judge``; toys read scenes back by themselves. batch_size: prompts that run together. out: a folder
    for finished cells, from which the same call goes on.

    The table has the distances (rmse in grey levels, psnr in dB and missing for equal images), k over the width, the
    share of energy the ablated channels held, and what the judge says. The summary has the means with their intervals,
    and ``..._top_minus``: by how much the top arm exceeds the arm of the line, over the same prompts and seeds. Raises
    OpError or PromptError before anything is drawn. Source: arXiv 2605.13974.
    """
    prompts, seeds, ks = as_prompts(prompts), as_seeds(seeds), sorted(as_tuple(k))
    check_k(lens, site, ks)
    _check_ablation(ablation, prompts, batch_size)
    judge, measures = judge_for(lens, prompts, judge), distances_of(["rmse", *distances])
    sites = lens.sites(site)
    extra = CONFOUNDS if confounds and ablation == "zero" and all(name.count(".") == 2 for name in sites) else ()
    settings = {
        "prompts": prompts,
        "k": ks,
        "seeds": seeds,
        "draws": draws,
        "score": score,
        "site": site,
        "steps": str(steps),
        "ablation": ablation,
        "confounds": list(extra),
        "distances": list(measures),
        "judge": judge,
        "batch_size": batch_size,
        "call": call,
        "width": lens.anatomy.width,
    }
    parts = batches(prompts, seeds, batch_size)
    total = len(parts) * (2 + len(ks) * (3 + draws + len(extra)))
    with Cells("disruption", settings, lens=lens, total=total, out=out) as cells:
        draw = Drawing(lens, call, twice=ablation == "resample", late=begins_late(lens, prompts[0], steps, call))
        reads = [*score_ops(site, score), *([Read(site, reduce="mean", name="mean")] if ablation == "mean" else [])]
        clean = [cells.get(f"{part.key}/clean", partial(_clean, draw, part, reads, judge)) for part in parts]
        means = _means(clean) if ablation == "mean" else {}
        ablate = partial(_ablate, ablation=ablation, site=site, steps=steps, sites=set(lens.sites()), means=means)
        for part, cell in zip(parts, clean, strict=True):
            arms = [(0, Arm("no-op", 0))]
            arms += [
                (size, a) for size in ks for a in _arms(sets_of(cell.arrays, size, score), draws, part.seed, extra)
            ]
            for size, arm in arms:
                make = partial(_edited, draw, part, ablate(arm, part.seed), cell.images, measures, judge, size, arm)
                cells.get(f"{part.key}/{size}/{arm.name}/{arm.draw}", make)
        return cells.result()


def _check_ablation(ablation: str, prompts: Sequence[str], batch_size: int | None) -> None:
    if ablation not in ("zero", "mean", "resample"):
        raise OpError(f"ablation={ablation!r} does not exist.{nearest(ablation, ('zero', 'mean', 'resample'))}")
    if ablation == "resample" and any(len(part.prompts) < 2 for part in batches(prompts, [0], batch_size)):
        raise PromptError(
            "ablation='resample' takes values from another prompt of the same batch, and one batch has a single "
            "prompt. Pass more prompts, or another batch_size."
        )


def _arms(top: Sequence[ChannelSet], draws: int, seed: int, extra: Sequence[str]) -> list[Arm]:
    return [*control_arms(top, draws, seed), *(Arm(name, 0, tuple(top)) for name in extra)]


def _clean(draw: Drawing, part: Batch, reads: Sequence[Read], judge: Judge | None) -> Cell:
    run = draw.clean(part, reads)
    cell = Cell(arrays=kept_scores(run, len(part.prompts)))
    if "mean" in run.keys():  # noqa: SIM118 a Run is no mapping
        cell.arrays |= {f"all/mean/{name}": value.float().numpy() for name, value in run["mean"].items()}
    for row, prompt, image in zip(part.rows, part.prompts, run.images, strict=False):
        cell.images[f"{row}/{part.seed}/0/untouched"] = image
        cell.lines.append(_line(prompt, part.seed, 0, Arm("untouched", 0), **judged(judge, image, prompt)))
    return cell


def _means(clean: Iterable[Cell]) -> dict[str, Any]:
    """The mean of every channel at every step over all prompts and seeds: site -> [s, d]."""
    import torch

    cells = list(clean)
    sites = [key.removeprefix("all/mean/") for key in cells[0].arrays if key.startswith("all/mean/")]
    means = {site: np.concatenate([cell.arrays[f"all/mean/{site}"] for cell in cells], 1).mean(1) for site in sites}
    return {site: torch.from_numpy(mean) for site, mean in means.items()}


def _ablate(
    arm: Arm,
    seed: int,
    *,
    ablation: str,
    site: Pattern,
    steps: Steps,
    sites: set[str],
    means: Mapping[str, Any],
) -> list[Op]:
    """The ops of an arm, for every image of a batch."""
    if not arm.sets:
        return [Zero(site, channels=[], steps=steps)]
    ops: list[Op] = []
    for row, one in enumerate(arm.sets):
        if arm.name == "attenuated":
            ops += _attenuated(one, seed, row, steps)
        elif arm.name == "norm-kept":
            ops += fill_ops(one, row, seed, steps)
        elif arm.name == "rescaled":
            ops += rescale_ops(one, row, steps, sites)
        elif arm.name == "random-direction":
            ops += push_ops(one, row, seed, steps)
        elif ablation == "mean":
            ops.append(MeanAblate(site, channels=one, rows=row, steps=steps, mean=means))
        elif ablation == "resample":
            other = len(arm.sets) + (row + 1) % len(arm.sets)
            ops.append(Swap(site, channels=one, rows=row, steps=steps, source=f"row:{other}", branch="both"))
        else:
            ops.append(Zero(site, channels=one, rows=row, steps=steps))
    return ops


def _attenuated(top: ChannelSet, seed: int, row: int, steps: Steps) -> list[Scale]:
    """The top channels, scaled down as far as zeroing the energy-matched control moves the tokens."""
    held, reached = top.energy_share(), top.energy_matched(seed).energy_share()
    return [
        Scale(site, channels=chosen, rows=row, steps=steps, factor=1 - min(1.0, reached[site] / held[site]) ** 0.5)
        for site, chosen in top.items()
        if held[site]
    ]


def _edited(
    draw: Drawing,
    part: Batch,
    ops: Sequence[Op],
    untouched: Mapping[str, Image],
    distances: Mapping[str, Distance],
    judge: Judge | None,
    k: int,
    arm: Arm,
) -> Cell:
    cell, images = Cell(), draw.edited(part, ops).images
    for i, (row, prompt) in enumerate(zip(part.rows, part.prompts, strict=True)):
        before, after = untouched[f"{row}/{part.seed}/0/untouched"], images[i]
        measures: dict[str, Any] = {name: _finite(distance(before, after)) for name, distance in distances.items()}
        if arm.sets:
            held = float(np.mean(list(arm.sets[i].energy_share().values())))
            measures |= {"energy_share": held, "matched": arm.sets[i].matched}
        cell.lines.append(_line(prompt, part.seed, k, arm, **measures, **judged(judge, after, prompt)))
        if arm.draw == 0:
            cell.images[f"{row}/{part.seed}/{k}/{arm.name}"] = after
    return cell


def _line(prompt: str, seed: int, k: int, arm: Arm, **measures: Any) -> dict[str, Any]:
    return {"prompt": prompt, "seed": seed, "k": k, "arm": arm.name, "draw": arm.draw, **measures}


def _finite(distance: Any) -> float:
    """A distance; missing where it is infinite, as the psnr of equal images."""
    return float(distance) if np.isfinite(distance) else np.nan


def assemble(settings: Mapping[str, Any], cells: Sequence[Cell]) -> Result:
    """The result of the cells so far."""
    table = pd.DataFrame([line for cell in cells for line in cell.lines])
    table.insert(3, "k_share", table["k"] / settings["width"])
    images = {name: image for cell in cells for name, image in cell.images.items()}
    edited = table[table["arm"] != "untouched"]
    # A psnr has no mean where some images are equal.
    measured = [name for name in settings["distances"] if name != "psnr" and name in table]
    said = ["fidelity"] if "fidelity" in table else _said(table)
    summary = summarise(edited, ("k", "k_share", "arm"), [*measured, *said, *_kept(table, "energy_share")])
    if len(contrasts := paired(edited, ("k",), [*measured, *said])):
        summary = summary.merge(contrasts, on=["k", "arm"], how="left")
    return Result("disruption", table, summary, dict(settings), images, notes=_notes(table, edited, settings))


def _said(table: pd.DataFrame) -> list[str]:
    """What a judge measured: all numbers of the untouched images."""
    ours = ("prompt", "seed", "k", "k_share", "arm", "draw")
    heard = table.loc[table["arm"] == "untouched"].dropna(axis="columns", how="all")
    return [name for name in heard if name not in ours]


def _kept(table: pd.DataFrame, *names: str) -> list[str]:
    return [name for name in names if name in table]


def _notes(table: pd.DataFrame, edited: pd.DataFrame, settings: Mapping[str, Any]) -> list[str]:
    notes = [share_of_width(k, settings["width"]) for k in settings["k"]]
    if edited.empty:
        return [*notes, "no image was edited yet"]
    floor = edited.loc[edited["arm"] == "no-op", "rmse"].max()
    notes.append(f"noise floor: an edit of no channel changes images by rmse {floor:g}")
    notes += _differences(edited, "top", ("bottom", "random", "energy-matched"))
    matched = edited[edited["arm"] == "energy-matched"]
    if len(matched) and not matched["matched"].astype(bool).all():
        reached = matched["energy_share"].mean()
        wanted = edited.loc[edited["arm"] == "top", "energy_share"].mean()
        notes.append(
            f"no other k channels hold the energy of the top k: energy-matched reaches a share of {reached:.3f}, top "
            f"has {wanted:.3f}; compare energy-matched with attenuated, which moves tokens just as far"
        )
        notes += _differences(edited, "attenuated", ("energy-matched",))
    if "norm-kept" in settings["confounds"] and min(settings["k"]) < 3:
        notes.append("norm-kept leaves two numbers per token, which is all that one or two channels held: take k >= 3")
    if "fidelity" in table:
        notes.append(f"untouched images: fidelity {table.loc[table['arm'] == 'untouched', 'fidelity'].mean():.3f}")
    return notes


def _differences(edited: pd.DataFrame, base: str, others: Sequence[str]) -> list[str]:
    """By how much one arm changes images more than others, on the same prompts and seeds: a note for every k."""
    found = paired(edited[edited["arm"].isin([base, *others])], ("k",), ["rmse"], base)
    if found.empty:
        return []
    shown = readable(found).rename(columns={f"rmse_{base}_minus": "more"})
    return [
        f"k={k}: {base} changes images by rmse "
        + ", ".join(f"{more} more than {arm}" for arm, more in zip(group["arm"], group["more"], strict=True))
        + " (paired)"
        for k, group in shown.groupby("k", sort=False)
    ]
