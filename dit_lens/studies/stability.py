"""How stable is the set of massive channels? Overlap over prompts, seeds, steps and sites, and when to stop looking."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from dit_lens.analysis.channels.statistics import RunningStats, chance_jaccard, overlaps
from dit_lens.arguments.lists import as_prompts, as_seeds, check_once
from dit_lens.core.request.ops import Read
from dit_lens.errors import OpError
from dit_lens.instruments.relevance import RELEVANCE
from dit_lens.plots import stability_figure
from dit_lens.studies.shared.arguments import as_ks, describe_k, find_meant
from dit_lens.studies.shared.arms import check_arm_score, find_relevance
from dit_lens.studies.shared.batches import PromptBatch, divide_call, make_batches
from dit_lens.studies.shared.cells import Cell
from dit_lens.studies.shared.checkpoints import StudyCheckpoints
from dit_lens.studies.shared.protocols import with_protocols
from dit_lens.studies.shared.registry import study
from dit_lens.studies.shared.result import Result
from dit_lens.studies.shared.slots import LaterCell
from dit_lens.studies.shared.tables import summarise

if TYPE_CHECKING:
    from dit_lens.core.request.ops import Pattern, Steps
    from dit_lens.lens import DiTLens

# From this overlap of successive aggregates on, SPARK calls a set stable.
STABLE = 0.9
COLUMNS = ["over", "site", "a", "b", "prompt", "seed", "jaccard"]


def assemble(settings: Mapping[str, Any], cells: Sequence[Cell]) -> Result:
    """The result of the cells so far."""
    images = pd.DataFrame([line for cell in cells for line in cell.lines])
    steps, whole, running = (
        np.concatenate([cell.arrays[name] for cell in cells]) for name in ("steps", "whole", "running")
    )
    by_site, by_pair = _compare_by_site(settings, images, steps, whole), _compare_pairs(settings, steps, whole)
    settling = _compare_successive(images, running)
    summary = pd.concat(
        [
            summarise(by_site, ("over", "site", "a", "b"), ("jaccard",)),
            by_pair.assign(n=len(images)),
            settling.groupby(["over", "a"], as_index=False).agg(jaccard=("jaccard", "mean"), n=("jaccard", "size")),
        ],
        ignore_index=True,
    ).assign(chance=chance_jaccard(settings["k"], settings["width"]))
    summary = summary.reindex(
        columns=["over", "site", "a", "b", "n", "jaccard", "jaccard_low", "jaccard_high", "chance"]
    )
    table = pd.concat([by_site, by_pair, settling], ignore_index=True)[COLUMNS]
    return Result("stability", table, summary, dict(settings), notes=_notes(settings, summary, settling, running))


@study(
    question="Are they the same channels everywhere?",
    assemble=assemble,
    figure=stability_figure,
)
@with_protocols
def stability(
    lens: DiTLens,
    prompts: str | Sequence[str],
    *,
    k: int = 12,
    seeds: int | Sequence[int] = (0,),
    scores: Sequence[str] = ("|mean|", "mean|x|"),
    site: Pattern = "blocks.*.img",
    steps: Steps = None,
    stable: float = STABLE,
    batch_size: int | None = None,
    out: str | Path | None = None,
    **call: Any,
) -> Result:
    """The Jaccard overlap of top-k sets over prompts, seeds, steps and sites, and after how many prompts they settle.

    >>> from dit_lens import DiTLens
    >>> prompts = [
    ...     "a big red circle left on a plain blue background",
    ...     "a small white cross top on a plain green background",
    ... ]
    >>> result = stability(DiTLens.toy(), prompts, k=4, num_inference_steps=2)
    >>> sorted(result.summary["over"].unique())
    ['prompts', 'running', 'scores', 'site x site', 'sites', 'step x step', 'steps']

    An image's set at a site is the top k of its score averaged over steps; only "steps" compares the sets of single
    steps. The table has per image and site the mean overlap with the sets of other prompts (same seed), of other
    seeds (same prompt), of other steps and of other sites (same image), and between the sets of the first score and
    of each other; ``step x step`` and ``site x site``, pair by pair, averaged over images; and ``running``: the set
    of the mean score over the first a prompts against that of the first a - 1, averaged over sites, for every seed.
    The set is stable from the number of prompts on after which this overlap stays at ``stable`` or above; the notes
    say which that is. A running mean moves less with every prompt, so this tells when the aggregate is known, and
    ``prompts`` whether prompts agree. Read every overlap beside ``chance``, that of two random sets.

    Scores are kept only as running statistics, so memory does not grow with them; of every image the sets stay.

    lens: lens on the model.
    prompts: one prompt or several.
    k: number of channels, 1 to the width.
    seeds: seeds of the noise; every prompt is run with each.
    scores: what channels are ranked by, reductions or "relevance" (as in ``massive_channels``); the first is the one
      in question.
    site: sites that are compared.
    steps: denoising steps that are read; all by default.
    stable: overlap in (0, 1] from which on the set counts as stable.
    batch_size: number of prompts that run together; all by default.
    out: folder for finished cells, from which the same call continues.
    call: other arguments of the pipeline.

    Source of the rule: SPARK; of the score: arXiv 2605.13974.
    """
    prompts, seeds = as_prompts(prompts), as_seeds(seeds)
    sites = lens.sites(site)
    (k,) = as_ks([k])
    width = _check(lens, sites, k, scores, stable)
    settings = {
        "prompts": prompts,
        "k": k,
        "seeds": seeds,
        "scores": list(scores),
        "site": site,
        "sites": sites,
        "steps": str(steps),
        "stable": stable,
        "batch_size": batch_size,
        "call": call,
        "width": width,
    }
    batches = make_batches(prompts, seeds, batch_size, divide_call(lens, call, len(prompts), images=False))
    for score in scores:
        check_arm_score(lens, score, batches[0].prompts, site, batches[0].call)
    seen: dict[int, SeenScores] = defaultdict(SeenScores)
    meant = find_meant(lens, batches[0].prompts, batches[0].call, site, steps)
    total, images = len(batches), len(prompts) * len(seeds)
    with StudyCheckpoints("stability", settings, lens=lens, total=total, out=out, meant=meant, images=images) as cells:
        for batch in batches:
            read = partial(_read_scores, lens, batch, site, steps, scores)
            make = partial(_find_sets, batch, read, k, seen[batch.seed])
            # The sets of a seed are of all prompts before.
            seen[batch.seed].add(cells.get(batch.key, make, group=str(batch.seed)))
        return cells.result()


def _check(lens: DiTLens, sites: Sequence[str], k: int, scores: Sequence[str], stable: float) -> int:
    """The width of all sites; OpError if it differs, or another argument is not valid.

    lens: lens on the model.
    sites: names of the sites.
    k: number of channels of a set.
    scores: reductions.
    stable: overlap that counts as stable.
    """
    widths = {name: lens.anatomy.channels(lens.anatomy.site(name)) for name in sites}
    width = widths[sites[0]]
    if odd := [name for name in sites if widths[name] != width]:
        raise OpError(
            f"{sites[0]} has {width} channels and {odd[0]} has {widths[odd[0]]}, so their channels cannot be compared. "
            "Choose sites of one width."
        )
    if not 1 <= k <= width:
        raise OpError(f"k={k} channels were asked for, but {sites[0]} has {width}. Choose k from 1 to {width}.")
    if not scores:
        raise OpError("scores=[] names no score. Give at least one, such as '|mean|'.")
    check_once("scores", scores, "a score")
    if not 0 < stable <= 1:
        raise OpError(f"stable={stable:g} must be an overlap in (0, 1]; SPARK's is {STABLE}.")
    return width


def _read_scores(
    lens: DiTLens, batch: PromptBatch, site: Pattern, steps: Steps, scores: Sequence[str]
) -> list[np.ndarray]:
    """The scores of a batch, each [sites, s, b, d]. Arguments: as in :func:`stability`."""
    reads = [Read(site, reduce=score, steps=steps, name=score) for score in scores if score != RELEVANCE]
    run = lens.run(batch.prompts, reads, seed=batch.seed, **batch.call) if reads else {}
    values = [
        find_relevance(lens, score, batch.prompts, site, seed=batch.seed, call=batch.call, steps=steps) or run[score]
        for score in scores
    ]
    return [np.stack([value.float().numpy() for value in sites.values()]) for sites in values]


@dataclass
class SeenScores:
    """The statistics of the scores of the prompts so far; a thousand prompts' own scores would be gigabytes."""

    _stats: RunningStats = field(default_factory=RunningStats, init=False)
    _later: list[Cell] = field(default_factory=list, init=False)

    def add(self, cell: Cell) -> None:
        """Takes the scores out of a cell; out of one that is not at hand once they are needed."""
        self._later.append(cell)
        if not isinstance(cell, LaterCell):
            self._take()

    def copy(self) -> RunningStats:
        """The statistics, to be gone on with."""
        self._take()
        copied = RunningStats()
        copied.merge(self._stats)
        return copied

    def _take(self) -> None:
        for cell in self._later:
            _add(self._stats, cell.arrays.pop("score"))
        self._later.clear()


