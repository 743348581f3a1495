"""From masks to a result: how well every arm's masks fit the subject, and the subjects of other prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import pandas as pd

from dit_lens.analysis.clusters import permutation_p
from dit_lens.studies.parts.chosen_block import choose_halves, describe_choice
from dit_lens.studies.parts.clustering import score_masks
from dit_lens.studies.shared.arguments import describe_k
from dit_lens.studies.shared.cells import Cell
from dit_lens.studies.shared.keys import ImageKey
from dit_lens.studies.shared.result import Result
from dit_lens.studies.shared.tables import compare_arms, summarise

ARMS = ("top", "bottom", "random", "energy-matched", "all")
BASELINES = ("attention", "norm", "component")
NULLS = ("centre", "noisy latent", "x0")
COLUMNS = ("step", "block", "arm", "n", "iou", "low", "high", "chance", "iou_other_prompts", "p")
_GAPS = ("iou_gap", "iou_gap_low", "iou_gap_high", "iou_gap_p")
COLUMNS += (*_GAPS, "size", "degenerate", "energy_share")


def assemble(settings: Mapping[str, Any], cells: Sequence[Cell]) -> Result:
    """The result of the cells so far."""
    images = {name: image for cell in cells for name, image in cell.images.items()}
    masks = {name: mask for cell in cells for name, mask in cell.masks.items()}
    table = pd.DataFrame([line for cell in cells for line in cell.lines])
    if table.empty:
        return Result("organisation", table, pd.DataFrame(columns=list(COLUMNS)), dict(settings), images, masks)
    others, p = _compare_with_other_prompts(table, masks, settings["polarity"])
    pair = ["row", "seed", "step", "block"]
    top = table.loc[table["arm"] == "top", [*pair, "iou"]].rename(columns={"iou": "iou_gap"})
    table = table.assign(iou_other_prompts=others).merge(top, on=pair)
    table["iou_gap"] -= table["iou"]
    table["half"] = table["prompt"].map(choose_halves(table["prompt"]))
    readable = len(table[["row", "seed"]].drop_duplicates())
    notes = _notes(table, settings, len(images) - readable)
    table = table.drop(columns="row")
    return Result("organisation", table, _summarise(table, p), dict(settings), images, masks, notes)


def name_mask(row: int, seed: int, step: int, block: int, arm: str, draw: int) -> str:
    """The text of the key of a mask.

    row: number of the prompt.
    seed: seed of the noise.
    step: denoising step.
    block: block of the transformer.
    arm: name of the arm.
    draw: number of the draw; the key of the first does not name it.
    """
    return str(ImageKey(row, seed, step=step, block=block, arm=arm, draw=draw or None))


def _compare_with_other_prompts(
    table: pd.DataFrame, masks: Mapping[str, np.ndarray], polarity: str
) -> tuple[pd.Series, dict[tuple[int, int, str], float]]:
    """Row by row the mean IoU with the other prompts' subjects; and (step, block, arm) -> p. NaN for one prompt."""
    others = pd.Series(np.nan, table.index)
    p: dict[tuple[int, int, str], float] = {}
    for where, group in table.groupby(["step", "block"], sort=False):
        step, block = cast("tuple[int, int]", where)
        fits = []
        for seed, own in group.groupby("seed", sort=False):
            rows = own["row"].unique()
            named = zip(own["row"], own["arm"], own["draw"], strict=True)
            found = [masks[name_mask(row, cast("int", seed), step, block, arm, draw)] for row, arm, draw in named]
            truths = [masks[str(ImageKey(row, cast("int", seed), arm="truth"))] for row in rows]
            fit = pd.DataFrame(score_masks(np.stack(found), np.stack(truths), polarity), own.index, rows)
            fits.append(fit)
            if len(rows) > 1:
                others[own.index] = (fit.sum(axis=1) - own["iou"]) / (len(rows) - 1)
        mean = pd.concat(fits).groupby([group["arm"], group["row"]]).mean()  # over seeds and draws
        for arm in group["arm"].unique():
            square = mean.loc[arm]
            square = square[square.index].to_numpy()
            p[step, block, arm] = permutation_p(square) if len(square) > 1 and np.isfinite(square).all() else np.nan
    return others, p


def _summarise(table: pd.DataFrame, p: Mapping[tuple[int, int, str], float]) -> pd.DataFrame:
    by = ["step", "block", "arm"]
    summary = summarise(table, by, ("iou",)).rename(columns={"iou_low": "low", "iou_high": "high"})
    gaps = compare_arms(table, by[:2], ("iou",)).rename(columns=lambda name: name.replace("iou_top_minus", "iou_gap"))
    summary = summary.merge(gaps, how="left", on=by) if len(gaps) else summary.assign(**dict.fromkeys(_GAPS, np.nan))
    means = ["chance", "iou_other_prompts", "size", "degenerate", "energy_share"]
    plain = table.groupby([*by, "prompt"])[means].mean()
    summary = summary.merge(plain.groupby(level=by).mean().reset_index(), on=by)
    summary["p"] = [p[key] for key in summary[by].itertuples(index=False, name=None)]
    order = {arm: i for i, arm in enumerate((*ARMS, *BASELINES, *NULLS))}
    summary = summary.sort_values(by, key=lambda column: column.map(order) if column.name == "arm" else column)
    return summary[list(COLUMNS)].reset_index(drop=True)


def _notes(table: pd.DataFrame, settings: Mapping[str, Any], unreadable: int) -> list[str]:
    notes = [describe_k(settings["k"], settings["width"]), describe_choice(table)]
    if settings["polarity"] == "oracle":
        notes.append(
            "polarity oracle: every mask is the better of itself and its complement, chosen with the truth in hand; "
            "chance is that of the same choice between a random mask and its complement"
        )
    held = table.groupby("arm")["energy_share"].mean()
    notes.append(
        f"the top channels hold {held['top']:.1%} of the energy, the energy-matched ones {held['energy-matched']:.1%}"
    )
    notes.append("attention, norm, component and centre are masks of as many tokens as the top channels' mask")
    notes += [f"left out: {name}: {why}" for name, why in settings["left_out"].items()]
    if unreadable:
        notes.append(f"{unreadable} images were unreadable and are left out")
    return notes
