"""A family's row laid over one live transformer: its sites, and the module, slot and tokens of each."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sized
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from dit_lens.errors import FamilyError
from dit_lens.families.row import Family, Stack
from dit_lens.sites import POINTS, STREAMS, Site

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin
    from torch import nn


@dataclass(frozen=True)
class Address:
    """Where a site's tensor is.

    module: path from the pipeline ("transformer.transformer_blocks.3"). side: "input" or "output" of that module.
    slot: for an input the argument's name, for an output its position in the tuple (None: a bare tensor).
    position: for an input, its place among positional arguments. tokens: "image" (recomputed at each call) or "all".
    """

    module: str
    side: str
    slot: str | int | None
    position: int | None = None
    tokens: str = "all"


class Anatomy:
    """Sites, addresses and sizes of a live transformer."""

    def __init__(self, family: Family, transformer: ModelMixin):
        self.family = family
        self.transformer = transformer
        self._places: list[tuple[Stack, int]] = []
        self.stacks: dict[str, range] = {}
        for stack in family.stacks:
            blocks = self._module(stack.path)
            if not isinstance(blocks, Sized):
                raise FamilyError(
                    f"{family.name}: {stack.path} of {type(transformer).__name__} is not a list of blocks."
                )
            start = len(self._places)
            self._places += [(stack, i) for i in range(len(blocks))]
            self.stacks[stack.name] = range(start, len(self._places))

    @property
    def depth(self) -> int:
        """How many blocks there are, over all stacks."""
        return len(self._places)

    @cached_property
    def width(self) -> int:
        return self._size(self.family.width)

    @cached_property
    def out_width(self) -> int:
        return self._size(self.family.out_width)

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """Every site of this model, in the order it is computed."""
        inner = [
            Site(i, stream, point)
            for i, (stack, _) in enumerate(self._places)
            for point in POINTS
            for stream in STREAMS
            if stream in (stack.inputs if point == "resid_pre" else stack.outputs)
        ]
        return (*inner, Site(None, "img", "final"), Site(None, "img", "velocity"))

    def site(self, name: str) -> Site:
        """The site of a full name, as :attr:`sites` lists it."""
        return self._by_name[name]

    @cached_property
    def _by_name(self) -> dict[str, Site]:
        return {site.name: site for site in self.sites}

    def planned_grid(self, pipe: DiffusionPipeline, call: Mapping[str, Any]) -> tuple[int, int] | None:
        """(h, w) image tokens that a call will have, or None where the pipeline chooses its own size."""
        if type(pipe).__name__ in self.family.resizing:
            return None
        size = [call.get(side) or pipe.default_sample_size * pipe.vae_scale_factor for side in ("height", "width")]
        h, w = (int(pixels) // (pipe.vae_scale_factor * self.family.patch) for pixels in size)
        return h, w

    def channels(self, site: Site) -> int:
        """The number of channels at a site."""
        return self.out_width if site.point == "velocity" else self.width

    def block_name(self, block: int) -> str:
        """A block's name within its stack, such as "single.4"."""
        stack, place = self._places[block]
        return f"{stack.name}.{place}"

    def address(self, site: Site) -> Address:
        tokens = "image" if site.stream == "img" else "all"
        if site.point == "velocity":
            return Address("transformer", "output", 0, tokens=tokens)
        if site.block is None:
            name, position = self._parameter(self.family.final, 0)
            return Address(f"transformer.{self.family.final}", "input", name, position, tokens)
        stack, place = self._places[site.block]
        path = f"{stack.path}.{place}"
        if site.point == "resid_pre":
            name, position = self._parameter(path, stack.inputs[site.stream])
            return Address(f"transformer.{path}", "input", name, position, tokens)
        return Address(f"transformer.{path}", "output", stack.outputs[site.stream], tokens=tokens)

    def _module(self, path: str) -> nn.Module:
        try:
            return self.transformer.get_submodule(path)
        except AttributeError:
            parts = ", ".join(name for name, _ in self.transformer.named_children())
            raise FamilyError(
                f"{self.family.name}: {type(self.transformer).__name__} has no module {path!r}; it has {parts}."
            ) from None

    def _parameter(self, path: str, asked: str | int) -> tuple[str, int]:
        """Name and place of an argument of a module's forward, whose wrappers are looked through."""
        names = list(inspect.signature(type(self._module(path)).forward).parameters)[1:]
        if isinstance(asked, str) and asked not in names:
            raise FamilyError(f"{self.family.name}: {path} takes no argument {asked!r}; it takes {', '.join(names)}.")
        return (names[asked], asked) if isinstance(asked, int) else (asked, names.index(asked))

    def _size(self, name: str) -> int:
        value = getattr(self.transformer, name, None)
        return int(value if value is not None else self.transformer.config[name])
