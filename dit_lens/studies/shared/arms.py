"""The arms of an intervention: the top channels of every image, and their controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dit_lens.analysis.channels import ChannelSet, top_channels
from dit_lens.core.request.ops import Apply, Op, Read
from dit_lens.instruments.massive import check_score
from dit_lens.instruments.relevance import RELEVANCE, take_relevance
from dit_lens.studies.shared.streams import make_stream

if TYPE_CHECKING:
    from dit_lens.core.request.ops import Pattern, Steps
    from dit_lens.core.runs.run import Run
    from dit_lens.lens import DiTLens

DRAWS = 10  # of a random control, so that the variance between them is inside the interval
MATCHED_DRAWS = 3  # at most, of an energy-matched control: few maps are as good as the best


@dataclass(frozen=True)
class Arm:
    """What is done to the images of a batch, as one arm of a study.

    name: name of the arm, such as "top" or "random".
    draw: number of the draw of a random arm; 0 for others.
    sets: a set of channels for every image; empty for an arm without one.
    """

    name: str
    draw: int
    sets: tuple[ChannelSet, ...] = ()


def make_score_reads(site: Pattern, score: str, steps: Steps = None) -> list[Read]:
    """The reads from which channel sets are made.

    site: sites that are read.
    score: reduction that gives one number per channel, such as "|mean|"; or "relevance", which is no read: see
      :func:`find_relevance`.
    steps: denoising steps that are read; all by default.
    """
    energy = Read(site, reduce="rms", steps=steps, name="rms")
    return [energy] if score == RELEVANCE else [Read(site, reduce=score, steps=steps, name="score"), energy]


def check_arm_score(lens: DiTLens, score: str, prompts: Sequence[str], site: Pattern, call: Mapping[str, Any]) -> None:
    """Raises what is wrong with a score, before anything is drawn.

    lens: lens on the model.
    score: as in :func:`make_score_reads`.
    prompts: those of a batch.
    site: sites whose channels are ranked.
    call: other arguments of the pipeline, for these prompts.
    """
    check_score(score, lens)
    if score == RELEVANCE:  # which is taken where an op can write
        lens.cost(list(prompts), Apply(site, fn=lambda x, _: x), **{"seed": 0, **call})


def find_relevance(
    lens: DiTLens,
    score: str,
    prompts: Sequence[str],
    site: Pattern,
    *,
    seed: int,
    call: Mapping[str, Any],
    steps: Steps = None,
    beside: Sequence[Op] = (),
) -> Mapping[str, torch.Tensor] | None:
    """Site -> [s, b, d], the scores of a batch that no read has: one more run, with gradients; None for a reduction.

    lens: lens on the model.
    score: as in :func:`make_score_reads`.
    prompts, seed, call: of the batch.
    site: sites whose channels are ranked.
    steps: denoising steps that count; all by default.
    beside: edits under which the batch is run.
    """
    if score != RELEVANCE:
        return None
    return take_relevance(lens, list(prompts), site, beside, steps=steps, seed=seed, **call)


def average_scores(
    run: Run, rows: int | None = None, relevance: Mapping[str, torch.Tensor] | None = None
) -> dict[str, np.ndarray]:
    """The score and the energy of every image and site, averaged over steps: "row/score/site" -> [d].

    run: a run with the reads of :func:`make_score_reads`.
    rows: number of images that are wanted, from the first; all by default.
    relevance: the scores that are none of its reads.
    """
    scores = run["score"] if relevance is None else relevance
    found = {"score": scores, "energy": {site: rms.float().square() for site, rms in run["rms"].items()}}
    return {
        f"{row}/{name}/{site}": value[:, row].float().mean(0).numpy()
        for name, values in found.items()
        for site, value in values.items()
        for row in range(value.shape[1] if rows is None else rows)
    }


def select_top_channels(scores: Mapping[str, np.ndarray], k: int, score: str) -> list[ChannelSet]:
    """For every image its own top-k channels per site.

    scores: what :func:`average_scores` returned, perhaps among other arrays.
    k: number of channels per site.
    score: name of the score.
    """
    rows: dict[int, dict[str, dict[str, torch.Tensor]]] = {}
    for row, name, site, value in _read_scores(scores):
        rows.setdefault(row, {"score": {}, "energy": {}})[name][site] = torch.from_numpy(value)
    return [top_channels(rows[row]["score"], rows[row]["energy"], k, score) for row in sorted(rows)]


def select_common_channels(scores: Sequence[Mapping[str, np.ndarray]], k: int, score: str) -> ChannelSet:
    """The top-k channels per site by scores averaged over all images.

    scores: for every batch what :func:`average_scores` returned, perhaps among other arrays.
    k: number of channels per site.
    score: name of the score.
    """
    found: dict[str, dict[str, list[np.ndarray]]] = {"score": {}, "energy": {}}
    for batch in scores:
        for _, name, site, value in _read_scores(batch):
            found[name].setdefault(site, []).append(value)
    means = {
        name: {site: torch.from_numpy(np.mean(values, 0)) for site, values in sites.items()}
        for name, sites in found.items()
    }
    return top_channels(means["score"], means["energy"], k, score)


def add_controls(top: Sequence[ChannelSet], draws: int, seed: int, names: Sequence[str], *more: int) -> list[Arm]:
    """The arm of the top channels and its controls: bottom, random and energy-matched.

    Every draw of every image has random numbers of its own: see :func:`~dit_lens.studies.shared.streams.make_stream`.

    top: the top channels of every image.
    draws: number of random arms; each is one map of channels for all sites. Of energy-matched ones there are as many,
      but at most 3.
    seed: seed of the images.
    names: name of every image in the study, its prompt.
    more: what else tells this call from others on the same images, such as k.
    """

    def draw(arm: str, number: int) -> Arm:
        streams = [make_stream(seed, name, *more, arm, number) for name in names]
        make = {"random": ChannelSet.random, "energy-matched": ChannelSet.energy_matched}[arm]
        return Arm(arm, number, tuple(make(one, stream) for one, stream in zip(top, streams, strict=True)))

    return [
        Arm("top", 0, tuple(top)),
        Arm("bottom", 0, tuple(one.bottom() for one in top)),
        *(draw("random", number) for number in range(draws)),
        *(draw("energy-matched", number) for number in range(count_matched(draws))),
    ]


def count_matched(draws: int) -> int:
    """The number of energy-matched arms beside so many random ones."""
    return max(1, min(draws, MATCHED_DRAWS))


def count_arms(draws: int) -> int:
    """The number of arms that :func:`add_controls` returns."""
    return 2 + draws + count_matched(draws)


def _read_scores(arrays: Mapping[str, np.ndarray]) -> list[tuple[int, str, str, np.ndarray]]:
    """(row, "score" or "energy", site, [d]) of every score among a cell's arrays."""
    parts = [(*key.split("/", 2), value) for key, value in arrays.items() if key.count("/") >= 2]
    return [(int(row), name, site, value) for row, name, site, value in parts if name in ("score", "energy")]
