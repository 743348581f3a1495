"""The images of a steering study: untouched, by the edited prompt, and under directions of some strength."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dit_lens.analysis.metrics import rmse
from dit_lens.core.request.ops import Op, Read, Zero
from dit_lens.instruments.steering_vectors import Steering
from dit_lens.studies.parts.doses import group_sites, is_residual, read_doses, weigh
from dit_lens.studies.shared.cells import Cell
from dit_lens.studies.shared.judges import Attributes, Judge, ask_judge
from dit_lens.studies.shared.keys import ImageKey
from dit_lens.studies.shared.streams import make_stream

if TYPE_CHECKING:
    from dit_lens.core.request.ops import Steps
    from dit_lens.lens import DiTLens
    from dit_lens.studies.shared.batches import StudyCall

HALVES = 2
SIDES = ("from", "to")


@dataclass(frozen=True, kw_only=True)
class SteeringBatch:
    """Pairs of prompts that run together from one seed: one run for the prompts, one for their edits.

    seed: seed of the noise.
    rows: numbers of the pairs in the study.
    pairs: (prompt, edited prompt).
    call: the other arguments of the pipeline, for all pairs.
    """

    seed: int
    rows: range
    pairs: Sequence[tuple[str, str]]
    call: StudyCall

    @property
    def key(self) -> str:
        """The batch in the key of a cell."""
        return f"{self.seed}/{self.rows.start}"

    def prompts(self, side: int) -> list[str]:
        """The prompts, or for 1 the edited ones."""
        return [pair[side] for pair in self.pairs]

    def arguments(self, side: int) -> dict[str, Any]:
        """The other arguments of the pipeline for them."""
        return self.call.of([2 * row + side for row in self.rows])


@dataclass(frozen=True, kw_only=True)
class SteeredImages:
    """Draws and measures images.

    lens: lens on the model.
    sites: where directions are added.
    steps: denoising steps at which they are.
    first: the first of them, at which doses are weighed.
    judge: what says how far an image shows a prompt, if anything does.
    attributes: prompt -> attribute -> value, if anything says it.
    """

    lens: DiTLens
    sites: Sequence[str]
    steps: Steps
    first: int
    judge: Judge | None
    attributes: Attributes | None

    def run_clean(self, batch: SteeringBatch) -> Cell:
        """The images of the prompts and of their edits, and the means of tokens in both."""
        cell = Cell()
        reads = [Read(self.sites, reduce="mean", name="mean"), Read(self.sites, reduce="rms", name="rms")]
        for side, arm in enumerate(("untouched", "prompt")):
            run = self.lens.run(batch.prompts(side), reads, seed=batch.seed, **batch.arguments(side))
            cell.arrays |= {
                f"{SIDES[side]}/{site}": value.float().numpy() for site, value in run["mean"].items()
            }  # [s, b, d]
            if side == 0:
                squares = {site: value[self.first].float().square().sum(-1) for site, value in run["rms"].items()}
                cell.arrays |= {f"energy/{site}": value.numpy() for site, value in squares.items()}  # [b]
            for row, image in zip(batch.rows, run.images, strict=True):
                cell.images[str(ImageKey(row, batch.seed, arm=arm))] = image
        for i, row in enumerate(batch.rows):
            for arm in ("untouched", "prompt"):
                image = cell.images[str(ImageKey(row, batch.seed, arm=arm))]
                cell.lines.append(self._line(batch, i, arm, image, cell))
        return cell

    def run_nothing(self, batch: SteeringBatch, clean: Cell) -> Cell:
        """The images under an edit of no channel."""
        return self._run(batch, [Zero(list(self.sites), channels=[], steps=self.steps)], clean, "no-op")

    def run_steered(
        self, batch: SteeringBatch, clean: Cell, directions: Sequence[Steering], strength: float, draw: int | None
    ) -> Cell:
        """The images under directions.

        clean: cell of the untouched images.
        directions: for every image its own.
        strength: how often they are added.
        draw: number of the draw of random directions as long; None for the directions themselves.
        """
        ops: list[Op] = []
        intended = []
        for row, one in enumerate(directions):
            if draw is not None:
                one = turn(one, make_stream(batch.seed, batch.pairs[row][0], "random", draw))  # noqa: PLW2901
            edits: list[Op] = [one.op(strength, rows=row, steps=self.steps)]
            for sites in group_sites(self.sites, self.lens.anatomy):
                edits = weigh(edits, sites, row, self.first)
            ops += edits
            intended.append(self._intend(one, strength, row, clean))
        arm = "steering" if draw is None else "random"
        return self._run(batch, ops, clean, arm, strength, draw or 0, intended)

    def _intend(self, one: Steering, strength: float, row: int, clean: Cell) -> float:
        """The dose that directions mean to give an image, by the energy of its tokens in the run without them."""
        doses = []
        for sites in group_sites(self.sites, self.lens.anatomy):
            moved, carried = torch.zeros(()), is_residual(sites)
            for site in sites:
                vector = one.vectors[site] if one.vectors[site].ndim == 1 else one.vectors[site][self.first]
                moved = strength * vector + (moved if carried else 0)
                energy = float(clean.arrays[f"energy/{site}"][row])
                doses.append(float(moved.square().sum()) / energy if energy else 0.0)
        return float(np.mean(doses)) if doses else np.nan

    def _run(
        self,
        batch: SteeringBatch,
        ops: Sequence[Op],
        clean: Cell,
        arm: str,
        strength: float = 0.0,
        draw: int = 0,
        intended: Sequence[float] = (),
    ) -> Cell:
        run = self.lens.run(batch.prompts(0), ops, seed=batch.seed, **batch.arguments(0))
        cell, doses = Cell(), read_doses(ops, run.receipt)
        for i, (row, image) in enumerate(zip(batch.rows, run.images, strict=True)):
            given = {"dose_intended": intended[i], "dose": doses.get(i, np.nan)} if intended else {}
            line = self._line(batch, i, arm, image, clean)
            cell.lines.append({**line, "strength": strength, "draw": draw, **given})
            if arm == "steering" or (arm == "random" and draw == 0):
                key = ImageKey(row, batch.seed, arm=arm, part=f"strength {strength:g}")
                cell.images[str(key)] = image
        return cell

    def _line(self, batch: SteeringBatch, i: int, arm: str, image: Any, clean: Cell) -> dict[str, Any]:
        """What is measured of one image. i: number of its pair in the batch."""
        start, end = batch.pairs[i]
        ends = [clean.images[str(ImageKey(batch.rows[i], batch.seed, arm=name))] for name in ("untouched", "prompt")]
        line: dict[str, Any] = {"prompt": f"{start} -> {end}", "seed": batch.seed, "arm": arm}
        line |= {"strength": 0.0, "draw": 0, "rmse": rmse(ends[0], image), "to_prompt": rmse(ends[1], image)}
        if self.judge is None:
            return line
        said = [ask_judge(self.judge, image, prompt) for prompt in (start, end)]
        line |= {
            f"fidelity_{side}": one["fidelity"] for side, one in zip(SIDES, said, strict=True) if "fidelity" in one
        }
        line |= {"readable": said[0]["readable"]} if "readable" in said[0] else {}
        if self.attributes is not None:
            asked = [dict(self.attributes(prompt)) for prompt in (start, end)]
            known = [name for name in asked[0] if name in asked[1] and name in said[0] and name in said[1]]
            differ = [float(said[1][name]) for name in known if asked[0][name] != asked[1][name]]
            shared = [float(said[0][name]) for name in known if asked[0][name] == asked[1][name]]
            for name, values in (("changed", differ), ("kept", shared)):
                if told := [value for value in values if not np.isnan(value)]:
                    line[name] = float(np.mean(told))
        return line


def turn(directions: Steering, seed: int) -> Steering:
    """The directions turned by one random rotation for all sites and steps: as long, and with the same angles.

    So they add up over blocks as the directions themselves do.

    >>> one = Steering({"blocks.0.img": [3.0, 0.0, 0.0], "blocks.1.img": [3.0, 4.0, 0.0]})
    >>> new = turn(one, seed=0).vectors
    >>> round(float(new["blocks.1.img"].norm()), 4), round(float(new["blocks.0.img"] @ new["blocks.1.img"]), 4)
    (5.0, 9.0)

    seed: of the rotation.
    """
    generator = torch.Generator().manual_seed(seed)
    turned: dict[str, torch.Tensor] = {}
    widths = dict.fromkeys(vector.shape[-1] for vector in directions.vectors.values())
    for width in widths:
        some = {site: vector for site, vector in directions.vectors.items() if vector.shape[-1] == width}
        rows = torch.cat([vector.reshape(-1, width).double() for vector in some.values()])
        _, parts = torch.linalg.qr(rows.T)  # the vectors in an orthonormal basis, in whose place comes a random one
        basis, _ = torch.linalg.qr(torch.randn(width, len(parts), generator=generator, dtype=torch.float64))
        found = (basis @ parts).T.float().split([vector.numel() // width for vector in some.values()])
        turned |= {site: new.reshape(some[site].shape) for site, new in zip(some, found, strict=True)}
    return replace(directions, vectors={site: turned[site] for site in directions.vectors}, method="random")


def learn_directions(
    lens: DiTLens, clean: Sequence[Cell], batches: Sequence[SteeringBatch], sites: Sequence[str]
) -> list[Steering]:
    """For every half of the pairs, the mean differences in the other one; a pair's half is its number modulo 2.

    clean: the cells of untouched images, batch by batch.
    batches: the batches.
    sites: where.
    """
    found = []
    for half in range(HALVES):
        vectors = {}
        for site in sites:
            differences = [
                cell.arrays[f"to/{site}"][:, i] - cell.arrays[f"from/{site}"][:, i]
                for cell, batch in zip(clean, batches, strict=True)
                for i, row in enumerate(batch.rows)
                if row % HALVES != half
            ]
            vectors[site] = torch.from_numpy(np.mean(differences, 0))
        found.append(Steering(vectors, "mean", n=len(differences), family=lens.family.name))
    return found
