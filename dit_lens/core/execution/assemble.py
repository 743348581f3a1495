"""From what the executor stored to a Run: reads in their shapes, receipts, and the check that every op has fired."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from dit_lens.core.plan.compile import list_tokens
from dit_lens.core.plan.spill import Spill, map_to_file
from dit_lens.core.request.ops import Op
from dit_lens.core.runs.reading import Reading
from dit_lens.core.runs.receipt import Entry, Receipt
from dit_lens.core.runs.run import Run
from dit_lens.errors import ExecutionError
from dit_lens.families.transfers import fetch_numbers

if TYPE_CHECKING:
    from torch import Tensor

    from dit_lens.core.plan.compile import Plan, PlannedRead
    from dit_lens.core.plan.program import Store, Touched

Piece: TypeAlias = "tuple[Tensor, Tensor | None]"  # what was read, and which tokens of it are data

BRANCHES = ("cond", "uncond")  # the order of a read of both, whatever the order of the forward passes


def assemble(
    ops: Sequence[Op],
    plan: Plan,
    stores: Sequence[Store],
    outputs: Sequence[Any],
    spec: dict[str, Any],
    provenance: dict[str, Any],
) -> Run:
    """One Run out of the batches of a run.

    ops, plan: what was asked, and how it was laid out.
    stores: what the executor left of every batch.
    outputs: what the pipeline returned for every batch.
    spec, provenance: of the run, as in :class:`Run`.
    """
    first = plan.outline.timeline.forwards[0][0]
    clock = [(step, timestep, sigma) for step, branch, timestep, sigma in stores[0]["clock"] if branch == first]
    grid = tuple(int(side) for side in stores[0]["grid"])
    pieces: dict[tuple, list[Piece]] = defaultdict(list)  # (op, site, step, branch) -> rows in order
    for store in stores:
        for key, value in sorted(store["reads"].items(), key=lambda item: item[0][-1]):
            pieces[key[:-1]].append((value, store["masks"].get(key)))
        store["reads"].clear()
    touched = [line for store in stores for line in store["touched"]]
    receipt = Receipt(tuple(_entries(ops, plan, touched)))
    _check_fired(ops, plan, pieces, touched)
    spilled = isinstance(stores[0]["reads"], Spill)
    steps = plan.outline.steps
    readings = [_assemble_read(read, pieces, plan, (steps, grid, spilled)) for read in plan.reads]
    drawn = [output_images(output) for output in outputs]
    if isinstance(drawn[0], torch.Tensor):
        latents, images = torch.cat(drawn).cpu(), []
    else:
        latents, images = None, [image for batch in drawn for image in batch]
    return Run(images, latents, readings, receipt, clock, grid, spec, provenance)


def output_images(output: Any) -> Any:
    """Images, frames or latents out of a pipeline's output, whatever its field is called."""
    return output[0] if isinstance(output, tuple) else next(iter(output.values()))


def _assemble_read(
    read: PlannedRead,
    pieces: dict[tuple, list[Piece]],
    plan: Plan,
    of_run: tuple[int, tuple[int, ...], bool],
) -> Reading:
    """Puts one read together; its pieces are taken out, so that no site is kept twice.

    read: as planned.
    pieces: (op, site, step, branch) -> what every batch read.
    plan: of the run, whose selections are as they were in the batch that held the group.
    of_run: how many steps ran, (h, w) image tokens or (f, h, w) of a video, and whether values are to lie in a file.
    """
    total_steps, grid, spilled = of_run
    branches = tuple(branch for branch in BRANCHES if branch in read.branches)
    values, masks = {}, {}
    order = [sorted(read.rows).index(row) for row in read.rows]
    for site in read.sites:
        found = [[pieces.pop((read.op, site, step, branch)) for branch in branches] for step in read.steps]
        if read.reduce is None and ".txt" in site:
            found, mask = _fill_up(site, read, found, plan)
            if mask is not None:
                masks[site] = mask[:, order] if read.both else mask[0, order]
        _check_sizes(site, read, found)
        stacked = [[torch.cat([value for value, _ in batches]) for batches in of_step] for of_step in found]
        both = torch.stack([torch.stack(of_step) for of_step in stacked])  # [s, branch, b, ...]
        both = both if order == sorted(order) else both[:, :, order]
        value = both if read.both else both[:, 0]
        values[site] = map_to_file(value) if spilled else value
    return Reading(
        name=read.name,
        tensors=values,
        steps=read.steps,
        total_steps=total_steps,
        branches=branches,
        both=read.both,
        rows=read.rows,
        tokens=_list_tokens(read, plan.selections, order),
        channels=dict(read.channels),
        reduce=read.reduce,
        shape_of_grid=grid if read.image else None,
        masks=masks,
        features=read.features,
    )


def _list_tokens(read: PlannedRead, selections: Mapping[tuple, tuple], order: Sequence[int]) -> Any:
    """The tokens of a read as a Reading holds them: where text chose them, those of the batch that held the row.

    order: of the rows, by their places among those that ascend.
    """
    if not read.groups:
        return read.tokens
    chosen = [selections[read.op, read.sites[0], group][1] for group in range(len(read.groups))]
    found = list_tokens([branch for branch, _ in read.groups], chosen)
    return (
        {branch: tuple(rows[i] for i in order) for branch, rows in found.items()} if isinstance(found, dict) else found
    )


