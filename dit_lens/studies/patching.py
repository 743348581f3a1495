"""Causal sweeps: which of a source's activations, put into a target, make it draw the source; tried and estimated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
from scipy.stats import pearsonr, spearmanr
from torch import Tensor

from dit_lens.analysis.clusters import segment
from dit_lens.core.request.ops import Branch, Op, Read
from dit_lens.errors import OpError, PromptError, nearest
from dit_lens.instruments.gradients import (
    THROUGH,
    PairMetric,
    attribution,
    check_differentiable,
    check_latents,
    nearness,
)
from dit_lens.instruments.latents import autoencoder, decode, tokens_of
from dit_lens.studies.parts.patches import Patch, by_group, by_head, by_region, by_step, chunks
from dit_lens.studies.shared.arguments import as_pairs, as_seeds, check_k, share_of_width
from dit_lens.studies.shared.arms import DRAWS, kept_scores, score_ops, sets_of
from dit_lens.studies.shared.cells import Cell
from dit_lens.studies.shared.checkpoints import Cells
from dit_lens.studies.shared.judges import Judge, judge_for, judged
from dit_lens.studies.shared.result import Result, readable, summarise

if TYPE_CHECKING:
    from dit_lens.analysis.channels import ChannelSet
    from dit_lens.core.request.ops import Pattern, Steps
    from dit_lens.core.runs.run import Run
    from dit_lens.instruments.gradients import Through
    from dit_lens.lens import DiTLens

Over = Literal["block x step", "block x channel group", "block x head", "token region"]
OVER = ("block x step", "block x channel group", "block x head", "token region")
ROWS = 16
_ENDS = ("source", "target")


def patching(
    lens: DiTLens,
    pairs: Sequence[tuple[str, str]],
    *,
    over: Over = "block x step",
    metric: PairMetric = nearness,
    attribute: Sequence[Through] = THROUGH,
    seeds: int | Sequence[int] = (0,),
    site: Pattern | None = None,
    steps: Steps = None,
    branch: Branch = "cond",
    k: int = 12,
    draws: int = DRAWS,
    score: str = "|mean|",
    tiles: int = 4,
    judge: Judge | None = None,
    batch_size: int = ROWS,
    out: str | Path | None = None,
    **call: Any,
) -> Result:
    """Puts a source's activations into its target, one cell of a map at a time, and measures how far that carries.

    >>> from dit_lens import DiTLens
    >>> pair = (
    ...     "a big red circle left on a plain blue background",
    ...     "a small white cross right on a plain green background",
    ... )
    >>> result = patching(DiTLens.toy(), [pair], site="blocks[0:3].img", batch_size=4, num_inference_steps=2)
    >>> result.summary.pivot(index="row", columns="column", values="effect").shape  # blocks x steps
    (3, 2)

    Denoising in the sense of TransformerLens: source (clean) and target (corrupt) are rows of one batch from the same
    noise, and the target's activations are replaced by the source's in lockstep. over: what a cell of the map swaps:

    - "block x step": a block's whole output at one step;
    - "block x channel group": the source's top-k channels of one block, bottom, random (``draws`` of them) or the rest;
    - "block x head": one head's output (``attn.z``) in one block;
    - "token region": one of ``tiles`` x ``tiles`` parts of the grid, or what is inside or outside the source's subject
      (K-means of its massive channels), in all blocks of ``site``.

    site: by default the image stream of every block. steps: the columns of "block x step"; elsewhere the steps at which
    a cell swaps; all by default. ``effect`` is the metric's way from the untouched target (0) to the source (1).
    metric: fn(latents [m, ...], source [...], target [...]) -> [m], of final latents in the pipeline's own form;
    :func:`nearness` by default. judge: ``fn(image, prompt) -> {"fidelity": number}``, of either
    prompt as ``says_source`` and ``says_target``; toys read scenes back by themselves.

    attribute: attribution patching beside it (see :func:`attribution`): through "run" of the same
    metric, through "step" of the nearness of what each step predicts; () for none. The notes say how well it agrees
    with the swaps; :func:`agreement` as a table.

    batch_size: rows that run together at most, the source among them; cells of one step share a batch that starts from
    the untouched run's latents at that step. All batches have equally many rows. out: a folder for finished cells, from
    which the same call goes on. Images are kept of the untouched pair and of the cells of highest and lowest effect.
    """
    pairs = as_pairs(pairs)
    _check(pairs, over, attribute, batch_size, tiles, call)
    seeds = as_seeds(seeds)
    sites = lens.sites(("blocks.*.img.attn.z" if over == "block x head" else "blocks.*.img") if site is None else site)
    judge = judge_for(lens, [prompt for pair in pairs for prompt in pair], judge)
    when, plan = lens.planned(list(pairs[0]), **call)
    sweep = Sweep(lens, over, tuple(sites), tuple(when.select(steps)), branch, k, draws, score, tiles, metric, judge)
    sweep.check(pairs[0], plan.program["expected"], attribute, call)
    settings = {
        "pairs": pairs,
        "over": over,
        "metric": metric,
        "attribute": list(attribute),
        "seeds": seeds,
        "site": sites,
        "steps": list(sweep.steps),
        "branch": branch,
        "k": k,
        "draws": draws,
        "score": score,
        "tiles": tiles,
        "judge": judge,
        "batch_size": batch_size,
        "call": call,
        "width": lens.anatomy.width,
    }
    sizes = [len(some) for some in chunks(sweep.patches(None, 0), batch_size - 1)]
    total = len(pairs) * len(seeds) * (1 + len(attribute) + len(sizes))
    with Cells("patching", settings, lens=lens, total=total, out=out) as cells:
        for number, pair in enumerate(pairs):
            for seed in seeds:
                trial = Trial(sweep, number, pair, seed, 1 + max(sizes), call)
                clean = cells.get(f"{number}/{seed}/clean", trial.clean)
                shares: dict[str, dict[str, np.ndarray]] = {
                    through: cells.get(f"{number}/{seed}/{through}", partial(trial.attributed, through, clean)).arrays
                    for through in attribute
                }
                for i, some in enumerate(chunks(sweep.patches(clean, seed), max(sizes))):
                    cells.get(f"{number}/{seed}/{i}", partial(trial.patched, some, clean, shares))
        return cells.result()


@dataclass(frozen=True)
class Sweep:
    """What is swapped, and how it is measured; the same for every pair."""

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
        """Raises what would go wrong, before anything runs."""
        check_latents(self.lens.pipe)
        if attribute:
            check_differentiable(self.lens.pipe)
            if self.branch == "both":
                raise OpError("branch='both': attribution is of one branch. Choose it, or pass attribute=().")
        autoencoder(self.lens.pipe)
        if self.scored:
            check_k(self.lens, self.scored, [self.k])
        if self.over == "block x channel group" and self.draws < 1:
            raise OpError(f"draws={self.draws} leaves no random channels to compare with. Take 10 or more.")
        if self.over == "token region" and (grid is None or self.tiles > min(grid)):
            size = "is not known before it runs" if grid is None else f"is {' x '.join(map(str, grid))} tokens"
            raise OpError(f"tiles={self.tiles}: the grid of this call {size}. Pass height= and width=, or fewer tiles.")
        swaps: list[Op] = [patch.op(1, self.branch) for patch in self.patches(None, 0)]
        self.lens.cost(list(pair), [*swaps, *self.reads], **call)

    @property
    def reads(self) -> list[Read]:
        """What the untouched run is read for."""
        if not self.scored:
            return []
        tokens = [Read(self.scored, steps=-1, rows=0, name="tokens")] if self.over == "token region" else []
        return [*score_ops(self.scored, self.score), *tokens]

    def patches(self, clean: Cell | None, seed: int) -> list[Patch]:
        """The cells of the map, for the pair whose untouched run is ``clean``; without one, as many cells."""
        if self.over == "block x step":
            return by_step(self.sites, self.steps)
        if self.over == "block x head":
            return by_head({site: self.lens.heads(site) for site in self.sites}, self.steps)
        if self.over == "token region":
            side = [self.tiles] * 2
            subject = np.zeros(side, bool) if clean is None else clean.arrays["subject"]
            return by_region(self.sites, self.steps, subject, self.tiles)
        return by_group(None if clean is None else self.top(clean), self.sites, self.steps, self.draws, seed)

    def top(self, clean: Cell) -> ChannelSet:
        """The source's massive channels, from its untouched run."""
        scores = {name: value for name, value in clean.arrays.items() if "/" in name}
        return sets_of(scores, self.k, self.score)[0]


