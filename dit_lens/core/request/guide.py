"""An op that guides one row of a batch away from a degraded copy of itself."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from dit_lens.arguments.numbers import to_number
from dit_lens.arguments.signatures import told_fields
from dit_lens.core.request.indices import to_indices
from dit_lens.core.request.op import Edit, Forecast, Lowered, Lowering, Op, Pattern
from dit_lens.errors import OpError, show
from dit_lens.families.layout import PlanMismatchError, argument

if TYPE_CHECKING:
    from dit_lens.families import Anatomy
    from dit_lens.families.sites import Site


@told_fields
@dataclass(frozen=True, eq=False, repr=False)
class Guide(Op):
    """Pushes the conditional prediction of a row away from that of its degraded twin: v + scale (v - v_twin).

    The twin is another row of the same prompt and seed, which other ops degrade (``rows=1``). It is given the guided
    prediction as well, so that both rows go through the same noisy images and end in one image; where nothing degrades
    the twin, or with ``scale=0``, that is the image without guidance, bit for bit. When and where the twin is degraded
    says the op that does it (``steps=``, ``channels=``, ...). Under classifier-free guidance of scale g the push counts
    g times.

    row, twin: their numbers in the batch.
    scale: how far it is pushed; scales that count beside classifier-free guidance are g times this one.
    """

    site: Pattern = field(default="velocity")
    row: int = field(default=0, kw_only=True)
    twin: int = field(default=1, kw_only=True)
    scale: float = field(default=1.0, kw_only=True)

    sees_rows: ClassVar[bool] = True

    def prepare(self, sites: list[Site], anatomy: Anatomy, run: Forecast) -> tuple[Op, list[Site]]:  # noqa: ARG002 of all
        """Itself with its two rows; OpError where these are known to draw other images."""
        self._check()
        rows = [to_indices(one, run.rows, "row", "this run has", "images") for one in (self.row, self.twin)]
        if [len(some) for some in rows] != [1, 1] or rows[0] == rows[1]:
            raise OpError(
                f"Guide: row={self.row!r} and twin={self.twin!r} are to be two rows. Give them by their numbers."
            )
        row, twin = rows[0][0], rows[1][0]
        for what, one, other in zip(("prompt", "seed"), run.draws[row], run.draws[twin], strict=True):
            if one != other:
                raise OpError(
                    f"Guide: rows {row} and {twin} have another {what} each ({one!r} and {other!r}), and a twin is a "
                    "copy. Give both the same: lens.run([prompt, prompt], ..., seed=[0, 0])."
                )
        return replace(self, rows=[row, twin]), sites

    def _check(self) -> None:
        """OpError for what no model has."""
        refused = ("channels", "tokens", "mask", "steps", "rows", "branch")
        if odd := [name for name in refused if getattr(self, name) is not None]:
            raise OpError(
                f"Guide takes no {odd[0]}=: it guides the whole prediction at every step, so that the twin stays in "
                "step with its row. Give that to the op that degrades the twin."
            )
        scale = to_number(self.scale)
        if scale is None or abs(scale) > torch.finfo(torch.float32).max:
            raise OpError(f"Guide: scale={show(self.scale)} is not a finite number.")

    def lower(self, at: Lowering) -> Lowered:
        if at.site != "velocity":
            raise OpError(f"Guide is for the prediction, 'velocity', and {at.site!r} is not that.")
        scale = to_number(self.scale)
        branches = [branch for branch, _ in at.on_branches(kind="Guide")]
        pushed = {branch: scale if branch == "cond" else 0.0 for branch in branches}
        return [(branch, {"kind": "Guide", "parameters": {"scale": pushed[branch]}}) for branch in branches]


def guide(edit: Edit) -> Tensor:
    """The guided prediction, for a row and its twin, which come in this order."""
    if edit.hook.step == 0:
        rule, (row, twin) = edit.grid, edit.hook.rows
        latents = argument(edit.inputs, rule["latents"], rule["latents_position"])
        if not torch.equal(latents[row], latents[twin]):
            raise PlanMismatchError(
                "Guide: a row and its twin begin from other noise. Give both the same seed, as seed=[0, 0], and latents"
            )
    own, other = edit.old[:1], edit.old[1:]
    scale = edit.action["parameters"]["scale"]
    return (own + scale * (own - other) if scale else own).expand_as(edit.old).clone()
