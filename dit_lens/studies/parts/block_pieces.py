"""The pieces of blocks that are taken out one by one, the ops that do it, and noise as large in the same place.

What a piece adds is c: of a block what leaves it minus what entered, else what its module gives. Taking it out leaves
its mean m over images and tokens, or nothing (m = 0): x becomes x - (c - m). The noise keeps the piece, and moves every
channel of every token exactly as far, with a random sign: x becomes x + s (c - m), s = 1 or -1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from dit_lens.arguments.lists import check_once
from dit_lens.core.request.ops import Add, Apply, MeanAblate, Op, Read, Skip, Zero
from dit_lens.errors import OpError, check_choice
from dit_lens.studies.parts.doses import Doses, note, share_of

if TYPE_CHECKING:
    from dit_lens.core.request.ops import Pattern, Steps
    from dit_lens.lens import DiTLens

Part = Literal["block", "img", "txt", "attention", "cross", "mlp", "head"]
PARTS = ("block", "img", "txt", "attention", "cross", "mlp", "head")
# Where each is taken out: where it is given out, or else, where one projection adds up several, what enters that.
POINTS = {
    "block": ("",),
    "img": ("",),
    "txt": ("",),
    "attention": (".attn.o", ".attn.z"),
    "cross": (".cross.o", ".cross.z"),
    "mlp": (".mlp.o", ".mlp.post"),
    "head": (".attn.z",),
}
STREAMS = ("img", "txt")
NOISE = "noise"
SEEDS = 2**63  # of a generator of torch


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One part of one block.

    part: "block", a stream, "attention", "cross" or "mlp"; of a head "head 0" and so on.
    block: number of the block.
    sites: where it is taken out, in the model's order, with its channels there; None: all.
    """

    part: str
    block: int
    sites: Mapping[str, Sequence[int] | None]

    @property
    def is_output(self) -> bool:
        """Whether it is taken out where a block ends, which passes on what entered."""
        return all(site.count(".") == 2 for site in self.sites)

    def list_reads(self) -> list[str]:
        """The sites whose means tell the mean of what it adds."""
        return [*self.sites, *(f"{site}.resid_pre" for site in self.sites if self.is_output)]

    def ablate(self, steps: Steps, means: Mapping[str, Tensor]) -> list[Op]:
        """The ops that take it out of all images.

        steps: denoising steps.
        means: site -> [s, d], what is left of it; empty for nothing.
        """
        sites = list(self.sites)
        if self.is_output:
            left = {site: means[site] - means[f"{site}.resid_pre"] for site in sites if means}
            return [Skip(sites, steps=steps), *([Add(sites, value=left, steps=steps)] if left else [])]
        if means:
            return [MeanAblate(site, channels=some, mean=means, steps=steps) for site, some in self.sites.items()]
        return [Zero(site, channels=some, steps=steps) for site, some in self.sites.items()]

    def disturb(self, row: int, seeds: Sequence[int], steps: Steps, means: Mapping[str, Tensor]) -> list[Op]:
        """The ops that add noise to one image, as large as what taking it out takes.

        row: row of the image.
        seeds: a seed for every site.
        steps, means: as in :meth:`ablate`.
        """
        ops: list[Op] = []
        for (site, some), seed in zip(self.sites.items(), seeds, strict=True):
            entered: dict[str, Tensor] = {}
            mean = self._find_mean(site, means)
            if self.is_output:
                ops.append(Apply(f"{site}.resid_pre", rows=row, steps=steps, fn=partial(_keep, entered)))
            shake = partial(_shake, entered, mean, seed)
            ops.append(Apply(site, channels=some, rows=row, steps=steps, fn=shake))
        return ops

    def weigh(self, edits: Sequence[Op], row: int, step: int) -> list[Op]:
        """The edits, and around them the ops that weigh how much of what the piece adds they move.

        edits: what is done.
        row: row of the image whose dose it is.
        step: denoising step at which it is weighed.
        """
        heads, tails = [], []
        where: dict[str, Any] = {"rows": row, "steps": [step], "branch": "cond"}
        for site, some in self.sites.items():
            entered: dict[str, Tensor] = {}
            before: dict[str, Tensor] = {}
            dose: Doses = {}
            if self.is_output:
                heads.append(Apply(f"{site}.resid_pre", fn=partial(_keep, entered), **where))
            heads.append(Apply(site, channels=some, fn=partial(_keep, before), **where))
            tails.append(Apply(site, channels=some, fn=partial(_compare, entered, before, dose), **where))
            tails += note(".".join(site.split(".")[:3]), row, step, dose)
        return [*heads, *edits, *tails]

    def _find_mean(self, site: str, means: Mapping[str, Tensor]) -> Tensor | None:
        if not means:
            return None
        mean = means[site] - means[f"{site}.resid_pre"] if self.is_output else means[site]
        return mean if self.sites[site] is None else mean[:, list(self.sites[site] or ())]