def _find_sets(batch: PromptBatch, read: Callable[[], list[np.ndarray]], k: int, seen: SeenScores) -> Cell:
    """The sets of a batch: ``steps`` [b, sites, s, k], ``whole`` [b, sites, scores, k], ``running`` [b, sites, k].

    batch: the prompts and their seed.
    read: reads its scores, each [sites, s, b, d].
    k: number of channels of a set.
    seen: the scores of earlier prompts.
    """
    found = read()
    by_step = found[0]
    score = by_step.mean(1).swapaxes(0, 1)  # [b, sites, d]
    stats, running = seen.copy(), []
    for row in score:
        _add(stats, row[None])
        running.append(_top(stats.mean.reshape(row.shape).numpy(), k))
    return Cell(
        lines=[
            {"row": row, "prompt": prompt, "seed": batch.seed}
            for row, prompt in zip(batch.rows, batch.prompts, strict=True)
        ],
        arrays={
            "steps": _top(by_step, k).transpose(2, 0, 1, 3),
            "whole": np.stack([_top(one.mean(1), k) for one in found]).transpose(2, 1, 0, 3),
            "running": np.stack(running),
            "score": score,
        },
    )


def _top(scores: np.ndarray, k: int) -> np.ndarray:
    """The k channels with the highest scores, [..., k]; equal scores go to the lower channel."""
    return np.argsort(-scores, axis=-1, kind="stable")[..., :k].astype(np.int32)


