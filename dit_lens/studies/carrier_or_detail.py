"""The open question: do massive channels carry the prompt (arXiv 2605.13974), or tune detail (2510.11538)?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from dit_lens.analysis.channels import ChannelSet
from dit_lens.analysis.metrics import rmse
from dit_lens.core.request.ops import Apply, Op, Read, Swap, TokenMean, Zero
from dit_lens.errors import OpError, PromptError
from dit_lens.plots import carrier_or_detail_figure
from dit_lens.studies.parts.evidence import (
    PARTS,
    Thresholds,
    decide_verdict,
    weigh_decoding,
    weigh_edits,
    weigh_variance,
)
from dit_lens.studies.shared.arguments import as_prompts, as_seeds, check_draws, check_k, describe_k, find_meant
from dit_lens.studies.shared.arms import (
    Arm,
    add_controls,
    average_scores,
    count_arms,
    make_score_reads,
    select_common_channels,
)
from dit_lens.studies.shared.batches import PromptBatch, make_batches
from dit_lens.studies.shared.cells import Cell
from dit_lens.studies.shared.checkpoints import StudyCheckpoints
from dit_lens.studies.shared.judges import Judge, ask_judge, choose_judge, scene_judge
from dit_lens.studies.shared.keys import ImageKey
from dit_lens.studies.shared.registry import study
from dit_lens.studies.shared.result import Result
from dit_lens.toys.scenes import Scene

if TYPE_CHECKING:
    from PIL.Image import Image

    from dit_lens.core.request.ops import Pattern
    from dit_lens.lens import DiTLens

Attributes = Callable[[str], Mapping[str, str]]

PROBED_BLOCKS, PROBED_STEPS = 4, 4
EVIDENCE = ["measure", "part", "value", "value_low", "value_high", "control", "strongest control", "says", "n"]
# What the table has of the study itself.
COLUMNS = ("measure", "arm", "part", "draw", "prompt", "seed", "effect", "rmse", "source", "to_source")


def assemble(settings: Mapping[str, Any], cells: Sequence[Cell]) -> Result:
    """The evidence of the cells so far, and the verdict."""
    thresholds = Thresholds(**settings["thresholds"])
    table = pd.DataFrame([line for cell in cells for line in cell.lines])
    evidence: list[dict[str, Any]] = []
    for measure in ("ablation", "transport"):
        lines = table[table["measure"] == measure]
        if len(lines):
            evidence += [{"measure": measure, **one} for one in weigh_edits(lines, "effect", thresholds)]
    evidence += _weigh_information(settings, cells, thresholds)
    summary = pd.DataFrame(evidence, columns=EVIDENCE)
    ablated = table[(table["measure"] == "ablation") & (table["arm"] == "top")]
    changes = ablated.groupby("part")["rmse"].mean().to_dict() if len(ablated) else {}
    found = decide_verdict(summary, changes, thresholds)
    rows = pd.DataFrame([{"measure": "verdict", "part": part, "says": says} for part, says in found.items()])
    notes = [
        f"verdict: {found['overall']} (mean: {found['mean']}, residual: {found['residual']})",
        (
            f"rules: carrier from {thresholds.carrier:g} and above every control, detail up to {thresholds.detail:g}, "
            f"of edits that change the image by rmse {thresholds.change:g} or more"
        ),
        describe_k(settings["k"], settings["width"]),
    ]
    if len(settings["seeds"]) == 1:
        notes.append("variance was not measured: of one seed all that varies depends on the prompt")
    images = {name: image for cell in cells for name, image in cell.images.items()}
    summary = pd.concat([summary, rows], ignore_index=True)
    return Result("carrier_or_detail", table, summary, dict(settings), images, notes=notes)


@study(
    question="Carrier or detail knob?",
    assemble=assemble,
    figure=carrier_or_detail_figure,
)
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

    lens: lens on the model.
    prompts: two prompts or more, at least two in every batch.
    k: number of channels per site.
    seeds: seeds of the noise; every prompt is run with each.
    draws: number of random controls.
    score: reduction by which channels are ranked.
    site: sites whose channels are edited.
    thresholds: what counts as evidence.
    judge: function (image, prompt) -> {"fidelity": number in [0, 1], ...}; toys have one.
    attributes: function prompt -> {attribute: value}; toys have one.
    batch_size: number of prompts that run together; all by default.
    out: folder for finished cells, from which the same call continues.
    call: other arguments of the pipeline.

    Sources: arXiv 2605.13974, 2510.11538, 2607.02968.
    """
    prompts, seeds = as_prompts(prompts), as_seeds(seeds)
    check_k(lens, site, [k])
    check_draws(draws)
    batches = make_batches(prompts, seeds, batch_size)
    judge = _check_judge(choose_judge(lens, prompts, judge), batches)
    attributes_of = [_read_attributes(prompt, attributes, judge) for prompt in prompts]
    steps = _space_evenly(range(lens.outline(prompts[0], **call).steps), PROBED_STEPS)
    sites = _space_evenly(lens.sites(site), PROBED_BLOCKS)
    settings = {
        "prompts": prompts,
        "k": k,
        "seeds": seeds,
        "draws": draws,
        "score": score,
        "site": site,
        "thresholds": asdict(thresholds),
        "judge": judge,
        "attributes": attributes_of,
        "batch_size": batch_size,
        "call": call,
        "width": lens.anatomy.width,
        "probed": {"steps": steps, "sites": sites},
    }
    edit = EditStudy(lens=lens, site=site, score=score, judge=judge, call=call)
    total = len(batches) * 2 * (3 + count_arms(draws))
    meant = find_meant(lens, batches[0].prompts, call, site)
    with StudyCheckpoints("carrier_or_detail", settings, lens=lens, total=total, out=out, meant=meant) as cells:
        clean = [cells.get(f"{batch.key}/clean", partial(edit.run_clean, batch)) for batch in batches]
        common = select_common_channels([cell.arrays for cell in clean], k, score)
        edits = _list_edits(add_controls([common], draws, 0, ["all prompts"]))
        for batch, cell in zip(batches, clean, strict=True):
            cells.get(f"{batch.key}/values", partial(edit.read_values, batch, edits, steps, sites))
            for arm, part in edits:
                name = f"{arm.name}/{part}/{arm.draw}"
                cells.get(f"{batch.key}/ablation/{name}", partial(edit.ablate, batch, cell, arm, part))
                cells.get(f"{batch.key}/transport/{name}", partial(edit.transport, batch, cell, arm, part))
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


