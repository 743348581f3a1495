"""The arms of an intervention: the top channels of every image, and their controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dit_lens.analysis.channels import ChannelSet, top_channels
from dit_lens.core.request.ops import Read

if TYPE_CHECKING:
    import numpy as np

    from dit_lens.core.request.ops import Pattern, Steps
    from dit_lens.core.runs.run import Run

DRAWS = 10  # of a random control, so that the variance between them is inside the interval


@dataclass(frozen=True)
class Arm:
    """A set of channels per image, under the name of the arm and its draw."""

    name: str
    draw: int
    sets: tuple[ChannelSet, ...] = ()


def score_ops(site: Pattern, score: str, steps: Steps = None) -> list[Read]:
    """The reads from which channel sets are made."""
    return [Read(site, reduce=score, steps=steps, name="score"), Read(site, reduce="rms", steps=steps, name="rms")]


def kept_scores(run: Run, rows: int | None = None) -> dict[str, np.ndarray]:
    """What :func:`sets_of` needs of a run: per image and site the score and the energy, averaged over steps.

    rows: how many of the first images are wanted; all by default.
    """
    found = {"score": run["score"], "energy": {site: rms.float().square() for site, rms in run["rms"].items()}}
    return {
        f"{row}/{name}/{site}": value[:, row].float().mean(0).numpy()
        for name, values in found.items()
        for site, value in values.items()
        for row in range(value.shape[1] if rows is None else rows)
    }


def sets_of(kept: Mapping[str, np.ndarray], k: int, score: str) -> list[ChannelSet]:
    """For every image its own top-k channels per site, from what :func:`kept_scores` returned."""
    rows: dict[int, dict[str, dict[str, torch.Tensor]]] = {}
    for key, value in kept.items():
        row, name, site = key.split("/", 2)
        if name in ("score", "energy"):
            rows.setdefault(int(row), {"score": {}, "energy": {}})[name][site] = torch.from_numpy(value)
    return [top_channels(rows[row]["score"], rows[row]["energy"], k, score) for row in sorted(rows)]


def control_arms(top: Sequence[ChannelSet], draws: int, seed: int) -> list[Arm]:
    """A top-k family and its controls: bottom, random (every draw one map for all sites), energy-matched."""
    random = [Arm("random", draw, tuple(one.random(seed + draw) for one in top)) for draw in range(draws)]
    matched = Arm("energy-matched", 0, tuple(one.energy_matched(seed) for one in top))
    return [Arm("top", 0, tuple(top)), Arm("bottom", 0, tuple(one.bottom() for one in top)), *random, matched]
