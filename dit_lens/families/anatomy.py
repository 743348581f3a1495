"""A family's row laid over one live transformer: its sites, and the module, slot and tokens of each."""

from __future__ import annotations

import inspect
import math
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
    position: for an input, its place among positional arguments. stream, layout: whose tokens, and where they lie.
    axes, patch: those of a picture, or "tokens". turned: whether the tensor is [token, row, channel].
    """

    module: str
    side: str
    slot: str | int | None
    position: int | None = None
    stream: str = "img"
    layout: str = "own"
    axes: str = "tokens"
    patch: tuple[int, int, int] = (1, 1, 1)
    turned: bool = False


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
            if stream in (stack.inputs if point == "resid_pre" else self._returned(i))
        ]
        return (*inner, Site(None, "img", "final"), Site(None, "img", "velocity"))

    def _returned(self, block: int) -> set[str]:
        """The streams a block returns."""
        stack, place = self._places[block]
        last = place == len(self.stacks[stack.name]) - 1
        return set(stack.outputs) - set(stack.ends_without if last else ())

    def site(self, name: str) -> Site:
        """The site of a full name, as :attr:`sites` lists it."""
        return self._by_name[name]

    @cached_property
    def _by_name(self) -> dict[str, Site]:
        return {site.name: site for site in self.sites}

    @cached_property
    def patch(self) -> tuple[int, int, int]:
        """Latent frames, rows and columns of an image token."""
        sides = self.family.grid.patch
        value = self.transformer.config[sides] if isinstance(sides, str) else sides
        sizes = [value] * 2 if isinstance(value, int) else list(value)
        f, h, w = (1, *sizes)[-3:]
        return f, h, w

    def time_rule(self, levels: list[float] | None) -> dict[str, Any]:
        """What the executor needs to tell the time of a call; ``levels``: noise by timestep, where it is a table."""
        time = self.family.time
        return {
            "argument": time.argument,
            "position": self._place("", time.argument),
            "offset": time.offset,
            "scale": time.scale,
            "levels": levels,
        }

    @cached_property
    def grid_rule(self) -> dict[str, Any]:
        """What the executor needs to find image tokens in a call."""
        grid = self.family.grid
        return {
            "rule": grid.rule,
            "argument": grid.argument,
            "position": self._place("", grid.argument),
            "latents": grid.latents,
            "latents_position": self._place("", grid.latents),
            "patch": list(self.patch),
            "target": grid.target,
            "pad": grid.pad,
            "largest": vars(self.transformer).get("max_seq"),
            "mask": grid.mask,
            "marked": grid.marked,
        }

    def planned_grid(self, pipe: DiffusionPipeline, call: Mapping[str, Any]) -> tuple[int, int] | None:
        """(h, w) image tokens that a call will have, or None where the pipeline chooses its own size."""
        defaults = inspect.signature(type(pipe).__call__).parameters
        if type(pipe).__name__ in self.family.resizing or "num_frames" in defaults or "height" not in defaults:
            return None
        if "use_resolution_binning" in defaults and call.get("use_resolution_binning", True):
            return None
        factor = getattr(pipe, "vae_scale_factor", None)
        sizes = [call.get(side) or defaults[side].default for side in ("height", "width")]
        usual = getattr(pipe, "default_sample_size", None)
        if factor is None or (None in sizes and not isinstance(usual, int)):
            return None
        h, w = (int(size or usual * factor) // (factor * self.family.patch) for size in sizes)
        return h, w

    def channels(self, site: Site) -> int:
        """The number of channels at a site."""
        return self.out_width if site.point == "velocity" else self.width

    def block_name(self, block: int) -> str:
        """A block's name within its stack, such as "single.4"."""
        stack, place = self._places[block]
        return f"{stack.name}.{place}"

    def address(self, site: Site) -> Address:
        family = self.family
        if site.point == "velocity":
            return Address(
                "transformer",
                "output",
                0,
                layout=family.prediction_layout,
                axes=family.prediction,
                patch=self.patch,
            )
        if site.block is None:
            name, position = self._parameter(family.final, 0)
            layout, _, turned = family.final_layout.partition(" ")
            return Address(
                f"transformer.{family.final}",
                "input",
                name,
                position,
                layout=layout,
                axes=family.final_axes,
                turned=turned == "turned",
            )
        stack, place = self._places[site.block]
        path = f"{stack.path}.{place}"
        tokens: dict[str, Any] = {"stream": site.stream, "layout": stack.layout, "turned": stack.turned}
        if site.point == "resid_pre":
            name, position = self._parameter(path, stack.inputs[site.stream])
            return Address(f"transformer.{path}", "input", name, position, **tokens)
        return Address(f"transformer.{path}", "output", stack.outputs[site.stream], **tokens)

    def _module(self, path: str) -> nn.Module:
        try:
            return self.transformer.get_submodule(path)
        except AttributeError:
            parts = ", ".join(name for name, _ in self.transformer.named_children())
            raise FamilyError(
                f"{self.family.name}: {type(self.transformer).__name__} has no module {path!r}; it has {parts}."
            ) from None

    def _parameter(self, path: str, asked: str | int) -> tuple[str, int | None]:
        """Name and place of an argument of a module's forward, whose wrappers are looked through."""
        parameters = list(inspect.signature(type(self._module(path)).forward).parameters.values())[1:]
        names = [parameter.name for parameter in parameters]
        if isinstance(asked, int):
            return names[asked], asked
        if asked in names:
            return asked, names.index(asked)
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            return asked, None
        raise FamilyError(
            f"{self.family.name}: {path or 'the transformer'} takes no argument {asked!r}; it takes {', '.join(names)}."
        )

    def _place(self, path: str, argument: str) -> int | None:
        return self._parameter(path, argument)[1]

    def _size(self, name: str) -> int:
        """A size from names joined by ``*``: attributes of the transformer, entries of its config, or numbers."""
        return math.prod(self._factor(part) for part in name.split("*"))

    def _factor(self, name: str) -> int:
        if name.isdecimal():
            return int(name)
        entry = name.removeprefix("config.")
        value = None if entry != name else vars(self.transformer).get(name)
        value = self.transformer.config[entry] if not isinstance(value, int | tuple | list) else value
        if value is None and entry == "out_channels":
            value = self.transformer.config["in_channels"]
        return math.prod(value) if isinstance(value, tuple | list) else int(value)
