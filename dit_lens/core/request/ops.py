"""Operations: frozen data that says what to read or change, where and when. They go to JSON and back.

>>> op = Zero("blocks.*.img", channels=[3, 17], steps=(0.0, 0.5))
>>> from_json(to_json(op))
Zero(site='blocks.*.img', channels=[3, 17], steps=(0.0, 0.5))

All there is to an op stands here: its fields, how it is laid out for one site (``lower``), and the edit that the
executor makes of it (``EDITS``). The edits use torch only, as they travel to a server by source.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from math import isfinite
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from dit_lens.core.request.json_values import SigmaInterval, from_plain, to_plain
from dit_lens.core.request.op import (
    OPS,
    Branch,
    Channels,
    Edit,
    Lowered,
    Lowering,
    Mask,
    Op,
    Pattern,
    Rows,
    Source,
    Steps,
    Tokens,
    to_real_tensor,
)
from dit_lens.core.request.reduce import parse
from dit_lens.errors import DitLensError, OpError, nearest
from dit_lens.families.layout import PlanMismatchError
from dit_lens.families.tensors import outer_index

if TYPE_CHECKING:
    from dit_lens.core.runs.run import Run

__all__ = [
    "EDITS",
    "OPS",
    "Add",
    "Apply",
    "Branch",
    "Channels",
    "Edit",
    "Lowered",
    "Lowering",
    "Mask",
    "MeanAblate",
    "Op",
    "Pattern",
    "Read",
    "Resample",
    "Rows",
    "Scale",
    "SigmaInterval",
    "Source",
    "Steps",
    "Swap",
    "TokenMean",
    "Tokens",
    "Zero",
    "from_json",
    "sigma",
    "to_json",
    "to_real_tensor",
]


def sigma(high: float, low: float) -> SigmaInterval:
    """A span of noise levels, from ``high`` (included) down to ``low`` (excluded): noise is 1.0, a clean image 0.0.

    >>> sigma(1.0, 0.3)
    SigmaInterval(high=1.0, low=0.3)
    """
    if not 0 <= low < high:
        raise OpError(
            f"sigma({high}, {low}) is empty. Noise falls during a run, so write the larger level first: sigma(1.0, "
            "0.3)."
        )
    return SigmaInterval(high, low)


@dataclass(frozen=True, eq=False, repr=False)
class Read(Op):
    """Keeps the values at a site: [step, row, token, channel], or [step, row, channel, ...] after a reduction.

    reduce: how tokens are reduced on the model's device: "mean", "|mean|", "mean|x|", "rms", "max", "p99.9",
        "quantile(0.1,0.9)", "histogram(-10,10,64)", "topk(12)"; None keeps every token.
    name: the key of the result; the site's own name by default.
    """

    reduce: str | None = field(default=None, kw_only=True)
    name: str | None = field(default=None, kw_only=True)

    default_branch: ClassVar[str] = "cond"
    edits: ClassVar[bool] = False

    def lower(self, at: Lowering) -> Lowered:
        return at.on_branches(kind="Read", reduce=None if self.reduce is None else _parse(self.reduce))


@dataclass(frozen=True, eq=False, repr=False)
class Zero(Op):
    """Sets the chosen elements to zero."""

    exact_under_gate: ClassVar[bool] = True


@dataclass(frozen=True, eq=False, repr=False)
class Scale(Op):
    """Multiplies the chosen elements by ``factor``."""

    factor: float = field(default=1.0, kw_only=True)

    exact_under_gate: ClassVar[bool] = True

    def lower(self, at: Lowering) -> Lowered:
        if isinstance(self.factor, bool | str) or not hasattr(self.factor, "__float__") or not isfinite(self.factor):
            raise OpError(f"Scale at {at.site}: factor={self.factor!r} is not a finite number.")
        return at.on_branches(kind="Scale", parameters={"factor": float(self.factor)})


@dataclass(frozen=True, eq=False, repr=False)
class Add(Op):
    """Adds ``value``, a number or a vector over the chosen channels, to every chosen token."""

    value: float | Tensor = field(default=0.0, kw_only=True)

    def lower(self, at: Lowering) -> Lowered:
        value = to_real_tensor(self.value, f"Add at {at.site}: value")
        if value.ndim > 1 or (value.ndim == 1 and value.shape[0] not in (1, at.size)):
            raise OpError(
                f"Add at {at.site}: value has shape {list(value.shape)}; it must be a number or a vector over the "
                f"{at.size} chosen channels."
            )
        return at.on_branches(kind="Add", key=at.give(value))


@dataclass(frozen=True, eq=False, repr=False)
class Swap(Op):
    """Replaces the chosen elements by those of a source: x <- (1 - strength) x + strength source.

    source: "row:0" (another image of the same batch, at the same site, step and branch: lockstep transport), a Run
        that read the site, a mapping site -> tensor, or one tensor [step, row, token, channel] (leading axes of size 1,
        or left out, apply to every step and row).
    strength: in [0, 1]; 1 assigns, 0 does nothing.
    """

    source: Source = field(default="", kw_only=True)
    strength: float = field(default=1.0, kw_only=True)

    def does_nothing(self) -> bool:
        if isinstance(self.strength, bool | str) or not 0 <= self.strength <= 1:
            raise OpError(
                f"strength={self.strength!r} lies outside [0, 1]: 0 leaves the target as it is, 1 replaces it. "
                "To exaggerate, use Scale or Apply."
            )
        return self.strength == 0

    def lower(self, at: Lowering) -> Lowered:
        if isinstance(self.source, str):
            return at.on_branches(kind="CopyRow", source_rows=at.row(self.source), strength=self.strength)
        return at.put(self.source, strength=self.strength)


@dataclass(frozen=True, eq=False, repr=False)
class Resample(Op):
    """Replaces the chosen elements by those of a randomly chosen row of another run (resample ablation).

    source: a Run that read the site, or a mapping site -> tensor.
    seed: of the choice of rows.
    """

    source: Run | Mapping[str, Tensor] = field(default_factory=dict, kw_only=True)
    seed: int = field(default=0, kw_only=True)

    def lower(self, at: Lowering) -> Lowered:
        return at.put(self.source, pick_rows=self._pick_rows)

    def _pick_rows(self, available: Sequence[int], targets: list[int]) -> list[int]:
        """For every target a random row of the source, never the one of the same number where there is a choice."""
        import numpy as np

        rng = np.random.default_rng(self.seed)
        others = [[row for row in available if row != target or len(available) == 1] for target in targets]
        return [int(rng.choice(rows)) for rows in others]


@dataclass(frozen=True, eq=False, repr=False)
class TokenMean(Op):
    """Keeps one part of each channel: its mean over the chosen tokens, or the spatial residual around that mean."""

    keep: Literal["mean", "residual"] = field(default="mean", kw_only=True)

    def lower(self, at: Lowering) -> Lowered:
        if self.keep not in ("mean", "residual"):
            raise OpError(
                f"keep={self.keep!r} is not a valid part of a channel.{nearest(str(self.keep), ('mean', 'residual'))}"
            )
        return at.on_branches(kind="TokenMean", parameters={"keep": self.keep})


@dataclass(frozen=True, eq=False, repr=False)
class MeanAblate(Op):
    """Replaces the chosen elements by a fixed mean per channel, taken from a data set.

    mean: a mapping site -> tensor [channel] or [step, channel], or a Run that read the sites with reduce="mean".
    """

    mean: Run | Mapping[str, Tensor] = field(default_factory=dict, kw_only=True)

    def lower(self, at: Lowering) -> Lowered:
        return at.put(self.mean, means=True)


@dataclass(frozen=True, eq=False, repr=False)
class Apply(Op):
    """Calls ``fn(tensor, hook)`` with the chosen elements [row, token, channel]; what it returns replaces them.

    ``hook`` has ``name``, ``step``, ``timestep``, ``sigma`` and ``branch``. Returning None changes nothing. A function
    has no JSON form.
    """

    fn: Callable[[Tensor, Any], Tensor | None] | None = field(default=None, kw_only=True)

    has_json: ClassVar[bool] = False

    def lower(self, at: Lowering) -> Lowered:
        if not callable(self.fn):
            raise OpError(f"Apply at {at.site} needs a function fn(tensor, hook); it was given {self.fn!r}.")
        return at.on_branches(kind="Apply", key=at.give(self.fn))


# The edits: how the executor changes what an action has chosen.


def zero(edit: Edit) -> Tensor:
    """Zeros."""
    return torch.zeros_like(edit.old)


def scale(edit: Edit) -> Tensor:
    """A multiple."""
    return edit.old * edit.action["parameters"]["factor"]


def add(edit: Edit) -> Tensor:
    """The sum with a number or a vector."""
    return edit.old + edit.payload[edit.action["key"]].to(edit.old)


def put(edit: Edit) -> Tensor:
    """Elements of a given tensor [step, row, token, channel], whose axes of size 1 stand for all."""
    source = edit.payload[edit.action["key"]]
    source = source[min(edit.action["step_index"], source.shape[0] - 1)]
    source = source if source.shape[0] == 1 else source[edit.action["source_rows"]]
    if source.shape[1] not in (1, edit.old.shape[1]):
        raise PlanMismatchError(f"{edit.hook.name} has {edit.old.shape[1]} tokens, and the source {source.shape[1]}")
    return source.to(edit.old).expand_as(edit.old)


def copy_row(edit: Edit) -> Tensor:
    """The same tokens and channels of another row of the batch."""
    action = edit.action
    where = outer_index(edit.stream, action["source_rows"], action["tokens"], action["channels"], edit.indices)
    return edit.stream[where].expand_as(edit.old).clone()


def token_mean(edit: Edit) -> Tensor:
    """Each channel's mean over the chosen tokens, or what is left without it."""
    mean = edit.old.mean(1, keepdim=True, dtype=torch.float32).to(edit.old.dtype)
    return mean.expand_as(edit.old) if edit.action["parameters"]["keep"] == "mean" else edit.old - mean


