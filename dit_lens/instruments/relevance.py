"""How much the prediction depends on every channel, to first order: gradient x activation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dit_lens.instruments.gradients import Gradients, take_gradients

if TYPE_CHECKING:
    from dit_lens.core.request.ops import Op, Pattern, Steps
    from dit_lens.core.session import Session

RELEVANCE = "relevance"  # its name as a score


def read_relevance(
    lens: Session, prompt: str | Sequence[str] | None, site: Pattern, *, steps: Steps = None, **call: Any
) -> Gradients:
    """The relevance of every channel: the mean over tokens of |x d(|v|^2 / 2) / dx|, v the prediction of the same step.

    >>> from dit_lens import DiTLens
    >>> prompt = "a big red circle left on a plain blue background"
    >>> found = read_relevance(DiTLens.toy(), prompt, "blocks.3.img", seed=0, num_inference_steps=2)
    >>> found["blocks.3.img"].shape
    torch.Size([2, 1, 128])

    To first order it is how far zeroing the channel at a token would change half the square of the prediction. Returns
    a mapping site -> [s, b, d], with its run; conditional branch.

    lens: lens on the model; it has to be differentiable.
    prompt: one or several, or None with embeddings.
    site: sites that Apply can write.
    steps: denoising steps that are read; all by default.
    call: as in :meth:`dit_lens.DiTLens.run`.
    """
    return take_relevance(lens, prompt, site, (), steps=steps, **call)


def take_relevance(
    lens: Session,
    prompt: str | Sequence[str] | None,
    site: Pattern,
    beside: Sequence[Op],
    *,
    steps: Steps = None,
    **call: Any,
) -> Gradients:
    """The relevance of a run under edits. beside: the edits. Others: as in :func:`read_relevance`."""
    call.pop("output_type", None)  # of images, which are not drawn
    return take_gradients(
        lens,
        prompt,
        site,
        beside,
        metric=lambda prediction: prediction.float().square().sum() / 2,
        through="step",
        steps=steps,
        reduce=lambda x, gradient: (x.float() * gradient.float()).abs().mean(1),
        **call,
    )