@dataclass(frozen=True)
class Trial:
    """One pair from one seed. rows: of every batch: the source, then targets."""

    sweep: Sweep
    number: int
    pair: tuple[str, str]
    seed: int
    rows: int
    call: Mapping[str, Any]

    def draw(self, ops: Sequence[Op], **how: Any) -> Run:
        """A batch: the source, and its target in every other row."""
        source, target = self.pair
        prompts = [source, *[target] * (self.rows - 1)]
        return self.sweep.lens.run(prompts, ops, seed=self.seed, output_type="latent", **how, **self.call)

    @cached_property
    def untouched(self) -> Run:
        """The run from which every batch of patches starts."""
        return self.draw(self.sweep.reads, record=True)

    def clean(self) -> Cell:
        """The untouched pair: its latents, its images, and what the patches are made of."""
        sweep, run = self.sweep, self.untouched
        latents = _latents(run)
        cell = Cell(arrays={"latents": latents[:2].numpy()})
        cell.arrays["ends"] = self._ends(latents[:2])
        if sweep.scored:
            cell.arrays |= kept_scores(run, 1)
        if sweep.over == "token region":
            (name,) = sweep.scored
            tokens = run["tokens"][name][-1, 0].float().numpy()
            cell.arrays["subject"] = segment(tokens[:, list(sweep.top(cell)[name])], run.grid).mask
            cell.masks[f"{self.number}/{self.seed}"] = cell.arrays["subject"]
        floor = np.abs(self._effects(latents[1:], cell)).max()
        for end, image, effect in zip(("source", "target"), self._images(run, [0, 1]), (1.0, floor), strict=True):
            cell.images[f"{self.number}/{self.seed}/{end}"] = image
            cell.lines.append(self._line(("untouched", end, 0), effect=effect, **self._says(image)))
        return cell

    def attributed(self, through: Through, clean: Cell) -> Cell:
        """What swaps would do to the effect, to first order: channels/site -> [s, d], tokens/site -> [s, n]."""
        sweep = self.sweep
        found = attribution(
            sweep.lens,
            *self.pair,
            sweep.sites,
            metric=sweep.metric if through == "run" else nearness,
            through=through,
            steps=sweep.steps,
            branch=sweep.branch,
            seed=self.seed,
            **self.call,
        )
        parts = {"channels": found.channels, "tokens": found.tokens}
        way = _way(clean) if through == "run" else 1.0
        return Cell(
            arrays={
                f"{part}/{site}": (value / way).numpy()
                for part, values in parts.items()
                for site, value in values.items()
            }
        )

    def patched(self, some: Sequence[Patch], clean: Cell, shares: Mapping[str, Mapping[str, np.ndarray]]) -> Cell:
        """One batch: a patch in every row below the source; rows that are left over stay untouched."""
        sweep, cell = self.sweep, Cell()
        run = self.draw([patch.op(i, sweep.branch) for i, patch in enumerate(some, 1)], prefix=self.untouched)
        effects = self._effects(_latents(run)[1 : 1 + len(some)], clean)
        extremes = {int(effects.argmin()), int(effects.argmax())}
        shown = sorted(extremes) if sweep.judge is None else list(range(len(some)))
        images = dict(zip(shown, self._images(run, [1 + i for i in shown]), strict=True))
        for i, (patch, effect) in enumerate(zip(some, effects, strict=True)):
            guessed = {
                f"attribution_{through}": patch.attributed(share, sweep.steps) for through, share in shares.items()
            }
            says = self._says(images[i]) if i in images else {}
            cell.lines.append(
                self._line((patch.row, patch.column, patch.draw), effect=float(effect), **guessed, **says)
            )
            if i in extremes:
                cell.images[f"{self.number}/{self.seed}/{patch.row}/{patch.column}/{patch.draw}"] = images[i]
        return cell

    def _ends(self, latents: Tensor) -> np.ndarray:
        """The metric of the untouched source and target; OpError where it does not tell them apart."""
        ends = self.sweep.metric(latents, latents[0], latents[1]).detach().double().numpy()
        if ends.shape != (2,) or not np.isfinite(ends).all() or ends[0] == ends[1]:
            raise OpError(
                f"metric= must give one number a row and tell the source from the target; it gave {ends.tolist()} for "
                "the two."
            )
        return ends

    def _effects(self, latents: Tensor, clean: Cell) -> np.ndarray:
        """How far rows have come: 0 is the untouched target, 1 the source."""
        source, target = torch.from_numpy(clean.arrays["latents"])
        found = self.sweep.metric(latents, source, target).detach().double().numpy()
        return (found - clean.arrays["ends"][1]) / _way(clean)

    def _images(self, run: Run, rows: Sequence[int]) -> list[Any]:
        lens = self.sweep.lens
        return decode(lens, tokens_of(lens, run.latents, run.grid)[list(rows)], run.grid)

    def _says(self, image: Any) -> dict[str, float]:
        judge = self.sweep.judge
        found = {f"says_{end}": judged(judge, image, prompt) for end, prompt in zip(_ENDS, self.pair, strict=True)}
        return {name: numbers["fidelity"] for name, numbers in found.items() if "fidelity" in numbers}

    def _line(self, where: tuple[str | int, str | int, int], **measures: Any) -> dict[str, Any]:
        place = dict(zip(("row", "column", "draw"), where, strict=True))
        return {"prompt": " -> ".join(self.pair), "pair": self.number, "seed": self.seed, **place, **measures}


