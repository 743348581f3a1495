"""Where tensors and tokens are, as plain data: what a family tells the executor, with which it travels to a server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict


class Location(TypedDict):
    """A tensor in the input or output of a module: :class:`TensorLocation` as plain data, without module and gate."""

    slot: Any  # of an input a str, of an output an int or None
    position: Any  # of an input an int, or None where it is only passed by name
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
    name: NotRequired[str]  # what messages call it


class TimeRule(TypedDict):
    """How the time of a transformer call is read: noise level = offset + scale * argument, or levels[argument]."""

    argument: str
    position: int | None
    offset: float
    scale: float
    levels: list[float] | None
    kind: str | None
    sign: int


class GridRule(TypedDict):
    """How image tokens are found in the arguments of a transformer call; see :class:`~dit_lens.Grid`."""

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
    marks: Any  # a str where the rule is "marks"
    marked: int | None


class ReadoutRule(TypedDict):
    """How image tokens become a prediction; see :class:`~dit_lens.Readout`. Modules are paths from the pipeline."""

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
    half: the channels of a module's input that count, where the tensor is what the module makes of them alone.
    gate: what the tensor is multiplied by before it is added to the residual.
    tanh: whether the hyperbolic tangent is taken of it.
    table: (parameter, part) of the module that is added to it.
    x0: whether the clean latents are computed from it.
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
        }


class ImageTokens:
    """Where the image tokens of one transformer call are.

    grid: (h, w), or (f, h, w) of a video.
    count: tokens of the image that is drawn.
    first: the first of them among ``total`` image tokens.
    total: all image tokens, those of references and padding included.
    starts: the first image token of every row, where the text before it is of another length in every row; else empty.
    """

    def __init__(self, grid: tuple[int, ...], count: int, first: int, total: int, starts: list[int]):
        self.grid, self.count, self.first, self.total, self.starts = grid, count, first, total, starts
