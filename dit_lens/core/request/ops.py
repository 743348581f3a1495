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
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from dit_lens.arguments.functions import name_of, takes
from dit_lens.arguments.numbers import to_int, to_number
from dit_lens.arguments.signatures import told_fields
from dit_lens.core.request.attention import AttentionMask, knock_out
from dit_lens.core.request.feature import Feature, add_feature
from dit_lens.core.request.guide import Guide, guide
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
    Vectors,
    to_real_tensor,
    to_strength,
)
from dit_lens.core.request.reads import Read, ReadFeatures
from dit_lens.core.request.rope import Rope, turn_back
from dit_lens.errors import DitLensError, OpError, nearest, show
from dit_lens.families.layout import PlanMismatchError
from dit_lens.families.tensors import take

if TYPE_CHECKING:
    import numpy as np

    from dit_lens.core.runs.run import Run

__all__ = [
    "EDITS",
    "OPS",
    "Add",
    "Apply",
    "AttentionMask",
    "Branch",
    "Channels",
    "Edit",
    "Feature",
    "Guide",
    "Lowered",
    "Lowering",
    "Mask",
    "MeanAblate",
    "Op",
    "Pattern",
    "Read",
    "ReadFeatures",
    "Resample",
    "Rope",
    "Rows",
    "Scale",
    "SigmaInterval",
    "Skip",
    "Source",
    "Steps",
    "Swap",
    "TokenMean",
    "Tokens",
    "Vectors",
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
    return SigmaInterval(high, low)


@told_fields
@dataclass(frozen=True, eq=False, repr=False)
class Zero(Op):
    """Sets the chosen elements to zero."""

    exact_under_gate: ClassVar[bool] = True


@told_fields
@dataclass(frozen=True, eq=False, repr=False)
class Scale(Op):
    """Multiplies the chosen elements by ``factor``."""

    factor: float = field(default=1.0, kw_only=True)

    exact_under_gate: ClassVar[bool] = True

    def lower(self, at: Lowering) -> Lowered:
        factor = to_number(self.factor)
        if factor is None:
            raise OpError(f"Scale at {at.site}: factor={show(self.factor)} is not a finite number.")
        if abs(factor) > torch.finfo(torch.float32).max:
            raise OpError(f"Scale at {at.site}: factor={factor:g} is too large for an activation.")
        return at.on_branches(kind="Scale", parameters={"factor": factor})


@told_fields
@dataclass(frozen=True, eq=False, repr=False)
class Add(Op):
    """Adds ``value`` to every chosen token.

    value: a number, a vector over the chosen channels, or one for each chosen step, in their order (or for every step
        of the run, from the first), as [step, channel]; a mapping "cond" or "uncond" -> one of these; or a mapping
        site -> any of them.
    """

    value: Vectors = field(default=0.0, kw_only=True)

    def lower(self, at: Lowering) -> Lowered:
        return at.add(self.value)


@told_fields
@dataclass(frozen=True, eq=False, repr=False)
class Swap(Op):
    """Replaces the chosen elements by those of a source: x <- (1 - strength) x + strength source.

    source: "row:0" (another image of the same batch, at the same site, step and branch: lockstep transport),
        "site:blocks.3.img.attn.v" (another site of the same stream, computed before in the same forward pass), a Run
        that read the site or one of its reads, a mapping site -> tensor, or one tensor [step, row, token, channel]
        (leading axes of size 1, or left out, apply to every step and row).
    strength: in [0, 1]; 1 assigns, 0 does nothing.
    """

    source: Source = field(default="", kw_only=True)
    strength: float = field(default=1.0, kw_only=True)

    def does_nothing(self) -> bool:
        return to_strength(self.strength) == 0

    def lower(self, at: Lowering) -> Lowered:
        strength = to_strength(self.strength)
        if isinstance(self.source, str):
            return at.copy(self.source, strength=strength)
        return at.put(self.source, strength=strength)


@told_fields
@dataclass(frozen=True, eq=False, repr=False)
class Skip(Op):
    """Leaves blocks out: what leaves them is what entered. For the outputs of blocks, such as "blocks[3:5].*".

    With fewer rows, tokens, steps or branches a block is left out for those only; their part in its attention stays.
    """

    def lower(self, at: Lowering) -> Lowered:
        if at.site.count(".") != 2:
            raise OpError(f"Skip is for the outputs of blocks, such as 'blocks[3:5].*', and {at.site} is none.")
        return at.copy(f"site:{at.site}.resid_pre")


@told_fields
@dataclass(frozen=True, eq=False, repr=False)
class Resample(Op):
    """Replaces the chosen elements by those of a randomly chosen row of another run (resample ablation).

    source: a Run that read the site, one of its reads, or a mapping site -> tensor.
    seed: of the choice of rows.
    """

    source: Run | Mapping[str, Tensor] = field(default_factory=dict, kw_only=True)
    seed: int = field(default=0, kw_only=True)

    def lower(self, at: Lowering) -> Lowered:
        seed = to_int(self.seed)
        if seed is None or seed < 0:
            raise OpError(f"Resample at {at.site}: seed={self.seed!r} is not a whole number from 0 up.")
        return at.put(self.source, pick_rows=partial(self._pick_rows, seed))

    @staticmethod
    def _pick_rows(seed: int, available: Sequence[int], targets: list[int]) -> list[int]:
        """For every target a random row of the source, never the one of the same number where there is a choice."""
        import numpy as np

        rng = np.random.default_rng(seed)
        others = [[row for row in available if row != target or len(available) == 1] for target in targets]
        return [int(rng.choice(rows)) for rows in others]


@told_fields
@dataclass(frozen=True, eq=False, repr=False)
class TokenMean(Op):
    """Keeps one part of each channel: its mean over the chosen tokens, or the spatial residual around that mean."""

    keep: Literal["mean", "residual"] = field(default="mean", kw_only=True)

    def lower(self, at: Lowering) -> Lowered:
        if not isinstance(self.keep, str) or self.keep not in ("mean", "residual"):
            raise OpError(
                f"keep={self.keep!r} is not a valid part of a channel.{nearest(str(self.keep), ('mean', 'residual'))}"
            )
        return at.on_branches(kind="TokenMean", parameters={"keep": self.keep})


@told_fields
@dataclass(frozen=True, eq=False, repr=False)
class MeanAblate(Op):
    """Replaces the chosen elements by a fixed mean per channel, taken from a data set.

    mean: a mapping site -> tensor [channel] or [step, channel], or a Run that read the sites with reduce="mean".
    """

    mean: Run | Mapping[str, Tensor] = field(default_factory=dict, kw_only=True)

    def lower(self, at: Lowering) -> Lowered:
        return at.put(self.mean, means=True)


@told_fields
@dataclass(frozen=True, eq=False, repr=False)
class Apply(Op):
    """Calls ``fn(tensor, hook)`` with the chosen elements [row, token, channel]; what it returns replaces them.

    ``hook`` has ``name``, ``step``, ``timestep``, ``sigma`` and ``branch``, and ``module``, the one whose input or
    output the site is, with ``rows``, where these rows are in its tensors. The answer is a tensor or an array of the
    same shape, or a number for all elements; None changes nothing. A function has no JSON form.

    A function is called once for each batch, with the rows of that batch. Where memory runs out, the batch is drawn
    anew in halves, and the function is called for those too: what it counts or keeps holds the calls of the batch that
    was given up, which nobody can take back.
    """

    fn: Callable[[Tensor, Any], Tensor | np.ndarray | float | None] | None = field(default=None, kw_only=True)

    sees_rows: ClassVar[bool] = True

    def lower(self, at: Lowering) -> Lowered:
        if not callable(self.fn):
            raise OpError(f"Apply at {at.site} needs a function fn(tensor, hook); it was given {self.fn!r}.")
        if not takes(self.fn, 2):
            raise OpError(
                f"Apply at {at.site}: {name_of(self.fn)} cannot be called as fn(tensor, hook). Give it two parameters."
            )
        return at.on_branches(kind="Apply", key=at.give(self.fn))


# The edits: how the executor changes what an action has chosen.


def zero(edit: Edit) -> Tensor:
    """Zeros."""
    return torch.zeros_like(edit.old)


def scale(edit: Edit) -> Tensor:
    """A multiple."""
    return edit.old * edit.action["parameters"]["factor"]


def add(edit: Edit) -> Tensor:
    """The sum with a number, a vector, or the vector of this step."""
    value = edit.payload[edit.action["key"]].to(edit.old)
    return edit.old + (value if value.ndim < 2 else value[min(edit.action["step_index"], len(value) - 1)])


def put(edit: Edit) -> Tensor:
    """Elements of a given tensor [step, row, token, channel], whose axes of size 1 stand for all.

    Tokens that it has not stay as they are, and must be no data here either.
    """
    source = edit.payload[edit.action["key"]]
    source = source[min(edit.action["step_index"], source.shape[0] - 1)]
    source = source if source.shape[0] == 1 else source[edit.action["source_rows"]]
    if source.shape[1] not in (1, edit.old.shape[1]):
        here, given = edit.old.shape[1], source.shape[1]
        raise PlanMismatchError(f"{edit.hook.name} has {here} tokens at step {edit.hook.step}, and the source {given}")
    new = source.to(edit.old).expand_as(edit.old)
    key = edit.action.get("source_mask")
    if key is None:
        return new
    there = edit.payload[key]
    there = (there if len(there) == 1 else there[edit.action["source_rows"]]).expand(edit.old.shape[:2])
    lacking = ~there if edit.mask is None else ~there & edit.mask
    if lacking.any():
        raise PlanMismatchError(
            f"{edit.hook.name} has data at {int(lacking.sum())} tokens at step {edit.hook.step} at which the source "
            "has none"
        )
    return torch.where(there[..., None].to(new.device), new, edit.old)


def copy_row(edit: Edit) -> Tensor:
    """The same tokens and channels of another row of the batch."""
    action = edit.action
    tokens = action.get("source_tokens", action["tokens"])
    source = take(edit.stream, action["source_rows"], tokens, action["channels"], edit.indices)
    return source.expand_as(edit.old).clone()


def copy_site(edit: Edit) -> Tensor:
    """The same rows, tokens and channels of a tensor that was computed before."""
    chosen = edit.take_held(edit.action["channels"])
    return chosen.to(edit.old).expand_as(edit.old).clone()


def token_mean(edit: Edit) -> Tensor:
    """Each channel's mean over the chosen tokens, or what is left without it."""
    tokens = [edit.old] if edit.mask is None else _tokens_that_count(edit.old, edit.mask)
    precision = torch.promote_types(edit.old.dtype, torch.float32)
    mean = torch.cat([some.mean(1, keepdim=True, dtype=precision) for some in tokens]).to(edit.old.dtype)
    return mean.expand_as(edit.old) if edit.action["parameters"]["keep"] == "mean" else edit.old - mean


def _tokens_that_count(old: Tensor, mask: Tensor) -> list[Tensor]:
    """Of every row the tokens that count; all of a row whose tokens are all masked. The mask is in main memory."""
    counting = [(one if one.any() else ~one).nonzero()[:, 0] for one in mask]
    return [old[i : i + 1, tokens.to(old.device)] for i, tokens in enumerate(counting)]


def apply(edit: Edit) -> Tensor | None:
    """Applies a function of the user's to a copy."""
    function, hook = edit.payload[edit.action["key"]], edit.hook
    who = f"{name_of(function)}, applied at {hook.name}, step {hook.step} ({hook.branch})"
    try:
        given = function(edit.old.clone(), hook)
    except Exception as problem:
        problem.add_note(f"raised by {who}: ops[{edit.action['op']}]")
        raise
    if given is None:
        return None
    asked = f"a tensor or array of shape {list(edit.old.shape)}, a number, or None"
    try:
        new = torch.as_tensor(given)
    except (ArithmeticError, RuntimeError, TypeError, ValueError):
        raise PlanMismatchError(f"{who}, returned {type(given).__name__} instead of {asked}") from None
    if new.is_complex() or new.layout != torch.strided or new.device.type == "meta" != edit.old.device.type:
        raise PlanMismatchError(f"{who}, returned {new.dtype} ({new.layout}, {new.device}) instead of {asked}")
    if new.ndim and tuple(new.shape) != tuple(edit.old.shape):
        raise PlanMismatchError(f"{who}, returned shape {list(new.shape)} instead of {asked}")
    return new.to(edit.old).expand_as(edit.old)


EDITS: dict[str, Callable[[Edit], Tensor | None]] = {
    "Zero": zero,
    "Scale": scale,
    "Add": add,
    "Put": put,
    "CopyRow": copy_row,
    "CopySite": copy_site,
    "TokenMean": token_mean,
    "AttentionMask": knock_out,
    "Guide": guide,
    "Feature": add_feature,
    "Rope": turn_back,
    "Apply": apply,
}


def to_json(op: Op) -> dict[str, Any]:
    """An op as plain data; what is left at its default is left out."""
    if not isinstance(op, Op):
        raise OpError(f"{type(op).__name__} is not an op. Ops are {', '.join(OPS)}.")
    name = type(op).__name__
    values = {f.name: getattr(op, f.name) for f in fields(op)}
    if any(
        callable(one) for value in values.values() for one in (value if isinstance(value, list | tuple) else [value])
    ):
        raise OpError(
            f"{name} holds a Python function, which has no JSON form. "
            "Save the results of its run instead, or use another op."
        )
    try:
        return {"op": name, **{field: to_plain(value) for field, value in values.items() if value is not None}}
    except RecursionError as depth:
        raise OpError(f"{name} is nested too deeply for a JSON form.") from depth


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