def _way(clean: Cell) -> float:
    """How much larger the metric is at the source than at the target."""
    source, target = clean.arrays["ends"]
    return float(source - target)


def _latents(run: Run) -> Tensor:
    """Final latents; the study has checked that the pipeline returns them."""
    latents: Any = run.latents
    return latents.float()


def _check(
    pairs: Sequence[tuple[str, str]],
    over: str,
    attribute: Sequence[str],
    batch_size: int,
    tiles: int,
    call: Mapping[str, Any],
) -> None:
    """What is wrong with the arguments whatever the model."""
    if same := [source for source, target in pairs if source == target]:
        raise PromptError(f"source and target are both {same[0]!r}, so no patch can move one to the other.")
    if over not in OVER:
        raise OpError(f"over={over!r} does not exist.{nearest(str(over), OVER)}")
    for through in attribute:
        if through not in THROUGH:
            raise OpError(f"attribute= knows no {through!r}.{nearest(str(through), THROUGH)}")
    if batch_size < 2:
        raise OpError(f"batch_size={batch_size} has no room for the source and a target. Take at least 2.")
    if tiles < 1:
        raise OpError(f"tiles={tiles} divides nothing. Take at least 1.")
    for name in ("output_type", "num_images_per_prompt", "prompt_embeds"):
        if name in call:
            raise PromptError(f"{name}= cannot be used here: every row is one latent of one prompt. Leave it out.")