def apply(edit: Edit) -> Tensor | None:
    """Applies a function of the user's to a copy."""
    new = edit.payload[edit.action["key"]](edit.old.clone(), edit.hook)
    if new is None:
        return None
    if tuple(new.shape) != tuple(edit.old.shape):
        raise PlanMismatchError(
            f"the function applied at {edit.hook.name} returned shape {list(new.shape)} for {list(edit.old.shape)}"
        )
    return new.to(edit.old)


EDITS: dict[str, Callable[[Edit], Tensor | None]] = {
    "Zero": zero,
    "Scale": scale,
    "Add": add,
    "Put": put,
    "CopyRow": copy_row,
    "TokenMean": token_mean,
    "Apply": apply,
}


def to_json(op: Op) -> dict[str, Any]:
    """An op as plain data; what is left at its default is left out."""
    name = type(op).__name__
    if not op.has_json:
        raise OpError(
            f"{name} holds a Python function, which has no JSON form. "
            "Save the results of its run instead, or use another op."
        )
    values = {f.name: getattr(op, f.name) for f in fields(op)}
    return {"op": name, **{field: to_plain(value) for field, value in values.items() if value is not None}}


def from_json(data: Mapping[str, Any]) -> Op:
    """The op that :func:`to_json` wrote."""
    if not isinstance(data, Mapping):
        raise OpError(f"an op in JSON is a mapping, not {type(data).__name__}.")
    values = dict(data)
    kind = str(values.pop("op", None))
    if kind not in OPS:
        raise OpError(f"{kind!r} is not an op.{nearest(kind, OPS)}")
    known = [f.name for f in fields(OPS[kind])]
    for name in values:
        if name not in known:
            raise OpError(f"{kind} takes no {name!r}.{nearest(name, known)}")
    try:
        return OPS[kind](**{name: from_plain(value) for name, value in values.items()})
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as damage:
        if isinstance(damage, DitLensError):
            raise
        raise OpError(f"this {kind} cannot be read from JSON ({damage}). Was it changed by hand?") from damage


def _parse(text: str) -> list[Any]:
    try:
        return parse(text)
    except ValueError as problem:
        raise OpError(f"reduce={text!r}: {problem}") from None
