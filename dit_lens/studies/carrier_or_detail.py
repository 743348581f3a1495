"""The open question: do massive channels carry the prompt (arXiv 2605.13974), or tune detail (2510.11538)?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from dit_lens.arguments.lists import as_prompts, as_seeds
from dit_lens.errors import OpError, PromptError, StoreError, check_choice
from dit_lens.plots import carrier_or_detail_figure
from dit_lens.studies.parts.ablations import average_means
from dit_lens.studies.parts.channel_parts import PARTS, Removal, modulates_end
from dit_lens.studies.parts.doses import AGREES, find_off
from dit_lens.studies.parts.evidence import (
    COLUMNS,
    DESTROYED,
    Tables,
    decide_verdicts,
    weigh_destruction,
    weigh_edits,
    weigh_information,
)
from dit_lens.studies.parts.information import Values
from dit_lens.studies.parts.part_cells import ALL, ALONE, EditStudy
from dit_lens.studies.parts.verdict import LEVEL, Thresholds
from dit_lens.studies.power import power
from dit_lens.studies.shared.arguments import check_draws, check_k, describe_k, find_meant
from dit_lens.studies.shared.arms import Arm, add_controls, check_arm_score, count_arms, select_common_channels
from dit_lens.studies.shared.batches import PromptBatch, divide_call, make_batches
from dit_lens.studies.shared.cells import Cell
from dit_lens.studies.shared.checkpoints import StudyCheckpoints
from dit_lens.studies.shared.judges import Attributes, Judge, choose_judge, scene_judge
from dit_lens.studies.shared.registry import study
from dit_lens.studies.shared.result import Result
from dit_lens.toys.scenes import Scene

if TYPE_CHECKING:
    from dit_lens.core.request.ops import Pattern
    from dit_lens.lens import DiTLens

LEAST_SPREAD = 1e-6  # below it all prompts are alike but for rounding
LEAST_DOSE = 1e-4  # share of the energy below which doses that differ are both none
PROBED_BLOCKS, PROBED_STEPS = 2, 2


def assemble(settings: Mapping[str, Any], cells: Sequence[Cell]) -> Result:
    """The evidence of the cells so far, and the verdict."""
    if "ablation" not in settings:
        raise StoreError(
            "this carrier_or_detail study was begun by an earlier release of dit_lens, which judged destroyed images "
            "with the others and did not move all channels: its cells do not give today's verdict. Run the study again "
            "in a new folder; a result that was saved with Result.save can still be loaded."
        )
    thresholds = Thresholds(**settings["thresholds"])
    table = pd.DataFrame([line for cell in cells for line in cell.lines])
    tables = Tables(table, settings["prompts"], settings["seeds"])
    evidence = weigh_edits(tables, thresholds)
    destroyed = weigh_destruction(tables, thresholds)
    informed = _weigh_information(settings, cells, thresholds)
    lines = [*decide_verdicts(evidence), *evidence, *destroyed, *informed]
    summary = pd.DataFrame(lines, columns=list(COLUMNS))
    images = {name: image for cell in cells for name, image in cell.images.items()}
    notes = _notes(settings, table, summary, thresholds)
    return Result("carrier_or_detail", table, summary, dict(settings), images, notes=notes)


@study(
    question="Carrier or detail knob?",
    assemble=assemble,
    figure=carrier_or_detail_figure,
    figure_options=lambda settings: {"bound": settings.get("thresholds", {}).get("bound", Thresholds().bound)},
)
def carrier_or_detail(
    lens: DiTLens,
    prompts: str | Sequence[str],
    *,
    k: int = 12,
    seeds: int | Sequence[int] = (0,),
    draws: int = 3,
    score: str = "|mean|",
    site: Pattern = "blocks.*.img",
    ablation: Removal = "mean",
    thresholds: Thresholds = Thresholds(),  # noqa: B008 frozen
    judge: Judge | None = None,
    attributes: Attributes | None = None,
    batch_size: int | None = None,
    out: str | Path | None = None,
    **call: Any,
) -> Result:
    """Asks whether prompts need the massive channels, and whether these channels move them: two answers, four verdicts.

    >>> from dit_lens import DiTLens
    >>> prompts = [
    ...     "a big red circle left on a plain blue background",
    ...     "a big white square right on a plain green background",
    ... ]
    >>> result = carrier_or_detail(DiTLens.toy(), prompts, k=4, draws=1, num_inference_steps=1)
    >>> result.summary[["measure", "part", "says"]].head(1).to_numpy().tolist()  # two prompts decide nothing
    [['verdict', 'overall', 'undecided']]

    Channels are one set for the study: the top k of each site by scores averaged over prompts, seeds and steps. A
    channel has two parts, its mean over the image tokens and the spatial residual around it; "whole" is both. Every
    part is compared with the same part of equally many others: bottom, random (``draws`` maps) and energy-matched (as
    many, but at most 3).

    - necessity: the share of a prompt's attributes that is lost when a part is removed from all sites;
    - sufficiency: what is gained of a source prompt's attributes when a part is moved from its image, under the same
      noise (conditional branch), into the next prompt's, as a share of what moving all channels of the sites gains.

    Either is answered **yes** where the share lies more than ``thresholds.bound`` beyond every control, **no** where it
    lies less than that beyond some control, and else **undecided**, by paired differences of the same prompt and seed
    with a p-value of at most 0.05 after Holm's correction over the controls. The verdict is "necessary and movable" (a
    carrier), "necessary, not movable", "movable, not necessary" or "neither", and "undecided" unless both answers are
    there. Nothing is said of sufficiency where all channels gain less than ``thresholds.ceiling`` of what is missing:
    with what modulates the final norm, through which the text of some models enters too, for either answer, and for a
    no without it.

    Attributes are judged in readable images only: those of which the judge says "readable" of 0.5 or more; of a judge
    that does not say it, all. Images that an edit destroys are counted apart, per arm; where it leaves less than
    ``thresholds.readable`` of them, nothing is said of their attributes.

    ``summary`` has the verdict first; then either question for every part, with the control that decides, the excess
    over it, its p-value and the share of readable images; the mean against the residual; the ceiling; the rates of
    destroyed images; and what is known of the prompt whether or not it is used: how well a linear decoder reads
    attributes of prompts it never saw (``decoding``; 0 is the guess of the commonest), and the share of variance that
    halves of the study have in common (``variance``; takes two seeds). ``table`` has every image; its ``dose`` is as in
    ``disruption`` for ablations, and how much of the way to the source a part is moved for transports.

    Take one seed, or three and more: two tell too little of others. ``studies.power(spread, difference=0.1)`` says how
    many prompts a spread takes; notes say it for the spread that was found.

    lens: lens on the model.
    prompts: two prompts or more, at least two in every batch.
    k: number of channels per site.
    seeds: seeds of the noise; every prompt is run with each.
    draws: number of random controls.
    score: reduction by which channels are ranked, or "relevance": how much the prediction depends on them.
    site: sites whose channels are edited.
    ablation: what is left of a channel that is removed: "mean", its mean over the study's images and their tokens at
      that step, so that only what differs is taken; or "zero", which also takes what is the same for every prompt.
    thresholds: what counts.
    judge: function (image, prompt) -> {"fidelity": number in [0, 1], "readable": 0 or 1, ...}; toys have one.
    attributes: function prompt -> {attribute: value}; toys have one.
    batch_size: number of prompts that run together, of moves with their sources four times as many; all by default.
    out: folder for finished cells, from which the same call continues.
    call: other arguments of the pipeline.

    Sources: arXiv 2605.13974, 2510.11538, 2607.02968; the rules: dit_lens.studies.parts.verdict.
    """
    prompts, seeds = as_prompts(prompts), as_seeds(seeds)
    check_k(lens, site, [k])
    check_draws(draws)
    check_choice(ablation, ("mean", "zero"), "ablation")
    batches = make_batches(prompts, seeds, batch_size, divide_call(lens, call, len(prompts)))
    check_arm_score(lens, score, batches[0].prompts, site, batches[0].call)
    judge = _check_judge(choose_judge(lens, prompts, judge), batches)
    attributes_of = [_read_attributes(prompt, attributes, judge) for prompt in prompts]
    steps = _space_evenly(range(lens.outline(batches[0].prompts, **batches[0].call).steps), PROBED_STEPS)
    sites = _space_evenly(lens.sites(site), PROBED_BLOCKS)
    settings = {
        "prompts": prompts,
        "k": k,
        "seeds": seeds,
        "draws": draws,
        "score": score,
        "site": site,
        "ablation": ablation,
        "thresholds": asdict(thresholds),
        "judge": judge,
        "attributes": attributes_of,
        "batch_size": batch_size,
        "call": call,
        "width": lens.anatomy.width,
        "probed": {"steps": steps, "sites": sites},
    }
    edit = EditStudy(lens=lens, site=site, sites=lens.sites(site), score=score, ablation=ablation, judge=judge)
    every = [ALL, ALONE] if modulates_end(lens.anatomy) else [ALL]
    total = len(batches) * (2 + len(every) + 2 * len(PARTS) * count_arms(draws))
    # Of each image 2 untouched, and the moves of an arm with one source beside them.
    each = 2 + (len(every) + 1) + (2 * len(PARTS) + 1) * count_arms(draws)
    meant = find_meant(lens, batches[0].prompts, batches[0].call, site)
    with StudyCheckpoints(
        "carrier_or_detail",
        settings,
        lens=lens,
        total=total,
        out=out,
        meant=meant,
        images=each * len(prompts) * len(seeds),
    ) as cells:
        clean = [cells.get(f"{batch.key}/clean", partial(edit.run_clean, batch)) for batch in batches]
        common = select_common_channels([cell.arrays for cell in clean], k, score)
        arms = add_controls([common], draws, 0, ["all prompts"])
        means = average_means(clean)
        for batch, cell in zip(batches, clean, strict=True):
            if cells.skips(total // len(batches) - 1):
                continue
            cells.get(f"{batch.key}/values", partial(edit.read_values, batch, arms, steps, sites))
            moves = edit.move(batch, cell, [(Arm(name, 0), "whole") for name in every])
            for name, make in zip(every, moves, strict=True):
                cells.get(f"{batch.key}/transport/{name}", make, group=f"{batch.key}/every")
            for arm in arms:
                moves = edit.move(batch, cell, [(arm, part) for part in PARTS])
                for part, make in zip(PARTS, moves, strict=True):
                    name = f"{arm.name}/{part}/{arm.draw}"
                    cells.get(f"{batch.key}/ablation/{name}", partial(edit.remove, batch, cell, arm, part, means))
                    cells.get(f"{batch.key}/transport/{name}", make, group=f"{batch.key}/{arm.name}/{arm.draw}")
        return cells.result()


def _check_judge(judge: Judge | None, batches: Sequence[PromptBatch]) -> Judge:
    """The judge, if there is one, and another prompt to move channels from in every batch."""
    if judge is None:
        raise OpError(
            "whether an image still shows its prompt must be judged: pass judge=, a function of image and prompt "
            'that returns {"fidelity": number from 0 to 1}.'
        )
    if any(len(batch.prompts) < 2 for batch in batches):
        raise PromptError(
            "channels are moved between prompts of one batch, and one batch has a single prompt. Pass more prompts, or "
            "another batch_size."
        )
    return judge


def _read_attributes(prompt: str, attributes: Attributes | None, judge: Judge | None) -> dict[str, str]:
    """What a prompt asks for, by attribute; empty if nothing says so."""
    if attributes is not None:
        return dict(attributes(prompt))
    return asdict(Scene.parse(prompt)) if judge is scene_judge else {}


def _space_evenly(items: Sequence[Any], n: int) -> list[Any]:
    """At most n of them, evenly spaced, the last included."""
    return [items[i] for i in sorted({round((j + 1) * len(items) / n) - 1 for j in range(n)} - {-1})]


def _weigh_information(
    settings: Mapping[str, Any], cells: Sequence[Cell], thresholds: Thresholds
) -> list[dict[str, Any]]:
    """Decoding and variance, of the images whose values are all there: batches of a seed one after the other."""
    kept = [cell.arrays for cell in cells if any(key.startswith("top/0/") for key in cell.arrays)]
    prompts, seeds = len(settings["prompts"]), len(settings["seeds"])
    if not kept or sum(next(iter(one.values())).shape[1] for one in kept) != prompts * seeds:
        return []
    found: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    for key in kept[0]:
        arm, draw, site = key.split("/", 2)
        found.setdefault(arm, {}).setdefault(draw, {})[site] = np.concatenate([one[key] for one in kept], 1)
    values: dict[str, list[Values]] = {arm: list(draws.values()) for arm, draws in found.items()}
    return list(weigh_information(values, settings["attributes"] * seeds, prompts, thresholds))


def _notes(
    settings: Mapping[str, Any], table: pd.DataFrame, summary: pd.DataFrame, thresholds: Thresholds
) -> list[str]:
    """What a reader must know: the verdict, its rules, its power, what was destroyed, and which doses were given."""
    verdicts = summary[summary["measure"] == "verdict"].set_index("part")
    overall = verdicts.loc["overall"]
    mean, residual = (verdicts.loc[part, "says"] for part in ("mean", "residual"))
    notes = [f"verdict: {overall['says']} ({overall['why']}); of the mean: {mean}, of the residual: {residual}"]
    sides = summary[summary["measure"].isin(["necessity", "sufficiency"]) & (summary["part"] == "whole")]
    notes += [f"{side}: {says}, as {why}" for side, says, why in sides[["measure", "says", "why"]].to_numpy()]
    notes.append(
        f"rules: yes is more than {thresholds.bound:g} beyond every control, no is less than that beyond one, each "
        f"with a corrected p of at most {LEVEL:g}; all channels have to gain {thresholds.ceiling:g} of what is missing"
    )
    notes += _describe_power(sides, len(settings["prompts"]), thresholds)
    notes += [line for name in DESTROYED.values() for line in _describe_destroyed(summary, name)]
    notes += _describe_doses(table)
    notes.append(describe_k(settings["k"], settings["width"]))
    seeds = len(settings["seeds"])
    if seeds == 1:
        notes.append("variance was not measured: of one seed all that varies depends on the prompt")
    if seeds == 2:
        notes.append("two seeds tell little of others, so intervals are wide: one, or three and more, decide more")
    return notes


def _describe_power(sides: pd.DataFrame, prompts: int, thresholds: Thresholds) -> list[str]:
    """Which excess so many prompts can tell from the bound, and how many it takes to tell none from it."""
    notes = []
    for side, spread in sides[["measure", "spread"]].dropna().to_numpy():
        if not spread > LEAST_SPREAD or prompts < 2:
            continue
        answer = power(float(spread), thresholds.bound, prompts=prompts, level=1 - LEVEL / 3).iloc[0]
        needs = "more than 100,000" if np.isnan(answer["needs"]) else f"{answer['needs']:,.0f}"
        notes.append(
            f"power of {side}: {prompts} prompts that differ by {spread:.2f} say yes to an excess of "
            f"{thresholds.bound + answer['decides']:.2f} with a chance of 80 %; to say no to an excess of 0 takes "
            f"{needs} of them"
        )
    return notes


def _describe_destroyed(summary: pd.DataFrame, name: str) -> list[str]:
    rows = summary[(summary["measure"] == name) & (summary["part"] == "whole")]
    rates = ", ".join(f"{arm} {rate:.0%}" for arm, rate in rows[["arm", "value"]].to_numpy())
    return [f"images {name}: {rates} (n = {rows['n'].max():.0f})"] if len(rows) else []


def _describe_doses(table: pd.DataFrame) -> list[str]:
    """Which edits gave another dose than they intended."""
    if "dose" not in table:
        return []
    edits = table[table["measure"].isin(["ablation", "transport"])]
    means = edits.groupby(["measure", "part", "arm"], sort=False)[["dose_intended", "dose"]].mean().dropna()
    off = find_off(means)
    off = off[(off["dose"] - off["dose_intended"]).abs() > LEAST_DOSE]
    notes = [
        f"{measure} of {arm} ({part}) gave a dose of {dose:.3g} where {meant:.3g} was intended"
        for (measure, part, arm), meant, dose in off.itertuples(name=None)
    ]
    return notes or [f"every edit gave the dose it intended, within {AGREES:.0%}"] * bool(len(means))
