"""The arguments of one small call of a transformer, from the words in a family's row."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from dit_lens.families.anatomy import Anatomy

ROWS = 2


def build_call(anatomy: Anatomy, text: int) -> dict[str, Any]:
    """Random arguments for a call on the family's ``check_grid`` image tokens and ``text`` text tokens.

    A word of the row is a kind and its sizes: numbers, entries of the config, b (rows), n (image tokens), t (text
    tokens), h and w (latent pixels), joined by + or *. What is no word is passed as it is.
    """
    family, maker = anatomy.family, _Maker(anatomy, text)
    call = {name: maker.make(word) if isinstance(word, str) else word for name, word in family.call.items()}
    if family.embedded and not anatomy.transformer.config[family.embedded]:
        call.pop("guidance", None)
    return call


class _Maker:
    def __init__(self, anatomy: Anatomy, text: int):
        self.config, self.grid, self.text = anatomy.transformer.config, anatomy.family.check_grid, text
        h, w = self.grid
        _, tall, wide = anatomy.patch
        self.sizes = {"b": ROWS, "n": h * w, "t": text, "h": h * tall, "w": w * wide}

    def make(self, word: str) -> Any:
        kind, *sizes = word.split()
        return getattr(self, f"_{kind}")(*sizes)

    def _size(self, word: str) -> int:
        return sum(math.prod(self._factor(one) for one in term.split("*")) for term in word.split("+"))

    def _factor(self, name: str) -> int:
        return int(name) if name.isdecimal() else self.sizes[name] if name in self.sizes else int(self.config[name])

    def _shape(self, sizes: tuple[str, ...]) -> list[int]:
        return [self._size(size) for size in sizes]

    def _randn(self, *sizes: str) -> Any:
        return torch.randn(self._shape(sizes))

    def _zeros(self, *sizes: str) -> Any:
        return torch.zeros(self._shape(sizes))

    def _full(self, value: str, *sizes: str) -> Any:
        return torch.full(self._shape(sizes), float(value))

    def _true(self, *sizes: str) -> Any:
        return torch.ones(self._shape(sizes), dtype=torch.bool)

    def _false(self, *sizes: str) -> Any:
        return torch.zeros(self._shape(sizes), dtype=torch.bool)

    def _long(self, *sizes: str) -> Any:
        return torch.ones(self._shape(sizes), dtype=torch.long)

    _ones_long = _long

    def _zeros_long(self, *sizes: str) -> Any:
        return torch.zeros(self._shape(sizes), dtype=torch.long)

    def _slots(self, *sizes: str) -> Any:
        """Text tokens, then one slot for four image tokens."""
        text = torch.zeros(*self._shape(sizes), self.text, dtype=torch.bool)
        return torch.nn.functional.pad(text, (0, self.sizes["n"] // 4), value=True)

    def _lengths(self, *sizes: str) -> Any:
        return torch.full(self._shape(sizes), self.text)

    def _list(self, *sizes: str) -> Any:
        return list(self._randn("b", *sizes))

    def _layers(self, count: str, *sizes: str) -> Any:
        return [self._randn(*sizes) for _ in range(int(count))]

    def _count(self, *sizes: str) -> Any:
        shape = self._shape(sizes)
        return torch.arange(shape[-1]).expand(shape)

    def _rows(self) -> int:
        return self.grid[0]

    def _columns(self) -> int:
        return self.grid[1]

    def _ids(self) -> Any:
        y, x = torch.meshgrid(*map(torch.arange, self.grid), indexing="ij")
        return torch.stack([torch.zeros_like(y), y, x], -1).reshape(-1, 3).float()

    def _ids4(self) -> Any:
        return torch.nn.functional.pad(self._ids(), (0, 1))

    def _positions(self, *rows: str) -> Any:
        """Those of the text, all zero, before those of the image."""
        ids = torch.nn.functional.pad(self._ids(), (0, 0, self.text, 0)).long()
        return ids.expand(*self._shape(rows), *ids.shape) if rows else ids.float()

    def _marks(self, *rows: str) -> Any:
        from diffusers.models.transformers import transformer_ideogram4 as module

        marks = [module.LLM_TOKEN_INDICATOR] * self.text + [module.OUTPUT_IMAGE_INDICATOR] * self.sizes["n"]
        return torch.tensor(marks).expand(*self._shape(rows), -1)

    def _shapes(self) -> Any:
        return [[(1, *self.grid)]] * ROWS

    def _shapes_flat(self) -> Any:
        return [(1, *self.grid)] * ROWS

    def _axes(self) -> Any:
        return [torch.arange(size) for size in (1, *self.grid)]

    def _rope(self, *sizes: str) -> Any:
        return torch.ones(self._shape(sizes)), torch.zeros(self._shape(sizes))

    def _turns(self, size: str) -> Any:
        return torch.ones(self.sizes["h"] // 2 * 96, 96, int(size), dtype=torch.complex64)
