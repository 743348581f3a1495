"""Doses: how far an edit moves the tokens of a residual stream from where they would be without it.

A block passes on what it receives and adds to it. So what edits did at earlier sites is still there at a later one, and
an edit that is repeated at every block piles up unless it takes that into account. At a site, of one image, at one step
and over all tokens:

    moved = what the edits here and at all earlier sites have changed: the sum of (after - before) over these sites
    dose  = |moved|^2 / |before - moved so far|^2

that is the energy that was moved, as a share of the energy the tokens would have. Zeroing channels gives the share
that they hold. Where an edit is of no residual stream, nothing is carried from site to site.

A dose is weighed where the tokens are, and comes back in the receipt, so that it is the same on a server: an op writes
it into one element of a site, whose norm the receipt keeps, and another puts that element back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dit_lens.core.request.ops import Apply

if TYPE_CHECKING:
    from dit_lens.core.request.ops import Op
    from dit_lens.core.runs.receipt import Receipt

AGREES = 0.05  # how far a dose may lie from the one that was intended, as a share of that

Doses = dict[str, float]  # by branch


def share_of(part: Tensor, whole: Tensor) -> float:
    """The energy of one tensor as a share of another's.

    >>> share_of(torch.tensor([3.0, 0.0]), torch.tensor([3.0, 4.0]))
    0.36
    """
    energy = float(whole.double().square().sum())
    return round(float(part.double().square().sum()) / energy, 9) if energy else 0.0


def weigh(edits: Sequence[Op], sites: Sequence[str], row: int, step: int, *, carried: bool) -> list[Op]:
    """The edits of one image, and around them the ops that weigh their dose at every site.

    edits: what is done.
    sites: where it is done, in the model's order.
    row: row of the batch that is edited.
    step: the denoising step at which it is weighed.
    carried: whether each site passes on what it was given.
    """
    before: dict[str, Tensor] = {}  # by branch, since branches take turns within a site
    moved: dict[str, Tensor] = {}
    at: dict[str, Doses] = {site: {} for site in sites}
    first = sites[0]

    def keep(x: Tensor, hook: Any) -> None:
        before[hook.branch] = x

    def compare(x: Tensor, hook: Any) -> None:
        raw = before.pop(hook.branch)
        whole = raw if hook.name == first or not carried else raw - moved[hook.branch]
        moved[hook.branch] = x - whole
        at[hook.name][hook.branch] = share_of(moved[hook.branch], whole)

    where: dict[str, Any] = {"rows": row, "steps": [step], "branch": "cond"}
    heads = [Apply(site, fn=keep, **where) for site in sites]
    tails = [Apply(site, fn=compare, **where) for site in sites]
    return [*heads, *edits, *tails, *(op for site in sites for op in note(site, row, step, at[site]))]


def note(site: str, row: int, step: int, doses: Doses) -> list[Op]:
    """Ops that leave a dose in the receipt, and the site as it was.

    site: where they act; its dose is known by then.
    row: row of the batch that the dose is of.
    step: the step at which it was weighed.
    doses: by branch; none counts as 0.
    """
    kept: dict[str, Tensor] = {}
    where: dict[str, Any] = {"rows": row, "tokens": [0], "channels": [0], "steps": [step], "branch": "cond"}
    return [
        Apply(site, fn=partial(write_dose, doses, kept), **where),
        Apply(site, fn=partial(put_back, kept), **where),
    ]


def write_dose(doses: Doses, kept: dict[str, Tensor], x: Tensor, hook: Any) -> Tensor:
    """Writes the dose of this branch, and keeps what was there."""
    kept[hook.branch] = x
    return torch.full_like(x, doses.pop(hook.branch, 0.0))


def put_back(kept: dict[str, Tensor], _: Tensor, hook: Any) -> Tensor:
    """Puts back what a dose was written over."""
    return kept.pop(hook.branch)


def read_doses(ops: Sequence[Op], receipt: Receipt) -> dict[int, float]:
    """The dose of every row, averaged over sites: row -> dose.

    ops: the ops of a run.
    receipt: of that run.
    """
    found: dict[int, list[float]] = {}
    for entry in receipt.entries:
        op = ops[entry.op]
        if isinstance(op, Apply) and getattr(op.fn, "func", None) is write_dose and entry.after:
            found.setdefault(int(op.rows), []).append(entry.after[0])  # ty: ignore[invalid-argument-type]
    return {row: float(np.mean(doses)) for row, doses in found.items()}


def predict_zeroing(
    energy: Mapping[str, np.ndarray], channels: Mapping[str, Iterable[int]], *, carried: bool
) -> dict[str, float]:
    """The dose of zeroing channels at every site, by the run without edits.

    >>> energy = {"blocks.0.img": np.array([3.0, 1.0]), "blocks.1.img": np.array([3.0, 2.0])}
    >>> predict_zeroing(energy, {"blocks.0.img": [0], "blocks.1.img": [1]}, carried=True)
    {'blocks.0.img': 0.75, 'blocks.1.img': 1.0}

    It is the share of energy that they hold; and where a site passes on what it is given, what a channel held at the
    last site where it was zeroed is lacking at later ones that zero others.

    energy: site -> [d], the mean square of each channel, in the model's order.
    channels: site -> the channels.
    carried: whether each site passes on what it was given.
    """
    found, lost = {}, np.zeros(0)
    for site, some in channels.items():
        lost = lost if carried and len(lost) else np.zeros_like(energy[site])
        lost[list(some)] = energy[site][list(some)]
        found[site] = _divide(lost.sum(), energy[site].sum())
    return found


def predict_share(energy: Mapping[str, np.ndarray], channels: Mapping[str, Iterable[int]]) -> dict[str, float]:
    """The share of energy that channels hold at every site.

    energy, channels: as in :func:`predict_zeroing`.
    """
    return {site: _divide(energy[site][list(some)].sum(), energy[site].sum()) for site, some in channels.items()}


def predict_means(
    energy: Mapping[str, np.ndarray],
    own: Mapping[str, np.ndarray],
    new: Mapping[str, np.ndarray],
    channels: Mapping[str, Iterable[int]],
) -> dict[str, float]:
    """The dose of replacing channels by fixed values: sum of E[x^2] - 2 new E[x] + new^2, as a share of the energy.

    energy, channels: as in :func:`predict_zeroing`; what earlier sites changed in other channels is left out.
    own: site -> [d], the mean of each channel over tokens.
    new: site -> [d], the values.
    """
    found = {}
    for site, some in channels.items():
        c = list(some)
        moved = energy[site][c] - 2 * new[site][c] * own[site][c] + new[site][c] ** 2
        found[site] = _divide(moved.sum(), energy[site].sum())
    return found


def _divide(part: float, whole: float) -> float:
    return float(part / whole) if whole else 0.0
