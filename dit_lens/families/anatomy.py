"""A family's row laid over one live transformer: its sites, and the module, slot and tokens of each."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sized
from functools import cached_property
from typing import TYPE_CHECKING, Any

from dit_lens.errors import FamilyError, SiteError
from dit_lens.families.locations import GridRule, ReadoutRule, TensorLocation, TimeRule
from dit_lens.families.row import Family, PointSpec, Stack, Time
from dit_lens.families.sites import MODEL_POINTS, POINTS, STREAMS, Site

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin
    from torch import nn


HEADED = ("attn.q", "attn.k", "attn.v", "attn.z")


class Anatomy:
    """Sites, locations and sizes of a live transformer."""

    def __init__(self, family: Family, transformer: ModelMixin):
        self.family = family
        self.transformer = transformer
        self.order: Mapping[tuple[str, str, str], int] = {}  # (stack, module, side) -> place, seen at the check
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

    def block(self, index: int) -> int:
        """A block's number, counted from the end where it is negative; SiteError where there is none."""
        if not -self.depth <= index < self.depth:
            raise SiteError(f"block {index} does not exist: there are {self.depth}, 0 to {self.depth - 1}.")
        return index % self.depth

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
            for i in range(self.depth)
            for point in POINTS
            for stream in STREAMS
            if self.why_not(i, stream, point) is None
        ]
        return (*inner, *(Site(None, "img", point) for point in MODEL_POINTS))

    def attention(self, block: int) -> tuple[nn.Module, str]:
        """A block's module, and the order of the streams inside its attention; SiteError where it has no pattern."""
        stack, place = self._places[block]
        if stack.attention not in ("text_first", "image_first", "own"):
            raise SiteError(
                f"blocks.{block} of {self.family.name} has no pattern of attention: {stack.attention}. Read attn.q and "
                "attn.k instead."
            )
        return self.blocks(stack)[place], "ragged" if stack.layout == "ragged" else stack.attention

    def why_not(self, block: int, stream: str, point: str) -> str | None:
        """Why a block lacks a point; None where it has it."""
        stack, _ = self._places[block]
        streams = stack.inputs if point == "resid_pre" else self._returned(block)
        if point in ("resid_pre", "resid_post"):
            return None if stream in streams else f"block {block} ({stack.name}) holds no {stream} tokens there"
        if point == "x0":
            if stream != "img" or stream not in streams:
                return f"block {block} ({stack.name}) holds no image tokens to read out"
            return (
                None if self.family.readout else f"the row of {self.family.name} does not say how tokens are read out"
            )
        if stream not in stack.outputs:
            return f"block {block} ({stack.name}) holds no {stream} tokens"
        if stream not in streams and not point.startswith("attn."):
            return f"block {block} ({stack.name}), the last, returns no {stream} tokens"
        tap = stack.points.get(stream, {}).get(point)
        if tap is None:
            return f"the {self._called(stack)} of {self.family.name} have no {point}, or its row does not say where"
        if isinstance(tap, str):
            return f"the {self._called(stack)} of {self.family.name} have no {point}: {tap}"
        if self.order and (stack.name, f".{tap.module}" if tap.module else "", tap.side) not in self.order:
            return f"{tap.module} of the {stack.name} blocks was not called when {self.family.name} was checked"
        return self._lacks(block, tap)

    @staticmethod
    def _called(stack: Stack) -> str:
        return "blocks" if stack.name == "block" else f"{stack.name} blocks"

    def _lacks(self, block: int, tap: PointSpec) -> str | None:
        """What a tap needs that this very block does not have."""
        module = self._inner(block, tap.module)
        if module is None:
            return f"block {block} has no module {tap.module}"
        if isinstance(tap.slot, str) and tap.slot not in inspect.signature(type(module).forward).parameters:
            return f"block {block} takes no argument {tap.slot}"
        if tap.span is not None and (tap.span[1] or 0) * self.width > (_width_of(module, tap.side) or math.inf):
            return f"{tap.module} of block {block} has no such channels"
        return None if tap.gate is None else self._lacks(block, tap.gate)

    def blocks(self, stack: Stack) -> list[nn.Module]:
        """The blocks of a stack."""
        return list(self._module(stack.path).children())

    def _inner(self, block: int, path: str) -> nn.Module | None:
        """A module of a block, through its own names or those of a list."""
        stack, place = self._places[block]
        try:
            return self.transformer.get_submodule(f"{stack.path}.{place}{'.' if path else ''}{path}")
        except AttributeError:
            return None

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

    def time_rule(
        self, time: Time | None = None, levels: list[float] | None = None, kind: str | None = None
    ) -> TimeRule:
        """What the executor needs to tell the time of a call, and what its prediction is.

        time: the family's own by default. levels: noise by timestep, where it is a table. kind: "flow", "epsilon" or
        "v_prediction".
        """
        time = self.family.time if time is None else time
        return {
            "argument": time.argument,
            "position": self._place("", time.argument),
            "offset": time.offset,
            "scale": time.scale,
            "levels": levels,
            "kind": kind,
            "sign": self.family.sign,
        }

    @cached_property
    def grid_rule(self) -> GridRule:
        """What the executor needs to find image tokens in a call."""
        grid = self.family.grid
        return {
            "rule": grid.rule,
            "axes": grid.axes,
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
        if type(pipe).__name__ in self.family.chooses_size or "num_frames" in defaults or "height" not in defaults:
            return None
        if "use_resolution_binning" in defaults and call.get("use_resolution_binning", True):
            return None
        factor = getattr(pipe, "vae_scale_factor", None)
        sizes = [call.get(side) or defaults[side].default for side in ("height", "width")]
        if None in sizes and call.get("image") is not None and type(pipe).__name__ in self.family.size_from_image:
            return None
        usual = getattr(pipe, "default_sample_size", None)
        if factor is None or (None in sizes and not isinstance(usual, int)):
            return None
        h, w = (int(size or usual * factor) // (factor * self.family.patch) for size in sizes)
        return h, w

    def channels(self, site: Site) -> int:
        """The number of channels at a site."""
        if site.point in ("velocity", "x0"):
            return self.out_width if site.point == "velocity" else self.latent_width
        tap = self._tap(site)
        if tap is None or tap.half is not None:
            return self.width
        whole = _width_of(self._inner(site.block or 0, tap.module), tap.side) or self.width
        if tap.span is None:
            return whole
        start, stop = tap.span
        return (whole if stop is None else stop * self.width) - start * self.width

    def heads(self, site: Site) -> list[range]:
        """The channels of every head at a point of attention; SiteError elsewhere."""
        tap = self._tap(site) if site.point in HEADED else None
        paths = [] if tap is None else [tap.module.rpartition(".")[0], tap.module.split(".")[0]]
        modules = [self._inner(site.block or 0, path) for path in paths]
        count = next(filter(None, map(_heads_of, modules)), None)
        if count is None:
            raise SiteError(
                f"{site} is not made of heads that its module counts. Heads are at {', '.join(HEADED)}, for instance "
                f"blocks.{site.block or 0}.img.attn.z."
            )
        size = self.channels(Site(site.block, site.stream, "attn.q")) // count
        return [range(start, start + size) for start in range(0, self.channels(site), size)]

    @cached_property
    def latent_width(self) -> int:
        """The size of one token of latents: what is predicted, without a learned variance."""
        channels = self.transformer.config.get("in_channels")
        if self.family.prediction == "tokens" or channels is None:
            return self.out_width
        return min(self.out_width, channels * math.prod(self.patch))

    def _tap(self, site: Site) -> PointSpec | None:
        if site.block is None or site.point in ("resid_pre", "resid_post", "x0"):
            return None
        tap = self._places[site.block][0].points[site.stream][site.point]
        if isinstance(tap, str):
            raise FamilyError(f"{self.family.name}: {site} does not exist: {tap}.")
        return tap

    def block_name(self, block: int) -> str:
        """A block's name within its stack, such as "single.4"."""
        stack, place = self._places[block]
        return f"{stack.name}.{place}"

    def locate(self, site: Site) -> TensorLocation:
        """Where the tensor of a site is."""
        family = self.family
        if site.block is None and site.point in ("velocity", "x0"):
            return TensorLocation(
                "transformer",
                "output",
                0,
                layout=family.prediction_layout,
                axes=family.prediction,
                patch=self.patch,
                x0=site.point == "x0",
            )
        if site.block is None:
            name, position = self._parameter(family.final, 0)
            return TensorLocation(
                f"transformer.{family.final}",
                "input",
                name,
                position,
                layout=family.final_layout,
                axes=family.final_axes,
                sequence_first=family.final_sequence_first,
            )
        stack, place = self._places[site.block]
        path = f"{stack.path}.{place}"
        tokens: dict[str, Any] = {"stream": site.stream, "layout": stack.layout, "sequence_first": stack.sequence_first}
        if site.point == "resid_pre":
            name, position = self._parameter(path, stack.inputs[site.stream])
            return TensorLocation(f"transformer.{path}", "input", name, position, **tokens)
        tap = self._tap(site)
        if tap is not None:
            return self._tapped(site.block, site.stream, tap)
        return TensorLocation(f"transformer.{path}", "output", stack.outputs[site.stream], **tokens)

    @cached_property
    def final(self) -> TensorLocation:
        """What enters the final norm."""
        return self.locate(Site(None, "img", "final"))

    @cached_property
    def shift(self) -> TensorLocation | None:
        """What shift and scale after the final norm are made from, where no module applies them."""
        readout = self.family.readout
        if readout is None or readout.shift is None:
            return None
        module, slot = readout.shift
        self._module(module)
        return TensorLocation(f"transformer.{module}", "output", slot, layout="whole")

    @cached_property
    def readout_rule(self) -> ReadoutRule | None:
        """What the executor needs to read image tokens out."""
        readout = self.family.readout
        if readout is None:
            return None
        for module in readout.modules:
            self._module(module)
        return {
            "modules": [f"transformer.{module}" for module in readout.modules],
            "order": readout.order,
            "table": readout.table,
            "passes_temb": readout.passes_temb,
            "projection": readout.projection and f"transformer.{readout.projection}",
            "axes": self.family.prediction,
            "patch": list(self.patch),
        }

    def _tapped(self, block: int, stream: str, tap: PointSpec) -> TensorLocation:
        stack, place = self._places[block]
        path = f"{stack.path}.{place}{'.' if tap.module else ''}{tap.module}"
        slot, position = (
            self._parameter(path, tap.slot) if tap.side == "input" and tap.slot is not None else (tap.slot, None)
        )
        table = None if tap.table is None else (tap.table, (tap.span or (0, None))[0])
        return TensorLocation(
            f"transformer.{path}",
            tap.side,
            slot,
            position,
            stream=stream,
            layout=tap.layout or stack.layout,
            axes=tap.axes,
            sequence_first=stack.sequence_first and not tap.batch_first and tap.layout != "whole",
            span=None if tap.table is not None else self._channels_of(tap.span),
            half=self._channels_of(tap.half),
            gate=None if tap.gate is None else self._tapped(block, stream, tap.gate),
            tanh=tap.tanh,
            table=table,
        )

    def _channels_of(self, units: tuple[int, int | None] | None) -> tuple[int, int | None] | None:
        """A span in units of the hidden size, in channels."""
        if units is None:
            return None
        start, stop = units
        return start * self.width, None if stop is None else stop * self.width

    def rank(self, location: TensorLocation) -> tuple[int, int]:
        """Sorts locations as the model computes them: blocks by their number, modules of a block as they were seen."""
        if self.family.readout and self.family.readout.shift and location == self.shift:
            return -1, 0
        for number, (stack, place) in enumerate(self._places):
            path = f"transformer.{stack.path}.{place}"
            if location.module == path or location.module.startswith(f"{path}."):
                return number, self.order[stack.name, location.module[len(path) :], location.side]
        return self.depth, ["input", "output"].index(location.side)

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


def _heads_of(module: Any) -> int | None:
    """How many heads an attention says it has."""
    counts = (getattr(module, name, None) for name in ("heads", "num_heads"))
    return next((count for count in counts if isinstance(count, int)), None)


def _width_of(module: Any, side: str) -> int | None:
    """Channels that enter or leave a module, where it says."""
    names = ("in_features", "in_channels") if side == "input" else ("out_features", "out_channels")
    return next((int(getattr(module, name)) for name in names if hasattr(module, name)), None)
