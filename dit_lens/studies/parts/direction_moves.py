"""Directions of one image moved into another, in lockstep: the transports of ``studies.basis``, and their worth.

Every image's directions go into the image of the next prompt of its batch, under the same noise. The batch has its
prompts twice: the first rows are the targets, the rows below the untouched sources.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from dit_lens.analysis.metrics import rmse
from dit_lens.core.request.ops import Apply, Op, Swap
from dit_lens.studies.parts.channel_parts import FINAL_MODULATION, modulates_end
from dit_lens.studies.parts.direction_arms import DirectionArm
from dit_lens.studies.parts.transport_levels import COLLAPSES, REFERENCES, Levels, add_shares, find_levels
from dit_lens.studies.shared.cells import Cell
from dit_lens.studies.shared.judges import Judge, ask_judge
from dit_lens.studies.shared.keys import ImageKey

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from dit_lens.core.request.ops import Pattern, Steps
    from dit_lens.studies.parts.directions import Basis
    from dit_lens.studies.shared.batches import BatchRunner, PromptBatch

CEILING, WHOLE = DirectionArm("ceiling"), "whole"
KEYS = ["prompt", "seed", "arm", "draw", "level"]
# What a moved image is measured by, on average over images.
MEASURES = ("to_source", "to_target", "to_others", "to_mean", "to_grey", "specificity", "share", "fidelity_gain")
COLUMNS = ("target", "energy_held", *MEASURES, "fidelity_source", "fidelity_target", "moved_readable")


@dataclass(frozen=True, kw_only=True)
class DirectionMoves:
    """Moves directions between the images of a batch.

    runner: what runs a batch with its prompts twice.
    site: sites of the directions.
    steps: denoising steps at which they are moved.
    judge: what says how far an image shows a prompt, if anything does.
    levels: seed -> the pictures that others are compared with.
    """

    runner: BatchRunner
    site: Pattern
    steps: Steps
    judge: Judge | None
    levels: Mapping[int, Levels]

    def run_ceiling(self, batch: PromptBatch, clean: Cell) -> Cell:
        """All there is to move; and, without a run, the untouched targets and what a collapse would look like."""
        n, lens = len(batch.prompts), self.runner.lens
        beside = [FINAL_MODULATION] if modulates_end(lens.anatomy) else []
        sites = [*dict.fromkeys([*lens.sites(self.site), *beside])]
        ops = [
            Swap(sites, source=f"row:{n + i}", rows=target, steps=self.steps, branch="cond")
            for i, target in enumerate(_list_targets(n))
        ]
        images = self.runner.run_edited(batch, ops).images
        cell = self._measure(batch, clean, CEILING, images[:n], [1.0] * n)
        cell.lines += self._measure(batch, clean, DirectionArm("untouched"), _untouched(batch, clean), [0.0] * n).lines
        levels = self.levels[batch.seed]
        for name, picture in zip(COLLAPSES, (levels.mean, levels.grey), strict=True):
            cell.lines += self._measure(batch, clean, DirectionArm(name), [picture] * n, [np.nan] * n).lines
        return cell

    def run_arm(self, batch: PromptBatch, clean: Cell, arm: DirectionArm, bases: Sequence[Mapping[str, Basis]]) -> Cell:
        """The images of a batch into which an arm's directions of the image before were moved.

        batch: the prompts and their seed.
        clean: cell of the untouched images.
        arm: the arm.
        bases: for every image its directions: site -> basis; none where it moves none.
        """
        n = len(batch.prompts)
        ops = [
            op for i, target in enumerate(_list_targets(n)) for op in make_move_ops(bases[i], target, n + i, self.steps)
        ]
        images = self.runner.run_edited(batch, ops).images
        held = [np.mean([float(one.held.sum()) for one in some.values()]) if some else np.nan for some in bases]
        return self._measure(batch, clean, arm, images[:n], held)

    def _measure(
        self, batch: PromptBatch, clean: Cell, arm: DirectionArm, images: Sequence[Image], held: Sequence[float]
    ) -> Cell:
        """One line for every source. images: of the targets. held: share of the source's energy that is moved."""
        cell, before = Cell(), _untouched(batch, clean)
        for i, target in enumerate(_list_targets(len(batch.prompts))):
            if arm.name not in ("untouched", *COLLAPSES) and np.isnan(held[i]):
                continue
            image, number = images[target], batch.rows[i]
            said, other = (self._ask(image, batch.prompts[end]) for end in (i, target))
            about = {"prompt": batch.prompts[i], "seed": batch.seed, "arm": arm.name, "draw": arm.draw}
            cell.lines.append(
                {
                    **about,
                    "level": arm.label,
                    "target": batch.prompts[target],
                    "energy_held": held[i],
                    "to_source": float(rmse(image, before[i])),
                    "to_target": float(rmse(image, before[target])),
                    **self.levels[batch.seed].measure(image, number),
                    "fidelity_source": said.get("fidelity", np.nan),
                    "fidelity_target": other.get("fidelity", np.nan),
                    "readable": said.get("readable", np.nan),
                }
            )
            if arm.name not in ("untouched", *COLLAPSES):
                key = ImageKey(number, batch.seed, edit="transport", arm=arm.name, part=arm.label or WHOLE)
                cell.images[str(key)] = image
        return cell

    def _ask(self, image: Image, prompt: str) -> dict[str, Any]:
        return ask_judge(self.judge, image, prompt)


