"""The arms of ``studies.basis``, and the directions of every image that they remove, found in its untouched run."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dit_lens.core.request.ops import Read
from dit_lens.instruments.relevance import read_relevance
from dit_lens.studies.parts.directions import Basis, count_directions, find_basis, make_rotation
from dit_lens.studies.shared.streams import make_stream

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from dit_lens.core.request.ops import Pattern
    from dit_lens.studies.shared.batches import BatchRunner, PromptBatch

BASES = ("random", "rotation", "components", "mean-direction", "relevant")
DRAWN = ("random", "rotation")  # of which there are several draws
ONE = "mean-direction"  # has a single direction
Level = float | str
MOST_BYTES = 2e9  # of tokens that are in memory at once


@dataclass(frozen=True)
class DirectionArm:
    """What is removed from the images of a batch.

    name: name of the basis, "no-op" or "untouched".
    draw: number of the draw of a random basis; 0 for others.
    level: how much: an int, a number of directions; a float, a share of the energy of every site; "mean", the share
        that the mean direction holds there; "most", the most that any other arm removes there, or just above.
    """

    name: str
    draw: int = 0
    level: Level = ""

    @property
    def label(self) -> str:
        """The level in tables and keys."""
        return f"k={self.level}" if isinstance(self.level, int) else str(self.level)


def list_arms(bases: Sequence[str], draws: int, levels: Sequence[float]) -> list[DirectionArm]:
    """All arms of a study, level by level.

    >>> [(arm.name, arm.label) for arm in list_arms(["components"], 1, [0.1])]
    [('no-op', ''), ('top', '0.1'), ('components', '0.1'), ('top', 'most')]

    bases: the bases beside "top".
    draws: number of draws of the random ones.
    levels: numbers of directions, or shares of the energy.
    """
    arms = [DirectionArm("no-op")]
    wanted: list[Level] = [*(["mean"] if ONE in bases else []), *levels]
    for level in wanted:
        arms += [DirectionArm(ONE, level="mean")] if level == "mean" else []
        for name in ("top", *(one for one in bases if one != ONE)):
            arms += [DirectionArm(name, draw, level) for draw in range(_count_draws(name, draws))]
    # So that the curve of the top channels reaches as far as the others.
    return [*arms, DirectionArm("top", level="most")] if bases else arms


@dataclass(frozen=True, kw_only=True)
class DirectionFinder:
    """Finds the bases of every image in its untouched run, and keeps of them what the arms remove.

    bases, draws, levels: as in :func:`list_arms`.
    score: reduction by which channels and rotated directions are ranked.
    site: sites of the study.
    steps: indices of the steps that count.
    """

    bases: Sequence[str]
    draws: int
    levels: Sequence[float]
    score: str
    site: Pattern
    steps: Sequence[int]

    def measure(self, runner: BatchRunner, batch: PromptBatch) -> tuple[Sequence[Image], dict[str, np.ndarray]]:
        """The untouched images of a batch, and what is kept of their bases: "number in batch/site/what" -> array."""
        images: Sequence[Image] = []
        arrays: dict[str, np.ndarray] = {}
        for sites in self._split_sites(runner, batch):
            run = runner.run(batch, [Read(sites, name="x")])
            images = images or run.images
            relevance = self._read_relevance(runner, batch, sites)
            for site, x in run["x"].items():
                for i, prompt in enumerate(batch.prompts):
                    scores = relevance[site][:, i].mean(0) if relevance else None
                    found = self._describe(x[:, i].float(), scores, (batch.seed, prompt))
                    arrays |= {f"{i}/{site}/{what}": value.numpy() for what, value in found.items()}
        return images, arrays

    def count(self, arrays: Mapping[str, np.ndarray], i: int, arm: DirectionArm) -> dict[str, int]:
        """How many directions an arm removes from one image: by site; empty for an arm without any.

        arrays: as :meth:`measure` returned them.
        i: number of the image in its batch.
        arm: the arm.
        """
        if arm.name not in ("top", *BASES):
            return {}
        sites = [key.split("/")[1] for key in arrays if key.startswith(f"{i}/") and key.endswith("/mean")]
        return {site: self._count(arrays, f"{i}/{site}", arm) for site in sites}

    def is_new(self, arrays: Mapping[str, np.ndarray], i: int, arm: DirectionArm) -> bool:
        """Whether an arm removes from one image what its basis has not removed at an earlier level."""
        found = self.count(arrays, i, arm)
        before = itertools.takewhile(lambda other: other != arm, list_arms(self.bases, self.draws, self.levels))
        same = [other for other in before if (other.name, other.draw) == (arm.name, arm.draw)]
        return all(self.count(arrays, i, other) != found for other in same)

    def load(
        self, arrays: Mapping[str, np.ndarray], i: int, draw_of: tuple[int, str], arm: DirectionArm
    ) -> dict[str, Basis]:
        """The directions that an arm removes from one image: site -> basis.

        draw_of: the image, as seed and prompt. Others: as in :meth:`count`.
        """
        found: dict[str, Basis] = {}
        for site, count in self.count(arrays, i, arm).items():
            of_arm = f"{i}/{site}/{arm.name}/{arm.draw}"
            order, held = (torch.from_numpy(arrays[f"{of_arm}/{part}"]) for part in ("order", "held"))
            vectors = None
            if arm.name == "rotation":
                vectors = make_rotation(len(order), make_stream(*draw_of, arm.name, arm.draw))
            elif f"{of_arm}/vectors" in arrays:
                vectors = torch.from_numpy(arrays[f"{of_arm}/vectors"])
            found[site] = Basis(order, held, vectors).take(count)
        return found

    def _count(self, arrays: Mapping[str, np.ndarray], of: str, arm: DirectionArm) -> int:
        """How many directions an arm removes from one image at one site, "number/site"."""
        held = torch.from_numpy(arrays[f"{of}/{arm.name}/{arm.draw}/held"])
        if not isinstance(arm.level, str):
            return count_directions(held, arm.level)
        if arm.level == "mean":
            return count_directions(held, float(arrays[f"{of}/{ONE}/0/held"][0]))
        others = [other for other in list_arms(self.bases, self.draws, self.levels) if other.name in self.bases]
        shares = [
            float(arrays[f"{of}/{other.name}/{other.draw}/held"][: self._count(arrays, of, other)].sum())
            for other in others
        ]
        # Not as near as can be, but as far or farther, so that nothing lies beyond the curve.
        return min(int((held.cumsum(0) < max(shares)).sum()) + 1, len(held))

    def _split_sites(self, runner: BatchRunner, batch: PromptBatch) -> Iterator[list[str]]:
        """The sites, as many at a time as memory holds."""
        sites = runner.lens.sites(self.site)
        size = runner.lens.cost(batch.prompts, Read(self.site), **batch.call).bytes / len(sites)
        count = max(1, int(MOST_BYTES // max(size, 1)))
        return (sites[start : start + count] for start in range(0, len(sites), count))

    def _read_relevance(self, runner: BatchRunner, batch: PromptBatch, sites: Sequence[str]) -> Mapping[str, Tensor]:
        """By site [s, b, d], of the steps that count; empty if nobody asks."""
        if "relevant" not in self.bases:
            return {}
        steps = list(self.steps)
        return read_relevance(runner.lens, batch.prompts, sites, steps=steps, seed=batch.seed, **batch.call)

    def _describe(self, x: Tensor, relevance: Tensor | None, draw_of: tuple[int, str]) -> dict[str, Tensor]:
        """What is kept of the bases of one image at one site.

        x: [s, n, d].
        relevance: [d], for "relevant".
        draw_of: the image, as seed and prompt.
        """
        found = {"mean": x.mean(1), "energy": x[list(self.steps)].square().mean(1).sum()}
        levels = list(self.levels)
        for name in dict.fromkeys((ONE, "top", *self.bases)):
            for draw in range(_count_draws(name, self.draws)):
                seed = make_stream(*draw_of, name, draw)
                one = find_basis(name, x, self.steps, score=self.score, seed=seed, relevance=relevance)
                if name == ONE:
                    levels.append(float(one.held[0]))
                if name == "components":  # all would be a square of the width for every site
                    one = one.take(max(count_directions(one.held, level) for level in levels))
                found |= {f"{name}/{draw}/order": one.order, f"{name}/{draw}/held": one.held}
                if one.vectors is not None and name != "rotation":  # whose seed makes it again
                    found[f"{name}/{draw}/vectors"] = one.vectors[..., : len(one.order)].contiguous()
        return found


def _count_draws(name: str, draws: int) -> int:
    return draws if name in DRAWN else 1
