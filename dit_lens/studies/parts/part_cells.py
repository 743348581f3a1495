"""The cells of ``carrier_or_detail``: a batch untouched, and with parts of channels removed or moved."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from dit_lens.analysis.metrics import rmse
from dit_lens.core.request.ops import Read
from dit_lens.studies.parts.ablations import pick_step
from dit_lens.studies.parts.channel_parts import (
    Part,
    Removal,
    make_ceiling,
    make_move,
    make_removal,
    predict_removal,
    weigh_move,
    weigh_removal,
)
from dit_lens.studies.parts.doses import group_sites, read_doses
from dit_lens.studies.parts.information import pool_tokens
from dit_lens.studies.shared.arms import Arm, average_scores, find_relevance, make_score_reads
from dit_lens.studies.shared.batches import share_call
from dit_lens.studies.shared.cells import Cell
from dit_lens.studies.shared.judges import Judge, ask_judge
from dit_lens.studies.shared.keys import ImageKey

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from dit_lens.core.request.ops import Pattern
    from dit_lens.core.runs.run import Run
    from dit_lens.lens import DiTLens
    from dit_lens.studies.shared.batches import PromptBatch

ALL = "all"  # the arm of everything that can be moved
ALONE = "all-sites"  # the arm of all channels of the study's sites, and nothing beside them
READABLE = 0.5  # of what a judge calls "readable"
# What the table has of the study itself; "readable" is the judge's, if it says so.
TAKEN = (
    "measure", "arm", "part", "draw", "prompt", "seed", "effect", "possible", "destroyed", "rmse", "source",
    "to_source", "dose_intended", "dose",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class EditStudy:
    """What every cell of one study shares.

    lens: lens on the model.
    site: sites whose channels are edited.
    sites: their names, in the model's order.
    score: reduction by which channels are ranked.
    ablation: what is left of channels that are removed.
    judge: what says how far an image shows a prompt.
    """

    lens: DiTLens
    site: Pattern
    sites: Sequence[str]
    score: str
    ablation: Removal
    judge: Judge

    def ask_judge(self, image: Image, prompt: str) -> dict[str, Any]:
        """How far an image shows a prompt, whether it is readable, and what else the judge says."""
        said = ask_judge(self.judge, image, prompt, TAKEN, need_fidelity=True)
        return {"readable": 1.0, **said}

    def run_clean(self, batch: PromptBatch) -> Cell:
        """The untouched images of a batch, the scores of their channels, and what doses are predicted from."""
        reads = [*make_score_reads(self.site, self.score), Read(self.site, reduce="mean", name="mean")]
        run = self.lens.run(batch.prompts, reads, seed=batch.seed, **batch.call)
        relevance = find_relevance(self.lens, self.score, batch.prompts, self.site, seed=batch.seed, call=batch.call)
        cell = Cell(arrays={**average_scores(run, relevance=relevance), "grid": np.array(run.grid)})
        squares = {site: rms.float().square() for site, rms in run["rms"].items()}
        for name, values in (("energy at first", squares), ("mean at first", run["mean"])):
            cell.arrays |= pick_step(name, values, 0, len(batch.prompts))
        cell.arrays |= {f"all/mean/{name}": value.float().numpy() for name, value in run["mean"].items()}
        for row, prompt, image in zip(batch.rows, batch.prompts, run.images, strict=True):
            cell.images[_name_untouched(row, batch)] = image
            measures = self.ask_judge(image, prompt)
            cell.lines.append(_line("untouched", Arm("untouched", 0), "whole", prompt, batch.seed, measures))
        return cell

    def read_values(self, batch: PromptBatch, arms: Sequence[Arm], steps: Sequence[int], sites: Sequence[str]) -> Cell:
        """The channels of every arm at the probed sites and steps, pooled over tokens: "arm/draw/site" -> array.

        batch: the prompts and their seed.
        arms: the arms.
        steps: denoising steps that are probed.
        sites: sites that are probed.
        """
        sets = {f"{arm.name}/{arm.draw}": arm.sets[0].restrict(sites) for arm in arms}
        reads = [Read(list(sites), channels=one, steps=steps, name=name) for name, one in sets.items()]
        run = self.lens.run(batch.prompts, reads, seed=batch.seed, **batch.call)
        return Cell(
            arrays={
                f"{name}/{site}": pool_tokens(value.float().numpy(), run.grid)
                for name in sets
                for site, value in run[name].items()
            }
        )

    def remove(self, batch: PromptBatch, clean: Cell, arm: Arm, part: Part, means: Mapping[str, Tensor]) -> Cell:
        """Removes a part of an arm's channels from every image of a batch.

        batch: the prompts and their seed.
        clean: cell of the untouched images.
        arm: the arm.
        part: "whole", "mean" or "residual".
        means: site -> [s, d], over all images of the study.
        """
        channels, anatomy = arm.sets[0], self.lens.anatomy
        op = make_removal(self.site, channels, part, self.ablation, means)
        ops = weigh_removal(op, self.sites, anatomy, range(len(batch.prompts)), 0)
        run = self.lens.run(batch.prompts, ops, seed=batch.seed, **batch.call)
        doses, images = read_doses(ops, run.receipt), run.images
        new = {site: (self.ablation == "mean") * mean[0].numpy() for site, mean in means.items()}
        cell, streams = Cell(), group_sites(self.sites, anatomy)
        for i, (row, prompt, before) in enumerate(zip(batch.rows, batch.prompts, clean.lines, strict=True)):
            judged = self.ask_judge(images[i], prompt)
            readable = _is_readable(judged)
            measures = {
                **judged,
                **_measure(before["fidelity"] - judged["fidelity"], before["fidelity"], _is_readable(before), readable),
                "rmse": float(rmse(clean.images[_name_untouched(row, batch)], images[i])),
                "dose_intended": predict_removal(clean.arrays, i, channels, streams, part, new),
                "dose": doses.get(i, np.nan),
            }
            cell.lines.append(_line("ablation", arm, part, prompt, batch.seed, measures))
            self._keep_image(cell, "ablation", arm, part, row, batch, images[i])
        return cell

    def move(self, batch: PromptBatch, clean: Cell, moves: Sequence[tuple[Arm, Part]]) -> list[Callable[[], Cell]]:
        """Moves parts of arms' channels from every image of a batch into the one before it: a function for each cell.

        The first of them that is called runs all moves in one batch, in which they share the untouched sources.

        batch: the prompts and their seed.
        clean: cell of the untouched images.
        moves: each an arm (without sets all channels are moved, and of "all" what modulates the final norm besides) and
          the part of its channels: "whole", "mean" or "residual".
        """
        run = cache(partial(self._run_moves, batch, moves))
        return [partial(self._read_move, batch, clean, moves, i, run) for i in range(len(moves))]

    def _run_moves(self, batch: PromptBatch, moves: Sequence[tuple[Arm, Part]]) -> tuple[Run, dict[int, float]]:
        """The run of all moves, targets of one after the other and then the sources; and the dose of every row."""
        n = len(batch.prompts)
        sources, ops = _list_sources(n), []
        for number, (arm, part) in enumerate(moves):
            channels = arm.sets[0] if arm.sets else None
            for row in range(n):
                rows = (number * n + row, len(moves) * n + row)
                edits = [make_move(self.site, channels, part, *rows)]
                if arm.name == ALL:
                    edits = make_ceiling(self.sites, self.lens.anatomy, *rows)
                ops += weigh_move(edits, self.sites, self.lens.anatomy, rows, 0, channels, part)
        order = [*range(n)] * len(moves) + sources
        prompts = [batch.prompts[row] for row in order]
        run = self.lens.run(prompts, ops, seed=batch.seed, **share_call(self.lens, batch, order))
        return run, read_doses(ops, run.receipt)

    def _read_move(
        self,
        batch: PromptBatch,
        clean: Cell,
        moves: Sequence[tuple[Arm, Part]],
        number: int,
        run: Callable[[], tuple[Run, dict[int, float]]],
    ) -> Cell:
        """The cell of one of the moves of a run."""
        n, (arm, part), (moved, doses) = len(batch.prompts), moves[number], run()
        sources, images = _list_sources(n), moved.images[number * n : (number + 1) * n]
        untouched = [clean.images[_name_untouched(row, batch)] for row in batch.rows]
        cell = Cell()
        for i, (row, prompt) in enumerate(zip(batch.rows, batch.prompts, strict=True)):
            source = batch.prompts[sources[i]]
            before, after = (self.ask_judge(image, source) for image in (untouched[i], images[i]))
            missing = 1 - before["fidelity"]
            readable = all(_is_readable(clean.lines[j]) for j in (i, sources[i]))
            measures = {
                **_measure(after["fidelity"] - before["fidelity"], missing, readable, _is_readable(after)),
                "readable": after["readable"],
                "fidelity": self.ask_judge(images[i], prompt)["fidelity"],
                "source": source,
                "rmse": float(rmse(untouched[i], images[i])),
                "to_source": float(rmse(untouched[sources[i]], images[i])),
                "dose_intended": 1.0,
                "dose": doses.get(number * n + i, np.nan),
            }
            cell.lines.append(_line("transport", arm, part, prompt, batch.seed, measures))
            self._keep_image(cell, "transport", arm, part, row, batch, images[i])
        return cell

    def _keep_image(
        self, cell: Cell, edit: str, arm: Arm, part: Part, row: int, batch: PromptBatch, image: Image
    ) -> None:
        if arm.draw == 0:
            cell.images[str(ImageKey(row, batch.seed, edit=edit, arm=arm.name, part=part))] = image


def _list_sources(n: int) -> list[int]:
    """For every image of a batch the one from which it is moved to."""
    return [(row + 1) % n for row in range(n)]


def _is_readable(measures: Mapping[str, Any]) -> bool:
    """Whether something can be recognised in an image; what the judge leaves open counts as not."""
    return bool((measures["readable"] or 0.0) >= READABLE)


def _measure(effect: float, possible: float, before: bool, after: bool) -> dict[str, float]:
    """What an edit did to an image: its effect if both images are readable, and whether it destroyed one that was.

    effect: share of the attributes that was lost or gained.
    possible: the most that this could be; where it is nothing, there is no effect.
    before, after: whether the image was readable, and is.
    """
    judged = before and possible > 0
    return {
        "effect": effect if judged and after else np.nan,
        "possible": possible if judged else np.nan,
        "destroyed": float(not after) if before else np.nan,
    }


def _name_untouched(row: int, batch: PromptBatch) -> str:
    return str(ImageKey(row, batch.seed, arm="untouched"))


def _line(measure: str, arm: Arm, part: str, prompt: str, seed: int, measures: Mapping[str, Any]) -> dict[str, Any]:
    where = {"measure": measure, "arm": arm.name, "part": part, "draw": arm.draw, "prompt": prompt, "seed": seed}
    return {**where, **measures}
