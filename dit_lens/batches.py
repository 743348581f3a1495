"""A run in batches: prompts that go through the pipeline together, fewer of them where memory runs out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from tqdm.auto import tqdm

from dit_lens.call import Call
from dit_lens.errors import ExecutionError, OpError, PromptError
from dit_lens.plan import Plan, narrowed

Drawn = TypeVar("Drawn")


def drawn_in_batches(
    call: Call, plan: Plan, batch_size: int | None, draw: Callable[[Call, Plan], Drawn]
) -> Iterator[Drawn]:
    """What ``draw`` makes of every batch; several share one progress bar. Where memory runs out, half do.

    Raises PromptError for a size that is none, ExecutionError where one prompt is too many.
    """
    prompts = call.rows // call.images_per_prompt
    if batch_size is not None and batch_size < 1:
        raise PromptError(f"batch_size={batch_size} must be at least 1.")
    asked = size = min(batch_size or prompts, prompts)
    pieces, done = _pieces(call, plan, range(prompts), size), 0
    with tqdm(total=prompts, desc="prompts", disable=size == prompts) as bar:
        while pieces:
            (part, piece), *rest = pieces
            count = part.rows // call.images_per_prompt
            try:
                drawn = draw(part, piece)
            except torch.OutOfMemoryError as full:
                size = count // 2
                pieces = _smaller_pieces(call, plan, range(done, prompts), size, full)
                continue
            yield drawn
            pieces, done = rest, done + count
            bar.update(count)
    if size < asked:
        warnings.warn(
            f"memory ran out with {asked} prompts in a batch; {size} fitted. Pass batch_size={size} next time.",
            stacklevel=4,
        )


def _pieces(call: Call, plan: Plan, prompts: range, size: int) -> list[tuple[Call, Plan]]:
    """The call and plan of every batch of ``size`` prompts."""
    n = call.images_per_prompt
    if len(prompts) * n == call.rows and size >= len(prompts):
        return [(call, plan)]
    spans = [prompts[start : start + size] for start in range(0, len(prompts), size)]
    return [(call.part(span), narrowed(plan, range(span.start * n, span.stop * n))) for span in spans]


def _smaller_pieces(
    call: Call, plan: Plan, prompts: range, size: int, full: torch.OutOfMemoryError
) -> list[tuple[Call, Plan]]:
    """The batches that are left, made smaller; an error with the remedies where they cannot be."""
    try:
        if size:
            return _pieces(call, plan, prompts, size)
        why = "with one prompt at a time"
    except (OpError, PromptError) as problem:
        why = f"and the batch cannot be made smaller: {problem}"
    raise ExecutionError(
        f"memory ran out {why} ({full}). Nothing was kept of this run. Draw smaller pictures (height=, width=), "
        "reduce reads where they are (reduce=), encode prompts first (lens.encode(prompts, release=True)), or offload: "
        "dit_lens.recommend(lens.pipe, gb=...) shows what fits."
    ) from full
