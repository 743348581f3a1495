"""How far can a direction steer? Strength against effect, beside random directions and the edit of the prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch

from dit_lens.analysis.metrics.intervals import holm
from dit_lens.arguments.lists import as_seeds
from dit_lens.arguments.numbers import check_number
from dit_lens.errors import OpError, PromptError, show
from dit_lens.instruments.steering_vectors import Steering
from dit_lens.plots import steering_figure
from dit_lens.studies.parts.doses import find_off
from dit_lens.studies.parts.steered_images import SteeredImages, SteeringBatch, learn_directions
from dit_lens.studies.shared.arguments import as_pairs, as_strengths, check_draws, find_meant
from dit_lens.studies.shared.batches import divide_call, make_batches
from dit_lens.studies.shared.cells import Cell
from dit_lens.studies.shared.checkpoints import StudyCheckpoints
from dit_lens.studies.shared.judges import Attributes, Judge, choose_judge, scene_judge
from dit_lens.studies.shared.registry import study
from dit_lens.studies.shared.result import Result
from dit_lens.studies.shared.tables import compare_arms, format_summary, summarise
from dit_lens.toys.scenes import Scene

if TYPE_CHECKING:
    from dit_lens.core.request.ops import Pattern, Steps
    from dit_lens.lens import DiTLens

MEASURES = ("changed", "kept", "readable", "fidelity_to", "fidelity_from", "rmse", "to_prompt")
STRONGEST = 1e4  # of a strength; beyond it nothing is left of tokens but the direction


def assemble(settings: Mapping[str, Any], cells: Sequence[Cell]) -> Result:
    """The result of the cells so far."""
    table = pd.DataFrame([line for cell in cells for line in cell.lines])
    images = {name: image for cell in cells for name, image in cell.images.items()}
    measures = [name for name in MEASURES if name in table]
    doses = [name for name in ("dose_intended", "dose") if name in table]
    summary = summarise(table, ("strength", "arm"), [*measures, *doses])
    counts = table.groupby(["strength", "arm"])[measures].count().add_suffix("_n")
    summary = summary.merge(counts.reset_index(), on=["strength", "arm"], how="left")
    edited = table[table["arm"].isin(["steering", "random"])]
    if len(contrasts := compare_arms(edited, ("strength",), measures, "steering")):
        for name in measures:
            contrasts[f"{name}_steering_minus_p"] = holm(contrasts[f"{name}_steering_minus_p"])
            means = edited.groupby(["strength", "prompt", "seed", "arm"])[name].mean().unstack("arm").dropna()
            paired = contrasts["strength"].map(means.groupby("strength").size())
            contrasts[f"{name}_steering_minus_n"] = paired.fillna(0).astype("Int64")
        summary = summary.merge(contrasts, on=["strength", "arm"], how="left")
    return Result("steering", table, summary, dict(settings), images, notes=_notes(table, summary, measures))


@study(
    question="How far can a direction steer?",
    assemble=assemble,
    figure=steering_figure,
)
def steering(
    lens: DiTLens,
    pairs: Sequence[tuple[str, str]],
    *,
    sites: Pattern = "blocks.*.img",
    strengths: float | Sequence[float] = (0.5, 1.0, 2.0, 4.0),
    directions: Steering | None = None,
    seeds: int | Sequence[int] = (0,),
    draws: int = 3,
    steps: Steps = None,
    judge: Judge | None = None,
    attributes: Attributes | None = None,
    batch_size: int | None = None,
    out: str | Path | None = None,
    **call: Any,
) -> Result:
    """Adds a direction to prompts at several strengths, and measures what changes as meant, and what else is lost.

    >>> from dit_lens import DiTLens
    >>> scenes = [f"a big red {shape} left on a plain green background" for shape in ("circle", "cross")]
    >>> pairs = [(scene, scene.replace("red", "blue")) for scene in scenes]
    >>> result = steering(DiTLens.toy(), pairs, sites="blocks[2:4].img", strengths=2, draws=1, num_inference_steps=1)
    >>> result.summary[["strength", "arm"]].to_numpy().tolist()
    [[0.0, 'untouched'], [0.0, 'prompt'], [0.0, 'no-op'], [2.0, 'steering'], [2.0, 'random']]

    The direction is the mean difference, over pairs and seeds, of the tokens' means at every site and step
    (:class:`~dit_lens.Steering`). It is learned on one half of the pairs and tried on the other, and the other way
    round (pairs of even and of odd numbers), so no prompt is steered by what was learned of it. Arms:

    - untouched, and no-op (an edit of no channel, which must change nothing);
    - prompt: the image of the edited prompt under the same noise, which is what the direction is to achieve;
    - steering: the direction, at every strength; 1 moves by the mean difference;
    - random: the direction turned by a random rotation (``draws`` an image), one for all sites and steps, so that it is
      as long and adds up over blocks alike; without it a strength says nothing.

    The table has, of attributes that judge and ``attributes`` know, ``changed``: the share of those in which the two
    prompts differ that are as in the edited prompt; and ``kept``: the share of those which both share that are right;
    ``readable``, ``fidelity_to`` and ``fidelity_from`` the edited and the own prompt, rmse to the untouched image and,
    as ``to_prompt``, to that of the edited prompt. The summary has means with intervals, and ``..._steering_minus``: by
    how much steering exceeds random, paired, with p-values corrected for their number (Holm, over strengths). ``n``
    counts images, ``changed_n`` and so on those that a measure is known of, and ``..._steering_minus_n`` the pairs of
    prompt and seed that are compared.

    ``dose``: |moved|^2 / |x|^2 at the first step (conditional branch), averaged over sites, where moved is what
    directions here and at earlier blocks changed together; ``dose_intended`` by the energies of the untouched run.

    It draws 3 + strengths * (1 + draws) images for every pair and seed. Raises OpError or PromptError before.

    lens: lens on the model.
    pairs: (prompt, the same prompt edited), at least two.
    sites: where the direction is learned and added.
    strengths: how often it is added, above 0.
    directions: directions to try instead of learning them, such as ``Steering.load(file)``, at all of their sites; the
      pairs should then be others than those they were found from.
    seeds: seeds of the noise; every pair is run with each.
    draws: number of random directions.
    steps: denoising steps at which it is added; all by default.
    judge: function (image, prompt) -> {"fidelity": number, ...}; toys read every attribute back by themselves.
    attributes: function prompt -> {attribute: value}, of attributes that the judge gives numbers to; toys have one.
    batch_size: number of pairs that run together; all by default.
    out: folder for finished cells, from which the same call continues.
    call: other arguments of the pipeline.

    Sources: activation addition (arXiv 2308.10248), CAA (2312.06681).
    """
    pairs, seeds, strengths = as_pairs(pairs, "prompt"), as_seeds(seeds), as_strengths(strengths)
    check_draws(draws)
    for strength in strengths:
        check_number("strengths", strength, 0, STRONGEST, open_ends=True)
    if not strengths:
        raise OpError("strengths=[] adds nothing. Give at least one.")
    if directions is not None and not isinstance(directions, Steering):
        raise OpError(
            f"directions={show(directions)} is no Steering. Give one, such as dl.Steering.load(file), or none."
        )
    if directions is None and len(pairs) < 2:
        raise PromptError("a direction is learned from other pairs than those it is tried on. Give two pairs, or more.")
    prompts = [prompt for pair in pairs for prompt in pair]
    judge = choose_judge(lens, prompts, judge)
    if attributes is None and judge is scene_judge:
        attributes = _read_scene
    names = lens.sites(sites if directions is None else list(directions.vectors))
    settings = {
        "pairs": pairs,
        "sites": names,
        "strengths": list(strengths),
        "directions": None if directions is None else {"method": directions.method, "n": directions.n},
        "seeds": seeds,
        "draws": draws,
        "steps": str(steps),
        "judge": judge,
        "attributes": attributes,
        "batch_size": batch_size,
        "call": call,
    }
    if directions is not None:
        settings["vectors"] = {site: vector.numpy() for site, vector in directions.vectors.items()}
    divided = divide_call(lens, call, len(prompts))
    batches = [
        SteeringBatch(seed=one.seed, rows=one.rows, pairs=[pairs[i] for i in one.rows], call=divided)
        for one in make_batches([start for start, _ in pairs], seeds, batch_size)
    ]
    first = batches[0]
    meant = find_meant(lens, first.prompts(0), first.arguments(0), names, steps)
    trial = directions or Steering({site: torch.zeros(_width(lens, site)) for site in names}, family=lens.family.name)
    lens.cost(first.prompts(0), trial.op(steps=steps), **{"seed": 0, **first.arguments(0)})
    cells_of_batch = 2 + len(strengths) * (1 + draws)
    images = len(pairs) * len(seeds) * (1 + cells_of_batch)
    total = len(batches) * cells_of_batch
    with StudyCheckpoints("steering", settings, lens=lens, total=total, out=out, meant=meant, images=images) as cells:
        steered = SteeredImages(
            lens=lens, sites=names, steps=steps, first=min(meant["steps"]), judge=judge, attributes=attributes
        )
        clean = [cells.get(f"{batch.key}/clean", partial(steered.run_clean, batch)) for batch in batches]
        halves = [directions] * 2 if directions is not None else learn_directions(lens, clean, batches, names)
        for batch, cell in zip(batches, clean, strict=True):
            if cells.skips(cells_of_batch - 1):
                continue
            cells.get(f"{batch.key}/no-op", partial(steered.run_nothing, batch, cell))
            own = [halves[row % 2] for row in batch.rows]
            for strength in strengths:
                for draw in (None, *range(draws)):
                    name = "steering" if draw is None else f"random/{draw}"
                    run = partial(steered.run_steered, batch, cell, own, strength, draw)
                    cells.get(f"{batch.key}/{strength:g}/{name}", run)
        return cells.result()


def _read_scene(prompt: str) -> dict[str, str]:
    """What a toy's prompt asks for, by attribute."""
    return asdict(Scene.parse(prompt))


