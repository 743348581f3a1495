"""An op that takes rotary position embedding out of attention."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dit_lens.arguments.signatures import told_fields
from dit_lens.core.request.op import Edit, Forecast, Lowered, Lowering, Op, check_outputs, move_tokens
from dit_lens.errors import OpError
from dit_lens.families.layout import PlanMismatchError
from dit_lens.families.sites import Site

if TYPE_CHECKING:
    from dit_lens.families import Anatomy


@told_fields
@dataclass(frozen=True, eq=False, repr=False)
class Rope(Op):
    """Takes rotary position embedding out of blocks: their attention no longer knows where the chosen tokens are.

    Queries and keys of these tokens are left as they are after their norm, without the rotation that follows (FreeFlux,
    arXiv 2503.16153, does so layer by layer). Tokens that are not chosen keep theirs, so to them the chosen ones are at
    position 0.

    >>> import dit_lens as dl
    >>> lens = dl.DiTLens.toy()
    >>> prompt = "a big red circle left on a plain blue background"
    >>> run = lens.run(prompt, dl.Rope("blocks[2:4].img"), seed=0, num_inference_steps=1)
    >>> sorted({entry.site for entry in run.receipt.entries})
    ['blocks.2.img.attn.k_rot', 'blocks.2.img.attn.q_rot', 'blocks.3.img.attn.k_rot', 'blocks.3.img.attn.q_rot']

    site: blocks, and the stream of the tokens, such as "blocks[3:5].img".
    """

    def prepare(self, sites: list[Site], anatomy: Anatomy, run: Forecast) -> tuple[Op, list[Site]]:  # noqa: ARG002 of all
        """Itself at the queries and keys of the blocks that it names."""
        if self.channels is not None:
            raise OpError("Rope takes no channels=: a rotation turns channels in pairs. Choose tokens= or mask=.")
        check_outputs(self, sites, "are rotated")
        found = [(site, rotated) for site in sites for rotated in anatomy.find_rotated(site.block or 0, site.stream)]
        return replace(self, tokens=move_tokens(self.tokens, found)), [rotated for _, rotated in found]

    def lower(self, at: Lowering) -> Lowered:
        return at.turn_back()


def turn_back(edit: Edit) -> Tensor:
    """Queries or keys before their rotation: what the norm makes of what was projected."""
    action, how = edit.action, edit.action["parameters"]
    projected, size = edit.take_held(None), how["head"]
    heads = projected.unflatten(2, (-1, size))
    if how["norm"] is not None:
        norm = edit.hook.module.get_submodule(how["norm"])
        heads = norm(heads) if _measure(norm) == size else norm(projected)
    new = heads.reshape(projected.shape).to(edit.old)
    whole = action["tokens"] is None and action["step_index"] == 0
    if whole and edit.hook.name.split(".")[2] == "img" and torch.equal(new, edit.old) and edit.old.any():
        raise PlanMismatchError(f"{edit.hook.name} is not rotated in this run, so there is no rotation to take out")
    return new


def _measure(norm: torch.nn.Module) -> int:
    """How many channels a norm is of."""
    given: Any = norm
    shape = getattr(given, "normalized_shape", getattr(given, "dim", None))
    shape = given.weight.shape if shape is None else shape
    return shape if isinstance(shape, int) else shape[-1]
