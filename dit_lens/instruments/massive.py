"""Massive activations: the channels with outsized responses, and the subject that their clusters show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dit_lens.analysis.arrays import border_of
from dit_lens.analysis.channels import ChannelSet, rule_of
from dit_lens.analysis.clusters import POLARITIES, segment
from dit_lens.analysis.subjects import distance_from_border, threshold
from dit_lens.core.request.ops import Pattern, Read, Steps
from dit_lens.core.request.reduce import parse
from dit_lens.errors import ExecutionError, OpError, PromptError, check_choice, show, warn
from dit_lens.instruments.gradients import check_differentiable
from dit_lens.instruments.relevance import RELEVANCE, read_relevance

if TYPE_CHECKING:
    from dit_lens.core.plan.outline import Outline
    from dit_lens.core.session import Session

MASK_RULES = ("distance", *POLARITIES)


def find_massive_channels(
    lens: Session,
    prompt: str | Sequence[str] | None,
    k: int | None = None,
    *,
    share: float | None = None,
    mad: float | None = None,
    score: str = "|mean|",
    site: Pattern = "blocks.*.img",
    steps: Steps = None,
    **call: Any,
) -> ChannelSet:
    """See :meth:`dit_lens.DiTLens.massive_channels`."""
    check_score(score, lens)
    ops = [Read(site, reduce="rms", steps=steps, name="rms")]
    widths = {name: lens.anatomy.channels(lens.anatomy.site(name)) for name in lens.sites(site)}
    rule = rule_of(widths, k, share, mad)
    if score == RELEVANCE:
        scored = read_relevance(lens, prompt, site, steps=steps, **call)
        run = lens.run(prompt, ops, **{**call, "seed": scored.run.spec["seed"]})
    else:
        run = lens.run(prompt, [Read(site, reduce=score, steps=steps, name="score"), *ops], **call)
        scored = run["score"]
    scores = {name: value.float().mean((0, 1)) for name, value in scored.items()}
    energy = {name: value.float().square().mean((0, 1)) for name, value in run["rms"].items()}
    return rule(scores, energy, score=score)


def check_score(score: str, lens: Session | None = None) -> None:
    """Raises an error, before anything is drawn, for what gives no one number per channel: OpError for its name.

    score: a reduction, or "relevance".
    lens: on the model whose relevance would be read: ExecutionError or FamilyError where it has no gradients; None
      where a reduction is needed.
    """
    if score == RELEVANCE and lens is not None:
        if not lens.engine.reaches_weights:
            raise ExecutionError(
                "score='relevance' takes gradients, which need the model's weights on this machine, and this model is "
                "on a server without this dit_lens. Start that server with dit-lens serve, or rank channels by a "
                "reduction, such as '|mean|'."
            )
        return check_differentiable(lens)
    try:
        name, *numbers = parse(score)
    except ValueError as problem:
        beside = "" if lens is None else f" Beside them there is {RELEVANCE!r}, by gradients."
        raise OpError(f"score={show(score)}: {problem}{beside}") from None
    if name in ("topk", "histogram") or len(numbers) > 1:
        raise OpError(
            f"score={score!r} gives several numbers for a channel, or none, and channels are ranked by one. Choose "
            "mean, |mean|, mean|x|, rms, max or a single quantile such as p99.9."
        )
    return None


def find_subject_mask(
    lens: Session,
    prompt: str,
    channels: ChannelSet | Mapping[str, Sequence[int]] | None = None,
    *,
    k: int = 12,
    polarity: str = "distance",
    block: int | None = None,
    steps: Steps = -1,
    **call: Any,
) -> np.ndarray:
    """See :meth:`dit_lens.DiTLens.subject_mask`."""
    check_choice(polarity, MASK_RULES, "polarity")
    _check_one_image(lens.outline(prompt, **call), steps)
    channels = find_massive_channels(lens, prompt, k, **call) if channels is None else channels
    if polarity == "distance" and block is None:
        sites = [site for site in lens.sites("blocks.*.img") if site in channels]
    else:
        sites = [mask_site(lens, block)]
    run = lens.run(prompt, [Read(sites, channels=channels, steps=steps)], **call)
    tokens = np.concatenate([run[site][-1, 0].float().numpy() for site in sites], axis=1)
    if polarity == "distance":
        distance = distance_from_border(tokens, run.grid)
        mask = distance > threshold(distance)
    else:
        mask = segment(tokens, run.grid, polarity=polarity).mask
    _warn_of_background(mask, prompt)
    return mask


def _check_one_image(outline: Outline, steps: Steps) -> None:
    """A mask is of one image at one step: PromptError or OpError where the call has several, of which it is unclear."""
    if outline.rows != 1:
        raise PromptError(
            f"a mask is of one image, and this call draws {outline.rows}. Pass one prompt, and leave "
            "num_images_per_prompt= out; other images have other seeds (seed=)."
        )
    if len(chosen := outline.select(steps)) != 1:
        raise OpError(f"a mask is of one step, and steps={steps!r} chooses {len(chosen)}. Name one, such as steps=-1.")


def _warn_of_background(mask: np.ndarray, prompt: str) -> None:
    """Warns of a mask that is more likely the background, or everything."""
    size, border = mask.mean(), mask[border_of(mask.shape)].mean()
    if max(size, border) > 0.5:
        warn(
            f"the mask of {prompt!r} covers {size:.0%} of the image and {border:.0%} of its border: it may be the "
            "background. Look at it (plots.overlay), and try another polarity= or block=."
        )


def mask_site(lens: Session, block: int | None = None) -> str:
    """The site whose clusters are taken for the subject: after two thirds of the depth, unless a block is named."""
    (name,) = lens.sites(f"blocks.{(2 * lens.anatomy.depth) // 3 if block is None else block}.img")
    return name
