"""Channels or directions? Remove as much energy along channels as along other directions, and compare the damage."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch

from dit_lens.analysis.metrics import DISTANCES, Distance
from dit_lens.analysis.metrics.distances import distances as distances_of
from dit_lens.analysis.metrics.distances import measure_distances
from dit_lens.arguments.lists import as_prompts, as_seeds, as_tuple, check_once
from dit_lens.arguments.numbers import check_number
from dit_lens.core.request.ops import Apply, Zero
from dit_lens.errors import ExecutionError, OpError, PromptError, SiteError, check_choice, show
from dit_lens.instruments.gradients import check_differentiable
from dit_lens.instruments.massive import check_score
from dit_lens.instruments.relevance import RELEVANCE
from dit_lens.plots import basis_figure
from dit_lens.studies.parts.direction_arms import BASES, DirectionArm, DirectionFinder, list_arms
from dit_lens.studies.parts.direction_moves import COLUMNS as MOVE_COLUMNS
from dit_lens.studies.parts.direction_moves import MEASURES as MOVE_MEASURES
from dit_lens.studies.parts.direction_moves import (
    DirectionMoves,
    compare_sources,
    count_images,
    join_moves,
    list_moved,
)
from dit_lens.studies.parts.directions import make_removal_ops, share_removed
from dit_lens.studies.parts.equal_energy import (
    compare_with_top,
    describe_comparison,
    describe_moves,
    summarise_comparison,
)
from dit_lens.studies.parts.transport_levels import describe_levels
from dit_lens.studies.shared.arguments import as_ks, check_draws, find_meant
from dit_lens.studies.shared.batches import BatchRunner, PromptBatch, divide_call, make_batches, skips_first_step
from dit_lens.studies.shared.cells import Cell
from dit_lens.studies.shared.checkpoints import StudyCheckpoints
from dit_lens.studies.shared.judges import Judge, ask_judge, choose_judge
from dit_lens.studies.shared.keys import ImageKey
from dit_lens.studies.shared.measures import check_measures
from dit_lens.studies.shared.registry import study
from dit_lens.studies.shared.result import Result
from dit_lens.studies.shared.tables import summarise

if TYPE_CHECKING:
    from PIL.Image import Image

    from dit_lens.core.request.ops import Pattern, Steps
    from dit_lens.lens import DiTLens


COLUMNS = ("prompt", "seed", "arm", "draw", "level", "k", "energy_share")  # what the table has of the study itself
NOTHING = {"k": 0.0, "energy_share": 0.0}  # removed
MOVED = ("specificity", "fidelity_gain")  # measures of what was moved that arms are compared by


def assemble(settings: Mapping[str, Any], cells: Sequence[Cell]) -> Result:
    """The result of the cells so far."""
    lines = [line for cell in cells for line in cell.lines]
    table = pd.DataFrame([line for line in lines if "to_source" not in line])
    moves = [line for line in lines if "to_source" in line]
    images = {name: image for cell in cells for name, image in cell.images.items()}
    # A psnr has no mean where some images are equal.
    measured = [name for name in settings["distances"] if name != "psnr"]
    measures = [*measured, *(["fidelity"] if "fidelity" in table else _list_judged(table, settings))]
    table = join_moves(compare_with_top(table, measures), moves)
    moved = [name for name in MOVED if name in table and table[name].notna().any()]
    table = compare_with_top(table, moved, "energy_held")
    edited = table[table["arm"] != "untouched"]
    if edited.empty:
        return Result("basis", table, edited, dict(settings), images, notes=["no image was edited yet"])
    known = ["k", "energy_share"]  # of what was done, so that no interval belongs to it
    worth = [name for name in MOVE_MEASURES if name in table]
    summary = summarise(edited, ("arm", "level"), [*known, *measures, *worth])
    summary = summary.drop(columns=[f"{name}_{bound}" for name in known for bound in ("low", "high")])
    compared = summarise_comparison(table, ("level",), [*measures, *moved])
    summary = summary.merge(compared, on=["arm", "level"], how="left")
    notes = _notes(table, settings.get("no_modulation", ""))
    return Result("basis", table, summary, dict(settings), images, notes=notes)


@study(
    question="Channels or directions?",
    assemble=assemble,
    figure=basis_figure,
)
def basis(
    lens: DiTLens,
    prompts: str | Sequence[str],
    *,
    energies: float | Sequence[float] = (0.1, 0.2, 0.35, 0.5),
    k: int | Sequence[int] | None = None,
    seeds: int | Sequence[int] = (0,),
    bases: Sequence[str] = BASES,
    draws: int = 3,
    score: str = "|mean|",
    site: Pattern = "blocks.*.img",
    steps: Steps = None,
    ablation: Literal["zero", "mean"] = "zero",
    transport: bool | None = None,
    distances: Sequence[str | Distance] = ("rmse",),
    judge: Judge | None = None,
    batch_size: int | None = None,
    out: str | Path | None = None,
    **call: Any,
) -> Result:
    """Damage and transport against energy, along massive channels and along directions that are no channels.

    >>> from dit_lens import DiTLens
    >>> prompt = "a big red circle left on a plain blue background"
    >>> result = basis(
    ...     DiTLens.toy(), prompt, energies=0.2, bases=["components", "mean-direction"], num_inference_steps=2
    ... )
    >>> result.summary["arm"].tolist()
    ['no-op', 'mean-direction', 'top', 'components', 'top', 'top']

    Is "massive channels" a fact about channels, or about one direction that is seen in the basis of channels? A
    direction v is removed as a channel is zeroed: x - (x v) v, at every site and step. Every image's directions come
    from its own clean run. Arms:

    - top: channels by their score, the first ones first;
    - random: channels in random order;
    - rotation: directions of a random rotation of all channels, by the same score;
    - components: the directions that hold the most energy (principal components of the tokens, not centred);
    - mean-direction: a single direction for each site and step, that of the tokens' mean;
    - relevant: channels by gradient x activation of the prediction (see :func:`read_relevance`);
    - no-op: no direction, which must change nothing.

    Each is run at every level of ``energies``, with as many directions at every site as come nearest to that share of
    its energy, one at least, and once more at the share that the mean direction holds there (level "mean"). Levels at
    which a basis would remove the same as before are left out. Level "most" of the top channels reaches as far as any
    other arm.
    ``energy_share`` is what was removed: the share of the squared norm of the tokens in the clean run, averaged over
    sites; of ablation by the mean, that of the change. ``rmse_top_minus`` is by how much the top channels exceed the
    arm at the arm's own share, on the same prompt and seed: their curve is interpolated linearly, from the untouched
    image on, and never extended; it is missing where no top arm removed as much. The notes say what the averages over
    levels come to.

    The same directions are also moved, those of every image into the image of the next prompt of its batch, from which
    nothing else is taken: x + (x_source - x) v v, in lockstep, under the same noise (conditional branch); of random
    bases the first draw. Rows of the table have what became of that beside what became of the removal, as in
    ``transfer``: distances to the own source, to others, and to a collapse (``to_source``, ``to_target``,
    ``to_others``, ``to_mean``, ``to_grey``), ``specificity`` (to_others - to_source; a collapse has 0 on average),
    ``share`` of what the ceiling does, ``fidelity_source``, ``fidelity_target`` and ``fidelity_gain``. The rows
    "untouched" are the target as it is, "ceiling" has all channels and what modulates the final norm moved,
    "mean-picture" and "grey" stand for a collapse. ``specificity_top_minus`` compares arms where they hold the same
    share of the source's energy, ``energy_held``.

    By default that is 48 arms, 27 of which are moved, so that every prompt and seed costs 106 images: 2 untouched, 48
    without directions, and 56 for moves with their sources. The progress bar says the number before the first one.

    lens: lens on the model.
    prompts: one prompt or several.
    energies: shares of the energy that are removed, in (0, 1).
    k: numbers of directions, instead of energies.
    seeds: seeds of the noise; every prompt is run with each.
    bases: the arms that run beside top, from those above.
    draws: number of random orders and rotations, each drawn anew for every image.
    score: reduction by which channels and rotated directions are ranked.
    site: sites of image tokens whose directions are removed.
    steps: denoising steps at which they are removed, and which count for energy and scores; all by default.
    ablation: "zero"; or "mean": coefficients become those of the tokens' mean over the study's own prompts and seeds at
      that step.
    transport: whether directions are moved too; None: where every batch has two prompts to move them between.
    distances: to the untouched image, names or functions of two images; rmse is always among them.
    judge: function (image, prompt) -> {name: number}; toys read scenes back by themselves.
    batch_size: number of prompts that run together; all by default.
    out: folder for finished cells, from which the same call continues.
    call: other arguments of the pipeline.

    Tokens are read whole, a few sites at a time, each time in one more run of the untouched image.
    """
    prompts, seeds = as_prompts(prompts), as_seeds(seeds)
    check_draws(draws)
    levels = _check(lens, site, energies, k, bases, score, ablation)
    batches = make_batches(prompts, seeds, batch_size, divide_call(lens, call, len(prompts)))
    first = batches[0]
    lens.cost(first.prompts, Apply(site, fn=lambda x, _: x, steps=steps), **first.call)  # raises what cannot be planned
    moving = _check_transport(transport, batches)
    taken = (*COLUMNS, *(MOVE_COLUMNS if moving else ()))
    measure = Measure(distances_of(["rmse", *as_tuple(distances)]), choose_judge(lens, prompts, judge), taken)
    check_measures(measure.distances, (*taken, "fidelity"), "distances=")
    settings = {
        "prompts": prompts,
        "energies": list(as_tuple(energies)),
        "k": None if k is None else levels,
        "seeds": seeds,
        "bases": list(bases),
        "draws": draws,
        "score": score,
        "site": site,
        "steps": str(steps),
        "ablation": ablation,
        "transport": moving,
        "no_modulation": lens.anatomy.why_not(None, "img", "mod.final") or "",
        "distances": list(measure.distances),
        "judge": measure.judge,
        "batch_size": batch_size,
        "call": call,
    }
    if own := {name: distance for name, distance in measure.distances.items() if distance is not DISTANCES.get(name)}:
        settings["functions"] = own  # their names alone do not tell whether they are still the same
    arms = list_arms(bases, draws, levels)
    moved = list_moved(arms) if moving else []
    total = len(batches) * (1 + len(arms) + moving + len(moved))
    images = count_images(len(prompts) * len(seeds), arms, moves=moving)
    meant = find_meant(lens, first.prompts, first.call, site, steps)
    with StudyCheckpoints("basis", settings, lens=lens, total=total, out=out, meant=meant, images=images) as cells:
        late = skips_first_step(lens, first, steps)
        runner, beside = (BatchRunner(lens=lens, late=late, twice=twice) for twice in (False, True))
        find = DirectionFinder(bases=bases, draws=draws, levels=levels, score=score, site=site, steps=meant["steps"])
        clean = [
            cells.get(f"{batch.key}/clean", partial(_run_clean, runner, find, batch, measure)) for batch in batches
        ]
        means = average_means(clean) if ablation == "mean" else {}
        for batch, cell in zip(batches, clean, strict=True):
            for arm in arms:
                make = partial(_run_arm, runner, find, batch, cell, arm, means, steps, measure)
                cells.get(f"{batch.key}/{arm.name}/{arm.draw}/{arm.label}", make)
        if moving:
            levels = compare_sources(clean, batches)
            moves = DirectionMoves(runner=beside, site=site, steps=steps, judge=measure.judge, levels=levels)
            for batch, cell in zip(batches, clean, strict=True):
                cells.get(f"{batch.key}/moved/ceiling", partial(moves.run_ceiling, batch, cell))
                for arm in moved:
                    make = partial(_move_arm, moves, find, batch, cell, arm)
                    cells.get(f"{batch.key}/moved/{arm.name}/{arm.label}", make)
        return cells.result()


def _run_clean(runner: BatchRunner, find: DirectionFinder, batch: PromptBatch, measure: Measure) -> Cell:
    """The untouched images of a batch, and the directions of each."""
    images, arrays = find.measure(runner, batch)
    cell = Cell(arrays=arrays)
    for row, prompt, image in zip(batch.rows, batch.prompts, images, strict=True):
        cell.images[_name_image(row, batch.seed, DirectionArm("untouched"))] = image
        cell.lines.append(measure.line(prompt, batch.seed, DirectionArm("untouched"), image, image))
    return cell


def _run_arm(
    runner: BatchRunner,
    find: DirectionFinder,
    batch: PromptBatch,
    clean: Cell,
    arm: DirectionArm,
    means: Mapping[str, torch.Tensor],
    steps: Steps,
    measure: Measure,
) -> Cell:
    """The images of a batch from which an arm's directions are gone.

    runner, find, batch, arm, steps, measure: as in :func:`basis`.
    clean: cell of the untouched images.
    means: site -> [s, d], whose coefficients are put in place; empty: zero is.
    """
    ops, told, new = [], [], [find.is_new(clean.arrays, i, arm) for i in range(len(batch.rows))]
    if not any(new):
        return Cell()
    for i, prompt in enumerate(batch.prompts):
        bases = find.load(clean.arrays, i, (batch.seed, prompt), arm)
        ops += make_removal_ops(bases, i, steps, means)
        shares = []
        for site, one in bases.items():
            own, energy = (clean.arrays[f"{i}/{site}/{what}"] for what in ("mean", "energy"))
            shares.append(share_removed(one, torch.from_numpy(own), means.get(site), energy.item(), find.steps))
        count = float(np.mean([len(one.order) for one in bases.values()])) if bases else 0.0
        told.append({"k": count, "energy_share": float(np.mean(shares)) if bases else 0.0})
    cell, images = Cell(), runner.run_edited(batch, ops or [Zero(find.site, channels=[], steps=steps)]).images
    for row, prompt, image, removed in itertools.compress(
        zip(batch.rows, batch.prompts, images, told, strict=True), new
    ):
        before = clean.images[_name_image(row, batch.seed, DirectionArm("untouched"))]
        cell.lines.append(measure.line(prompt, batch.seed, arm, before, image, removed))
        if arm.draw == 0:
            cell.images[_name_image(row, batch.seed, arm)] = image
    return cell


def _move_arm(moves: DirectionMoves, find: DirectionFinder, batch: PromptBatch, clean: Cell, arm: DirectionArm) -> Cell:
    """The images of a batch into which an arm's directions were moved. Arguments: as in :func:`basis`."""
    bases = [
        find.load(clean.arrays, i, (batch.seed, prompt), arm) if find.is_new(clean.arrays, i, arm) else {}
        for i, prompt in enumerate(batch.prompts)
    ]
    return moves.run_arm(batch, clean, arm, bases) if any(bases) else Cell()


