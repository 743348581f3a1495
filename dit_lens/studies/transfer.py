"""Claim 3: are massive channels transferable? Move them from one generation into another, in lockstep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from dit_lens.core.request.ops import Branch
from dit_lens.studies.parts.blends import why_no_prompt_blend
from dit_lens.studies.parts.nearness import MATCHED, with_matched
from dit_lens.studies.parts.transport import ChannelsFrom, Lockstep, Transport, carry_out
from dit_lens.studies.shared.arguments import as_pairs, as_seeds, as_tuple, share_of_width
from dit_lens.studies.shared.arms import DRAWS
from dit_lens.studies.shared.cells import Cell
from dit_lens.studies.shared.checkpoints import Cells
from dit_lens.studies.shared.drawing import batches
from dit_lens.studies.shared.judges import Judge, judge_for
from dit_lens.studies.shared.protocols import with_protocols
from dit_lens.studies.shared.result import Result, summarise

if TYPE_CHECKING:
    from dit_lens.core.request.ops import Mask, Pattern, Steps
    from dit_lens.lens import DiTLens
    from dit_lens.studies.parts.transport import MaskFrom

_KEY = ["prompt", "seed", "k", "arm", "draw", "masked", "strength"]
_MEASURES = (
    "to_source",
    "to_target",
    "inside",
    "outside",
    "says_source",
    "says_target",
    "reached",
    *(f"matched_{name}" for name in MATCHED),
    "direct_share",
    "energy_share",
    "distinct",
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
    >>> result = transfer(DiTLens.toy(), [pair], k=4, strengths=[1.0], mask_from=None, draws=1, num_inference_steps=2)
    >>> sorted(result.summary["arm"])  # doctest: +NORMALIZE_WHITESPACE
    ['all', 'bottom', 'energy-matched', 'latent-blend', 'pixel-blend', 'prompt-blend', 'random', 'top', 'top-early',
     'top-readout', 'untouched']

    Source and target run as two rows of one batch from the same noise. Arms, each at every strength, everywhere and
    inside the mask:

    - top: the channels; bottom, random (``draws`` of them) and energy-matched: as many others; all: every channel;
    - top-early: top, without the last quarter of the blocks. top-readout: top, swapped only where the final norm
      reads, so that nothing but the final norm and projection sees it;
    - pixel-blend and latent-blend: the two images, or their final latents, blended; prompt-blend: the target drawn
      from embeddings between the two prompts' (everywhere only; left out where a pipeline takes no embeddings).

    pairs: (source prompt, target prompt). k: one or several sizes, up to the width; those above half of it have no
    controls. strengths: in (0, 1], at every site: after n blocks a residual stream keeps (1 - strength)^n of what the
    target had there, so that half the strength at all blocks is nearly all of it. channels_from: whose top channels are
    moved; "union" moves both. mask_from: whose subject is the mask: K-means of the row's own values of the moved
    channels (of the smallest k) at ``mask_block``, by default two thirds down, at the last step; "both" is the union;
    or a drawing, bool [H, W] of any size; None leaves masked arms out. branch: "cond" (default) or "both". batch_size:
    pairs that run together. out: a folder for finished cells, from which the same call goes on.

    The table has, per image, rmse (0 to 255) to the untouched source and target, the change inside and outside the
    mask (the source's, where there is none), and what the judge says of it as an image of either prompt.
    ``matched_*`` are the same arm's measures where it comes as near to the source as top does at that strength;
    ``reached`` says whether it ever does. In rmse no image is kept better at equal nearness than a pixel blend (the
    triangle inequality), so compare what the images say. ``direct_share``, of top and random at full strength: along
    the target's own trajectory, how much of the change of the predicted velocity remains when the channels are swapped
    for the final norm and projection alone (1 - squared error; 1: a transport that is read out and no more).
    ``distinct`` counts the channels an arm touches at any site. Source: arXiv 2605.13974; the controls are ours.
    """
    pairs = as_pairs(pairs)
    seeds = as_seeds(seeds)
    prompts = [prompt for pair in pairs for prompt in pair]
    ks = tuple(sorted(as_tuple(k)))
    judge = judge_for(lens, prompts, judge)
    transport = Transport(
        lens, ks, as_tuple(strengths), draws, score, site, steps, branch, channels_from, mask_from, mask_block, judge
    )
    transport.check(prompts, call)
    why = why_no_prompt_blend(lens, pairs[0], call)
    transport = replace(transport, prompt_blend=not why)
    settings = {"pairs": pairs, "seeds": seeds, "batch_size": batch_size, "call": call, "no_prompt_blend": why}
    parts = batches([source for source, _ in pairs], seeds, batch_size)
    total = len(parts) * transport.count
    with Cells("transfer", {**settings, **transport.settings()}, lens=lens, total=total, out=out) as cells:
        for part in parts:
            some = [pairs[i] for i in part.rows]
            batch = Lockstep(
                part.key,
                part.seed,
                part.rows,
                prompts=tuple(prompt for pair in some for prompt in pair),
                labels=tuple(f"{source} -> {target}" for source, target in some),
                captions=part.prompts,
                call=call,
            )
            carry_out(cells, transport, batch)
        return cells.result()


def assemble(settings: Mapping[str, Any], cells: Sequence[Cell], study: str = "transfer") -> Result:
    """The result of the cells so far."""
    lines = [line for cell in cells for line in cell.lines]
    measured = [line for line in lines if "to_source" in line]
    table = pd.DataFrame(measured, columns=None if measured else [*_KEY, *_MEASURES, "redrawn"])
    direct = pd.DataFrame([line for line in lines if "direct_share" in line])
    table = with_matched(table)
    if len(direct):
        table = table.merge(direct, how="left", on=_KEY)
    measures = [name for name in _MEASURES if name in table]
    return Result(
        study,
        table,
        summarise(table, ("k", "arm", "masked", "strength"), measures),
        dict(settings),
        {name: image for cell in cells for name, image in cell.images.items()},
        {name: mask for cell in cells for name, mask in cell.masks.items()},
        _notes(table, settings),
    )


def _notes(table: pd.DataFrame, settings: Mapping[str, Any]) -> list[str]:
    notes = [share_of_width(k, settings["width"]) for k in settings["k"]]
    whole = table[~table["masked"].astype(bool) & (table["strength"] == max(settings["strengths"]))]
    arms = whole.groupby(["k", "arm"], sort=False)
    if "distinct" in whole:
        touched = arms["distinct"].mean().dropna()
        notes.append("distinct channels touched at any site: " + _listed(touched[touched > 0], "{:.0f}"))
    if "direct_share" in table and table["direct_share"].notna().any():
        shares = arms["direct_share"].mean().dropna()
        notes.append("share of the change that is read out directly: " + _listed(shares, "{:.2f}"))
    matched = whole[whole["arm"] == "energy-matched"]
    if len(matched) and not matched["matched"].astype(bool).all():
        held = whole.groupby("arm")["energy_share"].mean()
        notes.append(
            f"no other k channels hold the energy of the top k: energy-matched has a share of "
            f"{held['energy-matched']:.3f}, top {held['top']:.3f}"
        )
    notes.append(f"final latents drawn again differ from their images by rmse {table['redrawn'].max():.2g} at most")
    if settings.get("no_prompt_blend"):
        notes.append(f"no prompt-blend: {settings['no_prompt_blend']}")
    return notes


def _listed(values: pd.Series, form: str) -> str:
    parts = zip(values.index.to_list(), values.to_list(), strict=True)
    return ", ".join(f"{arm} (k={k}) {form.format(value)}" for (k, arm), value in parts)
