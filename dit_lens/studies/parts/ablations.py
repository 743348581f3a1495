"""What each arm of a disruption does to the images of a batch, the dose it means to give, and how that is weighed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dit_lens.analysis.channels import ChannelSet
from dit_lens.core.request.ops import MeanAblate, Op, Swap, Zero
from dit_lens.studies.parts.confounds import make_attenuated_ops, make_fill_ops, make_push_ops
from dit_lens.studies.parts.doses import (
    group_sites,
    is_residual,
    predict_means,
    predict_share,
    predict_zeroing,
    weigh,
)
from dit_lens.studies.parts.norms import Reader, find_readers, make_frozen_ops, make_rescaled_ops

if TYPE_CHECKING:
    from dit_lens.core.request.ops import Pattern, Steps
    from dit_lens.lens import DiTLens
    from dit_lens.studies.shared.arms import Arm
    from dit_lens.studies.shared.cells import Cell

AblationKind = Literal["zero", "mean", "resample"]
CONFOUNDS = ("attenuated", "norm-kept", "norm-frozen", "rescaled", "random-direction")
WEIGHS_ITSELF = ("norm-frozen", "rescaled")


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """How channels are ablated: the same for all arms of a study.

    kind: "zero", "mean" or "resample".
    site: sites whose channels are ablated.
    steps: denoising steps at which they are ablated.
    first: the first of these, at which doses are weighed.
    readers: what reads each site, where sites are outputs of blocks.
    weighed: sites whose dose can be weighed, those of a stream together.
    means: site -> [s, d], for ablation by the mean.
    """

    kind: AblationKind
    site: Pattern
    steps: Steps
    first: int
    readers: Mapping[str, Reader]
    weighed: Sequence[Sequence[str]]
    means: Mapping[str, Any]

    def make_ops(self, arm: Arm, matched: Sequence[ChannelSet], streams: Sequence[int]) -> list[Op]:
        """The ops of an arm, for every image of a batch.

        arm: the arm, with a set of channels for every image.
        matched: for every image the channels whose zeroing "attenuated" equals.
        streams: for every image a seed of the arm's random numbers.
        """
        if not arm.sets:
            return [Zero(self.site, channels=[], steps=self.steps)]
        ops: list[Op] = []
        for row, one in enumerate(arm.sets):
            edits = self._edit(arm, one, matched, row, streams[row])
            for sites in [] if arm.name in WEIGHS_ITSELF else self.weighed:
                edits = weigh(edits, sites, row, self.first)
            ops += edits
        return ops

    def _edit(self, arm: Arm, one: ChannelSet, matched: Sequence[ChannelSet], row: int, seed: int) -> list[Op]:
        """What is done to one image."""
        if arm.name == "attenuated":
            return [*make_attenuated_ops(one, matched[row], row, self.steps)]
        if arm.name == "norm-kept":
            return [*make_fill_ops(one, row, seed, self.steps)]
        if arm.name == "norm-frozen":
            return make_frozen_ops(one, row, self.steps, self.readers, self.first)
        if arm.name == "rescaled":
            return make_rescaled_ops(one, row, self.steps, self.readers, self.first)
        if arm.name == "random-direction":
            return [*make_push_ops(one, row, seed, self.steps)]
        if self.kind == "mean":
            return [MeanAblate(self.site, channels=one, rows=row, steps=self.steps, mean=self.means)]
        if self.kind == "resample":
            other = f"row:{len(arm.sets) + (row + 1) % len(arm.sets)}"
            return [Swap(self.site, channels=one, rows=row, steps=self.steps, source=other, branch="both")]
        return [Zero(self.site, channels=one, rows=row, steps=self.steps)]

    def intend(self, arm: Arm, matched: Sequence[ChannelSet], row: int, arrays: Mapping[str, np.ndarray]) -> float:
        """The dose that an arm means to give an image, by the energies its channels have in the run without edits.

        Missing for "norm-kept" and for ablation by resampling, which move tokens as far as other values lie away.

        arm: the arm.
        matched: as in :meth:`make_ops`.
        row: row of the image.
        arrays: of the clean cell: ``first`` energies, and means if the ablation is by means.
        """
        if not arm.sets:
            return 0.0
        energy = pick_arrays(arrays, row, "energy at first")
        if arm.name == "norm-kept" or self.kind == "resample" or not energy:
            return np.nan
        share = predict_share(energy, arm.sets[row])
        if arm.name == "attenuated":
            other = self._predict_zeroing(energy, matched[row])
            return _average({site: min(share[site], other[site]) for site in share})
        if arm.name in ("rescaled", "random-direction"):
            return _average(share)
        if self.kind == "mean":
            new = {site: np.asarray(mean)[self.first] for site, mean in self.means.items()}
            return _average(predict_means(energy, pick_arrays(arrays, row, "mean at first"), new, arm.sets[row]))
        return _average(self._predict_zeroing(energy, arm.sets[row]))

    def _predict_zeroing(self, energy: Mapping[str, np.ndarray], channels: ChannelSet) -> dict[str, float]:
        found: dict[str, float] = {}
        for sites in self.weighed:
            some = {site: channels[site] for site in sites}
            found |= predict_zeroing(energy, some, carried=is_residual(sites))
        return found


def plan_ablation(
    lens: DiTLens, site: Pattern, steps: Steps, kind: AblationKind, first: int, means: Mapping[str, Any]
) -> Ablation:
    """How channels of a model are ablated.

    lens: lens on the model.
    site, steps, kind, first, means: as in :class:`Ablation`.
    """
    anatomy, sites = lens.anatomy, lens.sites(site)
    outputs = [name for name in sites if name.count(".") == 2]
    return Ablation(
        kind=kind,
        site=site,
        steps=steps,
        first=first,
        readers=find_readers(outputs, anatomy),
        weighed=group_sites(sites, anatomy),
        means=means,
    )


def pick_arrays(arrays: Mapping[str, np.ndarray], row: int, name: str) -> dict[str, np.ndarray]:
    """The arrays of an image: site -> [d].

    arrays: of a cell, under "row/name/site".
    row: row of the image.
    name: what they are.
    """
    start = f"{row}/{name}/"
    return {key.removeprefix(start): value for key, value in arrays.items() if key.startswith(start)}


def pick_step(name: str, values: Mapping[str, Any], step: int, rows: int) -> dict[str, np.ndarray]:
    """Reductions [s, b, d] at one step, for each image: "row/name/site" -> [d].

    name: what they are.
    values: by site.
    step: the step.
    rows: number of images.
    """
    return {
        f"{row}/{name}/{site}": value[step, row].float().numpy()
        for site, value in values.items()
        for row in range(rows)
    }


def average_means(clean: Iterable[Cell]) -> dict[str, Any]:
    """The mean of every channel at every step over all prompts and seeds: site -> [s, d].

    clean: the cells of untouched images, with means [s, b, d] as "all/mean/site".
    """
    import torch

    cells = list(clean)
    sites = [key.removeprefix("all/mean/") for key in cells[0].arrays if key.startswith("all/mean/")]
    means = {site: np.concatenate([cell.arrays[f"all/mean/{site}"] for cell in cells], 1).mean(1) for site in sites}
    return {site: torch.from_numpy(mean) for site, mean in means.items()}


def _average(doses: Mapping[str, float]) -> float:
    """The mean over sites; missing where there are none."""
    return float(np.mean(list(doses.values()))) if doses else np.nan
