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

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dit_lens.core.request.ops import Apply
from dit_lens.families.sites import Site

if TYPE_CHECKING:
    import pandas as pd

    from dit_lens.core.request.ops import Op
    from dit_lens.core.runs.receipt import Receipt
    from dit_lens.families import Anatomy

AGREES = 0.05  # how far a dose may lie from the one that was intended, as a share of that

Doses = dict[str, float]  # by branch


def find_off(means: pd.DataFrame) -> pd.DataFrame:
    """The arms whose dose is not the one that was intended.

    means: columns dose_intended and dose, both known.
    """
    return means[(means["dose"] - means["dose_intended"]).abs() > AGREES * means["dose_intended"]]


def share_of(part: Tensor, whole: Tensor) -> float:
    """The energy of one tensor as a share of another's.

    >>> share_of(torch.tensor([3.0, 0.0]), torch.tensor([3.0, 4.0]))
    0.36
    """
    energy = float(whole.double().square().sum())
    return round(float(part.double().square().sum()) / energy, 9) if energy else 0.0


def group_sites(sites: Sequence[str], anatomy: Anatomy) -> list[list[str]]:
    """The sites at which doses can be weighed, those of a stream together.

    A gated or divided output takes no op that could weigh it, and a vector has no tokens.

    sites: their names, in the model's order.
    anatomy: of the model.
    """
    streams: dict[str, list[str]] = {}
    for where in map(Site.parse, sites):
        at = anatomy.locate(where)
        if at.gate is None and at.half is None and at.table is None and at.layout != "whole":
            streams.setdefault(where.stream, []).append(where.name)
    return list(streams.values())


def is_residual(sites: Sequence[str]) -> bool:
    """Whether sites are all of the residual stream between blocks, where each passes on what it was given.

    >>> is_residual(["blocks.0.img", "blocks.1.img.resid_pre"]), is_residual(["blocks.0.img.attn.z"])
    (True, False)
    """
    return all(site.endswith(".resid_pre") or Site.parse(site).point in ("resid_post", "final") for site in sites)


def weigh(edits: Sequence[Op], sites: Sequence[str], row: int, step: int) -> list[Op]:
    """The edits of one image, and around them the ops that weigh their dose at every site.

    edits: what is done.
    sites: where it is done, in the model's order; of one stream.
    row: row of the batch that is edited.
    step: the denoising step at which it is weighed.
    """

    def share(moved: Tensor, whole: Tensor, _: str) -> float:
        return share_of(moved, whole)

    return _weigh(edits, sites, [row], step, share)


def weigh_way(
    edits: Sequence[Op],
    sites: Sequence[str],
    rows: tuple[int, int],
    step: int,
    *,
    channels: Mapping[str, Sequence[int]] | None = None,
    mask: np.ndarray | None = None,
    part: Callable[[Tensor], Tensor] | None = None,
) -> list[Op]:
    """The swaps of one image, and around them the ops that weigh how much of the way to their source they go.

    With w the way from where a tokens' channels would be to the source's, the dose is <moved, w> / |w|^2: 1 is there.

    edits: what is done.
    sites: where it is done, in the model's order; of one stream.
    rows: of the image that is edited, and of its source.
    step: the denoising step at which it is weighed.
    channels: site -> channels that are swapped; all by default.
    mask: the tokens that are swapped, bool [h, w]; all by default.
    part: tokens' channels [token, channel] -> the part of them that is swapped; all of it by default.
    """
    tokens = slice(None) if mask is None else torch.from_numpy(mask.ravel().nonzero()[0])

    def go(moved: Tensor, whole: Tensor, site: str) -> float:
        chosen = slice(None) if channels is None else list(channels[site])
        gone = moved[0][tokens][..., chosen].double()
        way = (whole[1] - whole[0])[tokens][..., chosen].double()
        way = way if part is None else part(way)
        length = float(way.square().sum())
        return round(float((gone * way).sum()) / length, 9) if length else 0.0

    return _weigh(edits, sites, rows, step, go)


def _weigh(
    edits: Sequence[Op],
    sites: Sequence[str],
    rows: Sequence[int],
    step: int,
    rate: Callable[[Tensor, Tensor, str], float],
) -> list[Op]:
    """The edits, and around them the ops that weigh them.

    rows: the one that is edited, and others that are looked at.
    rate: (what was moved, where it would be [row, token, channel], site) -> the dose.
    """
    before: dict[str, Tensor] = {}  # by branch, since branches take turns within a site
    moved: dict[str, Tensor] = {}
    at: dict[str, Doses] = {site: {} for site in sites}
    alone = [] if is_residual(sites) else sites[1:]
    fresh = {sites[0], *alone}  # sites that are passed nothing that was moved

    def keep(x: Tensor, hook: Any) -> None:
        before[hook.branch] = x

    def compare(x: Tensor, hook: Any) -> None:
        raw = before.pop(hook.branch)
        whole = raw if hook.name in fresh else raw - moved[hook.branch]
        moved[hook.branch] = x - whole
        at[hook.name][hook.branch] = rate(moved[hook.branch], whole, hook.name)

    where: dict[str, Any] = {"rows": list(rows), "steps": [step], "branch": "cond"}
    heads = [Apply(site, fn=keep, **where) for site in sites]
    tails = [Apply(site, fn=compare, **where) for site in sites]
    return [*heads, *edits, *tails, *(op for site in sites for op in note(site, rows[0], step, at[site]))]


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
    energy: Mapping[str, np.ndarray],
    channels: Mapping[str, Iterable[int]],
    *,
    carried: bool,
    part: Mapping[str, np.ndarray] | None = None,
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
    part: site -> [d], how much of each channel's energy is taken; all by default.
    """
    found, lost, taken = {}, np.zeros(0), part or energy
    for site, some in channels.items():
        lost = lost if carried and len(lost) else np.zeros_like(energy[site])
        lost[list(some)] = taken[site][list(some)]
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