def _width(lens: DiTLens, site: str) -> int:
    return lens.anatomy.channels(lens.anatomy.site(site))


def _notes(table: pd.DataFrame, summary: pd.DataFrame, measures: Sequence[str]) -> list[str]:
    """What a reader must know: the noise floor, the doses, and which strengths do more than chance."""
    nothing = table[table["arm"] == "no-op"]
    floor = f"noise floor: an edit of no channel changes images by rmse {nothing['rmse'].max():g}"
    notes = [floor] if len(nothing) else []
    told = next((name for name in ("changed", "fidelity_to") if name in measures), "rmse")
    shown = format_summary(summary)
    column = f"{told}_steering_minus"
    if column not in summary and table["arm"].isin(["steering", "random"]).any():
        notes.append("there are no random directions to compare with, so a strength says nothing. Give draws=1 or more")
    if column in summary:
        for line, text in zip(summary.to_dict("records"), shown.to_dict("records"), strict=True):
            if line["arm"] == "random":
                p = line[f"{column}_p"]
                found = "undecided: p is not determined" if pd.isna(p) else f"p = {p:.2g} for all strengths together"
                count = f"over {line[f'{column}_n']} pairs of prompt and seed"
                said = f"{told} {text[column]} more than random {count}, {found}"
                said = f"{told} is not known of the same images as of random" if pd.isna(line[column]) else said
                notes.append(f"strength {line['strength']:g}: {said}")
    if "dose" in table:
        given = table.groupby(["strength", "arm"], sort=False)[["dose_intended", "dose"]].mean().dropna()
        notes += [
            f"strength {strength:g}: {arm} gave a dose of {dose:.3g} where {meant:.3g} was intended"
            for (strength, arm), meant, dose in find_off(given).itertuples(name=None)
        ]
    return notes
