"""Massive activations: the channels with outsized responses, and the subject that their clusters show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dit_lens.analysis.channels import ChannelSet, rule_of
from dit_lens.analysis.clusters import segment
from dit_lens.core.request.ops import Pattern, Read, Steps
from dit_lens.core.request.reduce import parse
from dit_lens.errors import OpError, show

if TYPE_CHECKING:
    import numpy as np

    from dit_lens.core.session import Session


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
    check_score(score)
    ops = [Read(site, reduce=score, steps=steps, name="score"), Read(site, reduce="rms", steps=steps, name="rms")]
    widths = {name: lens.anatomy.channels(lens.anatomy.site(name)) for name in lens.sites(site)}
    rule = rule_of(widths, k, share, mad)
    run = lens.run(prompt, ops, **call)
    scores = {name: value.float().mean((0, 1)) for name, value in run["score"].items()}
    energy = {name: value.float().square().mean((0, 1)) for name, value in run["rms"].items()}
    return rule(scores, energy, score=score)


def check_score(score: str) -> None:
    """Raises OpError, before anything is drawn, for a reduction that gives no one number per channel."""
    try:
        name, *numbers = parse(score)
    except ValueError as problem:
        raise OpError(f"score={show(score)}: {problem}") from None
    if name in ("topk", "histogram") or len(numbers) > 1:
        raise OpError(
            f"score={score!r} gives several numbers for a channel, or none, and channels are ranked by one. Choose "
            "mean, |mean|, mean|x|, rms, max or a single quantile such as p99.9."
        )


def find_subject_mask(
    lens: Session,
    prompt: str,
    channels: ChannelSet | Mapping[str, Sequence[int]] | None = None,
    *,
    k: int = 12,
    block: int | None = None,
    steps: Steps = -1,
    **call: Any,
) -> np.ndarray:
    """See :meth:`dit_lens.DiTLens.subject_mask`."""
    name = mask_site(lens, block)
    channels = find_massive_channels(lens, prompt, k, **call) if channels is None else channels
    run = lens.run(prompt, [Read(name, channels=channels, steps=steps)], **call)
    return segment(run[name][-1, 0].float().numpy(), run.grid).mask


def mask_site(lens: Session, block: int | None = None) -> str:
    """The site whose clusters are taken for the subject: after two thirds of the depth, unless a block is named."""
    (name,) = lens.sites(f"blocks.{(2 * lens.anatomy.depth) // 3 if block is None else block}.img")
    return name
