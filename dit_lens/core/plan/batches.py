"""A run in batches: prompts that go through the pipeline together, fewer of them where memory runs out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, TypeVar

import torch
from tqdm.auto import tqdm

from dit_lens.core.plan.compile import Plan
from dit_lens.core.request.call import Call
from dit_lens.errors import ExecutionError, OpError, PromptError

Drawn = TypeVar("Drawn")


def run_in_batches(
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
    return [(call.part(span), narrow(plan, range(span.start * n, span.stop * n))) for span in spans]


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
        f"memory ran out {why} ({full}). Nothing was kept of this run. Draw smaller images (height=, width=), "
        "reduce reads where they are (reduce=), encode prompts first (lens.encode(prompts, release=True)), or offload: "
        "dit_lens.recommend(lens.pipe, gb=...) shows what fits."
    ) from full


def narrow(plan: Plan, rows: range) -> Plan:
    """The part of a plan that concerns some rows of the batch, with those rows numbered from 0."""
    if plan.program["record"] or plan.program["replayed"]:
        raise OpError("a recorded run is one batch: leave batch_size= out, and give fewer prompts where memory ends.")
    calls = [
        {
            **call,
            "visits": [
                [module, side, kept] for module, side, parts in call["visits"] if (kept := _narrowed_parts(parts, rows))
            ],
        }
        for call in plan.program["calls"]
    ]
    return replace(plan, program={**plan.program, "rows": len(rows), "calls": calls})


def _narrowed_parts(parts: list[dict[str, Any]], rows: range) -> list[dict[str, Any]]:
    kept = [
        part
        if "actions" not in part
        else {**part, "actions": [a for action in part["actions"] if (a := _narrowed_action(action, rows)) is not None]}
        for part in parts
    ]
    return [part for part in kept if part.get("actions", True)]


def _narrowed_action(action: dict[str, Any], rows: range) -> dict[str, Any] | None:
    if action["rows"] is None and action["kind"] != "Put" and action["kind"] != "CopyRow":
        return action
    source: list[int] = action.get("source_rows", [])
    chosen = action["rows"] if action["rows"] is not None else range(rows.stop)
    here = [i for i, row in enumerate(chosen) if row in rows]
    if not here:
        return None
    changed = {**action, "rows": [chosen[i] - rows.start for i in here]}
    if action["kind"] == "Put":
        changed["source_rows"] = [source[i] for i in here]
    if action["kind"] == "CopyRow":
        if source[0] not in rows:
            raise OpError(
                f"batch_size puts row {source[0]}, the source of a swap, and row {chosen[here[0]]} into different "
                "batches. Rows that exchange values must run together: raise batch_size, or place them side by side."
            )
        changed["source_rows"] = [source[0] - rows.start]
    return changed
