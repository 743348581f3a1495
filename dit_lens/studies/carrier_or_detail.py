"""The open question: do massive channels carry the prompt (arXiv 2605.13974), or tune detail (2510.11538)?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from dit_lens.analysis.channels import ChannelSet, top_channels
from dit_lens.analysis.metrics import rmse
from dit_lens.core.request.ops import Apply, Op, Read, Swap, TokenMean, Zero
from dit_lens.errors import OpError, PromptError
from dit_lens.studies.parts.evidence import (
    PARTS,
    Thresholds,
    decoding_evidence,
    edit_evidence,
    variance_evidence,
    verdict,
)
from dit_lens.studies.shared.arguments import as_prompts, as_seeds, check_k, share_of_width
from dit_lens.studies.shared.arms import Arm, control_arms, kept_scores, score_ops
from dit_lens.studies.shared.cells import Cell
from dit_lens.studies.shared.checkpoints import Cells
from dit_lens.studies.shared.drawing import Batch, batches
from dit_lens.studies.shared.judges import Judge, judge_for, judged, scene_judge
from dit_lens.studies.shared.result import Result

if TYPE_CHECKING:
    from PIL.Image import Image

    from dit_lens.core.request.ops import Pattern
    from dit_lens.lens import DiTLens

Attributes = Callable[[str], Mapping[str, str]]

PROBED_BLOCKS, PROBED_STEPS = 4, 4
COLUMNS = ["measure", "part", "value", "value_low", "value_high", "control", "strongest control", "says", "n"]


def carrier_or_detail(
    lens: DiTLens,
    prompts: str | Sequence[str],
    *,
    k: int = 12,
    seeds: int | Sequence[int] = (0, 1),
    draws: int = 3,
    score: str = "|mean|",
    site: Pattern = "blocks.*.img",
    thresholds: Thresholds = Thresholds(),  # noqa: B008 frozen
    judge: Judge | None = None,
    attributes: Attributes | None = None,
    batch_size: int | None = None,
    out: str | Path | None = None,
    **call: Any,
) -> Result:
    """Weighs four lines of evidence on the massive channels and on their two parts, and gives a verdict.

    >>> from dit_lens import DiTLens
    >>> prompts = [
    ...     "a big red circle left on a plain blue background",
    ...     "a big white square right on a plain green background",
    ... ]
    >>> result = carrier_or_detail(DiTLens.toy(), prompts, k=4, seeds=[0], draws=1, num_inference_steps=2)
    >>> result.summary.columns.tolist()[:3]
    ['measure', 'part', 'value']

    Channels are one set for the study: the top k of each site by scores averaged over prompts, seeds and steps. A
    channel has two parts, its mean over the image tokens and the spatial residual around it; "whole" is both.

    - ablation: the share of the prompt's attributes lost when a part is removed;
    - transport: the share of missing attributes of a source prompt gained when a part is moved from its image, under
      the same noise (conditional branch), into the next prompt's;
    - decoding: how well attributes of prompts never seen are read from a part by a linear decoder (0 is chance);
    - variance: the share of a part's variance, within a step, that depends on the prompt, alone or with the seed.
      It takes two seeds.

    Controls are equally many channels: bottom, random (``draws`` maps) and energy-matched. ``summary`` is the table of
    evidence, the rows "verdict" last: carrier, detail, both or undecided, by rules fixed beforehand (``thresholds``;
    dit_lens.studies.parts.evidence). Decoding needs prompts that share attributes; without them its lines are missing.

    judge: ``fn(image, prompt)`` with a "fidelity" in [0, 1]; attributes: ``fn(prompt) -> {attribute: value}``; toys
    know both. Two prompts at least in every batch. Sources: arXiv 2605.13974, 2510.11538, 2607.02968.
    """
    prompts, seeds = as_prompts(prompts), as_seeds(seeds)
    check_k(lens, site, [k])
    parts = batches(prompts, seeds, batch_size)
    judge = _checked(judge_for(lens, prompts, judge), parts)
    of_prompts = [_attributes_of(prompt, attributes, judge) for prompt in prompts]
    steps = _spread(range(lens.planned(prompts[0], **call)[0].steps), PROBED_STEPS)
    places = _spread(lens.sites(site), PROBED_BLOCKS)
    settings = {
        "prompts": prompts,
        "k": k,
        "seeds": seeds,
        "draws": draws,
        "score": score,
        "site": site,
        "thresholds": asdict(thresholds),
        "judge": judge,
        "attributes": of_prompts,
        "batch_size": batch_size,
        "call": call,
        "width": lens.anatomy.width,
        "probed": {"steps": steps, "sites": places},
    }
    arms = 6 + draws
    with Cells("carrier_or_detail", settings, lens=lens, total=len(parts) * (2 * arms), out=out) as cells:
        look = partial(_clean, lens, site=site, score=score, judge=judge, call=call)
        clean = [cells.get(f"{part.key}/clean", partial(look, part)) for part in parts]
        edits = _edits(control_arms([_aggregate(clean, k, score)], draws, 0))
        for part, cell in zip(parts, clean, strict=True):
            cells.get(f"{part.key}/values", partial(_values, lens, part, edits, steps, places, call))
            for arm, kept in edits:
                ablate = partial(_ablation, lens, part, cell, arm, kept, site, judge, call)
                cells.get(f"{part.key}/ablation/{arm.name}/{kept}/{arm.draw}", ablate)
                move = partial(_transport, lens, part, cell, arm, kept, site, judge, call)
                cells.get(f"{part.key}/transport/{arm.name}/{kept}/{arm.draw}", move)
        return cells.result()


def _checked(judge: Judge | None, parts: Sequence[Batch]) -> Judge:
    """The judge, where there is one, and another prompt to move channels from in every batch."""
    if judge is None:
        raise OpError(
            "whether an image still shows its prompt must be judged: pass judge=, a function of image and prompt "
            'that returns {"fidelity": number from 0 to 1}.'
        )
    if any(len(part.prompts) < 2 for part in parts):
        raise PromptError(
            "channels are moved between prompts of one batch, and one batch has a single prompt. Pass more prompts, or "
            "another batch_size."
        )
    return judge


def _attributes_of(prompt: str, attributes: Attributes | None, judge: Judge | None) -> dict[str, str]:
    """What a prompt asks for, by attribute; nothing where nobody knows."""
    from dit_lens.toys.scenes import Scene

    if attributes is not None:
        return dict(attributes(prompt))
    return dict(vars(Scene.parse(prompt))) if judge is scene_judge else {}


def _spread(items: Sequence[Any], n: int) -> list[Any]:
    """At most n of them, evenly spaced, the last included."""
    return [items[i] for i in sorted({round((j + 1) * len(items) / n) - 1 for j in range(n)} - {-1})]


def _clean(lens: DiTLens, part: Batch, *, site: Pattern, score: str, judge: Judge, call: Mapping[str, Any]) -> Cell:
    run = lens.run(part.prompts, score_ops(site, score), seed=part.seed, **call)
    cell = Cell(arrays={**kept_scores(run), "grid": np.array(run.grid)})
    for row, prompt, image in zip(part.rows, part.prompts, run.images, strict=True):
        cell.images[f"{row}/{part.seed}/untouched"] = image
        cell.lines.append(
            _line("untouched", Arm("untouched", 0), "whole", prompt, part.seed, judged(judge, image, prompt))
        )
    return cell


def _aggregate(clean: Sequence[Cell], k: int, score: str) -> ChannelSet:
    """The top k of the scores averaged over everything the study draws."""
    sums: dict[str, dict[str, list[np.ndarray]]] = {"score": {}, "energy": {}}
    for cell in clean:
        for key, value in cell.arrays.items():
            if key != "grid":
                _, name, site = key.split("/", 2)
                sums[name].setdefault(site, []).append(value)
    scores, energy = (
        {site: torch.from_numpy(np.mean(found, 0)) for site, found in sums[name].items()}
        for name in ("score", "energy")
    )
    return top_channels(scores, energy, k, score)


def _edits(arms: Sequence[Arm]) -> list[tuple[Arm, str]]:
    """The arm and the part that each edit concerns: the massive channels in all parts, their controls as wholes."""
    return [(arm, part) for arm in arms for part in (PARTS if arm.name == "top" else PARTS[:1])]


def _values(
    lens: DiTLens,
    part: Batch,
    edits: Sequence[tuple[Arm, str]],
    steps: Sequence[int],
    places: Sequence[str],
    call: Mapping[str, Any],
) -> Cell:
    """The channels of every arm at the probed sites and steps, [s, b, n, k]."""
    arms = {arm.name: arm.sets[0].restrict(places) for arm, kept in edits if kept == "whole" and arm.draw == 0}
    reads = [Read(list(places), channels=one, steps=steps, name=name) for name, one in arms.items()]
    run = lens.run(part.prompts, reads, seed=part.seed, **call)
    found = {f"{name}/{site}": value.float().numpy() for name in arms for site, value in run[name].items()}
    return Cell(arrays=found)


def _ablation(
    lens: DiTLens,
    part: Batch,
    clean: Cell,
    arm: Arm,
    kept: str,
    site: Pattern,
    judge: Judge,
    call: Mapping[str, Any],
) -> Cell:
    op: Op = Zero(site, channels=arm.sets[0])
    if kept != "whole":
        op = TokenMean(site, channels=arm.sets[0], keep="residual" if kept == "mean" else "mean")
    run = lens.run(part.prompts, op, seed=part.seed, **call)
    cell = Cell()
    for row, prompt, image, before in zip(part.rows, part.prompts, run.images, clean.lines, strict=True):
        says = judged(judge, image, prompt)
        changed = float(rmse(clean.images[f"{row}/{part.seed}/untouched"], image))
        effect = {"effect": before["fidelity"] - says["fidelity"], "rmse": changed}
        cell.lines.append(_line("ablation", arm, kept, prompt, part.seed, {**says, **effect}))
        if arm.draw == 0:
            cell.images[f"{row}/{part.seed}/ablation/{arm.name}/{kept}"] = image
    return cell


def _transport(
    lens: DiTLens,
    part: Batch,
    clean: Cell,
    arm: Arm,
    kept: str,
    site: Pattern,
    judge: Judge,
    call: Mapping[str, Any],
) -> Cell:
    n = len(part.prompts)
    sources = [(row + 1) % n for row in range(n)]
    prompts = [*part.prompts, *(part.prompts[row] for row in sources)]
    ops = [_move(site, arm.sets[0], kept, row, n + row) for row in range(n)]
    images = lens.run(prompts, ops, seed=part.seed, **call).images
    untouched: list[Image] = [clean.images[f"{row}/{part.seed}/untouched"] for row in part.rows]
    cell = Cell()
    for i, (row, prompt) in enumerate(zip(part.rows, part.prompts, strict=True)):
        source = part.prompts[sources[i]]
        before = judged(judge, untouched[i], source)["fidelity"]
        after = judged(judge, images[i], source)["fidelity"]
        measures = {
            "effect": (after - before) / (1 - before) if before < 1 else np.nan,
            "fidelity": judged(judge, images[i], prompt)["fidelity"],
            "source": source,
            "rmse": float(rmse(untouched[i], images[i])),
            "to_source": float(rmse(untouched[sources[i]], images[i])),
        }
        cell.lines.append(_line("transport", arm, kept, prompt, part.seed, measures))
        if arm.draw == 0:
            cell.images[f"{row}/{part.seed}/transport/{arm.name}/{kept}"] = images[i]
    return cell


def _move(site: Pattern, channels: ChannelSet, kept: str, target: int, source: int) -> Op:
    """Puts a part of the source's channels in the place of the target's, on the conditional branch."""
    if kept == "whole":
        return Swap(site, channels=channels, rows=target, source=f"row:{source}", branch="cond")

    def exchange(x: Tensor, _: Any) -> Tensor:
        mean = x.mean(1, keepdim=True, dtype=torch.float32).to(x.dtype)
        x[0] = x[0] - mean[0] + mean[1] if kept == "mean" else mean[0] + x[1] - mean[1]
        return x

    return Apply(site, channels=channels, rows=[target, source], fn=exchange, branch="cond")


def _line(measure: str, arm: Arm, kept: str, prompt: str, seed: int, measures: Mapping[str, Any]) -> dict[str, Any]:
    where = {"measure": measure, "arm": arm.name, "part": kept, "draw": arm.draw, "prompt": prompt, "seed": seed}
    return {**where, **measures}


def assemble(settings: Mapping[str, Any], cells: Sequence[Cell]) -> Result:
    """The evidence of the cells so far, and the verdict."""
    thresholds = Thresholds(**settings["thresholds"])
    table = pd.DataFrame([line for cell in cells for line in cell.lines])
    evidence: list[dict[str, Any]] = []
    for measure in ("ablation", "transport"):
        lines = table[table["measure"] == measure]
        if len(lines):
            found = edit_evidence(lines, "effect", thresholds)
            evidence += [{"measure": measure, **one} for one in found]
    evidence += _information(settings, cells, thresholds)
    summary = pd.DataFrame(evidence, columns=COLUMNS)
    ablated = table[(table["measure"] == "ablation") & (table["arm"] == "top")]
    changes = ablated.groupby("part")["rmse"].mean().to_dict() if len(ablated) else {}
    found = verdict(summary, changes, thresholds)
    rows = pd.DataFrame([{"measure": "verdict", "part": part, "says": says} for part, says in found.items()])
    notes = [
        f"verdict: {found['overall']} (mean: {found['mean']}, residual: {found['residual']})",
        (
            f"rules: carrier from {thresholds.carrier:g} and above every control, detail up to {thresholds.detail:g}, "
            f"of edits that change the image by rmse {thresholds.change:g} or more"
        ),
        share_of_width(settings["k"], settings["width"]),
    ]
    if len(settings["seeds"]) == 1:
        notes.append("variance was not measured: of one seed all that varies depends on the prompt")
    images = {name: image for cell in cells for name, image in cell.images.items()}
    return Result(
        "carrier_or_detail", table, pd.concat([summary, rows], ignore_index=True), dict(settings), images, notes=notes
    )


def _information(settings: Mapping[str, Any], cells: Sequence[Cell], thresholds: Thresholds) -> list[dict[str, Any]]:
    """Decoding and variance, of the images whose values are all there: batches of a seed one after the other."""
    kept = [cell.arrays for cell in cells if any(key.startswith("top/") for key in cell.arrays)]
    prompts, seeds = len(settings["prompts"]), len(settings["seeds"])
    if not kept or sum(next(iter(one.values())).shape[1] for one in kept) != prompts * seeds:
        return []
    values: dict[str, dict[str, np.ndarray]] = {}
    for key in kept[0]:
        arm, site = key.split("/", 1)
        values.setdefault(arm, {})[site] = np.concatenate([one[key] for one in kept], 1)
    grid = next(tuple(cell.arrays["grid"].tolist()) for cell in cells if "grid" in cell.arrays)
    found = []
    if settings["attributes"][0]:
        numbers = list(range(prompts)) * seeds
        attributes = [settings["attributes"][i] for i in numbers]
        same = [settings["prompts"].index(settings["prompts"][i]) for i in numbers]  # a prompt given twice is one
        lines = decoding_evidence(values, attributes, same, grid, thresholds)
        found += [{"measure": "decoding", **line} for line in lines]
    if prompts > 1 and seeds > 1:  # of one seed all that varies depends on the prompt
        lines = variance_evidence(values, prompts, thresholds)
        found += [{"measure": "variance", "n": prompts * seeds, **line} for line in lines]
    return found