@dataclass(frozen=True)
class Measure:
    """What is measured of an image.

    distances: name -> distance of two images.
    judge: what says how far an image shows its prompt, if anything does.
    taken: columns that the table has without these.
    """

    distances: Mapping[str, Distance]
    judge: Judge | None
    taken: Sequence[str] = COLUMNS

    def line(
        self,
        prompt: str,
        seed: int,
        arm: DirectionArm,
        before: Image,
        after: Image,
        removed: Mapping[str, Any] = NOTHING,
    ) -> dict[str, Any]:
        """A row of the table."""
        return {
            "prompt": prompt,
            "seed": seed,
            "arm": arm.name,
            "draw": arm.draw,
            "level": arm.label,
            **removed,
            **measure_distances(self.distances, before, after),
            **ask_judge(self.judge, after, prompt, (*self.taken, *self.distances)),
        }


def average_means(clean: Sequence[Cell]) -> dict[str, torch.Tensor]:
    """The mean token of every site at every step over all prompts and seeds: site -> [s, d]."""
    found: dict[str, list[np.ndarray]] = {}
    for cell in clean:
        for key, value in cell.arrays.items():
            _, site, *what = key.split("/")
            if what == ["mean"]:
                found.setdefault(site, []).append(value)
    return {site: torch.from_numpy(np.mean(values, 0)) for site, values in found.items()}


