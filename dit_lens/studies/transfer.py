"""Claim 3: are massive channels transferable? Move them from one generation into another, in lockstep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from dit_lens.arguments.lists import as_seeds
from dit_lens.core.request.ops import Branch
from dit_lens.plots import transfer_figure
from dit_lens.studies.parts.blends import explain_no_prompt_blend
from dit_lens.studies.parts.doses import find_off
from dit_lens.studies.parts.transport import ChannelsFrom, PairBatch, plan_transport
from dit_lens.studies.parts.transport_cells import run_transport
from dit_lens.studies.parts.transport_levels import add_shares, describe_levels
from dit_lens.studies.parts.transport_measures import MATCHED, add_matched_measures
from dit_lens.studies.shared.arguments import as_pairs, describe_k, find_meant
from dit_lens.studies.shared.arms import DRAWS
from dit_lens.studies.shared.batches import PromptBatch, StudyCall, divide_call, make_batches
from dit_lens.studies.shared.cells import Cell
from dit_lens.studies.shared.checkpoints import StudyCheckpoints
from dit_lens.studies.shared.judges import Judge, choose_judge
from dit_lens.studies.shared.protocols import with_protocols
from dit_lens.studies.shared.registry import study
from dit_lens.studies.shared.result import Result
from dit_lens.studies.shared.tables import compare_arms, summarise

if TYPE_CHECKING:
    from dit_lens.core.request.ops import Mask, Pattern, Steps
    from dit_lens.lens import DiTLens
    from dit_lens.studies.parts.transport import MaskFrom

_KEY = ["prompt", "seed", "k", "arm", "draw", "masked", "strength"]
_MEASURES = (
    "to_source",
    "to_target",
    "to_others",
    "to_mean",
    "to_grey",
    "specificity",
    "share",
    "inside",
    "outside",
    "fidelity_source",
    "fidelity_target",
    "readable",
    "fidelity_gain",
    "reached",
    *(f"matched_{name}" for name in MATCHED),
    "direct_share",
    "energy_share",
    "distinct",
    "dose_intended",
    "dose",
)


def assemble(settings: Mapping[str, Any], cells: Sequence[Cell], name: str = "transfer") -> Result:
    """The result of the cells so far.

    settings: settings of the study.
    cells: its finished cells.
    name: name of the study.
    """
    lines = [line for cell in cells for line in cell.lines]
    measured = [line for line in lines if "to_source" in line]
    table = pd.DataFrame(measured, columns=None if measured else [*_KEY, *_MEASURES, "redrawn"])
    direct = pd.DataFrame([line for line in lines if "direct_share" in line])
    table = add_matched_measures(add_shares(table))
    if len(direct):
        table = table.merge(direct, how="left", on=_KEY)
    measures = [measure for measure in _MEASURES if measure in table]
    summary = summarise(table, ("k", "arm", "masked", "strength"), measures)
    edits = table[table["arm"].isin(["top", "bottom", "random", "energy-matched"])]
    judged = [measure for measure in ("to_source", "specificity") if measure in measures]
    if len(contrasts := compare_arms(edits, ("k", "masked", "strength"), judged)):
        summary = summary.merge(contrasts, how="left", on=["k", "arm", "masked", "strength"])
    return Result(
        name,
        table,
        summary,
        dict(settings),
        {key: image for cell in cells for key, image in cell.images.items()},
        {key: mask for cell in cells for key, mask in cell.masks.items()},
        _notes(table, settings),
    )


@study(
    question="Claim 3: can they be moved?",
    assemble=assemble,
    figure=transfer_figure,
)
@with_protocols
def transfer(
    lens: DiTLens,
    pairs: Sequence[tuple[str, str]],
    *,
    k: int | Sequence[int] = 12,
    strengths: float | Sequence[float] = (0.25, 0.5, 0.75, 1.0),
    seeds: int | Sequence[int] = (0,),
    draws: int = DRAWS,
    channels_from: ChannelsFrom = "source",
    mask_from: MaskFrom | Mask = "source",
    mask_block: int | None = None,
    score: str = "|mean|",
    site: Pattern = "blocks.*.img",
    steps: Steps = None,
    branch: Branch = "cond",
    judge: Judge | None = None,
    batch_size: int | None = None,
    out: str | Path | None = None,
    **call: Any,
) -> Result:
    """Moves k channels of each source into its target, X_target <- X_target (1 - M) + X_source M.

    >>> from dit_lens import DiTLens
    >>> pair = (
    ...     "a big red circle left on a plain blue background",
    ...     "a small white cross right on a plain green background",
    ... )
    >>> result = transfer(DiTLens.toy(), [pair], k=4, strengths=[1.0], mask_from=None, draws=1, num_inference_steps=1)
    >>> sorted(result.summary["arm"])  # doctest: +NORMALIZE_WHITESPACE
    ['all', 'bottom', 'ceiling', 'energy-matched', 'grey', 'latent-blend', 'mean-picture', 'pixel-blend',
     'prompt-blend', 'random', 'top', 'top-early', 'top-readout', 'untouched']

    Source and target run as two rows of one batch from the same noise. Arms, each at every strength, everywhere and
    inside the mask:

    - top: the channels; bottom, random and energy-matched (``draws`` of each, of the last at most 3): as many others;
      all: every channel;
    - top-early: top, without the last quarter of the blocks. top-readout: top, swapped only where the final norm
      reads, so that nothing but the final norm and projection sees it;
    - pixel-blend and latent-blend: the two images, or their final latents, blended; prompt-blend: the target drawn
      from embeddings between the two prompts' (everywhere only; left out where a pipeline takes no embeddings).

    And once for each pair, at no strength of their own, what nearness is worth:

    - ceiling: every channel, and what modulates the final norm (``final.img.mod``), in full: all there is to move. At
      all image blocks and steps it is the source itself;
    - mean-picture and grey: the mean of all untouched pictures, and mid grey: what a collapse would look like.

    The table has, per image, rmse (0 to 255) to the untouched source and target, to the sources of other pairs under
    the same seed (``to_others``, on average; none that shows its own source or target), to the mean picture and to
    grey; ``specificity``, to_others - to_source: how much nearer it is to its own source than to others, which of a
    collapse is 0 on average; ``share``, how much nearer to the source it comes than the untouched target, of what the
    ceiling does (missing where the ceiling comes less than a fifth of the way). Whether channels are movable is told by
    the specificity of top, against every control and both collapses. Then the change inside and outside the mask (the
    source's, if there is none), ``fidelity_source`` and ``fidelity_target``: how far the judge finds either prompt in
    it, and ``fidelity_gain``, what it finds more of the source than in the untouched target, in pictures that the judge
    can read. ``matched_*`` are the same arm's measures where it comes as near to the source as top does at
    that strength; ``reached`` says whether it ever does. In rmse no image is kept better at equal distance than a pixel
    blend (the triangle inequality), so compare what the images show. ``direct_share``, of top and random at full
    strength: along the target's own trajectory, how much of the change of the predicted velocity remains when the
    channels are swapped for the final norm and projection alone (1 - squared error; 1: a transport that is read out and
    no more). ``distinct`` counts the channels an arm touches at any site. ``dose``, beside the strength as
    ``dose_intended``, is how much of the way to the source the swaps of an arm move its channels, at their first step
    (conditional branch), averaged over sites: <moved, w> / |w|^2, where w leads from where the channels would be
    without the swaps here and at earlier blocks to the source's, and moved is what these swaps changed together.

    lens: lens on the model.
    pairs: pairs (source prompt, target prompt), no pair twice; without several there is nothing to tell a transport
      from a collapse.
    k: one or several numbers of channels, up to the width; those above half of it have no controls.
    strengths: one or several in (0, 1], at every site: after n blocks a residual stream keeps (1 - strength)^n of what
      the target had there, so that half the strength at all blocks is nearly all of it.
    seeds: seeds of the noise; every pair is run with each.
    draws: number of random controls.
    channels_from: whose top channels are moved; "union" moves both.
    mask_from: whose subject is the mask: K-means of the row's own values of the moved channels (of the smallest k) at
      ``mask_block``, at the last step; "both" is the union; or a drawing, bool [H, W] of any size; None leaves masked
      arms out.
    mask_block: block whose tokens are clustered for the mask; two thirds down by default.
    score: reduction by which channels are ranked, or "relevance": how much the prediction depends on them.
    site: sites whose channels are moved.
    steps: denoising steps at which they are moved; all by default.
    branch: "cond" or "both".
    judge: function (image, prompt) -> {"fidelity": number, ...}; toys read scenes back by themselves.
    batch_size: number of pairs that run together; all by default.
    out: folder for finished cells, from which the same call continues.
    call: other arguments of the pipeline.

    Source: arXiv 2605.13974; the controls are ours.
    """
    pairs = as_pairs(pairs)
    seeds = as_seeds(seeds)
    prompts = [prompt for pair in pairs for prompt in pair]
    divided = divide_call(lens, call, len(prompts))
    judge = choose_judge(lens, prompts, judge)
    transport = plan_transport(
        prompts, call, lens=lens, k=k, strengths=strengths, draws=draws, score=score, site=site, steps=steps,
        branch=branch, channels_from=channels_from, mask_from=mask_from, mask_block=mask_block, judge=judge,
    )  # fmt: skip
    why = explain_no_prompt_blend(lens, pairs[0], divided.of_pairs([0]))
    transport = replace(transport, prompt_blend=not why)
    settings = {"pairs": pairs, "seeds": seeds, "batch_size": batch_size, "call": call, "no_prompt_blend": why}
    settings |= transport.settings()
    batches = [
        _make_pairs(pairs, batch, divided) for batch in make_batches([source for source, _ in pairs], seeds, batch_size)
    ]
    total = len(batches) * transport.cells_per_batch
    images = len(pairs) * len(seeds) * transport.images_per_pair
    meant = find_meant(lens, batches[0].prompts, batches[0].call, site, steps)
    with StudyCheckpoints("transfer", settings, lens=lens, total=total, out=out, meant=meant, images=images) as cells:
        run_transport(cells, transport, batches)
        return cells.result()


def _make_pairs(pairs: Sequence[tuple[str, str]], batch: PromptBatch, call: StudyCall) -> PairBatch:
    """Some of the pairs, source and target in turn. batch: the sources. call: for all pairs."""
    some = [pairs[i] for i in batch.rows]
    return PairBatch(
        key=batch.key,
        seed=batch.seed,
        numbers=batch.rows,
        prompts=tuple(prompt for pair in some for prompt in pair),
        labels=tuple(f"{source} -> {target}" for source, target in some),
        captions=batch.prompts,
        call=call.of_pairs(batch.rows),
    )


def _notes(table: pd.DataFrame, settings: Mapping[str, Any]) -> list[str]:
    notes = [describe_k(k, settings["width"]) for k in settings["k"]]
    whole = table[~table["masked"].astype(bool) & (table["strength"] == max(settings["strengths"]))]
    arms = whole.groupby(["k", "arm"], sort=False)
    if "distinct" in whole:
        touched = arms["distinct"].mean().dropna()
        notes.append("distinct channels touched at any site: " + _format_arms(touched[touched > 0], "{:.0f}"))
    if "direct_share" in table and table["direct_share"].notna().any():
        shares = arms["direct_share"].mean().dropna()
        notes.append("share of the change that is read out directly: " + _format_arms(shares, "{:.2f}"))
    if "dose" in table:
        top = table[(table["arm"] == "top") & ~table["masked"].astype(bool)]
        given = top.groupby("strength")[["dose_intended", "dose"]].mean().dropna()
        off = find_off(given)["dose"]
        if len(off):
            told = ", ".join(f"{strength:g} moves them {dose:.2f} of it" for strength, dose in off.items())
            notes.append(
                f"strengths are of every block, and blocks pass on: on the way to the source's channels, {told}"
            )
    matched = whole[whole["arm"] == "energy-matched"]
    if len(matched) and not matched["matched"].astype(bool).all():
        held = whole.groupby("arm")["energy_share"].mean()
        notes.append(
            f"no other k channels hold the energy of the top k: energy-matched has a share of "
            f"{held['energy-matched']:.3f}, top {held['top']:.3f}"
        )
    notes += describe_levels(table, settings.get("no_modulation", ""))
    notes.append(f"final latents drawn again differ from their images by rmse {table['redrawn'].max():.2g} at most")
    if settings.get("no_prompt_blend"):
        notes.append(f"no prompt-blend: {settings['no_prompt_blend']}")
    return notes


def _format_arms(values: pd.Series, form: str) -> str:
    parts = zip(values.index.to_list(), values.to_list(), strict=True)
    return ", ".join(f"{arm} (k={k}) {form.format(value)}" for (k, arm), value in parts)