def count_images(images: int, arms: Sequence[DirectionArm], *, moves: bool) -> int:
    """How many images a study draws at most, those that are drawn for their tokens alone among them.

    >>> count_images(8, [DirectionArm("no-op"), DirectionArm("top", level=0.5)], moves=True)
    56

    images: prompts times seeds.
    arms: all arms; relevant channels take a gradient run, too.
    moves: whether directions are moved too: then every image has its source drawn beside it, and there is a ceiling.
    """
    relevance = any(arm.name == "relevant" for arm in arms)
    return images * (1 + relevance + len(arms) + 2 * moves * (1 + len(list_moved(arms))))


def list_moved(arms: Sequence[DirectionArm]) -> list[DirectionArm]:
    """The arms that are moved as well: all but the later draws of random ones, and but the one without directions."""
    return [arm for arm in arms if arm.draw == 0 and arm.name != "no-op"]


def make_move_ops(bases: Mapping[str, Basis], target: int, source: int, steps: Steps) -> list[Op]:
    """The ops that move what a source has along directions into a target, on the conditional branch.

    bases: site -> the directions.
    target, source: rows of the batch.
    steps: denoising steps.
    """
    ops: list[Op] = []
    for site, basis in bases.items():
        if basis.vectors is None:
            channels = basis.order.tolist()
            ops.append(Swap(site, channels=channels, rows=target, source=f"row:{source}", steps=steps, branch="cond"))
        else:
            fn = _make_move(basis.vectors[..., basis.order])
            ops.append(Apply(site, rows=[target, source], steps=steps, branch="cond", fn=fn))
    return ops


def move(target: Tensor, source: Tensor, vectors: Tensor) -> Tensor:
    """The target with the source's coefficients along directions.

    >>> import torch
    >>> move(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 9.0]]), torch.tensor([[0.0], [1.0]]))
    tensor([[3., 9.]])

    target, source: [token, channel].
    vectors: [d, m], orthonormal.
    """
    vectors, old = vectors.to(target.device), target.float()
    return (old + (source.float() - old) @ vectors @ vectors.T).to(target.dtype)


def _make_move(vectors: Tensor) -> Any:
    """A function for ``Apply`` at target and source: :func:`move`, with the directions of the step."""

    def fn(x: Tensor, hook: Any) -> Tensor:
        x[0] = move(x[0], x[1], vectors if vectors.ndim == 2 else vectors[hook.step])
        return x

    return fn


def compare_sources(clean: Sequence[Cell], batches: Sequence[PromptBatch]) -> dict[int, Levels]:
    """The levels of every seed, from the untouched images of all batches.

    clean: the cells of the untouched images.
    batches: the prompts of each.
    """
    found: dict[int, dict[str, Image]] = {}
    for batch, cell in zip(batches, clean, strict=True):
        images, some = _untouched(batch, cell), found.setdefault(batch.seed, {})
        for i, target in enumerate(_list_targets(len(images))):
            some[str(ImageKey(batch.rows[i], batch.seed, arm="source"))] = images[i]
            some[str(ImageKey(batch.rows[i], batch.seed, arm="target"))] = images[target]
    return {seed: find_levels(images, seed) for seed, images in found.items()}


def join_moves(table: pd.DataFrame, lines: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """The table of removals with what came of moving the same directions; arms that are only moved come last.

    table: one row per removal.
    lines: one per transport.
    """
    if not lines:
        return table
    moves = add_shares(pd.DataFrame(lines)).rename(columns={"readable": "moved_readable"})
    joined = table.merge(moves, on=KEYS, how="left")
    alone = moves[moves["arm"].isin(REFERENCES)]
    return pd.concat([joined, alone], ignore_index=True)


def _list_targets(n: int) -> list[int]:
    """For every image the one into which its directions go."""
    return [(i + 1) % n for i in range(n)]


def _untouched(batch: PromptBatch, clean: Cell) -> list[Image]:
    keys = [str(ImageKey(row, batch.seed, arm="untouched")) for row in batch.rows]
    return [clean.images[key] for key in keys]
