"""Causal sweeps: which of a source's activations, put into a target, make it draw the source; tried and estimated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from scipy.stats import pearsonr, spearmanr

from dit_lens.arguments.lists import as_seeds, check_once
from dit_lens.core.request.ops import Branch
from dit_lens.errors import OpError, PromptError, check_choice, nearest
from dit_lens.instruments.gradients import THROUGH, PairMetric, nearness
from dit_lens.plots import patching_figure
from dit_lens.studies.parts.patched_pair import ENDS, PatchedPair, PatchMap
from dit_lens.studies.parts.patches import chunk_patches
from dit_lens.studies.shared.arguments import as_pairs, check_draws, describe_k
from dit_lens.studies.shared.arms import DRAWS
from dit_lens.studies.shared.batches import divide_call
from dit_lens.studies.shared.cells import Cell
from dit_lens.studies.shared.checkpoints import StudyCheckpoints
from dit_lens.studies.shared.judges import Judge, choose_judge
from dit_lens.studies.shared.keys import ImageKey
from dit_lens.studies.shared.registry import study
from dit_lens.studies.shared.result import Result
from dit_lens.studies.shared.streams import make_stream
from dit_lens.studies.shared.tables import compare_arms, format_summary, summarise

if TYPE_CHECKING:
    from dit_lens.core.request.ops import Pattern, Steps
    from dit_lens.instruments.gradients import Through
    from dit_lens.lens import DiTLens

Over = Literal["block x step", "block x channel group", "block x head", "token region"]
OVER = ("block x step", "block x channel group", "block x head", "token region")
ROWS = 16


def assemble(settings: Mapping[str, Any], cells: Sequence[Cell]) -> Result:
    """The result of the cells so far."""
    table = pd.DataFrame([line for cell in cells for line in cell.lines])
    patched = table[table["row"] != "untouched"]
    attributions = [f"attribution_{through}" for through in settings["attribute"]]
    measures = [name for name in ("effect", "fidelity_source", "fidelity_target", *attributions) if name in table]
    shown = _choose_images(table)
    summary = summarise(patched, ("row", "column"), measures).assign(over=settings["over"])
    if settings["over"] == "block x channel group":
        groups = compare_arms(patched.rename(columns={"column": "arm"}), ("row",), ["effect"])
        if len(groups):
            summary = summary.merge(groups.rename(columns={"arm": "column"}), on=["row", "column"], how="left")
    return Result(
        "patching",
        table,
        summary,
        dict(settings),
        {name: image for cell in cells for name, image in cell.images.items() if name in shown},
        {name: mask for cell in cells for name, mask in cell.masks.items()},
        _notes(table, settings),
    )


@study(
    question="Where do they act?",
    assemble=assemble,
    figure=patching_figure,
)
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
    noise, and the target's activations are replaced by the source's at the same step. What a cell of the map swaps:

    - "block x step": a block's whole output at one step;
    - "block x channel group": the source's top-k channels of one block, bottom, random (``draws`` of them) or the rest;
    - "block x head": one head's output (``attn.z``) in one block;
    - "token region": one of ``tiles`` x ``tiles`` parts of the grid, or what is inside or outside the source's subject
      (K-means of its massive channels), in all blocks of ``site``.

    ``effect`` is how far the metric moves from the untouched target (0) to the source (1). ``fidelity_source`` and
    ``fidelity_target`` say how far the judge finds either prompt in an image. Beside the swaps stands what attribution
    patching (see :func:`attribution`) predicts: through "run" of the same metric, through "step" of the nearness of
    what each step predicts. The notes say how well it agrees with the swaps; :func:`agreement` as a table.

    The summary has means over pairs and seeds with their intervals, and of channel groups ``effect_top_minus``: by how
    much the top channels of a block do more than the others of the line, on the same pairs and seeds. Two pairs decide
    next to nothing: they find a difference of 12 standard deviations with a chance of 80 %, eight one of 1.2.

    Cells of one step share a batch that starts from the untouched run's latents at that step. All batches have equally
    many rows. Images are kept of the untouched pair and of the cells of highest and lowest effect.

    lens: lens on the model.
    pairs: pairs (source prompt, target prompt).
    over: what a cell of the map swaps.
    metric: function (latents [m, ...], source [...], target [...]) -> [m], of final latents in the pipeline's own form.
    attribute: "run", "step", both or neither: attribution patching beside the swaps.
    seeds: seeds of the noise; every pair is run with each.
    site: sites that are swapped; the image stream of every block by default.
    steps: columns of "block x step"; elsewhere the steps at which a cell swaps; all by default.
    branch: "cond" or "both".
    k: number of channels of a group.
    draws: number of random groups.
    score: reduction by which channels are ranked, or "relevance": how much the prediction depends on them.
    tiles: number of tiles along each side of the grid.
    judge: function (image, prompt) -> {"fidelity": number, ...}; toys read scenes back by themselves.
    batch_size: number of rows that run together at most, the source among them.
    out: folder for finished cells, from which the same call continues.
    call: other arguments of the pipeline.
    """
    pairs = as_pairs(pairs)
    _check(over, attribute, batch_size, tiles, call)
    check_draws(draws)
    seeds = as_seeds(seeds)
    sites = lens.sites(("blocks.*.img.attn.z" if over == "block x head" else "blocks.*.img") if site is None else site)
    judge = choose_judge(lens, [prompt for pair in pairs for prompt in pair], judge)
    divided = divide_call(lens, call, 2 * len(pairs), images=False)  # it draws latents
    first = divided.of_pairs([0])
    outline = lens.outline(list(pairs[0]), **first)
    patch_map = PatchMap(
        lens=lens,
        over=over,
        sites=tuple(sites),
        steps=tuple(sorted(outline.select(steps))),
        branch=branch,
        k=k,
        draws=draws,
        score=score,
        tiles=tiles,
        metric=metric,
        judge=judge,
    )
    patch_map.check(pairs[0], outline.grid, attribute, first)
    settings = {
        "pairs": pairs,
        "over": over,
        "metric": metric,
        "attribute": list(attribute),
        "seeds": seeds,
        "site": sites,
        "steps": list(patch_map.steps),
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
    sizes = [len(some) for some in chunk_patches(patch_map.list_patches(None, 0), batch_size - 1)]
    total = len(pairs) * len(seeds) * (1 + len(attribute) + len(sizes))
    images = len(pairs) * len(seeds) * ((1 + max(sizes)) * (1 + len(sizes)) + 2 * len(attribute))
    with StudyCheckpoints("patching", settings, lens=lens, total=total, out=out, images=images) as cells:
        for number, prompts in enumerate(pairs):
            for seed in seeds:
                pair = PatchedPair(
                    map=patch_map, number=number, prompts=prompts, seed=seed, rows=1 + max(sizes), call=divided
                )
                clean = cells.get(f"{number}/{seed}/clean", pair.run_clean)
                shares: dict[str, dict[str, np.ndarray]] = {
                    through: cells.get(f"{number}/{seed}/{through}", partial(pair.attribute, through, clean)).arrays
                    for through in attribute
                }
                for i, some in enumerate(
                    chunk_patches(patch_map.list_patches(clean, make_stream(seed, *prompts)), max(sizes))
                ):
                    cells.get(f"{number}/{seed}/{i}", partial(pair.run_patches, some, clean, shares))
        return cells.result()


def _check(
    over: str,
    attribute: Sequence[str],
    batch_size: int,
    tiles: int,
    call: Mapping[str, Any],
) -> None:
    """Raises what is wrong with the arguments, whatever the model.

    over: what a cell of the map swaps.
    attribute: attributions that are asked for.
    batch_size: number of rows that run together.
    tiles: number of tiles along each side of the grid.
    call: other arguments of the pipeline.
    """
    check_choice(over, OVER, "value of over")
    for through in attribute:
        if through not in THROUGH:
            raise OpError(f"attribute= knows no {through!r}.{nearest(str(through), THROUGH)}")
    check_once("attribute", attribute, "an attribution")
    if batch_size < 2:
        raise OpError(f"batch_size={batch_size} has no room for the source and a target. Take at least 2.")
    if tiles < 1:
        raise OpError(f"tiles={tiles} divides nothing. Take at least 1.")
    for name in ("output_type", "prompt_embeds"):
        if name in call:
            raise PromptError(f"{name}= cannot be used here: every row is one latent of one prompt. Leave it out.")


def agreement(table: pd.DataFrame) -> pd.DataFrame:
    """How well attribution predicts the effects of patches, over the cells of a map.

    >>> table = pd.DataFrame({"prompt": "a", "seed": 0, "effect": [0.0, 1.0, 3.0], "attribution_run": [0.0, 1.0, 2.0]})
    >>> agreement(table)[["attribution", "cells", "pearson", "spearman"]].round(3).values.tolist()
    [['run', 3, 0.982, 1.0]]

    Returns one row per attribution: number of cells of a map, n maps (pairs x seeds), and the correlations (missing if
    one side is constant), averaged over maps, each with _low and _high.
    table: the table of ``studies.patching``.
    """
    cells = table[table["row"] != "untouched"] if "row" in table else table
    lines = []
    for _, one in cells.groupby(["prompt", "seed"], sort=False):
        for name in (name for name in one if str(name).startswith("attribution_")):
            both = one[["effect", name]].to_numpy(float)
            varied = bool((np.ptp(both, axis=0) > 0).all()) and len(both) > 1
            lines.append(
                {
                    "prompt": one["prompt"].iloc[0],
                    "seed": one["seed"].iloc[0],
                    "attribution": str(name).removeprefix("attribution_"),
                    "cells": len(both),
                    "pearson": float(pearsonr(*both.T).statistic) if varied else np.nan,
                    "spearman": float(spearmanr(*both.T).statistic) if varied else np.nan,
                }
            )
    return (
        summarise(pd.DataFrame(lines), ("attribution", "cells"), ("pearson", "spearman")) if lines else pd.DataFrame()
    )


def _choose_images(table: pd.DataFrame) -> set[str]:
    """The keys of the images that a result keeps: the untouched pairs, and their highest and lowest cells."""
    runs = table[["pair", "seed"]].drop_duplicates().to_numpy().tolist()
    keys = {ImageKey(pair, seed, arm=end) for pair, seed in runs for end in ENDS}
    for _, one in table[table["row"] != "untouched"].groupby(["pair", "seed"]):
        for i in (one["effect"].idxmin(), one["effect"].idxmax()):
            pair, seed, row, column, draw = one.loc[i, ["pair", "seed", "row", "column", "draw"]]
            keys.add(ImageKey(pair, seed, row=row, column=column, draw=draw))
    return set(map(str, keys))


def _notes(table: pd.DataFrame, settings: Mapping[str, Any]) -> list[str]:
    untouched, patched = (table[(table["row"] == "untouched") == wanted] for wanted in (True, False))
    notes = []
    if settings["over"] == "block x channel group":
        notes.append(describe_k(settings["k"], settings["width"]))
    floor = untouched.loc[untouched["column"] == "target", "effect"].max()
    notes.append(f"noise floor: equal rows of one batch differ by an effect of {floor:.1g}")
    if "fidelity_source" in untouched:
        found = untouched.groupby("column")["fidelity_source"].mean()
        notes.append(
            f"untouched images say the source's prompt: sources {found['source']:.2f}, targets {found['target']:.2f}"
        )
    notes += [
        f"attribution through the {line['attribution']} agrees with patching over {line['cells']} cells: Pearson "
        f"{line['pearson']}, Spearman {line['spearman']}"
        for line in format_summary(agreement(patched)).to_dict("records")
    ]
    return notes