def _add(seen: RunningStats, score: np.ndarray) -> None:
    seen.update(torch.from_numpy(score).flatten(1))


def stable_after(running: Sequence[float], stable: float = STABLE) -> int | None:
    """After how many prompts a running set stays as it is: SPARK's stopping rule.

    >>> stable_after([0.5, 0.95, 0.8, 0.9, 1.0])
    5

    Returns the least number of prompts from which on every overlap is at least ``stable``, or None if the last is not.

    running: overlap of the aggregate over 2, 3, ... prompts with the one before.
    stable: overlap that counts as stable.
    """
    below = [i for i, overlap in enumerate(running) if overlap < stable]
    first = below[-1] + 1 if below else 0
    return None if first == len(running) else first + 2


def _compare_by_site(
    settings: Mapping[str, Any], images: pd.DataFrame, steps: np.ndarray, whole: np.ndarray
) -> pd.DataFrame:
    """For every image and site, the mean overlap of its set with each kind of others.

    settings: settings of the study.
    images: row, prompt and seed of every image.
    steps: sets of single steps, [image, site, s, k].
    whole: sets over all steps, [image, site, score, k].
    """
    sets, found = whole[:, :, 0], []  # [images, sites, k]

    def add(over: str, rows: Any, jaccard: np.ndarray, **names: str) -> None:
        lines = images.iloc[list(rows)].loc[lambda p: p.index.repeat(len(settings["sites"]))].reset_index(drop=True)
        found.append(lines.assign(over=over, site=settings["sites"] * len(rows), jaccard=jaccard.ravel(), **names))

    for over, same in (("prompts", "seed"), ("seeds", "row")):
        for rows in images.groupby(same, sort=False).indices.values():
            if len(rows) > 1:
                add(over, rows, _overlap_with_others(sets[rows].swapaxes(0, 1)).T)
    for row in range(len(images)):
        if steps.shape[2] > 1:
            add("steps", [row], _overlap_with_others(steps[row]).mean(1))
        if len(settings["sites"]) > 1:
            add("sites", [row], _overlap_with_others(sets[row]))
        for i, other in enumerate(settings["scores"][1:], start=1):
            add("scores", [row], overlaps(sets[row], whole[row, :, i]), a=settings["scores"][0], b=other)
    return pd.concat(found, ignore_index=True).reindex(columns=COLUMNS) if found else pd.DataFrame(columns=COLUMNS)