def _fill_up(
    site: str, read: PlannedRead, found: list[list[list[Piece]]], plan: Plan
) -> tuple[list[list[list[Piece]]], Any]:
    """The pieces of a read of text, each with as many tokens as the longest, and which tokens of it are data.

    Where a pipeline fills rows up in front of their text, so is it done here: tokens are where the whole run has them.

    site: whose they are.
    read: as planned.
    found: for every step and branch the pieces of its batches.
    plan: of the run.

    The mask is bool [branch, b, n]; None where all tokens are data. Text is the same at every step.
    """
    masks = [[[_mask_of(piece) for piece in batches] for batches in of_step] for of_step in found]
    for step, of_step in zip(read.steps[1:], masks[1:], strict=True):
        if not all(map(torch.equal, _flat(masks[0]), _flat(of_step))):
            raise ExecutionError(
                f"{site} has other text tokens at step {step} than at step {read.steps[0]}, which fit no one tensor. "
                "Read these steps in runs of their own, or reduce over tokens (reduce=)."
            )
    length = max(mask.shape[1] for mask in _flat(masks[0]))
    uneven = any(mask.shape[1] < length for mask in _flat(masks[0]))
    in_front = uneven and read.tokens is None and plan.outline.text().pads_in_front()
    filled = [
        [[(_lengthen(value, length, in_front), None) for value, _ in batches] for batches in of_step]
        for of_step in found
    ]
    mask = torch.stack(
        [torch.cat([_lengthen(one[..., None], length, in_front)[..., 0] for one in batches]) for batches in masks[0]]
    )
    return filled, None if mask.all() else mask


def _flat(masks: list[list[Tensor]]) -> list[Tensor]:
    return [mask for batches in masks for mask in batches]


def _mask_of(piece: Piece) -> Tensor:
    value, mask = piece
    return torch.ones(value.shape[:2], dtype=torch.bool) if mask is None else mask


def _lengthen(value: Tensor, length: int, in_front: bool) -> Tensor:
    """[b, n, d] with zeros for the tokens that are missing, in front or behind."""
    missing = length - value.shape[1]
    return torch.nn.functional.pad(value, (0, 0, missing, 0) if in_front else (0, 0, 0, missing)) if missing else value


def _check_sizes(site: str, read: PlannedRead, found: list[list[list[Piece]]]) -> None:
    """ExecutionError where steps, branches or batches have other numbers of tokens, which fit no one tensor."""
    if len({tuple(batch.shape[1:]) for of_step in found for batches in of_step for batch, _ in batches}) == 1:
        return
    lines = [
        f"step {step} {'/'.join(str(batch.shape[1]) for batches in of_step for batch, _ in batches)}"
        for step, of_step in zip(read.steps, found, strict=True)
    ]
    raise ExecutionError(
        f"{site} has other numbers of tokens in other branches, prompts or steps ({', '.join(lines[:4])}), which fit "
        "no one tensor. Read branches, prompts or steps in runs of their own, or reduce over tokens (reduce=)."
    )


def _entries(ops: Sequence[Op], plan: Plan, touched: Sequence[Touched]) -> list[Entry]:
    """One entry per op, site, branch and group of rows, steps ascending; norms of batches add in quadrature."""
    squares: dict[tuple, dict[int, list[float]]] = defaultdict(lambda: defaultdict(lambda: [0.0, 0.0, 0.0]))
    norms = fetch_numbers([norm for line in touched for norm in line[-2:]])
    for (op, site, step, branch, shape, group, *_), before, after in zip(touched, norms[::2], norms[1::2], strict=True):
        line = squares[op, site, branch, group][step]
        line[0] += before**2
        line[1] += after**2
        line[2] += shape[0] * shape[1] * shape[2]
    entries = []
    for (op, site, branch, group), steps in squares.items():
        rows, tokens, channels = plan.selections[op, site, group]
        entries.append(
            Entry(
                op=op,
                kind=type(ops[op]).__name__,
                site=site,
                branch=branch,
                steps=tuple(sorted(steps)),
                rows=rows,
                tokens=tokens,
                channels=channels,
                elements=int(next(iter(steps.values()))[2]),
                before=tuple(steps[step][0] ** 0.5 for step in sorted(steps)),
                after=tuple(steps[step][1] ** 0.5 for step in sorted(steps)),
                keys=plan.keys.get((op, site, group, branch)),
            )
        )
    return entries


def _check_fired(ops: Sequence[Op], plan: Plan, pieces: dict[tuple, list[Piece]], touched: Sequence[tuple]) -> None:
    """Every planned visit took place; an op that fired nowhere, or less often than planned, is an error."""
    seen: dict[int, set] = defaultdict(set)
    for op, site, step, branch, _, group, *_ in touched:
        seen[op].add((site, step, branch, group))
    for (op, site, step, branch), values in pieces.items():
        seen[op].update((site, step, branch, i) for i in range(len(values)))
    for op, planned in plan.visits.items():
        if len(seen[op]) < planned:
            raise ExecutionError(
                f"ops[{op}], {ops[op]!r}, fired {len(seen[op])} times instead of {planned}. "
                "Nothing was kept of this run."
            )
