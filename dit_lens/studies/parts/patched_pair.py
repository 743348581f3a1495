"""A map of patches: what its cells swap, and the cells of one pair of prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dit_lens.analysis.clusters import segment
from dit_lens.core.request.ops import Branch, Op, Read
from dit_lens.errors import OpError
from dit_lens.instruments.gradients import (
    PairMetric,
    attribution,
    check_differentiable,
    check_latents,
    measure_rows,
    nearness,
)
from dit_lens.instruments.latents import check_autoencoder, decode_latents, read_latents
from dit_lens.studies.parts.patches import Patch, patch_groups, patch_heads, patch_regions, patch_steps
from dit_lens.studies.shared.arguments import check_k
from dit_lens.studies.shared.arms import (
    average_scores,
    check_arm_score,
    find_relevance,
    make_score_reads,
    select_top_channels,
)
from dit_lens.studies.shared.cells import Cell
from dit_lens.studies.shared.judges import Judge, ask_judge
from dit_lens.studies.shared.keys import ImageKey

if TYPE_CHECKING:
    from dit_lens.analysis.channels import ChannelSet
    from dit_lens.core.runs.run import Run
    from dit_lens.instruments.gradients import Through
    from dit_lens.lens import DiTLens
    from dit_lens.studies.shared.batches import StudyCall

ENDS = ("source", "target")


@dataclass(frozen=True, kw_only=True)
class PatchMap:
    """What is swapped, and how it is measured; the same for every pair.

    lens: lens on the model.
    over: what a cell of the map swaps.
    sites: sites that are swapped.
    steps: denoising steps at which they are swapped.
    branch: branch on which they are swapped.
    k: number of channels of a group.
    draws: number of random groups.
    score: reduction by which channels are ranked.
    tiles: number of tiles along each side of the grid.
    metric: what says how near final latents are to the source.
    judge: what says how far an image shows a prompt, if anything does.
    """

    lens: DiTLens
    over: str
    sites: tuple[str, ...]
    steps: tuple[int, ...]
    branch: Branch
    k: int
    draws: int
    score: str
    tiles: int
    metric: PairMetric
    judge: Judge | None

    @property
    def scored(self) -> list[str]:
        """The sites whose massive channels are needed: none for maps that do not ask for them."""
        if self.over == "block x channel group":
            return list(self.sites)
        return [self.lens.mask_site(None)] if self.over == "token region" else []

    def check(
        self, pair: tuple[str, str], grid: Sequence[int] | None, attribute: Sequence[str], call: Mapping[str, Any]
    ) -> None:
        """Raises what would go wrong, before anything runs.

        pair: source and target prompt.
        grid: token grid of the call, or None if it is not known.
        attribute: the attributions that are asked for.
        call: other arguments of the pipeline.
        """
        check_latents(self.lens)
        if attribute:
            check_differentiable(self.lens)
            if self.branch == "both":
                raise OpError("branch='both': attribution is of one branch. Choose it, or pass attribute=().")
        check_autoencoder(self.lens)
        if self.scored:
            check_k(self.lens, self.scored, [self.k])
            check_arm_score(self.lens, self.score, pair, self.scored, call)
        if self.over == "block x channel group" and self.draws < 1:
            raise OpError(f"draws={self.draws} leaves no random channels to compare with. Take 10 or more.")
        if self.over == "token region" and (grid is None or self.tiles > min(grid)):
            size = "is not known before it runs" if grid is None else f"is {' x '.join(map(str, grid))} tokens"
            raise OpError(f"tiles={self.tiles}: the grid of this call {size}. Pass height= and width=, or fewer tiles.")
        swaps: list[Op] = [patch.make_op(1, self.branch) for patch in self.list_patches(None, 0)]
        self.lens.cost(list(pair), [*swaps, *self.make_reads()], **call)

    def make_reads(self) -> list[Read]:
        """What the untouched run is read for."""
        if not self.scored:
            return []
        tokens = [Read(self.scored, steps=-1, rows=0, name="tokens")] if self.over == "token region" else []
        return [*make_score_reads(self.scored, self.score), *tokens]

    def list_patches(self, clean: Cell | None, seed: int) -> list[Patch]:
        """The cells of the map.

        clean: the cell of the untouched pair; without it the patches are as many, and empty.
        seed: seed of the random groups, of this pair alone.
        """
        if self.over == "block x step":
            return patch_steps(self.sites, self.steps)
        if self.over == "block x head":
            return patch_heads({site: self.lens.heads(site) for site in self.sites}, self.steps)
        if self.over == "token region":
            side = [self.tiles] * 2
            subject = np.zeros(side, bool) if clean is None else clean.arrays["subject"]
            return patch_regions(self.sites, self.steps, subject, self.tiles)
        top = None if clean is None else self.select_channels(clean)
        return patch_groups(top, self.sites, self.steps, self.draws, seed)

    def select_channels(self, clean: Cell) -> ChannelSet:
        """The source's massive channels, from its untouched run."""
        return select_top_channels(clean.arrays, self.k, self.score)[0]


