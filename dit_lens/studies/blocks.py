"""Which block does what? Take each block out, or its attention or its MLP, and see what the image loses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from dit_lens.analysis.metrics import DISTANCES, Distance
from dit_lens.analysis.metrics.distances import distances as distances_of
from dit_lens.analysis.metrics.distances import measure_distances
from dit_lens.arguments.lists import as_prompts, as_seeds, as_tuple
from dit_lens.core.request.ops import Op, Zero
from dit_lens.errors import check_choice
from dit_lens.plots import blocks_figure
from dit_lens.studies.block_notes import describe_blocks
from dit_lens.studies.parts.ablations import average_means
from dit_lens.studies.parts.block_damage import UNJUDGED, summarise_damage
from dit_lens.studies.parts.block_pieces import NOISE, Part, Piece, find_pieces, read_means
from dit_lens.studies.parts.doses import read_doses
from dit_lens.studies.shared.arguments import check_draws, find_meant
from dit_lens.studies.shared.batches import BatchRunner, PromptBatch, divide_call, make_batches, skips_first_step
from dit_lens.studies.shared.cells import Cell
from dit_lens.studies.shared.checkpoints import StudyCheckpoints
from dit_lens.studies.shared.judges import Judge, ask_judge, choose_judge
from dit_lens.studies.shared.keys import ImageKey
from dit_lens.studies.shared.measures import check_measures
from dit_lens.studies.shared.registry import study
from dit_lens.studies.shared.result import Result
from dit_lens.studies.shared.streams import make_stream

if TYPE_CHECKING:
    from dit_lens.core.request.ops import Pattern, Steps
    from dit_lens.lens import DiTLens

Removed = Literal["skip", "mean"]
COLUMNS = ("prompt", "seed", "part", "block", "arm", "draw", "dose_intended", "dose")  # the study's own


def assemble(settings: Mapping[str, Any], cells: Sequence[Cell]) -> Result:
    """The result of the cells so far."""
    table = pd.DataFrame([line for cell in cells for line in cell.lines]).astype({"block": "Int64"})
    images = {name: image for cell in cells for name, image in cell.images.items()}
    # A psnr has no mean where some images are equal.
    measured = [name for name in settings["distances"] if name != "psnr" and name in table]
    clean = table[table["arm"] == "untouched"].dropna(axis="columns", how="all")
    judged = [name for name in clean if name not in COLUMNS]
    summary = summarise_damage(table, measured, judged, settings["ablation"])
    notes = describe_blocks(table, summary, measured, judged)
    return Result("blocks", table, summary, dict(settings), images, notes=notes)


@study(
    question="Which block does what?",
    assemble=assemble,
    figure=blocks_figure,
)
def blocks(
    lens: DiTLens,
    prompts: str | Sequence[str],
    *,
    parts: Part | Sequence[Part] = ("block", "attention", "mlp"),
    site: Pattern = "blocks.*.*",
    seeds: int | Sequence[int] = (0,),
    draws: int = 1,
    steps: Steps = None,
    ablation: Removed = "skip",
    distances: Sequence[str | Distance] = ("rmse",),
    judge: Judge | None = None,
    batch_size: int | None = None,
    out: str | Path | None = None,
    **call: Any,
) -> Result:
    """Takes every block out of the model, or one part of it, and measures what images lose, by attribute.

    >>> from dit_lens import DiTLens
    >>> result = blocks(
    ...     DiTLens.toy(),
    ...     "a big red circle left on a plain blue background",
    ...     parts="attention",
    ...     site="blocks[2:4].*",
    ...     num_inference_steps=1,
    ... )
    >>> result.summary.query("measure == 'colour'")[["part", "block", "n"]].to_numpy().tolist()
    [['attention', 2, 1], ['attention', 3, 1]]

    Parts are a whole "block" (all its streams among ``site``), its "img" or "txt" stream, its "attention", "cross"
    attention or "mlp" (what they give out before a gate; where one projection adds both up, what enters it), and every
    "head" of its attention (what it gives to the output projection; of many heads this takes long). Arms: no-op (an
    edit of no channel, which must change nothing); "skip" or "mean", where the part is gone; and its control, noise.

    Damage is the distance to the untouched image, or the loss of what the judge said of it: 1 where an attribute was
    right in all images and is in none. Taking a part out moves tokens, and any move does some damage. So there is

    - noise: the part stays, and every channel of every token is moved exactly as far as without the part, with a random
      sign (others for every token, step and image, so one draw says much);
    - the other blocks: the mean damage of all other blocks by the same part, on the same prompts and seeds;
    - of an attribute, the mean of all others that the judge gave of the same image: a destroyed image lost all.

    The summary has, for every part, measure and block, the damage, that under noise, and by how much the damage exceeds
    each control (``beyond_noise``, ``beyond_blocks``, ``beyond_attributes``), paired, with intervals and p-values that
    are corrected for the number of blocks and controls of that part and measure (Holm), not for the number of parts and
    measures. ``n`` counts the images of the damage, ``beyond_noise_n`` and so on those of each comparison.

    ``needed`` is, with p <= 0.05, "yes" where the damage lies beyond noise and the other blocks; "less than noise";
    "less than other blocks", which may still be more than noise (see ``beyond_noise``), so that the block does
    something, and others more; else "undecided", always so of one block alone or with ``draws=0``. ``specific`` is
    "yes" where an image loses more of the attribute than of others, "no" where it loses less, else "undecided"; None
    where an image has no others. ``spread`` is for ``studies.power``. "Needed" is said of this model as it is: what is
    lost without a block may be made elsewhere.

    ``dose`` is how much of what the part adds was moved, at the first edited step (conditional branch), averaged over
    streams: |moved|^2 / |added|^2, 1 for skip and its noise. ``dose_intended`` is missing for "mean".

    It draws 2 + pieces * (1 + draws) images for every prompt and seed, each a row of the table, and keeps those of
    "untouched" and without each part. Raises OpError, SiteError or PromptError before.

    lens: lens on the model.
    prompts: one prompt or several.
    parts: what is taken out of blocks.
    site: outputs of the blocks and streams that are tried.
    seeds: seeds of the noise; every prompt is run with each.
    draws: number of random controls of every piece.
    steps: denoising steps at which parts are out; all by default.
    ablation: what is left of a part: nothing ("skip"), or its mean over tokens and the study's own prompts and seeds at
      that step (conditional branch), "mean", so that only what differs from image to image and token to token is taken.
    distances: to the untouched image, names or functions of two images (see ``metrics.distances``), such as "lpips";
      rmse is always among them.
    judge: function (image, prompt) -> {name: number}, such as ``metrics.clip_judge``, larger where the image is better;
      toys read every attribute back by themselves.
    batch_size: number of prompts that run together; all by default.
    out: folder for finished cells, from which the same call continues.
    call: other arguments of the pipeline.

    Sources: layers that are skipped one by one: arXiv 2411.14430 (vital layers), 2601.02211.
    """
    prompts, seeds, parts = as_prompts(prompts), as_seeds(seeds), as_tuple(parts)
    check_draws(draws)
    check_choice(ablation, ("skip", "mean"), "ablation")
    judge, measures = choose_judge(lens, prompts, judge), distances_of(["rmse", *as_tuple(distances)])
    check_measures(measures, (*COLUMNS, *UNJUDGED), "distances=")
    pieces = find_pieces(lens, site, parts)
    settings = {
        "prompts": prompts,
        "parts": list(parts),
        "site": site,
        "seeds": seeds,
        "draws": draws,
        "steps": str(steps),
        "ablation": ablation,
        "distances": list(measures),
        "judge": judge,
        "batch_size": batch_size,
        "call": call,
    }
    if own := {name: distance for name, distance in measures.items() if distance is not DISTANCES.get(name)}:
        settings["functions"] = own  # their names alone do not tell whether they are still the same
    batches = make_batches(prompts, seeds, batch_size, divide_call(lens, call, len(prompts)))
    first_batch = batches[0]
    every = [op for piece in pieces for op in piece.ablate(steps, {})]
    lens.cost(list(first_batch.prompts), every, **{"seed": 0, **first_batch.call})  # which says what cannot be written
    meant = find_meant(lens, first_batch.prompts, first_batch.call, site, steps)
    each = 2 + len(pieces) * (1 + draws)
    images = len(prompts) * len(seeds) * each
    with StudyCheckpoints(
        "blocks", settings, lens=lens, total=len(batches) * each, out=out, meant=meant, images=images
    ) as cells:
        runner = BatchRunner(lens=lens, late=skips_first_step(lens, first_batch, steps))
        removal = Removal(
            runner=runner,
            distances=measures,
            judge=judge,
            ablation=ablation,
            steps=steps,
            first=min(meant["steps"]),
        )
        clean = [cells.get(f"{batch.key}/clean", partial(removal.run_clean, batch, pieces)) for batch in batches]
        means = average_means(clean) if ablation == "mean" else {}
        for batch, cell in zip(batches, clean, strict=True):
            if cells.skips(each - 1):
                continue
            cells.get(f"{batch.key}/no-op", partial(removal.run_nothing, batch, pieces[0], cell))
            for piece in pieces:
                where = f"{batch.key}/{piece.block}/{piece.part}"
                cells.get(f"{where}/{ablation}", partial(removal.run_without, batch, piece, cell, means))
                for draw in range(draws):
                    cells.get(f"{where}/{NOISE}/{draw}", partial(removal.run_noise, batch, piece, cell, means, draw))
        return cells.result()


@dataclass(frozen=True, kw_only=True)
class Removal:
    """Takes pieces out of batches, and measures their images.

    runner: what runs them.
    distances: name -> distance of two images.
    judge: what says how far an image shows its prompt, if anything does.
    ablation: "skip" or "mean".
    steps: denoising steps at which pieces are out.
    first: the first of them, at which doses are weighed.
    """

    runner: BatchRunner
    distances: Mapping[str, Distance]
    judge: Judge | None
    ablation: str
    steps: Steps
    first: int

    def run_clean(self, batch: PromptBatch, pieces: Sequence[Piece]) -> Cell:
        """The untouched images of a batch, and the means of what pieces add, where these are needed."""
        run = self.runner.run(batch, read_means(pieces) if self.ablation == "mean" else [])
        cell = Cell()
        if self.ablation == "mean":
            cell.arrays = {f"all/mean/{site}": value.float().numpy() for site, value in run["mean"].items()}
        for row, prompt, image in zip(batch.rows, batch.prompts, run.images, strict=True):
            cell.images[_name_image(row, batch, "untouched")] = image
            cell.lines.append(self._line(batch, prompt, "untouched", self._judge(image, prompt)))
        return cell

    def run_nothing(self, batch: PromptBatch, piece: Piece, clean: Cell) -> Cell:
        """The images under an edit of no channel."""
        edits = [Zero(site, channels=[], steps=self.steps) for site in piece.sites]
        return self._run(batch, edits, clean, "no-op", intended=0.0)

    def run_without(self, batch: PromptBatch, piece: Piece, clean: Cell, means: Mapping[str, Any]) -> Cell:
        """The images without a piece. means: what is left of it."""
        edits = piece.ablate(self.steps, means)
        for row in range(len(batch.prompts)):
            edits = piece.weigh(edits, row, self.first)
        return self._run(batch, edits, clean, self.ablation, intended=np.nan if means else 1.0, piece=piece)

    def run_noise(self, batch: PromptBatch, piece: Piece, clean: Cell, means: Mapping[str, Any], draw: int) -> Cell:
        """The images with noise as large as what taking a piece out would take."""
        edits: list[Op] = []
        for row, prompt in enumerate(batch.prompts):
            seeds = [make_stream(batch.seed, prompt, site, piece.part, draw) for site in piece.sites]
            edits += piece.weigh(piece.disturb(row, seeds, self.steps, means), row, self.first)
        return self._run(batch, edits, clean, NOISE, intended=np.nan if means else 1.0, piece=piece, draw=draw)

    def _run(
        self,
        batch: PromptBatch,
        edits: Sequence[Op],
        clean: Cell,
        arm: str,
        *,
        intended: float,
        piece: Piece | None = None,
        draw: int = 0,
    ) -> Cell:
        run = self.runner.run_edited(batch, edits)
        cell, images, doses = Cell(), run.images, read_doses(edits, run.receipt)
        for i, (row, prompt) in enumerate(zip(batch.rows, batch.prompts, strict=True)):
            before, after = clean.images[_name_image(row, batch, "untouched")], images[i]
            found: dict[str, Any] = dict(measure_distances(self.distances, before, after))
            found |= {"dose_intended": intended, "dose": doses.get(i, np.nan if piece else 0.0)}
            cell.lines.append(self._line(batch, prompt, arm, found | self._judge(after, prompt), piece, draw))
            if piece is not None and arm != NOISE:
                cell.images[_name_image(row, batch, arm, piece)] = after
        return cell

    def _judge(self, image: Any, prompt: str) -> dict[str, Any]:
        return ask_judge(self.judge, image, prompt, (*COLUMNS, *self.distances))

    @staticmethod
    def _line(
        batch: PromptBatch,
        prompt: str,
        arm: str,
        found: Mapping[str, Any],
        piece: Piece | None = None,
        draw: int = 0,
    ) -> dict[str, Any]:
        where = {"part": None, "block": None} if piece is None else {"part": piece.part, "block": piece.block}
        return {"prompt": prompt, "seed": batch.seed, **where, "arm": arm, "draw": draw, **found}


def _name_image(row: int, batch: PromptBatch, arm: str, piece: Piece | None = None) -> str:
    if piece is None:
        return str(ImageKey(row, batch.seed, arm=arm))
    return str(ImageKey(row, batch.seed, block=piece.block, arm=arm, part=piece.part))