def agreement(table: pd.DataFrame) -> pd.DataFrame:
    """How well attribution foretells the effects of patches, over the cells of a map.

    >>> table = pd.DataFrame({"prompt": "a", "seed": 0, "effect": [0.0, 1.0, 3.0], "attribution_run": [0.0, 1.0, 2.0]})
    >>> agreement(table)[["attribution", "cells", "pearson", "spearman"]].round(3).values.tolist()
    [['run', 3, 0.982, 1.0]]

    table: of studies.patching. One line per attribution: cells of a map, n maps (pairs x seeds), and the correlations
    (missing where a side is constant), averaged over maps, each with _low and _high.
    """
    cells = table[table["row"] != "untouched"] if "row" in table else table
    lines = []
    for _, one in cells.groupby(["prompt", "seed"], sort=False):
        for name in (name for name in one if str(name).startswith("attribution_")):
            both = one[["effect", name]].to_numpy(float)
            told = bool((np.ptp(both, axis=0) > 0).all()) and len(both) > 1
            lines.append(
                {
                    "prompt": one["prompt"].iloc[0],
                    "attribution": str(name).removeprefix("attribution_"),
                    "cells": len(both),
                    "pearson": float(pearsonr(*both.T).statistic) if told else np.nan,
                    "spearman": float(spearmanr(*both.T).statistic) if told else np.nan,
                }
            )
    return (
        summarise(pd.DataFrame(lines), ("attribution", "cells"), ("pearson", "spearman")) if lines else pd.DataFrame()
    )


