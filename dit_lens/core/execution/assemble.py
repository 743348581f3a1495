"""From what the executor stored to a Run: reads in their shapes, receipts, and the check that every op has fired."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from dit_lens.core.plan.spill import Spill, map_to_file
from dit_lens.core.request.ops import Op
from dit_lens.core.runs.receipt import Entry, Receipt
from dit_lens.core.runs.run import Reading, Run
from dit_lens.errors import ExecutionError

if TYPE_CHECKING:
    from torch import Tensor

    from dit_lens.core.plan.compile import Plan, PlannedRead
    from dit_lens.core.plan.program import Store, Touched

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
    pieces: dict[tuple, list[Tensor]] = defaultdict(list)  # (op, site, step, branch) -> tensors, rows in order
    for store in stores:
        for (op, site, step, branch, _), value in sorted(store["reads"].items(), key=lambda item: item[0][-1]):
            pieces[op, site, step, branch].append(value)
        store["reads"].clear()
    touched = [line for store in stores for line in store["touched"]]
    receipt = Receipt(tuple(_entries(ops, plan, touched)))
    _check_fired(ops, plan, pieces, touched)
    spilled = isinstance(stores[0]["reads"], Spill)
    readings = [_assemble_read(read, pieces, plan.outline.steps, grid, spilled) for read in plan.reads]
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
    read: PlannedRead, pieces: dict[tuple, list[Tensor]], total_steps: int, grid: tuple[int, ...], spilled: bool
) -> Reading:
    """Puts one read together; its pieces are taken out, so that no site is kept twice.

    read: as planned.
    pieces: (op, site, step, branch) -> what every batch read.
    total_steps: of the run.
    grid: (h, w) image tokens, or (f, h, w) of a video.
    spilled: whether its values are to lie in a file.
    """
    branches = tuple(branch for branch in BRANCHES if branch in read.branches)
    values = {}
    for site in read.sites:
        found = [[pieces.pop((read.op, site, step, branch)) for branch in branches] for step in read.steps]
        _check_sizes(site, read, found)
        stacked = [[torch.cat(batches) for batches in of_step] for of_step in found]
        both = torch.stack([torch.stack(of_step) for of_step in stacked])  # [s, branch, b, ...]
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
        tokens=read.tokens,
        channels=dict(read.channels),
        reduce=read.reduce,
        shape_of_grid=grid if read.image else None,
    )


def _check_sizes(site: str, read: PlannedRead, found: list[list[list[Tensor]]]) -> None:
    """ExecutionError where steps, branches or batches have other numbers of tokens, which fit no one tensor."""
    if len({tuple(batch.shape[1:]) for of_step in found for batches in of_step for batch in batches}) == 1:
        return
    lines = [
        f"step {step} {'/'.join(str(batch.shape[1]) for batches in of_step for batch in batches)}"
        for step, of_step in zip(read.steps, found, strict=True)
    ]
    raise ExecutionError(
        f"{site} has other numbers of tokens in other branches, prompts or steps ({', '.join(lines[:4])}), which fit "
        "no one tensor. Read branches, prompts or steps in runs of their own, or reduce over tokens (reduce=)."
    )


def _entries(ops: Sequence[Op], plan: Plan, touched: Sequence[Touched]) -> list[Entry]:
    """One entry per op, site, branch and group of rows, steps ascending; norms of batches add in quadrature."""
    squares: dict[tuple, dict[int, list[float]]] = defaultdict(lambda: defaultdict(lambda: [0.0, 0.0, 0.0]))
    for op, site, step, branch, shape, group, before, after in touched:
        line = squares[op, site, branch, group][step]
        line[0] += float(before) ** 2
        line[1] += float(after) ** 2
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
            )
        )
    return entries


def _check_fired(ops: Sequence[Op], plan: Plan, pieces: dict[tuple, list[Tensor]], touched: Sequence[tuple]) -> None:
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
