"""Claim 2: are massive channels spatially organised? Cluster the tokens by them, and compare with the subject."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from dit_lens.clusters import chance_iou, iou, segment, upsample
from dit_lens.errors import OpError
from dit_lens.ops import Read
from dit_lens.studies.common import Arm, check_k, control_arms, judge_for, kept_scores, listed, score_ops, sets_of
from dit_lens.studies.result import Result, summarise

if TYPE_CHECKING:
    from PIL.Image import Image

    from dit_lens.lens import DiTLens
    from dit_lens.ops import Pattern
    from dit_lens.run import Run

Masks = Sequence[np.ndarray] | Callable[["Image", str], "np.ndarray"]


def organisation(
    lens: DiTLens,
    prompts: str | Sequence[str],
    *,
    k: int = 12,
    seeds: Sequence[int] = (0,),
    step: int = -1,
    draws: int = 3,
    score: str = "|mean|",
    site: Pattern = "blocks.*.img",
    method: str = "minmax",
    polarity: str = "heat",
    masks: Masks | None = None,
    **call: Any,
) -> Result:
    """K-means (K = 2) of the image tokens on k channels, per block, against the subject in the generated picture.

    >>> from dit_lens import DiTLens
    >>> whole = lambda picture, prompt: np.ones((64, 64), bool)
    >>> result = organisation(
    ...     DiTLens.toy(),
    ...     "a big red circle left on a plain blue background",
    ...     k=4,
    ...     draws=1,
    ...     masks=whole,
    ...     num_inference_steps=2,
    ... )
    >>> set(result.summary["arm"]) == {"top", "bottom", "random", "energy-matched"}
    True

    step: the denoising step that is clustered; channels are chosen at the same step. method: normalisation, "minmax"
    (as reproduced) or "robust" (quantile clip). polarity: which cluster is the subject, "heat" or "border".
    masks: where the subject truly is, per prompt, or ``fn(picture, prompt) -> bool [H, W]``; toys know by reading the
    picture back (unreadable pictures are left out and counted). Every line has the chance level of an equally large
    random mask and a flag for degenerate masks. Source: arXiv 2605.13974; the procedure is the public reproduction's.
    """
    prompts = listed(prompts)
    check_k(lens, site, [k])
    if masks is None and judge_for(lens, prompts, None) is None:
        raise OpError(
            "where the subject is must be told: pass masks=, a list of bool arrays or a function of picture and prompt."
        )
    lines: list[dict[str, Any]] = []
    pictures: dict[str, Any] = {}
    kept: dict[str, np.ndarray] = {}
    unreadable = 0
    with lens.quiet(), tqdm(total=2 * len(seeds), desc="organisation") as bar:
        for seed in seeds:
            clean = lens.run(prompts, score_ops(site, score, step), seed=seed, **call)
            bar.update()
            arms = control_arms(sets_of(kept_scores(clean), k, score), draws, seed)
            reads = [
                Read(site, channels=one, rows=row, steps=step, name=f"{a}/{row}")
                for a, arm in enumerate(arms)
                for row, one in enumerate(arm.sets)
            ]
            run = lens.run(prompts, reads, seed=seed, **call)
            bar.update()
            for row, (prompt, image) in enumerate(zip(prompts, clean.images, strict=True)):
                pictures[f"{row}/{seed}"] = image
                truth = _truth(masks, image, prompt, row)
                if truth is None:
                    unreadable += 1
                    continue
                kept[f"{row}/{seed}/truth"] = truth
                for a, arm in enumerate(arms):
                    found, overlays = _segmented(lens, run, f"{a}/{row}", arm, truth, method, polarity)
                    lines += [{"prompt": prompt, "seed": seed, **line} for line in found]
                    kept |= {f"{row}/{seed}/{name}": mask for name, mask in overlays.items()} if arm.draw == 0 else {}
    settings = {
        "prompts": prompts,
        "k": k,
        "seeds": list(seeds),
        "step": step,
        "score": score,
        "method": method,
        "polarity": polarity,
        "draws": draws,
    }
    return _result(lens, lines, settings, pictures, kept, unreadable)


def _truth(masks: Masks | None, image: Image, prompt: str, row: int) -> np.ndarray | None:
    """The subject's mask in a picture; None when a toy's picture is unreadable."""
    if masks is None:
        from dit_lens.toys.scenes import describe

        found = describe(image)
        return None if found.scene is None else found.mask
    return np.asarray(masks(image, prompt) if callable(masks) else masks[row], bool)


def _segmented(
    lens: DiTLens, run: Run, name: str, arm: Arm, truth: np.ndarray, method: str, polarity: str
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    lines, overlays = [], {}
    for site, value in run[name].items():
        block = lens.anatomy.site(site).block
        found = segment(value[0, 0].float().numpy(), run.grid, method=method, polarity=polarity)
        large = upsample(found.mask, truth.shape)
        lines.append(
            {
                "block": block,
                "arm": arm.name,
                "draw": arm.draw,
                "iou": iou(large, truth),
                "chance": chance_iou(truth, int(large.sum())),
                "size": float(found.mask.mean()),
                "degenerate": float(found.degenerate),
            }
        )
        overlays[f"{block}/{arm.name}"] = found.mask
    return lines, overlays


def _result(
    lens: DiTLens,
    lines: list[dict[str, Any]],
    settings: dict[str, Any],
    pictures: dict[str, Any],
    masks: dict[str, np.ndarray],
    unreadable: int,
) -> Result:
    if not lines:
        raise OpError(
            "no picture could be read back, so there is no subject to compare with. "
            "Use other prompts or seeds, or pass masks=."
        )
    table = pd.DataFrame(lines)
    summary = summarise(table, ("block", "arm"), ("iou", "chance", "degenerate")).rename(
        columns={"iou_low": "low", "iou_high": "high"}
    )
    summary = summary[["block", "arm", "n", "iou", "low", "high", "chance", "degenerate"]]
    notes = [f"k={settings['k']} is {settings['k'] / lens.anatomy.width:.1%} of {lens.anatomy.width} channels"]
    if unreadable:
        notes.append(f"{unreadable} pictures were unreadable and are left out")
    return Result("organisation", table, summary, settings, pictures, masks, notes)
