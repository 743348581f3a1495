"""The program that the executor carries out: plain data, which goes to a server as it is.

A run is a row of forward passes of the transformer. For each of them the program lists the modules to visit, in the
order in which the model calls them; for each visit the parts of that module's input or output; and for each part the
actions on it, in the order of the ops.

What families say about tensors and tokens is in ``families.locations``, which lies below the plan; this file adds what
happens to them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NotRequired, Required, TypeAlias, TypedDict

from dit_lens.core.request.op import ActionDetails
from dit_lens.families.locations import GridRule, Location, ReadoutRule, TextRule, TimeRule

if TYPE_CHECKING:
    from torch import Tensor


class Action(ActionDetails):
    """What one op does at one site, in one forward pass and branch; its kind and values as the op gave them.

    op: the number of the op.
    group: which of the op's selections of rows and tokens.
    branch_index: which branch of the forward pass, counted in its rows.
    step_index: the position of the step among those of the op.
    rows, tokens, channels: explicit indices; None means all of that axis.
    highest_token: the last token asked for, where only the run can tell whether it exists.
    text_tokens: how many text tokens there are to be, where these were chosen by what the text says.
    """

    op: Required[int]
    group: Required[int]
    branch_index: Required[int]
    step_index: Required[int]
    rows: Required[list[int] | None]
    tokens: Required[list[int] | None]
    channels: Required[list[int] | None]
    highest_token: Required[int | None]
    text_tokens: Required[int | None]


class Part(TypedDict):
    """One tensor of a module's input or output, and what happens to it.

    role: "site": the actions are carried out on it. "gate": it is kept, since a later part of the block is multiplied
    by it. "hold": its tokens are kept until an edit takes values from them, or until the final norm is reached, where a
    part of the role "readout" turns them into a prediction. "attend": from here on the call of attention is waited for,
    at which its ``inside`` is carried out, until "attended".
    name: the site; of a gate or of what is held the key under which it is kept.
    location: where the tensor is.
    gate: the gate its tensor is multiplied by, if any.
    tokens, channels: how many the ops counted on; None where only the run can tell.
    actions: in the order of the ops.
    inside: parts of the call of attention, of which a location's slot is "query", "key" or "result".
    """

    role: Literal["site", "gate", "hold", "readout", "attend", "attended"]
    name: str
    location: Location
    gate: str | None
    tokens: int | None
    channels: int | None
    actions: list[Action]
    inside: NotRequired[list[Part]]


class Visit(TypedDict):
    """One module. side: "input" or "output"; parts: in the order in which the model computes them."""

    module: str
    side: str
    parts: list[Part]


class Forward(TypedDict):
    """One forward pass of the transformer. branches: of its rows, in order; each has ``Program.rows`` rows."""

    step: int
    branches: list[str]
    visits: list[Visit]


class Program(TypedDict):
    """A whole run.

    denoiser: path of the transformer in the pipeline.
    rows: images of one branch.
    time, grid, text, readout: rules of the family.
    repeats: steps at the same timestep as the one before.
    sigmas: the noise level of every step, where ops chose their steps by it.
    source_levels: [step, noise level, op and site] of every step that an op takes from another run.
    expected_grid: (h, w) image tokens, where they are known beforehand.
    record: whether the transformer's answers are kept.
    replayed: the forward passes whose answers are in the payload already.
    forwards: all forward passes, in order.
    """

    denoiser: str
    rows: int
    time: TimeRule
    repeats: list[int]
    sigmas: list[float] | None
    source_levels: list[list[Any]]
    grid: GridRule
    text: TextRule
    readout: ReadoutRule | None
    expected_grid: list[int] | None
    record: bool
    replayed: range
    forwards: list[Forward]


# (op, site, step, branch, shape, group, norm before, norm after) of one edit in one forward pass
Touched: TypeAlias = "tuple[int, str, int, str, tuple[int, ...], int, Tensor, Tensor]"


class Store(TypedDict):
    """What the executor leaves.

    reads: (op, site, step, branch, group) -> tensor.
    masks: the same keys -> which tokens of a read are data, where some are not.
    touched: for every edit (op, site, step, branch, shape, group, norm before, norm after).
    clock: for every forward pass (step, first branch, timestep, sigma).
    grid: image tokens of the last forward pass.
    answers: what the transformer returned, where it was to be recorded.
    given: what it was given then, as numbers that change with any bit of it: argument -> one for each tensor in it.
    """

    reads: dict[tuple[int, str, int, str, int], Tensor]
    masks: dict[tuple[int, str, int, str, int], Tensor]
    touched: list[Touched]
    clock: list[tuple[int, str, float, float]]
    grid: list[int]
    answers: list[Any]
    given: list[dict[str, list[Any]]]
