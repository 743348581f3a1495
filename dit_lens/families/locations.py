"""Where tensors and tokens are, as plain data: what a family tells the executor, with which it travels to a server.

The program (``core.plan.program``) holds these rules and adds what happens to the tensors. They are here because
families lie below the plan: a family describes its model without knowing what a plan is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict


class Location(TypedDict):
    """A tensor in the input or output of a module: :class:`TensorLocation` as plain data, without module and gate.

    slot: of an input the argument's name (a str), of an output its index in the tuple (an int; None: a bare tensor).
    position: of an input its index among positional arguments; None where it is passed by name only.
    stream: whose tokens are meant, "img" or "txt".
    layout: where they are in the tensor, as in :class:`~dit_lens.Stack`, or "whole".
    axes: "tokens", or the axes of an image.
    patch: latent frames, rows and columns of a token.
    sequence_first: whether the tensor is [token, row, channel].
    span: its channels (start, stop; stop None for the end); None for all.
    half: the channels of a module's input that count, where the tensor is the module's output for them alone.
    tanh: whether the hyperbolic tangent is taken of it.
    table: (parameter, part) of the module that is added to it.
    x0: whether the clean latents are computed from it.
    entry: of an argument that lists residuals, (rule, block, blocks) as in :class:`~dit_lens.PointSpec`; else None.
    once: whether it has one row for all where the call has one time for all, as the check at load saw.
    name: what messages call it.
    """

    slot: Any
    position: Any
    stream: str
    layout: str
    axes: str
    patch: Sequence[int]
    sequence_first: bool
    span: tuple[int, int | None] | None
    half: tuple[int, int | None] | None
    tanh: bool
    table: tuple[str, int] | None
    x0: bool
    entry: tuple[str, int, int] | None
    once: bool
    name: NotRequired[str]


class TimeRule(TypedDict):
    """How the time of a forward pass is read: noise level = offset + scale * argument, or as ``families.levels`` says.

    argument: of the transformer.
    position: the argument's index among positional ones; None where it is passed by name only.
    offset: the noise level where the argument is 0.
    scale: the noise level for each unit of the argument.
    levels: the noise level of every timestep, where the scheduler has a table of them.
    data: the standard deviation of data, where the argument is log(sigma) / 4 of noise beside it; else None.
    kind: what is predicted: "flow", "epsilon", "v_prediction", or None for anything else.
    sign: -1 where the prediction is the negative of that.
    """

    argument: str
    position: int | None
    offset: float
    scale: float
    levels: list[float] | None
    data: float | None
    kind: str | None
    sign: int


class GridRule(TypedDict):
    """How image tokens are found in the arguments of a forward pass; see :class:`~dit_lens.Grid`.

    rule: how, one of those of :class:`~dit_lens.Grid`.
    axes: of the latents: "tokens", or those of an image.
    argument: what the rule looks at.
    position: its index among positional arguments; None where it is passed by name only.
    latents: the argument that holds the noisy image.
    latents_position: its index among positional arguments, as ``position``.
    patch: latent frames, rows and columns of a token.
    target: which image is drawn, where there are references: "first" or "last".
    pad: image tokens are padded to a multiple of this.
    pad_to: to how many tokens an image is padded that is not square; None: to none.
    mask: the argument that marks the text tokens of every row, where text is ragged.
    layout: where image tokens are in the latents, as in :class:`~dit_lens.Stack`.
    marks: the argument that marks rows of image tokens, a str where the rule is "marks".
    marked: the value by which it marks them.
    coordinates: the argument that holds those of every token, where a pipeline gives no counts.
    """

    rule: str
    axes: str
    argument: str
    position: int | None
    latents: str
    latents_position: int | None
    patch: list[int]
    target: str
    pad: int
    pad_to: int | None
    mask: str | None
    layout: str
    marks: Any
    marked: int | None
    coordinates: str | None


class TextRule(TypedDict):
    """The text among the arguments of the transformer; see :class:`~dit_lens.Prompts`.

    texts: the arguments that hold it.
    text_positions: their indices among positional arguments; None where they are passed by name only.
    masks: the arguments that say which tokens take part in attention, each as the names that lead to it.
    positions: the indices of those.
    masked_by: how they say it, as in :class:`~dit_lens.Prompts`.
    multiple: each row's tokens are padded to a multiple of this, which takes part.
    """

    texts: list[str]
    text_positions: list[int | None]
    masks: list[list[str]]
    positions: list[int | None]
    masked_by: str | int
    multiple: int


class ReadoutRule(TypedDict):
    """How image tokens become a prediction; see :class:`~dit_lens.Readout`.

    modules: those after the final norm, in order, as paths from the pipeline.
    order: of a predicted token's channels, "cyx" or "yxc".
    table: the transformer's parameter that is added to the conditioning.
    passes_temb: whether the first module gets the conditioning as its ``temb``.
    projection: path of the module that the conditioning goes through, after a SiLU.
    axes: of the prediction: "tokens", or those of an image.
    patch: latent frames, rows and columns of a token.
    """

    modules: list[str]
    order: str
    table: str | None
    passes_temb: bool
    projection: str | None
    axes: str
    patch: list[int]


@dataclass(frozen=True)
class TensorLocation:
    """Where a site's tensor is.

    module: path from the pipeline ("transformer.transformer_blocks.3").
    side: "input" or "output" of that module.
    slot: of an input the argument's name, of an output its position in the tuple (None: a bare tensor).
    position: of an input, its position among positional arguments.
    stream: whose tokens are meant, "img" or "txt".
    layout: where they lie in the tensor, as in :class:`~dit_lens.Stack`, or "whole".
    axes: "tokens", or the axes of an image.
    patch: latent frames, rows and columns of a token.
    sequence_first: whether the tensor is [token, row, channel].
    span: its channels (start, stop; stop None for the end), or all.
    half: the channels of a module's input that count, where the tensor is the module's output for them alone.
    gate: what the tensor is multiplied by before it is added to the residual.
    tanh: whether the hyperbolic tangent is taken of it.
    table: (parameter, part) of the module that is added to it.
    x0: whether the clean latents are computed from it.
    entry: of an argument that lists residuals, (rule, block, blocks) as in :class:`~dit_lens.PointSpec`.
    once: whether it has one row for all where the call has one time for all, as the check at load saw.
    """

    module: str
    side: str
    slot: str | int | None
    position: int | None = None
    stream: str = "img"
    layout: str = "own"
    axes: str = "tokens"
    patch: tuple[int, int, int] = (1, 1, 1)
    sequence_first: bool = False
    span: tuple[int, int | None] | None = None
    half: tuple[int, int | None] | None = None
    gate: TensorLocation | None = None
    tanh: bool = False
    table: tuple[str, int] | None = None
    x0: bool = False
    entry: tuple[str, int, int] | None = None
    once: bool = False

    def plain(self) -> Location:
        """The same as plain data."""
        return {
            "slot": self.slot,
            "position": self.position,
            "stream": self.stream,
            "layout": self.layout,
            "axes": self.axes,
            "patch": self.patch,
            "sequence_first": self.sequence_first,
            "span": self.span,
            "half": self.half,
            "tanh": self.tanh,
            "table": self.table,
            "x0": self.x0,
            "entry": self.entry,
            "once": self.once,
        }


class ImageTokens:
    """Where the image tokens of one forward pass are.

    grid: (h, w), or (f, h, w) of a video.
    count: tokens of the image that is drawn.
    first: the first of them among ``total`` image tokens.
    total: all image tokens, those of references and padding included.
    starts: the first image token of every row, where the text before it is of another length in every row; else empty.
    """

    def __init__(self, grid: tuple[int, ...], count: int, first: int, total: int, starts: list[int]):
        self.grid, self.count, self.first, self.total, self.starts = grid, count, first, total, starts