def find_pieces(lens: DiTLens, site: Pattern, parts: Sequence[str]) -> list[Piece]:
    """The pieces of the blocks and streams of some sites, part by part; OpError or SiteError where there are none.

    lens: lens on the model.
    site: outputs of blocks.
    parts: what is taken out of them.
    """
    for part in parts:
        check_choice(part, PARTS, "part of a block")
    check_once("parts", parts, "a part")
    if not parts:
        raise OpError(f"parts=[] takes nothing out. Give at least one of {', '.join(PARTS)}.")
    outputs = lens.sites(site)
    if odd := [name for name in outputs if name.count(".") != 2 or not name.startswith("blocks.")]:
        raise OpError(
            f"site= names the outputs of blocks, such as 'blocks[3:5].*' or 'blocks.*.img', and {odd[0]} is none. "
            "parts= says which of their parts are taken out."
        )
    return [piece for part in parts for piece in _find_part(lens, outputs, part)]


def _find_part(lens: DiTLens, outputs: Sequence[str], part: str) -> list[Piece]:
    """The pieces of one part. outputs: of the blocks and streams that are tried."""
    asked = [name for name in outputs if part not in STREAMS or name.endswith(f".{part}")]
    if not asked:
        raise OpError(f"parts= names the stream {part!r}, and site= no output of it. Name sites such as 'blocks.*.*'.")
    blocks: dict[int, list[str]] = {}
    for name in filter(None, (_find_point(lens, name, POINTS[part]) for name in asked)):
        blocks.setdefault(lens.anatomy.site(name).block or 0, []).append(name)
    if not blocks:
        lens.sites([name + POINTS[part][0] for name in asked])  # which says why there is none
    if part != "head":
        return [Piece(part=part, block=block, sites=dict.fromkeys(names)) for block, names in blocks.items()]
    pieces = []
    for block, names in blocks.items():
        heads = {name: lens.heads(name) for name in names}
        pieces += [
            Piece(part=f"head {i}", block=block, sites={name: heads[name][i] for name in names})
            for i in range(len(heads[names[0]]))
        ]
    return pieces


def _find_point(lens: DiTLens, output: str, points: Sequence[str]) -> str | None:
    """The first point of a block's stream that the model has and ops can write; None where there is none."""
    known = {site.name: site for site in lens.anatomy.sites}
    names = [output + point for point in points if output + point in known]
    return next((name for name in names if lens.anatomy.locate(known[name]).half is None), None)


def read_means(pieces: Sequence[Piece]) -> list[Read]:
    """The read of all means that the pieces need."""
    return [Read(list(dict.fromkeys(site for one in pieces for site in one.list_reads())), reduce="mean", name="mean")]


def _keep(kept: dict[str, Tensor], x: Tensor, hook: Any) -> None:
    """Keeps what is there, for each branch, since branches take turns."""
    kept[hook.branch] = x


def _shake(entered: Mapping[str, Tensor], mean: Tensor | None, seed: int, x: Tensor, hook: Any) -> Tensor:
    """Adds noise as large as what the piece adds beyond its mean.

    entered: what entered the block; empty where the piece is no whole block.
    mean: [s, d], or None.
    seed: of the signs, which are others at every step.
    """
    added = x - entered[hook.branch] if entered else x
    added = added if mean is None else added - mean[hook.step].to(x)
    generator = torch.Generator().manual_seed((seed + hook.step) % SEEDS)
    signs = torch.randint(0, 2, x.shape, dtype=torch.int8, generator=generator).to(x.device)
    return torch.where(signs.bool(), x + added, x - added)


def _compare(entered: Mapping[str, Tensor], before: dict[str, Tensor], dose: Doses, x: Tensor, hook: Any) -> None:
    """Weighs what was moved, as a share of what the piece adds."""
    old = before.pop(hook.branch)
    dose[hook.branch] = share_of(x - old, old - entered[hook.branch] if entered else old)
