"""The cells of a study of transport: a batch of pairs, untouched, under every arm, and as blends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from dit_lens.analysis.clusters import segment, to_grid
from dit_lens.analysis.metrics import rmse
from dit_lens.core.request.ops import Op, Read, Swap
from dit_lens.instruments.latents import read_latents
from dit_lens.studies.parts.blends import blend_images, blend_latents, blend_texts
from dit_lens.studies.parts.doses import group_sites, read_doses, weigh_way
from dit_lens.studies.parts.transport import PairBatch, Transport, keep_readout
from dit_lens.studies.parts.transport_levels import COLLAPSES, Levels, take_levels
from dit_lens.studies.parts.transport_measures import explained_share, measure_change
from dit_lens.studies.shared.arms import Arm, average_scores, find_relevance, make_score_reads
from dit_lens.studies.shared.batches import BatchRunner, skips_first_step
from dit_lens.studies.shared.cells import Cell
from dit_lens.studies.shared.checkpoints import StudyCheckpoints
from dit_lens.studies.shared.judges import ask_judge
from dit_lens.studies.shared.keys import ImageKey

if TYPE_CHECKING:
    from PIL.Image import Image

LATENTS = "all/latents/final"  # beside the scores among a cell's arrays
REDRAWN = "redrawn"


class Condition(NamedTuple):
    """Under what targets were drawn.

    k: number of channels; 0 for an arm without a k of its own.
    arm: the arm.
    masked: whether only tokens inside the mask were touched.
    strength: strength of the transport or blend.
    """

    k: int
    arm: Arm
    masked: bool
    strength: float


def run_transport(cells: StudyCheckpoints, transport: Transport, batches: Sequence[PairBatch]) -> None:
    """Makes all cells: the untouched pictures of all batches first, with which others are compared.

    cells: the finished cells of the study.
    transport: what is moved, and how.
    batches: the pairs.
    """
    made = [PairCells(transport=transport, batch=batch) for batch in batches]
    clean = [cells.get(f"{pairs.batch.key}/clean", pairs.run_clean) for pairs in made]
    levels = take_levels([cell.images for cell in clean], [batch.seed for batch in batches])
    for pairs, cell in zip(made, clean, strict=True):
        if cells.skips(transport.cells_per_batch - 1):
            continue
        _run_batch(cells, replace(pairs, clean=cell, levels=levels[pairs.batch.seed]))


def _run_batch(cells: StudyCheckpoints, pairs: PairCells) -> None:
    """Makes the cells of a batch whose untouched pictures there are."""
    transport, batch, clean = pairs.transport, pairs.batch, pairs.clean
    cells.get(f"{batch.key}/untouched", pairs.measure_untouched)
    outline = transport.lens.outline(list(batch.prompts), seed=batch.seed, **batch.call)
    pairs = replace(pairs, first=min(outline.select(transport.steps)))
    # Source rows that are made by ops of their own leave no step alone.
    late = not batch.ops and skips_first_step(transport.lens, batch, transport.steps)
    runner = BatchRunner(lens=transport.lens, late=late)
    ceiling = Condition(0, transport.ceiling, False, 1.0)
    cells.get(f"{batch.key}/ceiling", partial(pairs.run_arm, runner, ceiling))
    arms = list(transport.list_arms(clean.arrays, batch.seed, batch.labels))
    for k, arm in arms:
        for masked, strength in transport.conditions:
            make = partial(pairs.run_arm, runner, Condition(k, arm, masked, strength))
            cells.get(f"{batch.key}/{k}/{arm.name}/{arm.draw}/{masked}/{strength:g}", make)
    cells.get(f"{batch.key}/blends", pairs.blend)
    for strength in transport.strengths if transport.prompt_blend else ():
        cells.get(f"{batch.key}/prompt-blend/{strength:g}", partial(pairs.blend_prompts, strength))
    for k in transport.controlled if transport.early else ():
        make = partial(pairs.measure_direct_share, [arm for size, arm in arms if size == k], k)
        cells.get(f"{batch.key}/{k}/direct", make)


@dataclass(frozen=True, kw_only=True)
class PairCells:
    """Makes the cells of one batch.

    transport: what is moved, and how.
    batch: the pairs.
    clean: the cell of the untouched pairs; empty until it is made.
    levels: the pictures that others are compared with; None until those are made.
    first: the first step of a swap, at which its dose is weighed.
    """

    transport: Transport
    batch: PairBatch
    clean: Cell = field(default_factory=Cell)
    levels: Levels | None = None
    first: int = 0

    def run_clean(self) -> Cell:
        """Sources and targets without any transport: scores, masks, images and final latents."""
        transport, batch, lens, site = self.transport, self.batch, self.transport.lens, self.transport.mask_site
        scored = list(dict.fromkeys([*transport.sites, site]))
        reads = [*make_score_reads(scored, transport.score), Read(site, steps=-1, name="mask")]
        run = batch.run(lens, reads)
        relevance = find_relevance(
            lens, transport.score, batch.prompts, scored, seed=batch.seed, call=batch.call, beside=batch.ops
        )
        cell = Cell(arrays=average_scores(run, relevance=relevance))
        tokens = run["mask"][site][-1].float().numpy()  # [b, n, d]
        sets = transport.select_channels(cell.arrays, transport.ks[0])
        found = [segment(row[:, list(sets[i // 2][site])], run.grid).mask for i, row in enumerate(tokens)]
        final = batch.run(lens, output_type="latent")
        cell.arrays[LATENTS] = read_latents(lens, final.latents, run.grid).numpy()
        for i, number in enumerate(batch.numbers):
            for row, end in enumerate(("source", "target")):
                cell.images[str(ImageKey(number, batch.seed, arm=end))] = run.images[2 * i + row]
            mask = _choose_mask(transport.mask_from, found[2 * i], found[2 * i + 1])
            cell.masks[str(ImageKey(number, batch.seed))] = mask
        redrawn = blend_latents(lens, torch.from_numpy(cell.arrays[LATENTS]), run.grid, 0.0)
        cell.arrays[REDRAWN] = np.array([rmse(*pair) for pair in zip(redrawn, run.images[1::2], strict=True)])
        return cell

    def measure_untouched(self) -> Cell:
        """Targets as they are, and what stands in their place after a collapse."""
        batch, levels = self.batch, self.levels
        targets = [self.clean.images[str(ImageKey(number, batch.seed, arm="target"))] for number in batch.numbers]
        cell = self.measure(Condition(0, Arm("untouched", 0), False, 0.0), targets)
        for line, error in zip(cell.lines, self.clean.arrays[REDRAWN], strict=True):
            line["redrawn"] = float(error)
        shown = () if levels is None else zip(COLLAPSES, (levels.mean, levels.grey), strict=True)
        for name, picture in shown:
            condition = Condition(0, Arm(name, 0), False, max(self.transport.strengths))
            found = self.measure(condition, [picture] * len(targets))
            cell.lines += found.lines
            cell.images |= found.images
        return cell

    def run_arm(self, runner: BatchRunner, condition: Condition) -> Cell:
        """Targets under the swaps of an arm."""
        masks = self.masks if condition.masked else None
        swaps = self.transport.make_swaps(condition.arm, len(self.batch.numbers), masks, condition.strength)
        ops = [*self.batch.ops, *self._weigh(swaps, condition.arm, masks)]
        run = runner.run_edited(self.batch, ops)
        cell, doses = self.measure(condition, run.images[1::2]), read_doses(ops, run.receipt)
        for i, line in enumerate(cell.lines):
            line |= {"dose_intended": condition.strength, "dose": doses.get(2 * i + 1, np.nan)}
        return cell

    def _weigh(self, swaps: Sequence[Swap], arm: Arm, masks: Sequence[np.ndarray] | None) -> list[Op]:
        """The swaps of every pair, and the ops that weigh how much of the way to the source each goes."""
        ops: list[Op] = []
        for i, swap in enumerate(swaps):
            channels = arm.sets[i] if arm.sets else None
            edits: list[Op] = [swap]
            for sites in group_sites(list(channels or self.transport.sites), self.transport.lens.anatomy):
                mask = None if masks is None else masks[i]
                edits = weigh_way(edits, sites, (2 * i + 1, 2 * i), self.first, channels=channels, mask=mask)
            ops += edits
        return ops

    def blend(self) -> Cell:
        """The two images of every pair blended in pixels, and in latents."""
        masks = self.masks
        cell, latents = Cell(), torch.from_numpy(self.clean.arrays[LATENTS])
        kept = list(self.clean.images.values())
        for masked, strength in self.transport.conditions:
            inside = masks if masked else None
            pixels = [
                blend_images(source, target, strength, None if inside is None else inside[i])
                for i, (source, target) in enumerate(zip(kept[0::2], kept[1::2], strict=True))
            ]
            decoded = blend_latents(self.transport.lens, latents, masks[0].shape, strength, inside)
            for name, images in (("pixel-blend", pixels), ("latent-blend", decoded)):
                found = self.measure(Condition(0, Arm(name, 0), masked, strength), images)
                cell.lines += found.lines
                cell.images |= found.images
        return cell

    def blend_prompts(self, strength: float) -> Cell:
        """Targets drawn from embeddings between the two prompts'."""
        batch, lens = self.batch, self.transport.lens
        texts = blend_texts(lens.encode(list(batch.prompts), **batch.call), strength)
        run = batch.run(lens, **texts)
        return self.measure(Condition(0, Arm("prompt-blend", 0), False, strength), run.images[1::2])

    def measure_direct_share(self, arms: Sequence[Arm], k: int) -> Cell:
        """How much of what a transport changes in the prediction needs only the final norm and projection.

        Along the untouched target's own trajectory, at every step: the velocity with the channels swapped at all sites,
        against the velocity with the same channels swapped only where the final norm reads.

        arms: arms of this k; the first draw of top and of random are measured.
        k: number of channels.
        """
        batch, transport = self.batch, self.transport
        guided = len(transport.lens.outline(list(batch.prompts), seed=batch.seed, **batch.call).branches) > 1
        clean = batch.run(transport.lens, [Read("velocity", branch="both" if guided else "cond", name="clean")])
        still = clean["clean"].by_branch("velocity")["cond"][:, 1::2].float().numpy()
        strength = max(transport.strengths)

        def change(arm: Arm) -> np.ndarray:
            swaps = transport.make_swaps(arm, len(batch.numbers), None, strength)
            # The prediction is read, and then put back, so that the next step starts from the untouched trajectory.
            held = [Read("velocity", name="moved"), Swap("velocity", source=clean)]
            return batch.run(transport.lens, [*swaps, *held])["moved"]["velocity"][:, 1::2].float().numpy() - still

        cell = Cell()
        for arm in arms:
            if arm.name not in ("top", "random") or arm.draw:
                continue
            readout = replace(arm, sets=tuple(map(keep_readout, arm.sets)))
            whole, part = change(arm), change(readout)  # [s, pair, n, d]
            for i in range(len(batch.numbers)):
                about = self._describe(i, Condition(k, arm, False, strength))
                cell.lines.append({**about, "direct_share": explained_share(whole[:, i], part[:, i])})
        return cell

    def measure(self, condition: Condition, images: Sequence[Image]) -> Cell:
        """One row per pair: how far the target's image has come, and what it shows now.

        condition: under what the images were drawn.
        images: the targets' images, one per pair.
        """
        batch, judge = self.batch, self.transport.judge
        cell, (k, arm, masked, strength) = Cell(), condition
        for i, number in enumerate(batch.numbers):
            source, target = (
                self.clean.images[str(ImageKey(number, batch.seed, arm=end))] for end in ("source", "target")
            )
            inside, outside = measure_change(images[i], target, self.masks[i])
            caption = batch.captions[i]
            said = _ask(judge, images[i], caption) if caption else {}
            line = {
                **self._describe(i, condition),
                "to_source": float(rmse(images[i], source)),
                "to_target": float(rmse(images[i], target)),
                "inside": inside,
                "outside": outside,
                **({} if self.levels is None else self.levels.measure(images[i], number)),
                "fidelity_source": said.get("fidelity", np.nan),
                "fidelity_target": _ask(judge, images[i], batch.prompts[2 * i + 1]).get("fidelity", np.nan),
                "readable": said.get("readable", np.nan),
            }
            if arm.sets:
                line["energy_share"] = float(np.mean(list(arm.sets[i].energy_share().values())))
                line["distinct"] = len(set().union(*arm.sets[i].values()))
                line["matched"] = arm.sets[i].matched
            elif arm.name == "all":
                line |= {"energy_share": 1.0, "distinct": self.transport.width}
            cell.lines.append(line)
            if arm.draw == 0 and strength:
                part = "masked" if masked else "whole"
                key = ImageKey(number, batch.seed, k=k, arm=arm.name, part=part, strength=strength)
                cell.images[str(key)] = images[i]
        return cell

    @property
    def masks(self) -> list[np.ndarray]:
        """The mask of every pair, bool [h, w]."""
        return [self.clean.masks[str(ImageKey(number, self.batch.seed))] for number in self.batch.numbers]

    def _describe(self, i: int, condition: Condition) -> dict[str, Any]:
        """The columns that say which measurement a row is."""
        return {
            "prompt": self.batch.labels[i],
            "seed": self.batch.seed,
            "k": condition.k,
            "arm": condition.arm.name,
            "draw": condition.arm.draw,
            "masked": condition.masked,
            "strength": condition.strength,
        }


def _choose_mask(mask_from: Any, source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The tokens of a pair that a masked transport touches, bool [h, w]; the source's if there is none."""
    if mask_from is None or isinstance(mask_from, str):
        return {"target": target, "both": source | target}.get(mask_from, source)
    return to_grid(mask_from, source.shape)


def _ask(judge: Any, image: Image, prompt: str) -> dict[str, Any]:
    return ask_judge(judge, image, prompt, need_fidelity=True)