def _overlap_with_others(sets: np.ndarray) -> np.ndarray:
    """Every set's mean overlap with the others: [..., m, k] -> [..., m]."""
    every = overlaps(sets[..., :, None, :], sets[..., None, :, :])
    return (every.sum(-1) - 1) / (sets.shape[-2] - 1)


def _compare_pairs(settings: Mapping[str, Any], steps: np.ndarray, whole: np.ndarray) -> pd.DataFrame:
    """The overlap of every two steps, averaged over images and sites, and of every two sites, over images."""
    between_steps = np.mean([overlaps(one[:, :, None], one[:, None]).mean(0) for one in steps], 0)
    between_sites = np.mean([overlaps(one[:, None], one[None]) for one in whole[:, :, 0]], 0)
    return pd.concat(
        [
            _pair_rows("step x step", range(steps.shape[2]), between_steps),
            _pair_rows("site x site", settings["sites"], between_sites),
        ],
        ignore_index=True,
    )


def _pair_rows(over: str, names: Sequence[Any], matrix: np.ndarray) -> pd.DataFrame:
    names = list(names)
    return pd.DataFrame(
        {"over": over, "a": np.repeat(np.array(names, object), len(names)), "b": names * len(names)}
        | {"jaccard": matrix.ravel()}
    )


def _compare_successive(images: pd.DataFrame, running: np.ndarray) -> pd.DataFrame:
    """For every seed the overlap of each aggregate with the one before, averaged over sites; a: prompts so far."""
    found = []
    for rows in images.groupby("seed", sort=False).indices.values():
        lines = images.iloc[rows[1:]].assign(over="running", a=range(2, len(rows) + 1))
        found.append(lines.assign(jaccard=overlaps(running[rows[1:]], running[rows[:-1]]).mean(1)))
    return pd.concat(found, ignore_index=True)


def _notes(
    settings: Mapping[str, Any], summary: pd.DataFrame, settling: pd.DataFrame, running: np.ndarray
) -> list[str]:
    notes = [
        describe_k(settings["k"], settings["width"])
        + f"; two random sets of {settings['k']} overlap by {summary['chance'].iloc[0]:.3f}"
    ]
    after = [
        stable_after(one["jaccard"].tolist(), settings["stable"]) for _, one in settling.groupby("seed", sort=False)
    ]
    what = f"the set of the running mean (overlap of successive aggregates at {settings['stable']:g} or above)"
    if not after:
        notes.append("one prompt cannot tell whether the set is stable over prompts")
    elif len(settled := [n for n in after if n is not None]) < len(after):
        notes.append(f"{what} is not stable at the last of {len(settings['prompts'])} prompts for some seed")
    else:
        notes.append(f"{what} is stable from prompt {max(settled)} of {len(settings['prompts'])} on, for every seed")
    channels, counts = np.unique(running[-1], return_counts=True)
    recurring = channels[2 * counts >= len(running[-1])]
    notes.append(
        f"channels in the last aggregate at half of the sites or more: {', '.join(map(str, recurring)) or 'none'}"
    )
    return notes