@dataclass(frozen=True, kw_only=True)
class PatchedPair:
    """One pair of prompts, from one seed.

    map: the map of patches.
    number: number of the pair in the study.
    prompts: source and target prompt.
    seed: seed of the noise.
    rows: number of rows of every batch: the source, then targets.
    call: other arguments of the pipeline, for all pairs of the study.
    """

    map: PatchMap
    number: int
    prompts: tuple[str, str]
    seed: int
    rows: int
    call: StudyCall

    def run(self, ops: Sequence[Op], **how: Any) -> Run:
        """Runs a batch: the source, and its target in every other row.

        ops: reads and swaps.
        how: other arguments of the lens.
        """
        (source, target), targets = self.prompts, self.rows - 1
        call = self.call.of([2 * self.number, *[2 * self.number + 1] * targets])
        return self.map.lens.run(
            [source, *[target] * targets], ops, seed=self.seed, output_type="latent", **how, **call
        )

    @cached_property
    def untouched(self) -> Run:
        """The run from which every batch of patches starts."""
        return self.run(self.map.make_reads(), record=True)

    def run_clean(self) -> Cell:
        """The untouched pair: its latents, its images, and what the patches are made of."""
        patch_map, run = self.map, self.untouched
        latents = _final_latents(run)
        cell = Cell(arrays={"latents": latents[:2].numpy()})
        cell.arrays["ends"] = self._measure_ends(latents[:2])
        if patch_map.scored:
            cell.arrays |= average_scores(run, 1, self._find_relevance())
        if patch_map.over == "token region":
            (name,) = patch_map.scored
            tokens = run["tokens"][name][-1, 0].float().numpy()
            channels = list(patch_map.select_channels(cell)[name])
            cell.arrays["subject"] = segment(tokens[:, channels], run.grid).mask
            cell.masks[str(ImageKey(self.number, self.seed))] = cell.arrays["subject"]
        floor = np.abs(self._measure_effects(latents[1:], cell)).max()
        for end, image, effect in zip(ENDS, self._decode(run, [0, 1]), (1.0, floor), strict=True):
            cell.images[str(ImageKey(self.number, self.seed, arm=end))] = image
            cell.lines.append(self._line("untouched", end, 0, {"effect": effect, **self._ask_judge(image)}))
        return cell

    def _find_relevance(self) -> Mapping[str, Tensor] | None:
        """The scores of the source that no read has."""
        patch_map, (source, _) = self.map, self.prompts
        call = self.call.of([2 * self.number])
        return find_relevance(patch_map.lens, patch_map.score, [source], patch_map.scored, seed=self.seed, call=call)

    def attribute(self, through: Through, clean: Cell) -> Cell:
        """What swaps would do to the effect, to first order: "channels/site" -> [s, d], "tokens/site" -> [s, n].

        through: "run" or "step".
        clean: the cell of the untouched pair.
        """
        patch_map = self.map
        found = attribution(
            patch_map.lens,
            *self.prompts,
            patch_map.sites,
            metric=patch_map.metric if through == "run" else nearness,
            through=through,
            steps=patch_map.steps,
            branch=patch_map.branch,
            seed=self.seed,
            **self.call.of_pairs([self.number]),
        )
        parts = {"channels": found.channels, "tokens": found.tokens}
        scale = _metric_difference(clean) if through == "run" else 1.0
        return Cell(
            arrays={
                f"{part}/{site}": (value / scale).numpy()
                for part, values in parts.items()
                for site, value in values.items()
            }
        )

    def run_patches(self, some: Sequence[Patch], clean: Cell, shares: Mapping[str, Mapping[str, np.ndarray]]) -> Cell:
        """One batch: a patch in every row below the source; rows that are left over stay untouched.

        some: the patches.
        clean: the cell of the untouched pair.
        shares: attribution -> its arrays, from :meth:`attribute`.
        """
        patch_map, cell = self.map, Cell()
        swaps = [patch.make_op(i, patch_map.branch) for i, patch in enumerate(some, 1)]
        run = self.run(swaps, prefix=self.untouched)
        effects = self._measure_effects(_final_latents(run)[1 : 1 + len(some)], clean)
        extremes = {int(effects.argmin()), int(effects.argmax())}
        shown = sorted(extremes) if patch_map.judge is None else list(range(len(some)))
        images = dict(zip(shown, self._decode(run, [1 + i for i in shown]), strict=True))
        for i, (patch, effect) in enumerate(zip(some, effects, strict=True)):
            measures = {"effect": float(effect)}
            measures |= {
                f"attribution_{through}": patch.sum_attribution(share, patch_map.steps)
                for through, share in shares.items()
            }
            measures |= self._ask_judge(images[i]) if i in images else {}
            cell.lines.append(self._line(patch.row, patch.column, patch.draw, measures))
            if i in extremes:
                key = ImageKey(self.number, self.seed, row=patch.row, column=patch.column, draw=patch.draw)
                cell.images[str(key)] = images[i]
        return cell

    def _measure_ends(self, latents: Tensor) -> np.ndarray:
        """The metric of the untouched source and target; OpError if it does not tell them apart."""
        ends = measure_rows(self.map.metric, latents, latents[0], latents[1]).detach().double().numpy()
        if ends.shape != (2,) or not np.isfinite(ends).all() or ends[0] == ends[1]:
            raise OpError(
                f"metric= must give one number per row and tell the source from the target; it gave {ends.tolist()} "
                "for the two."
            )
        return ends

    def _measure_effects(self, latents: Tensor, clean: Cell) -> np.ndarray:
        """How far rows have come: 0 is the untouched target, 1 the source."""
        source, target = torch.from_numpy(clean.arrays["latents"])
        found = measure_rows(self.map.metric, latents, source, target).detach().double().numpy()
        return (found - clean.arrays["ends"][1]) / _metric_difference(clean)

    def _decode(self, run: Run, rows: Sequence[int]) -> list[Any]:
        lens = self.map.lens
        return decode_latents(lens, read_latents(lens, run.latents, run.grid)[list(rows)], run.grid)

    def _ask_judge(self, image: Any) -> dict[str, float]:
        """How far an image shows either prompt, if there is a judge."""
        found = {
            f"fidelity_{end}": ask_judge(self.map.judge, image, prompt, need_fidelity=True)
            for end, prompt in zip(ENDS, self.prompts, strict=True)
        }
        return {name: measures["fidelity"] for name, measures in found.items() if "fidelity" in measures}

    def _line(self, row: str | int, column: str | int, draw: int, measures: Mapping[str, Any]) -> dict[str, Any]:
        about = {"prompt": " -> ".join(self.prompts), "pair": self.number, "seed": self.seed}
        return {**about, "row": row, "column": column, "draw": draw, **measures}


def _metric_difference(clean: Cell) -> float:
    """How much larger the metric is at the source than at the target."""
    source, target = clean.arrays["ends"]
    return float(source - target)


def _final_latents(run: Run) -> Tensor:
    """Final latents; the study has checked that the pipeline returns them."""
    latents: Any = run.latents
    return latents.float()