def _name_image(row: int, seed: int, arm: DirectionArm) -> str:
    return str(ImageKey(row, seed, arm=arm.name, part=arm.label or None))


def _check_transport(transport: bool | None, batches: Sequence[PromptBatch]) -> bool:
    """Whether directions are moved; PromptError where they should be, and a batch has a single prompt."""
    possible = all(len(batch.prompts) > 1 for batch in batches)
    if transport and not possible:
        raise PromptError(
            "transport=True moves directions between prompts of one batch, and one batch has a single prompt. Pass "
            "more prompts, or another batch_size."
        )
    return possible if transport is None else transport


def _check(
    lens: DiTLens,
    site: Pattern,
    energies: float | Sequence[float],
    k: int | Sequence[int] | None,
    bases: Sequence[str],
    score: str,
    ablation: str,
) -> list[float]:
    """The levels of the study; OpError or SiteError if an argument is not valid."""
    check_choice(ablation, ("zero", "mean"), "ablation")
    for name in bases:
        check_choice(name, BASES, "basis")
    check_once("bases", bases, "a basis")
    if score == RELEVANCE:
        raise OpError(
            "score='relevance' ranks channels, and here rotated directions are ranked too. Channels by relevance are "
            "an arm of their own: bases=[..., 'relevant']."
        )
    check_score(score)
    sites = {name: lens.anatomy.site(name) for name in lens.sites(site)}
    if odd := [name for name, one in sites.items() if one.stream != "img"]:
        raise SiteError(f"{odd[0]} does not hold image tokens, whose directions these are. Choose 'blocks.*.img'.")
    if "relevant" in bases:
        if not lens.engine.reaches_weights:
            raise ExecutionError(
                "relevant channels are found by gradients, which need the model's weights on this machine, and this "
                "model is on a server without this dit_lens. Start that server with dit-lens serve, or load the model "
                "here. Leave 'relevant' out of bases=."
            )
        check_differentiable(lens)
    if k is not None:
        width = min(map(lens.anatomy.channels, sites.values()))
        ks = as_ks(k)
        if not ks or any(not 1 <= one < width for one in ks):
            raise OpError(f"k={show(k)} is not a valid number of directions. Choose from 1 to {width - 1}.")
        return list(ks)
    levels = as_tuple(energies)
    for level in levels:
        check_number("energies", level, 0, 1)
    if not levels or any(not 0 < level < 1 for level in levels):
        raise OpError(f"energies={show(energies)}: give at least one share of the energy, between 0 and 1.")
    check_once("energies", levels, "a share of the energy")
    return sorted(map(float, levels))


def _list_judged(table: pd.DataFrame, settings: Mapping[str, Any]) -> list[str]:
    """What a judge measured: all numbers of the untouched images that are no distances."""
    measured = table.loc[table["arm"] == "untouched"].dropna(axis="columns", how="all")
    return [name for name in measured if name not in (*COLUMNS, *settings["distances"])]


def _notes(table: pd.DataFrame, no_modulation: str) -> list[str]:
    notes = []
    if len(floor := table.loc[table["arm"] == "no-op", "rmse"]):
        notes.append(f"noise floor: an edit of no direction changes images by rmse {floor.max():g}")
    notes += describe_comparison(table.dropna(subset=["rmse"]))
    notes += describe_levels(table.assign(masked=False), no_modulation)
    notes += describe_moves(table)
    if "fidelity" in table:
        notes.append(f"untouched images: fidelity {table.loc[table['arm'] == 'untouched', 'fidelity'].mean():.3f}")
    return notes
