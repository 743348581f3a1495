"""Where the tensor of a site is in a pipeline, and what a pattern of sites means: from the documentation alone."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod

import torch


@dataclass(frozen=True)
class Place:
    """One tensor.

    module: path below the transformer.
    side: "in" or "out" of the module.
    key: an output's index, (name, position) of an argument, or None for the whole output.
    span: sequence length -> the tokens of the stream.
    starts: argument of the transformer, a mask of text whose sums say where each row's image tokens begin.
    count: image tokens that begin there.
    part: first channel and the one after the last, where the tensor holds more.
    width: how many channels.
    patch: rows and columns of a token, where the tensor is an image.
    transposed: whether tokens come before rows.
    vector: whether there is one vector for each image in place of tokens.
    writes: "any" edit, "linear" ones alone as a gate follows, or "none"; "untried" where a site is known and not used.
    gate: (module, side, fn(module, value) -> [row, 1 or token, channel]) that the tensor is multiplied by.
    made: fn(module, tensor, moment) -> what no module gives, from the tensor; moment has the ``inputs`` of the
        transformer, (args, kwargs), and ``sigma``.
    """

    module: str
    side: str
    key: int | tuple | None = None
    span: Callable = lambda length: slice(0, length)
    starts: str | None = None
    count: int = 0
    part: tuple = (0, None)
    width: int = 32
    patch: tuple | None = None
    transposed: bool = False
    vector: bool = False
    writes: str = "any"
    gate: tuple | None = None
    made: Callable | None = None

    def tokens_of(self, row: int, length: int, starts: list | None) -> slice:
        """The tokens of the stream in one row of a forward pass."""
        if starts is None:
            return self.span(length)
        return slice(starts[row], starts[row] + self.count)

    def find(self, value):
        """The tensor in a module's input (args, kwargs) or output."""
        if isinstance(self.key, tuple):
            args, kwargs = value
            return kwargs[self.key[0]] if self.key[0] in kwargs else args[self.key[1]]
        return value if self.key is None else value[self.key]

    def put(self, value, tensor):
        """The input or output with another tensor."""
        if isinstance(self.key, tuple):
            args, kwargs = value
            if self.key[0] in kwargs:
                return args, {**kwargs, self.key[0]: tensor}
            return tuple(tensor if i == self.key[1] else arg for i, arg in enumerate(args)), kwargs
        return tensor if self.key is None else tuple(tensor if i == self.key else x for i, x in enumerate(value))

    def to_tokens(self, tensor):
        """[row, token, channel], a copy; an image's tokens lie row by row, each (channel, y, x)."""
        if self.patch is None:
            x = tensor[:, None] if tensor.ndim == 2 else tensor
            return (x.transpose(0, 1) if self.transposed else x).clone()
        x = torch.stack(list(tensor)) if isinstance(tensor, list) else tensor
        x = x if x.ndim == 5 else x[:, :, None]
        p, q = self.patch
        parts = torch.stack([x[:, :, :, y::p, z::q] for y in range(p) for z in range(q)], -1)  # [b, c, f, h, w, yx]
        return parts.permute(0, 2, 3, 4, 1, 5).flatten(4).flatten(1, 3)

    def from_tokens(self, tokens, like):
        """The inverse, in the form of ``like``."""
        if self.patch is None:
            x = tokens.transpose(0, 1) if self.transposed else tokens
            return x[:, 0] if like.ndim == 2 else x
        form = torch.stack(list(like)) if isinstance(like, list) else like
        new = (form if form.ndim == 5 else form[:, :, None]).clone()
        p, q = self.patch
        b, c, f, h, w = new.shape
        values = tokens.reshape(b, f, h // p, w // q, c, p, q)
        for y in range(p):
            for z in range(q):
                new[:, :, :, y::p, z::q] = values[..., y, z].permute(0, 4, 1, 2, 3)
        return list(new) if isinstance(like, list) else new.reshape(like.shape)


@dataclass(frozen=True)
class Wiring:
    """A pipeline as its sources describe it.

    places: site -> where it is, in the order in which the model computes them.
    stacks: name -> the numbers of its blocks.
    time: the transformer's argument, (name, position).
    grid: image tokens, (h, w) or (frames, h, w).
    text: the length of the text stream; None where there is none.
    knows_grid: whether the number of image tokens is known before a run.
    knows_text: the same of text tokens.
    attentions: (block, stream of the keys) -> the module in which it is called, and "text first", "image first", "own"
        or "cross"; those that are tried.
    rotates: whether tokens are rotated by their position in these.
    words: prompt, word -> its text tokens; None where they cannot be found.
    """

    places: dict[str, Place]
    stacks: dict
    time: tuple = ("timestep", 0)
    grid: tuple = (4, 6)
    text: int | None = 7
    knows_grid: bool = True
    knows_text: bool = False
    words: Callable | None = None
    attentions: dict = field(default_factory=dict)
    rotates: bool = False

    def tokens(self, site: str) -> int:
        """How many tokens there are at a site."""
        if self.places[site].vector:
            return 1
        return self.text if ".txt" in site else prod(self.grid)

    def expand(self, patterns) -> list[str]:
        """The sites that patterns mean."""
        patterns = [patterns] if isinstance(patterns, str) else list(patterns)
        return [name for name in self.places if any(self.means(pattern, name) for pattern in patterns)]

    def means(self, pattern: str, name: str) -> bool:
        """Whether a site is one of those of a pattern."""
        if pattern == name or "blocks" not in name or pattern in self.places:
            return pattern == name
        stack, index, span, rest = re.fullmatch(r"(\w+)(?:\.(\*|-?\d+)|\[(.*?)\])\.(.*)", pattern).groups()
        stream, _, point = rest.partition(".")
        _, number, its_stream, *its_point = name.split(".", 3)
        numbers = list(self.stacks[stack])
        if span is not None:
            numbers = numbers[slice(*(int(end) if end else None for end in span.split(":")))]
        elif index != "*":
            numbers = [numbers[int(index)]]
        streams = ("img", "txt") if stream == "*" else stream.strip("{}").split(",")
        return (
            int(number) in numbers
            and its_stream in streams
            and [point or "resid_post"] == (its_point or ["resid_post"])
        )
