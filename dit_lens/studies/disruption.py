"""Claim 1: are massive channels critical? Ablate them, and as many others, and see what becomes of the image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from dit_lens.analysis.metrics import DISTANCES, Distance
from dit_lens.analysis.metrics.distances import distances as distances_of
from dit_lens.analysis.metrics.distances import measure_distances
from dit_lens.arguments.lists import as_prompts, as_seeds, as_tuple
from dit_lens.core.request.ops import Op, Read
from dit_lens.errors import OpError, PromptError, check_choice
from dit_lens.plots import disruption_figure
from dit_lens.studies.parts.ablations import CONFOUNDS, AblationKind, average_means, pick_step, plan_ablation
from dit_lens.studies.parts.doses import AGREES, find_off, read_doses
from dit_lens.studies.shared.arguments import as_ks, check_draws, check_k, describe_k, find_meant
from dit_lens.studies.shared.arms import (
    DRAWS,
    Arm,
    add_controls,
    average_scores,
    check_arm_score,
    count_arms,
    find_relevance,
    make_score_reads,
    select_top_channels,
)
from dit_lens.studies.shared.batches import BatchRunner, PromptBatch, divide_call, make_batches, skips_first_step
from dit_lens.studies.shared.cells import Cell
from dit_lens.studies.shared.checkpoints import StudyCheckpoints
from dit_lens.studies.shared.judges import Judge, ask_judge, choose_judge
from dit_lens.studies.shared.keys import ImageKey
from dit_lens.studies.shared.measures import check_measures
from dit_lens.studies.shared.protocols import with_protocols
from dit_lens.studies.shared.registry import study
from dit_lens.studies.shared.result import Result
from dit_lens.studies.shared.streams import make_stream
from dit_lens.studies.shared.tables import compare_arms, format_summary, summarise

if TYPE_CHECKING:
    from dit_lens.analysis.channels import ChannelSet
    from dit_lens.core.request.ops import Pattern, Steps
    from dit_lens.lens import DiTLens

Distances = Sequence["str | Distance"]
KEYS = ("prompt", "seed", "k", "k_share", "arm", "draw")
COLUMNS = (*KEYS, "energy_share", "matched", "dose_intended", "dose")  # what the table has of the study itself


def assemble(settings: Mapping[str, Any], cells: Sequence[Cell]) -> Result:
    """The result of the cells so far."""
    table = pd.DataFrame([line for cell in cells for line in cell.lines])
    table.insert(3, "k_share", table["k"] / settings["width"])
    images = {name: image for cell in cells for name, image in cell.images.items()}
    edited = table[table["arm"] != "untouched"]
    # A psnr has no mean where some images are equal.
    measured = [name for name in settings["distances"] if name != "psnr" and name in table]
    judged = ["fidelity"] if "fidelity" in table else _list_judged(table)
    held = [name for name in ("energy_share", "dose_intended", "dose") if name in table]
    summary = summarise(edited, ("k", "k_share", "arm"), [*measured, *judged, *held])
    if len(contrasts := compare_arms(edited, ("k",), [*measured, *judged])):
        summary = summary.merge(contrasts, on=["k", "arm"], how="left")
    return Result("disruption", table, summary, dict(settings), images, notes=_notes(table, edited, settings))


@study(
    question="Claim 1: are they critical?",
    assemble=assemble,
    figure=disruption_figure,
)
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
    ablation: AblationKind = "zero",
    confounds: bool | Sequence[str] = True,
    distances: Distances = ("rmse", "psnr"),
    judge: Judge | None = None,
    batch_size: int | None = None,
    out: str | Path | None = None,
    **call: Any,
) -> Result:
    """Ablates the top-k channels and their controls, on the same prompts and seeds.

    >>> from dit_lens import DiTLens
    >>> result = disruption(
    ...     DiTLens.toy(), "a big red circle left on a plain blue background", k=4, draws=1, num_inference_steps=1
    ... )
    >>> sorted(result.summary["arm"])  # doctest: +NORMALIZE_WHITESPACE
    ['attenuated', 'bottom', 'energy-matched', 'no-op', 'norm-frozen', 'norm-kept', 'random', 'random-direction',
     'rescaled', 'top']

    Every image's own sets come from its clean run, averaged over all its steps, and stay fixed. All arms of a batch
    run at one batch shape. Arms: no-op (an edit of no channel, which must change nothing), top, bottom, random
    (``draws`` of them; each one map of channels for all blocks) and energy-matched (other channels, with energy as near
    as can be). Arms for what else could explain the damage, unless ``confounds=False``:

    - attenuated: the top channels kept just as much smaller as moves tokens as far as zeroing the energy-matched ones;
    - norm-kept: the top channels overwritten by a fixed pattern that leaves the next norm's statistics as they were;
    - norm-frozen: the top channels zeroed, while norms use the statistics they would have had without that;
    - rescaled: nothing removed; norms give out all other channels as large as zeroing the top would make them;
    - random-direction: every token pushed in one random direction, as far as zeroing would move it.

    The table has the distances (rmse in grey levels, psnr in dB and missing for equal images), k over the width, the
    share of energy the ablated channels held, the doses, and what the judge says. The summary has the means with their
    intervals, and ``..._top_minus``: by how much the top arm exceeds the arm of the line, over the same prompts and
    seeds.

    ``dose`` is how far the run's edits moved the tokens of an image, at the first edited step (conditional branch),
    averaged over sites: |moved|^2 / |x|^2, where x are the tokens as they would be without the edits here and at
    earlier blocks, whose outputs pass them on, and moved is what these edits changed together. ``dose_intended`` is
    what the arm means to give by the energies e of the clean run at that step: sum of e over its channels / sum of e
    over all; the smaller of the shares of top and energy-matched for attenuated; missing for norm-kept and for
    ablation by resampling. Of rescaled, which moves nothing, the dose is the share whose zeroing raises the others as
    much, 1 - 1 / gain^2, by what norms gave out; it and that of norm-frozen are 0 where no norm was found to hold. The
    notes name arms whose dose is not within 5 % of what was intended. Points with a gate of their own are not weighed.

    Confounds are of zeroing, so they run with it alone, and only if ``site`` is the output of blocks.
    Raises OpError or PromptError before anything is drawn.

    lens: lens on the model.
    prompts: one prompt or several.
    k: one or several numbers of channels.
    seeds: seeds of the noise; every prompt is run with each.
    draws: number of random controls.
    score: reduction by which channels are ranked, or "relevance": how much the prediction depends on them.
    site: sites whose channels are ablated.
    steps: denoising steps at which channels are ablated; all by default.
    ablation: "zero"; "mean", in every branch by the channel's mean over the study's own prompts and seeds at that step
      (conditional branch); or "resample", by the values of another prompt of the batch under the same noise.
    confounds: whether the arms for other explanations run, or the names of those that do.
    distances: to the untouched image, names or functions of two images (see ``metrics.distances``); rmse is always
      among them.
    judge: function (image, prompt) -> {name: number}, such as ``metrics.clip_judge``; toys read scenes back by
      themselves.
    batch_size: number of prompts that run together; all by default.
    out: folder for finished cells, from which the same call continues.
    call: other arguments of the pipeline.

    Source: arXiv 2605.13974.
    """
    prompts, seeds, ks = as_prompts(prompts), as_seeds(seeds), as_ks(k)
    check_k(lens, site, ks)
    check_draws(draws)
    _check_ablation(ablation, prompts, batch_size)
    judge, measures = choose_judge(lens, prompts, judge), distances_of(["rmse", *as_tuple(distances)])
    check_measures(measures, (*COLUMNS, "fidelity"), "distances=")
    sites = lens.sites(site)
    extra = _choose_confounds(confounds, possible=ablation == "zero" and all(name.count(".") == 2 for name in sites))
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
    if own := {name: distance for name, distance in measures.items() if distance is not DISTANCES.get(name)}:
        settings["functions"] = own  # their names alone do not tell whether they are still the same
    batches = make_batches(prompts, seeds, batch_size, divide_call(lens, call, len(prompts)))
    check_arm_score(lens, score, batches[0].prompts, site, batches[0].call)
    total = len(batches) * (2 + len(ks) * (count_arms(draws) + len(extra)))
    images = len(prompts) * len(seeds) * (total // len(batches)) * (2 if ablation == "resample" else 1)
    meant = find_meant(lens, batches[0].prompts, batches[0].call, site, steps)
    with StudyCheckpoints("disruption", settings, lens=lens, total=total, out=out, meant=meant, images=images) as cells:
        first = min(meant["steps"])
        late = skips_first_step(lens, batches[0], steps)
        runner = BatchRunner(lens=lens, twice=ablation == "resample", late=late)
        measure = Measure(runner=runner, distances=measures, judge=judge, site=site, score=score)
        reads = make_score_reads(site, score)
        reads += [Read(site, reduce="mean", name="mean")] if ablation == "mean" else []
        clean = [cells.get(f"{batch.key}/clean", partial(measure.run_clean, batch, reads, first)) for batch in batches]
        means = average_means(clean) if ablation == "mean" else {}
        ablate = plan_ablation(lens, site, steps, ablation, first, means)
        for batch, cell in zip(batches, clean, strict=True):
            if cells.skips(total // len(batches) - 1):
                continue
            arms: list[tuple[int, Arm, Sequence[ChannelSet]]] = [(0, Arm("no-op", 0), ())]
            for size in ks:
                top = select_top_channels(cell.arrays, size, score)
                controlled = add_controls(top, draws, batch.seed, batch.prompts, size)
                matched = next(arm.sets for arm in controlled if arm.name == "energy-matched")
                arms += [(size, arm, matched) for arm in controlled]
                arms += [(size, Arm(name, 0, tuple(top)), matched) for name in extra]
            for size, arm, matched in arms:
                streams = [make_stream(batch.seed, prompt, size, arm.name, arm.draw) for prompt in batch.prompts]
                ops = ablate.make_ops(arm, matched, streams)
                intended = [ablate.intend(arm, matched, row, cell.arrays) for row in range(len(batch.prompts))]
                edit = partial(measure.run_edited, batch, ops, cell, size, arm, intended)
                cells.get(f"{batch.key}/{size}/{arm.name}/{arm.draw}", edit)
        return cells.result()


def _check_ablation(ablation: str, prompts: Sequence[str], batch_size: int | None) -> None:
    check_choice(ablation, ("zero", "mean", "resample"), "ablation")
    if ablation == "resample" and any(len(batch.prompts) < 2 for batch in make_batches(prompts, [0], batch_size)):
        raise PromptError(
            "ablation='resample' takes values from another prompt of the same batch, and one batch has a single "
            "prompt. Pass more prompts, or another batch_size."
        )


def _choose_confounds(asked: bool | Sequence[str], *, possible: bool) -> tuple[str, ...]:
    """The arms for other explanations. possible: whether they are of this ablation and these sites."""
    if isinstance(asked, bool):
        return CONFOUNDS if asked and possible else ()
    for name in asked:
        check_choice(name, CONFOUNDS, "confound")
    if asked and not possible:
        raise OpError(
            f"confounds={list(asked)} are of zeroing the output of blocks. Leave confounds= out, or ablate with "
            "ablation='zero' at sites such as 'blocks.*.img'."
        )
    return tuple(name for name in CONFOUNDS if name in asked)


@dataclass(frozen=True, kw_only=True)
class Measure:
    """Runs batches and measures their images.

    runner: what runs them.
    distances: name -> distance of two images.
    judge: what says how far an image shows its prompt, if anything does.
    site: sites whose channels are ranked.
    score: what they are ranked by.
    """

    runner: BatchRunner
    distances: Mapping[str, Distance]
    judge: Judge | None
    site: Pattern
    score: str

    def run_clean(self, batch: PromptBatch, reads: Sequence[Read], first: int) -> Cell:
        """The untouched images of a batch, and the scores of their channels.

        batch: the prompts and their seed.
        reads: those from which channels and means are taken.
        first: the step at which doses are weighed.
        """
        run = self.runner.run(batch, reads)
        relevance = find_relevance(
            self.runner.lens, self.score, batch.prompts, self.site, seed=batch.seed, call=batch.call
        )
        cell = Cell(arrays=average_scores(run, len(batch.prompts), relevance))
        squares = {site: rms.float().square() for site, rms in run["rms"].items()}
        cell.arrays |= pick_step("energy at first", squares, first, len(batch.prompts))
        if "mean" in run:
            cell.arrays |= {f"all/mean/{name}": value.float().numpy() for name, value in run["mean"].items()}
            cell.arrays |= pick_step("mean at first", run["mean"], first, len(batch.prompts))
        for row, prompt, image in zip(batch.rows, batch.prompts, run.images, strict=False):
            cell.images[_name_image(row, batch, 0, "untouched")] = image
            measures = ask_judge(self.judge, image, prompt, (*COLUMNS, *self.distances))
            cell.lines.append(_line(prompt, batch.seed, 0, Arm("untouched", 0), measures))
        return cell

    def run_edited(
        self, batch: PromptBatch, ops: Sequence[Op], clean: Cell, k: int, arm: Arm, intended: Sequence[float]
    ) -> Cell:
        """The images of a batch under the edits of an arm.

        batch: the prompts and their seed.
        ops: the edits.
        clean: cell of the untouched images.
        k: number of channels of the arm.
        arm: the arm.
        intended: for every image the dose that the arm means to give.
        """
        run = self.runner.run_edited(batch, ops)
        cell, images, doses = Cell(), run.images, read_doses(ops, run.receipt)
        for i, (row, prompt) in enumerate(zip(batch.rows, batch.prompts, strict=True)):
            before, after = clean.images[_name_image(row, batch, 0, "untouched")], images[i]
            measures: dict[str, Any] = dict(measure_distances(self.distances, before, after))
            if arm.sets:
                held = float(np.mean(list(arm.sets[i].energy_share().values())))
                measures |= {"energy_share": held, "matched": arm.sets[i].matched}
            measures |= {"dose_intended": intended[i], "dose": doses.get(i, np.nan if arm.sets else 0.0)}
            measures |= ask_judge(self.judge, after, prompt, (*COLUMNS, *self.distances))
            cell.lines.append(_line(prompt, batch.seed, k, arm, measures))
            if arm.draw == 0:
                cell.images[_name_image(row, batch, k, arm.name)] = after
        return cell


def _name_image(row: int, batch: PromptBatch, k: int, arm: str) -> str:
    return str(ImageKey(row, batch.seed, k=k, arm=arm))


def _line(prompt: str, seed: int, k: int, arm: Arm, measures: Mapping[str, Any]) -> dict[str, Any]:
    return {"prompt": prompt, "seed": seed, "k": k, "arm": arm.name, "draw": arm.draw, **measures}


def _list_judged(table: pd.DataFrame) -> list[str]:
    """What a judge measured: all numbers of the untouched images."""
    measured = table.loc[table["arm"] == "untouched"].dropna(axis="columns", how="all")
    return [name for name in measured if name not in KEYS]


def _notes(table: pd.DataFrame, edited: pd.DataFrame, settings: Mapping[str, Any]) -> list[str]:
    notes = [describe_k(k, settings["width"]) for k in settings["k"]]
    if edited.empty:
        return [*notes, "no image was edited yet"]
    floor = edited.loc[edited["arm"] == "no-op", "rmse"].max()
    notes.append(f"noise floor: an edit of no channel changes images by rmse {floor:g}")
    notes += describe_doses(edited)
    notes += _describe_differences(edited, "top", ("bottom", "random", "energy-matched"))
    matched = edited[edited["arm"] == "energy-matched"]
    if len(matched) and not matched["matched"].astype(bool).all():
        reached = matched["energy_share"].mean()
        wanted = edited.loc[edited["arm"] == "top", "energy_share"].mean()
        notes.append(
            f"no other k channels hold the energy of the top k: energy-matched reaches a share of {reached:.3f}, top "
            f"has {wanted:.3f}; compare energy-matched with attenuated, which moves tokens just as far"
        )
        notes += _describe_differences(edited, "attenuated", ("energy-matched",))
    if "norm-kept" in settings["confounds"] and min(settings["k"]) < 3:
        notes.append("norm-kept leaves two numbers per token, which is all that one or two channels held: take k >= 3")
    if "fidelity" in table:
        notes.append(f"untouched images: fidelity {table.loc[table['arm'] == 'untouched', 'fidelity'].mean():.3f}")
    return notes


def describe_doses(edited: pd.DataFrame) -> list[str]:
    """Which arms gave another dose than they intended, for every k.

    edited: table of a disruption, without untouched images; results of earlier releases have no doses.
    """
    if "dose" not in edited:
        return []
    means = edited[edited["k"] > 0].groupby(["k", "arm"], sort=False)[["dose_intended", "dose"]].mean()
    given = means.dropna()
    notes = [
        f"k={k}: {arm} gave a dose of {dose:.3g} where {meant:.3g} was intended ({dose / meant - 1:+.0%})"
        for (k, arm), meant, dose in find_off(given).itertuples(name=None)
    ]
    if len(given) and not notes:
        notes = [f"every arm gave the dose it intended, within {AGREES:.0%} (arms that intend none: see dose)"]
    if len(lacking := means.index[means["dose"].isna()].unique("arm")):
        notes.append(f"doses were not weighed: {', '.join(lacking)}")
    return notes


def _describe_differences(edited: pd.DataFrame, base: str, others: Sequence[str]) -> list[str]:
    """By how much one arm changes images more than others, on the same prompts and seeds: a note for every k."""
    found = compare_arms(edited[edited["arm"].isin([base, *others])], ("k",), ["rmse"], base)
    if found.empty:
        return []
    shown = format_summary(found).rename(columns={f"rmse_{base}_minus": "more"})
    return [
        f"k={k}: {base} changes images by rmse "
        + ", ".join(f"{more} more than {arm}" for arm, more in zip(group["arm"], group["more"], strict=True))
        + " (paired)"
        for k, group in shown.groupby("k", sort=False)
    ]
