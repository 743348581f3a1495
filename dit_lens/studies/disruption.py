"""Claim 1: are massive channels critical? Zero them, and as many others, and see what becomes of the picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from dit_lens.metrics import psnr, rmse
from dit_lens.ops import Zero
from dit_lens.studies.common import Arm, Judge, check_k, control_arms, judge_for, judged, listed, score_ops, sets_of
from dit_lens.studies.result import Result, summarise

if TYPE_CHECKING:
    from dit_lens.lens import DiTLens
    from dit_lens.ops import Pattern, Steps
    from dit_lens.run import Run


def disruption(
    lens: DiTLens,
    prompts: str | Sequence[str],
    *,
    k: int | Sequence[int] = 12,
    seeds: Sequence[int] = (0,),
    draws: int = 3,
    score: str = "|mean|",
    site: Pattern = "blocks.*.img",
    steps: Steps = None,
    judge: Judge | None = None,
    **call: Any,
) -> Result:
    """Zeroes the top-k channels and their controls, on the same prompts and seeds.

    >>> from dit_lens import DiTLens
    >>> result = disruption(
    ...     DiTLens.toy(), "a big red circle left on a plain blue background", k=4, draws=1, num_inference_steps=2
    ... )
    >>> sorted(result.summary["arm"])
    ['bottom', 'energy-matched', 'no-op', 'random', 'top']

    Every picture's own sets come from its clean run, averaged over all its steps, and stay fixed. Arms: no-op (an edit
    of no channel, which must change nothing), top, bottom, random (``draws`` of them; one map of channels for all
    blocks) and energy-matched. All arms run at one batch shape.

    k: one or several sizes. steps: when channels are zeroed. judge: ``fn(picture, prompt) -> {name: number}``; toys
    read scenes back by themselves. The table has rmse (0 to 255) and psnr (dB; missing for equal pictures) to the
    untouched picture, the share of energy the zeroed channels held, and what the judge says.
    Source: arXiv 2605.13974.
    """
    prompts, ks = listed(prompts), [k] if isinstance(k, int) else sorted(k)
    check_k(lens, site, ks)
    judge = judge_for(lens, prompts, judge)
    lines: list[dict[str, Any]] = []
    pictures: dict[str, Any] = {}
    with lens.quiet(), tqdm(total=len(seeds) * (2 + len(ks) * (3 + draws)), desc="disruption") as bar:
        for seed in seeds:
            clean = lens.run(prompts, score_ops(site, score, None), seed=seed, **call)
            bar.update()
            arms = [(0, Arm("no-op", 0, ()))]
            arms += [(size, arm) for size in ks for arm in control_arms(sets_of(clean, size, score), draws, seed)]
            lines += [
                _line(prompt, seed, 0, "untouched", 0, **judged(judge, image, prompt))
                for prompt, image in zip(prompts, clean.images, strict=True)
            ]
            for size, arm in arms:
                ops = _zeros(arm, site, steps)
                edited = lens.run(prompts, ops, seed=seed, **call)
                lines += _measured(prompts, seed, size, arm, clean, edited, judge)
                if arm.draw == 0:
                    pictures |= {f"{row}/{seed}/{size}/{arm.name}": image for row, image in enumerate(edited.images)}
                bar.update()
            pictures |= {f"{row}/{seed}/0/untouched": image for row, image in enumerate(clean.images)}
    return _result(
        lens,
        lines,
        pictures,
        {
            "prompts": prompts,
            "k": ks,
            "seeds": list(seeds),
            "draws": draws,
            "score": score,
            "site": str(site),
            "steps": str(steps),
        },
    )


def _zeros(arm: Arm, site: Pattern, steps: Steps) -> list[Zero]:
    if arm.name == "no-op":
        return [Zero(site, channels=[], steps=steps)]
    return [Zero(site, channels=one, rows=row, steps=steps) for row, one in enumerate(arm.sets)]


def _measured(
    prompts: Sequence[str], seed: int, k: int, arm: Arm, clean: Run, edited: Run, judge: Judge | None
) -> list[dict[str, Any]]:
    lines = []
    for row, prompt in enumerate(prompts):
        before, after = clean.images[row], edited.images[row]
        shares = (
            {"energy_share": np.mean(list(arm.sets[row].energy_share().values())), "matched": arm.sets[row].matched}
            if arm.sets
            else {}
        )
        error = float(rmse(before, after))
        distance = {"rmse": error, "psnr": float(psnr(before, after)) if error else np.nan}
        lines.append(_line(prompt, seed, k, arm.name, arm.draw, **distance, **shares, **judged(judge, after, prompt)))
    return lines


def _line(prompt: str, seed: int, k: int, arm: str, draw: int, **measures: Any) -> dict[str, Any]:
    return {"prompt": prompt, "seed": seed, "k": k, "arm": arm, "draw": draw, **measures}


def _result(lens: DiTLens, lines: list[dict[str, Any]], pictures: dict[str, Any], settings: dict[str, Any]) -> Result:
    table = pd.DataFrame(lines)
    edited = table[table["arm"] != "untouched"]
    measures = [name for name in ("rmse", "fidelity", "energy_share") if name in table]
    summary = summarise(edited, ("k", "arm"), measures)
    notes = [
        f"width {lens.anatomy.width}: "
        + ", ".join(f"k={k} is {k / lens.anatomy.width:.1%} of the channels" for k in settings["k"])
    ]
    floor = edited.loc[edited["arm"] == "no-op", "rmse"].max()
    notes.append(f"noise floor: an edit of no channel changes pictures by rmse {floor:g}")
    if "matched" in table and not table.loc[table["arm"] == "energy-matched", "matched"].astype(bool).all():
        notes.append(
            "the energy of the top-k set cannot be reached by as many other channels: "
            "energy-matched falls short (see energy_share)"
        )
    if "fidelity" in table:
        notes.append(f"untouched pictures: fidelity {table.loc[table['arm'] == 'untouched', 'fidelity'].mean():.3f}")
    return Result("disruption", table, summary, settings, pictures, notes=notes)