def _list_edits(arms: Sequence[Arm]) -> list[tuple[Arm, str]]:
    """The arm and the part of each edit: the massive channels in all parts, their controls as wholes."""
    return [(arm, part) for arm in arms for part in (PARTS if arm.name == "top" else PARTS[:1])]


@dataclass(frozen=True, kw_only=True)
class EditStudy:
    """What every cell of one study shares.

    lens: lens on the model.
    site: sites whose channels are edited.
    score: reduction by which channels are ranked.
    judge: what says how far an image shows a prompt.
    call: other arguments of the pipeline.
    """

    lens: DiTLens
    site: Pattern
    score: str
    judge: Judge
    call: Mapping[str, Any]

    def ask_judge(self, image: Image, prompt: str) -> dict[str, Any]:
        """How far an image shows a prompt, and what else the judge says."""
        return ask_judge(self.judge, image, prompt, COLUMNS, need_fidelity=True)

    def run_clean(self, batch: PromptBatch) -> Cell:
        """The untouched images of a batch, and the scores of their channels."""
        run = self.lens.run(batch.prompts, make_score_reads(self.site, self.score), seed=batch.seed, **self.call)
        cell = Cell(arrays={**average_scores(run), "grid": np.array(run.grid)})
        for row, prompt, image in zip(batch.rows, batch.prompts, run.images, strict=True):
            cell.images[_name_untouched(row, batch)] = image
            measures = self.ask_judge(image, prompt)
            cell.lines.append(_line("untouched", Arm("untouched", 0), "whole", prompt, batch.seed, measures))
        return cell

    def read_values(
        self, batch: PromptBatch, edits: Sequence[tuple[Arm, str]], steps: Sequence[int], sites: Sequence[str]
    ) -> Cell:
        """The channels of every arm at the probed sites and steps: "arm/site" -> [s, b, n, k].

        batch: the prompts and their seed.
        edits: arms and the parts that are edited.
        steps: denoising steps that are probed.
        sites: sites that are probed.
        """
        arms = {arm.name: arm.sets[0].restrict(sites) for arm, part in edits if part == "whole" and arm.draw == 0}
        reads = [Read(list(sites), channels=one, steps=steps, name=name) for name, one in arms.items()]
        run = self.lens.run(batch.prompts, reads, seed=batch.seed, **self.call)
        found = {f"{name}/{site}": value.float().numpy() for name in arms for site, value in run[name].items()}
        return Cell(arrays=found)

    def ablate(self, batch: PromptBatch, clean: Cell, arm: Arm, part: str) -> Cell:
        """Removes a part of an arm's channels from every image of a batch.

        batch: the prompts and their seed.
        clean: cell of the untouched images.
        arm: the arm.
        part: "whole", "mean" or "residual".
        """
        op: Op = Zero(self.site, channels=arm.sets[0])
        if part != "whole":
            op = TokenMean(self.site, channels=arm.sets[0], keep="residual" if part == "mean" else "mean")
        run = self.lens.run(batch.prompts, op, seed=batch.seed, **self.call)
        cell = Cell()
        for row, prompt, image, before in zip(batch.rows, batch.prompts, run.images, clean.lines, strict=True):
            measures = self.ask_judge(image, prompt)
            changed = float(rmse(clean.images[_name_untouched(row, batch)], image))
            measures |= {"effect": before["fidelity"] - measures["fidelity"], "rmse": changed}
            cell.lines.append(_line("ablation", arm, part, prompt, batch.seed, measures))
            if arm.draw == 0:
                key = ImageKey(row, batch.seed, edit="ablation", arm=arm.name, part=part)
                cell.images[str(key)] = image
        return cell

    def transport(self, batch: PromptBatch, clean: Cell, arm: Arm, part: str) -> Cell:
        """Moves a part of an arm's channels from every image of a batch into the one before it.

        batch: the prompts and their seed.
        clean: cell of the untouched images.
        arm: the arm.
        part: "whole", "mean" or "residual".
        """
        n = len(batch.prompts)
        sources = [(row + 1) % n for row in range(n)]
        prompts = [*batch.prompts, *(batch.prompts[row] for row in sources)]
        ops = [make_move(self.site, arm.sets[0], part, row, n + row) for row in range(n)]
        images = self.lens.run(prompts, ops, seed=batch.seed, **self.call).images
        untouched = [clean.images[_name_untouched(row, batch)] for row in batch.rows]
        cell = Cell()
        for i, (row, prompt) in enumerate(zip(batch.rows, batch.prompts, strict=True)):
            source = batch.prompts[sources[i]]
            before = self.ask_judge(untouched[i], source)["fidelity"]
            after = self.ask_judge(images[i], source)["fidelity"]
            measures = {
                "effect": (after - before) / (1 - before) if before < 1 else np.nan,
                "fidelity": self.ask_judge(images[i], prompt)["fidelity"],
                "source": source,
                "rmse": float(rmse(untouched[i], images[i])),
                "to_source": float(rmse(untouched[sources[i]], images[i])),
            }
            cell.lines.append(_line("transport", arm, part, prompt, batch.seed, measures))
            if arm.draw == 0:
                key = ImageKey(row, batch.seed, edit="transport", arm=arm.name, part=part)
                cell.images[str(key)] = images[i]
        return cell


def make_move(site: Pattern, channels: ChannelSet, part: str, target: int, source: int) -> Op:
    """The op that replaces a part of the target's channels by the source's, on the conditional branch.

    site: sites of the channels.
    channels: channels of every site.
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


def _name_untouched(row: int, batch: PromptBatch) -> str:
    return str(ImageKey(row, batch.seed, arm="untouched"))


def _line(measure: str, arm: Arm, part: str, prompt: str, seed: int, measures: Mapping[str, Any]) -> dict[str, Any]:
    where = {"measure": measure, "arm": arm.name, "part": part, "draw": arm.draw, "prompt": prompt, "seed": seed}
    return {**where, **measures}


def _weigh_information(
    settings: Mapping[str, Any], cells: Sequence[Cell], thresholds: Thresholds
) -> list[dict[str, Any]]:
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
        lines = weigh_decoding(values, attributes, same, grid, thresholds)
        found += [{"measure": "decoding", **line} for line in lines]
    if prompts > 1 and seeds > 1:  # of one seed all that varies depends on the prompt
        lines = weigh_variance(values, prompts, thresholds)
        found += [{"measure": "variance", "n": prompts * seeds, **line} for line in lines]
    return found
