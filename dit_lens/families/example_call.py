"""The arguments of one small call of a transformer, as a family's row describes them.

A text is a kind and its sizes, such as "randn b n in_channels": numbers, entries of the config, b (rows), n (image
tokens), t (text tokens), h and w (latent pixels), joined by + or *. A function is called with :class:`CallSizes`.
Anything else is the argument itself. The kinds:

    randn, zeros, true, false  a tensor of this shape      ids, ids4     positions of image tokens, (0, y, x[, 0])
    ones_long, zeros_long      the same, whole numbers     positions     the same after zeros for text tokens
    full value                 a tensor of one value       shapes        (1, h, w) of each image, of each row
    count                      0, 1, ... along the last    shapes_flat   the same, not in lists
    each_row                   a list of one for each row  axes          counts along frames, rows and columns
    layers number              a list of tensors           rows, columns the sides of the grid
    lengths                    text tokens of every row
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dit_lens.arguments.functions import takes
from dit_lens.errors import FamilyError
from dit_lens.families.module_tree import read_entry

if TYPE_CHECKING:
    from torch import Tensor

    from dit_lens.families.anatomy import Anatomy

ROWS = 2


@dataclass(frozen=True)
class CallSizes:
    """The sizes of a call.

    rows: rows of the batch.
    text: text tokens.
    grid: image tokens (h, w).
    latents: latent pixels (h, w).
    config: of the transformer.
    """

    rows: int
    text: int
    grid: tuple[int, int]
    latents: tuple[int, int]
    config: Mapping[str, Any]

    @classmethod
    def of(cls, anatomy: Anatomy, text: int) -> CallSizes:
        """Those of a call on the image tokens of the family's example and ``text`` text tokens."""
        grid, (_, tall, wide) = anatomy.family.example.grid, anatomy.patch
        return cls(ROWS, text, grid, (grid[0] * tall, grid[1] * wide), anatomy.transformer.config)

    @property
    def tokens(self) -> int:
        """Image tokens."""
        return math.prod(self.grid)


def build_call(anatomy: Anatomy, text: int) -> dict[str, Any]:
    """Random arguments for a call on the image tokens of the family's example and ``text`` text tokens."""
    family, sizes = anatomy.family, CallSizes.of(anatomy, text)
    call = {name: make_argument(value, sizes) for name, value in family.example.call.items()}
    if family.guidance_flag and not read_entry(sizes.config, family.guidance_flag, family.name):
        call.pop("guidance", None)
    return call


def make_argument(value: Any, sizes: CallSizes) -> Any:
    """One argument, from what the row says of it.

    >>> make_argument("full 0.5 b", CallSizes(2, 5, (2, 3), (4, 6), {}))
    tensor([0.5000, 0.5000])
    """
    if callable(value):
        return value(sizes)
    if not isinstance(value, str):
        return value
    kind, *words = value.split() or [""]
    make = getattr(_Maker(sizes), kind, None) if kind.isidentifier() and kind[0] != "_" else None
    if make is None or not takes(make, len(words)):
        raise FamilyError(f"an example holds {value!r}, which is no kind of argument with its sizes.")
    return make(*words)


class _Maker:
    """A method for each kind; sizes come as words."""

    def __init__(self, sizes: CallSizes):
        self.sizes = sizes
        h, w = sizes.latents
        self.letters = {"b": sizes.rows, "n": sizes.tokens, "t": sizes.text, "h": h, "w": w}

    def _size(self, word: str) -> int:
        return sum(math.prod(map(self._factor, term.split("*"))) for term in word.split("+"))

    def _factor(self, name: str) -> int:
        if name.isdecimal():
            return int(name)
        return self.letters[name] if name in self.letters else int(read_entry(self.sizes.config, name, "an example"))

    def _shape(self, words: tuple[str, ...]) -> list[int]:
        return [self._size(word) for word in words]

    def randn(self, *words: str) -> Tensor:
        return torch.randn(self._shape(words))

    def zeros(self, *words: str) -> Tensor:
        return torch.zeros(self._shape(words))

    def full(self, value: str, *words: str) -> Tensor:
        return torch.full(self._shape(words), float(value))

    def true(self, *words: str) -> Tensor:
        return torch.ones(self._shape(words), dtype=torch.bool)

    def false(self, *words: str) -> Tensor:
        return torch.zeros(self._shape(words), dtype=torch.bool)

    def ones_long(self, *words: str) -> Tensor:
        return torch.ones(self._shape(words), dtype=torch.long)

    def zeros_long(self, *words: str) -> Tensor:
        return torch.zeros(self._shape(words), dtype=torch.long)

    def lengths(self, *words: str) -> Tensor:
        return torch.full(self._shape(words), self.sizes.text)

    def each_row(self, *words: str) -> list[Tensor]:
        return [*self.randn("b", *words)]

    def layers(self, number: str, *words: str) -> list[Tensor]:
        return [self.randn(*words) for _ in range(int(number))]

    def count(self, *words: str) -> Tensor:
        shape = self._shape(words)
        return torch.arange(shape[-1]).expand(shape)

    def rows(self) -> int:
        return self.sizes.grid[0]

    def columns(self) -> int:
        return self.sizes.grid[1]

    def ids(self) -> Tensor:
        y, x = torch.meshgrid(*map(torch.arange, self.sizes.grid), indexing="ij")
        return torch.stack([torch.zeros_like(y), y, x], -1).reshape(-1, 3).float()

    def ids4(self) -> Tensor:
        return torch.nn.functional.pad(self.ids(), (0, 1))

    def positions(self, *rows: str) -> Tensor:
        ids = torch.nn.functional.pad(self.ids(), (0, 0, self.sizes.text, 0)).long()
        return ids.expand(*self._shape(rows), *ids.shape) if rows else ids.float()

    def shapes(self) -> list[list[tuple[int, ...]]]:
        return [[(1, *self.sizes.grid)]] * self.sizes.rows

    def shapes_flat(self) -> list[tuple[int, ...]]:
        return [(1, *self.sizes.grid)] * self.sizes.rows

    def axes(self) -> list[Tensor]:
        return [torch.arange(size) for size in (1, *self.sizes.grid)]
