"""A run in batches: prompts that go through the pipeline together, fewer of them where memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch
from tqdm.auto import tqdm

from dit_lens.core.plan.compile import Plan
from dit_lens.core.request.call import Call
from dit_lens.core.request.values import check_count
from dit_lens.errors import ExecutionError, OpError, PromptError, warn

if TYPE_CHECKING:
    from dit_lens.core.plan.program import Action, Forward, Part, Visit
    from dit_lens.core.request.text_tokens import StreamText

Drawn = TypeVar("Drawn")


def run_in_batches(
    call: Call, plan: Plan, batch_size: int | None, draw: Callable[[Call, Plan], Drawn]
) -> Iterator[Drawn]:
    """What ``draw`` makes of every batch; several share one progress bar. Where memory runs out, half do.

    call, plan: of the whole run.
    batch_size: prompts in a batch; all by default.
    draw: runs one batch.

    Raises PromptError if the size is not valid, ExecutionError where one prompt is too many.
    """
    prompts = call.count
    asked = size = prompts if batch_size is None else min(check_count("batch_size", batch_size), prompts)
    pieces, done = _pieces(call, plan, range(prompts), size, asked=True), 0
    ran_out: torch.OutOfMemoryError | None = None
    with tqdm(total=prompts, desc="prompts", disable=size == prompts) as bar:
        while pieces:
            (batch, piece), *rest = pieces
            try:
                drawn = draw(batch, piece)
            except torch.OutOfMemoryError as full:
                size, ran_out = batch.count // 2, full
                pieces = _smaller_pieces(call, plan, range(done, prompts), size, full)
                continue
            except Exception as problem:
                if ran_out is None:
                    raise
                raise _out_of_memory(f"and a smaller batch fails: {problem}", ran_out) from ran_out
            yield drawn
            pieces, done = rest, done + batch.count
            bar.update(batch.count)
    if size < asked:
        warn(f"memory ran out with {asked} prompts in a batch; {size} fitted. Pass batch_size={size} next time.")


def _pieces(call: Call, plan: Plan, prompts: range, size: int, *, asked: bool) -> list[tuple[Call, Plan]]:
    """The call and plan of every batch of ``size`` prompts. asked: whether batch_size= asks for it."""
    n = call.images_per_prompt
    if len(prompts) * n == call.rows and size >= len(prompts):
        _check_masks(call, plan, None)
        return [(call, plan)]
    spans = [prompts[start : start + size] for start in range(0, len(prompts), size)]
    for span in spans:
        _check_masks(call, plan, span)
    rows = [range(span.start * n, span.stop * n) for span in spans]
    return [
        (call.for_prompts(span, asked=asked), narrow(plan, some, span, asked=asked))
        for span, some in zip(spans, rows, strict=True)
    ]


def _check_masks(call: Call, plan: Plan, prompts: range | None) -> None:
    """PromptError where the pipeline masks images of several prompts by other texts than their own.

    call, plan: of the whole run.
    prompts: those of the batch; None: all.
    """
    n, count = call.images_per_prompt, call.count if prompts is None else len(prompts)
    if call.prompts is None or n == 1 or count == 1:  # embeddings are repeated by the lens
        return
    wrong = (plan.outline.text() if prompts is None else plan.outline.text(prompts)).contradiction
    if wrong is not None:
        raise PromptError(
            f"{n} images of each prompt: {wrong}. The pipeline repeats masks in another order than embeddings. List "
            f"each prompt {n} times, with a seed for each image, or pass batch_size=1."
        )


def _smaller_pieces(
    call: Call, plan: Plan, prompts: range, size: int, full: torch.OutOfMemoryError
) -> list[tuple[Call, Plan]]:
    """The batches that are left, made smaller; an error with the remedies where they cannot be."""
    try:
        if size:
            return _pieces(call, plan, prompts, size, asked=False)
        why = "with one prompt at a time"
    except (OpError, PromptError) as problem:
        why = f"and the batch cannot be made smaller: {problem}"
    raise _out_of_memory(why, full) from full


def _out_of_memory(why: str, full: torch.OutOfMemoryError) -> ExecutionError:
    return ExecutionError(
        f"memory ran out {why} ({full}). Nothing was kept of this run. Draw smaller images (height=, width=), "
        "reduce reads where they are (reduce=), encode prompts first (lens.encode(prompts, release=True)), or offload: "
        "dit_lens.recommend(lens.pipe, gb=...) shows what fits."
    )


def graph_too_large(full: torch.OutOfMemoryError) -> ExecutionError:
    """The error where a graph does not fit, which no smaller batch is tried for."""
    return ExecutionError(
        f"memory ran out ({full}): gradients keep the graph of every block and step. Give fewer prompts, smaller "
        "images, through='step', or pipe.transformer.enable_gradient_checkpointing()."
    )


def narrow(plan: Plan, rows: range, prompts: range, *, asked: bool = True) -> Plan:
    """The part of a plan that concerns some rows of the batch, with those rows numbered from 0.

    Their text is filled up to another length, perhaps in front: tokens that were chosen by it are looked up there, also
    in ``plan.selections``.

    prompts: those of the rows.
    asked: whether batch_size= asks for it.
    """
    if plan.program["record"] or plan.program["replayed"]:
        leave = "leave batch_size= out, and " if asked else ""
        raise OpError(f"a recorded run is one batch: {leave}give fewer prompts where memory ends.")
    forwards: list[Forward] = []
    for forward in plan.program["forwards"]:
        place = partial(_place_text, plan, forward["branches"], rows, prompts)
        _check_read_text(plan, forward, rows, prompts)
        visits: list[Visit] = [
            {**visit, "parts": _narrow_parts(_recount(visit["parts"], plan, prompts), rows, place, asked)}
            for visit in forward["visits"]
        ]
        forwards.append({**forward, "visits": [visit for visit in visits if visit["parts"]]})
    return replace(plan, program={**plan.program, "rows": len(rows), "forwards": forwards})


def _recount(parts: list[Part], plan: Plan, prompts: range) -> list[Part]:
    """The parts with as many text tokens as a batch of some prompts has."""
    found: list[Part] = []
    for part in parts:
        counted = part["location"]["stream"] == "txt" and part["tokens"] is not None
        tokens = plan.outline.text(prompts).count if counted else part["tokens"]
        recounted: Part = {**part, "tokens": tokens}
        if "inside" in part:
            recounted["inside"] = _recount(part["inside"], plan, prompts)
        found.append(recounted)
    return found


def _check_read_text(plan: Plan, forward: Forward, rows: range, prompts: range) -> None:
    """OpError where keys of text that are no longer read lie elsewhere in a batch than in the whole run."""
    waited = [inner for visit in forward["visits"] for part in visit["parts"] for inner in part.get("inside", ())]
    for part, action in [(one, action) for one in waited for action in one["actions"]]:
        steps = action.get("key_tokens") or []
        if not steps or action.get("parameters", {}).get("keys") != "txt":
            continue
        branch = forward["branches"][action["branch_index"]]
        chosen = range(len(steps[0])) if action["rows"] is None else action["rows"]
        for row, tokens in [(row, tokens) for some in steps for row, tokens in zip(chosen, some, strict=True)]:
            if row in rows and tokens:
                named: Action = {**action, "rows": [row], "tokens": tokens}
                _check_places(plan, branch, (rows, prompts), part["name"], named)


def _place_text(plan: Plan, branches: list[str], rows: range, prompts: range, part: Part, action: Action) -> Action:
    """An action on text with the places of its tokens in a batch, where they were chosen by the text of its only row.

    Raises OpError for tokens that the batch has not, or has elsewhere: padding follows the longest prompt of a batch.

    plan: of the whole run.
    branches: of the forward pass.
    rows, prompts: of the batch.
    part: where it acts.
    action: for the whole run.
    """
    branch, row = branches[action["branch_index"]], (action["rows"] or [0])[0]
    if part["location"]["stream"] != "txt" or part["location"]["layout"] == "whole":
        return action
    if action["text_tokens"] is None:
        _check_places(plan, branch, (rows, prompts), part["name"], action)
        return action
    if row not in rows:
        return action
    batch = plan.outline.text(prompts)
    there = batch.rows[branch, row - rows.start]
    tokens = plan.outline.text().move(branch, row, action["tokens"] or (), there)
    action = _place_source(plan, branch, (rows, batch), action)
    if not tokens or (len(tokens) < len(action["tokens"] or ()) and action["kind"] == "Put"):
        raise OpError(
            f"{len(action['tokens'] or ())} tokens of padding were chosen at {part['name']} in row {row} ({branch}), "
            f"and in its batch the row has {len(tokens)}, as padding follows the longest prompt. Keep the "
            "prompts in one batch."
        )
    at = (action["op"], part["name"], action["group"])
    plan.selections[at] = (plan.selections[at][0], tuple(tokens), plan.selections[at][2])
    length = batch.length(branch, row - rows.start)
    if len(action.get("source_tokens", tokens)) != len(tokens):  # padding, of which the source's row kept less
        raise OpError(
            f"the padding chosen at {part['name']} in row {row} ({branch}) has {len(tokens)} tokens in its batch, and "
            f"in the row of the source {len(action['source_tokens'])}. Keep the prompts in one batch."
        )
    return {**action, "tokens": tokens, "highest_token": max(tokens, default=None), "text_tokens": length}


def _place_source(plan: Plan, branch: str, batch: tuple[range, StreamText], action: Action) -> Action:
    """An action that copies tokens of another row by its text, with their places in a batch.

    plan: of the whole run.
    branch: of the action.
    batch: its rows and text. One without the source's row is told elsewhere.
    action: for the whole run.
    """
    (rows, text), source = batch, (action.get("source_rows") or [-1])[0]
    if "source_tokens" not in action or source not in rows:
        return action
    there = text.rows[branch, source - rows.start]
    return {**action, "source_tokens": plan.outline.text().move(branch, source, action["source_tokens"], there)}


def _check_places(plan: Plan, branch: str, batch: tuple[range, range], site: str, action: Action) -> None:
    """OpError where the tokens of an action, by their numbers, are others in a batch than in the whole run.

    plan: of the whole run.
    branch: of the action.
    batch: its rows and prompts.
    site: where it acts.
    action: for the whole run.
    """
    rows, prompts = batch
    whole, there = plan.outline.text(), plan.outline.text(prompts)
    tokens, kind = action["tokens"], action["kind"]
    if tokens is None:
        source = plan.payload[action["key"]].shape[2] if kind == "Put" else 1
        if source > 1 and whole.count != there.count:
            raise OpError(
                f"the source at {site} has {source} tokens of text, and a batch of {len(prompts)} prompts has "
                f"{there.count}, as padding follows the longest prompt. Keep the prompts in one batch, or choose words "
                "(tokens=)."
            )
        return
    for row in rows if action["rows"] is None else [row for row in action["rows"] if row in rows]:
        if (branch, row) not in whole.rows or (branch, row - rows.start) not in there.rows:
            continue
        if whole.move(branch, row, tokens, there.rows[branch, row - rows.start]) != list(tokens):
            raise OpError(
                f"tokens={tokens} at {site} are counted in the {whole.length(branch, row)} text tokens of the whole "
                f"run, and in its batch row {row} has {there.length(branch, row - rows.start)}, where these are "
                "others, as padding follows the longest prompt. Keep the prompts in one batch, or choose words "
                "(tokens=)."
            )


def _narrow_parts(parts: list[Part], rows: range, place: Callable[[Part, Action], Action], asked: bool) -> list[Part]:
    """The parts with the actions that concern some rows; a part that is left without any is left out.

    place: (part, action) -> the action with the places of its tokens in these rows.
    """
    found: list[Part] = []
    for part in parts:
        if "inside" in part:
            found.append({**part, "inside": _narrow_parts(part["inside"], rows, place, asked)})
            continue
        placed = [place(part, action) for action in part["actions"]]
        actions = [kept for action in placed if (kept := _narrow_action(action, rows, asked)) is not None]
        if actions or part["role"] in ("gate", "hold", "attended"):
            found.append({**part, "actions": actions})
    return found


def _narrow_action(action: Action, rows: range, asked: bool) -> Action | None:
    """An action for some rows, numbered from 0; None where it concerns none of them."""
    source = action.get("source_rows")
    keys = action.get("key_tokens")
    if action["rows"] is None and source is None and keys is None:
        return action
    chosen = range(rows.stop) if action["rows"] is None else action["rows"]
    here = [i for i, row in enumerate(chosen) if row in rows]
    if not here:
        return None
    changed: Action = {**action, "rows": [chosen[i] - rows.start for i in here]}
    if action["kind"] == "Guide" and len(here) == 1:
        raise _tell_apart(chosen[1 - here[0]], "the twin of a guided row", chosen[here[0]], asked)
    if keys is not None:
        changed["key_tokens"] = [[some[i] for i in here] for some in keys]
    if action["kind"] == "CopyRow" and source is not None:
        if source[0] not in rows:
            raise _tell_apart(source[0], "the source of a swap", chosen[here[0]], asked)
        changed["source_rows"] = [source[0] - rows.start]
    elif source is not None:
        changed["source_rows"] = [source[i] for i in here]
    return changed


def _tell_apart(row: int, what: str, other: int, asked: bool) -> OpError:
    """The error for rows that need each other in different batches. asked: whether batch_size= asks for them."""
    who, more = ("batch_size", "raise batch_size") if asked else ("a smaller batch", "give fewer prompts")
    return OpError(
        f"{who} puts row {row}, {what}, and row {other} into different "
        f"batches. Rows that exchange values must run together: {more}, or place them side by side."
    )