def assemble(settings: Mapping[str, Any], cells: Sequence[Cell]) -> Result:
    """The result of the cells so far."""
    table = pd.DataFrame([line for cell in cells for line in cell.lines])
    patched = table[table["row"] != "untouched"]
    measures = [name for name in ("effect", "says_source", "says_target", *_attributions(settings)) if name in table]
    images = {name: image for cell in cells for name, image in cell.images.items()}
    return Result(
        "patching",
        table,
        summarise(patched, ("row", "column"), measures).assign(over=settings["over"]),
        dict(settings),
        {name: image for name, image in images.items() if name in _shown(table)},
        {name: mask for cell in cells for name, mask in cell.masks.items()},
        _notes(table, settings),
    )


def _attributions(settings: Mapping[str, Any]) -> list[str]:
    return [f"attribution_{through}" for through in settings["attribute"]]


def _shown(table: pd.DataFrame) -> set[str]:
    """The names of the images that a result keeps: the untouched pairs, and their highest and lowest cells."""
    names = {f"{pair}/{seed}/{end}" for pair, seed in table[["pair", "seed"]].to_numpy().tolist() for end in _ENDS}
    for (pair, seed), one in table[table["row"] != "untouched"].groupby(["pair", "seed"]):
        for i in (one["effect"].idxmin(), one["effect"].idxmax()):
            names.add("/".join(map(str, (pair, seed, *one.loc[i, ["row", "column", "draw"]]))))
    return names


def _notes(table: pd.DataFrame, settings: Mapping[str, Any]) -> list[str]:
    untouched, patched = (table[(table["row"] == "untouched") == wanted] for wanted in (True, False))
    notes = []
    if settings["over"] == "block x channel group":
        notes.append(share_of_width(settings["k"], settings["width"]))
    floor = untouched.loc[untouched["column"] == "target", "effect"].max()
    notes.append(f"noise floor: equal rows of one batch differ by an effect of {floor:.1g}")
    if "says_source" in untouched:
        says = untouched.groupby("column")["says_source"].mean()
        notes.append(
            f"untouched images say the source's prompt: sources {says['source']:.2f}, targets {says['target']:.2f}"
        )
    notes += [
        f"attribution through the {line['attribution']} agrees with patching over {line['cells']} cells: Pearson "
        f"{line['pearson']}, Spearman {line['spearman']}"
        for line in readable(agreement(patched)).to_dict("records")
    ]
    return notes
