"""A family's row laid over one live transformer: its sites, and the module, slot and tokens of each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sized
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from dit_lens.arguments.checks import checked
from dit_lens.errors import FamilyError, SiteError, nearest
from dit_lens.families.calls import call_parameters
from dit_lens.families.locations import GridRule, ReadoutRule, TensorLocation, TextRule, TimeRule
from dit_lens.families.module_tree import (
    ModuleTree,
    class_names,
    count_heads,
    measure_width,
    parameters_of,
    read_entry,
)
from dit_lens.families.row import Family, Time
from dit_lens.families.schedulers import Noise
from dit_lens.families.sites import MODEL_POINTS, PATTERNS, POINTS, STREAMS, Site, match
from dit_lens.families.stack import CALLED, NORMS, NORMS_OF_TEXT, ROTARY, PointSpec, Stack, find_point

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin
    from torch import nn


HEADED = (*(f"{module}.{part}" for module in ("attn", "cross") for part in "qkvz"), *CALLED, *PATTERNS)


class Anatomy:
    """Sites, locations and sizes of a live transformer."""

    def __init__(
        self, family: Family, transformer: ModelMixin, *, controlled: bool = False, caching: bool | None = None
    ):
        self.family = family
        self.controlled = controlled  # whether a ControlNet is there, whose residuals are added after blocks
        # Whether the pipeline keeps tokens in a cache; where it is not known, whether all of the family's do.
        self.caching = all(one.caches for one in family.pipelines) if caching is None else caching
        self.transformer = transformer
        self.modules = ModuleTree(transformer, family.name)
        self.order: Mapping[
            tuple[str, str, str], int
        ] = {}  # (stack, module, side) -> when it is computed, as the check saw
        self.tried: Mapping[tuple[str, str], frozenset[Callable[..., Any]]] = {}  # what the check ran, see .live
        self.once: frozenset[tuple[str, str, str]] = frozenset()  # (stack, stream, point) of one row for all, as it saw
        self._blocks: list[tuple[Stack, int]] = []  # of every block its stack, and its index there
        self.stacks: dict[str, range] = {}
        for stack in family.stacks:
            blocks = self.modules.get(stack.path)
            if not isinstance(blocks, Sized):
                raise FamilyError(
                    f"{family.name}: {stack.path} of {type(transformer).__name__} is not a list of blocks."
                )
            start = len(self._blocks)
            self._blocks += [(stack, i) for i in range(len(blocks))]
            self.stacks[stack.name] = range(start, len(self._blocks))

    @property
    def depth(self) -> int:
        """How many blocks there are, over all stacks."""
        return len(self._blocks)

    @checked
    def check_block(self, index: int) -> int:
        """A block's number, counted from the end if it is negative; raises SiteError if there is no such block."""
        if not -self.depth <= index < self.depth:
            raise SiteError(f"block {index} does not exist: there are {self.depth}, 0 to {self.depth - 1}.")
        return index % self.depth

    @cached_property
    def width(self) -> int:
        return self.modules.measure(self.family.width)

    @cached_property
    def out_width(self) -> int:
        return self.modules.measure(self.family.prediction.width)

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """Every site of this model, in the order it is computed."""
        inner = [
            Site(i, stream, point)
            for i in range(self.depth)
            for point in POINTS
            if point not in PATTERNS
            for stream in STREAMS
            if self.why_not(i, stream, point) is None
        ]
        outer = [Site(None, "img", point) for point in MODEL_POINTS if self.why_not(None, "img", point) is None]
        return (*inner, *outer)

    def find_attention(self, block: int) -> tuple[str, str]:
        """A block's path, and the order of the streams inside its attention; SiteError if it has no pattern."""
        stack, index = self._blocks[block]
        if stack.attention not in ("text_first", "image_first", "own"):
            raise SiteError(
                f"blocks.{block} of {self.family.name} has no pattern of attention: {stack.attention}. Read attn.q and "
                "attn.k instead."
            )
        return f"{stack.path}.{index}", stack.key_layout

    def find_call(self, block: int, stream: str, keys: str) -> tuple[Site, str]:
        """Where tokens of a stream read those of another in a block, and where these lie among the keys.

        Raises SiteError with the reason where they do not.
        """
        stack, _ = self._blocks[block]
        own = keys in stack.outputs or stack.attention in ("text_first", "image_first")
        point = "attn.pattern" if own else "cross.pattern"
        why = self.why_not(block, stream, point)
        if why is not None:
            raise SiteError(f"blocks.{block}.{stream} reads no {keys} tokens by attention: {why}.")
        return Site(block, stream, point), stack.key_layout if own else "own"

    def find_rotated(self, block: int, stream: str) -> list[Site]:
        """Queries and keys of a block's stream after rotary position embedding; SiteError where there is none."""
        stack, index = self._blocks[block]
        found = [Site(block, stream, point) for point in CALLED]
        why = next(filter(None, (self.why_not(block, stream, site.point) for site in found)), None)
        if why is None and not set(ROTARY) & set(parameters_of(type(self.blocks(stack)[index]).forward)):
            why = f"the {_describe_blocks(stack)} of {self.family.name} are given none, and add positions before them"
        if why is not None:
            raise SiteError(f"blocks.{block}.{stream} has no rotary position embedding: {why}.")
        return found

    def find_norm(self, site: Site) -> str | None:
        """The norm that queries or keys go through before they are rotated, in their attention; None: none."""
        module = self.locate(site).module.removeprefix("transformer.")
        part = site.point.removeprefix("attn.")[0]
        names = [*(NORMS_OF_TEXT if site.stream == "txt" else ()), *NORMS]
        named = (name.format(part, {"q": "query", "k": "key"}[part]) for name in names)
        return next((name for name in named if self.modules.find(f"{module}.{name}") is not None), None)

    def why_not(self, block: int | None, stream: str, point: str) -> str | None:
        """Why a block, or for None the whole model, lacks a point; None where it has it."""
        if block is None:
            return self._why_no_modulation() if point == "mod.final" else None
        stack, _ = self._blocks[block]
        streams = stack.inputs if point == "resid_pre" else self._streams_after(block)
        if point in ("resid_pre", "resid_post"):
            return None if stream in streams else f"block {block} ({stack.name}) holds no {stream} tokens there"
        if point == "x0":
            if stream != "img" or stream not in streams:
                return f"block {block} ({stack.name}) holds no image tokens to read out"
            return (
                None if self.family.readout else f"the row of {self.family.name} does not say how tokens are read out"
            )
        spec = find_point(stack, stream, point)
        crossing = point.startswith("cross.")
        if stream not in stack.outputs and not (crossing and spec is not None):
            return f"block {block} ({stack.name}) holds no {stream} tokens"
        if stream not in streams and not crossing and (not point.startswith("attn.") or point == "attn.o"):
            return f"block {block} ({stack.name}), the last, returns no {stream} tokens"
        if spec is None:
            return f"the {_describe_blocks(stack)} of {self.family.name} have no {point}, or its row does not say where"
        if isinstance(spec, str):
            return f"the {_describe_blocks(stack)} of {self.family.name} have no {point}: {spec}"
        side = "input" if spec.side == "attention" else spec.side
        if self.order and (stack.name, f".{spec.module}" if spec.module else "", side) not in self.order:
            return f"{spec.module} of the {stack.name} blocks was not called when {self.family.name} was checked"
        return self._find_missing(block, spec)

    def _why_no_modulation(self) -> str | None:
        """Why what modulates the final norm has no name."""
        final, name = self.family.final, self.family.name
        if isinstance(final.mod, str):
            return f"{name} has none: {final.mod}"
        return None if final.mod else f"the row of {name} does not say what modulates {final.module}"

    def _find_missing(self, block: int, spec: PointSpec) -> str | None:
        """What a spec needs that this very block does not have."""
        if spec.side == "attention" and self.caching:
            return f"its pipeline keeps tokens in a cache, so that attention in {spec.module} is not called with all"
        if spec.entry is not None:
            return self._why_no_control(block, spec)
        module = self._find_inner(block, spec.module)
        if module is None:
            return f"block {block} has no module {spec.module}"
        if spec.side == "input" and isinstance(spec.slot, str) and spec.slot not in parameters_of(type(module).forward):
            return f"block {block} takes no argument {spec.slot}"
        if spec.adapter is not None and spec.adapter not in class_names(getattr(module, "processor", None)):
            return f"no IP-Adapter is loaded there (its {spec.module} is not computed by a {spec.adapter})"
        if spec.span is not None and (spec.span[1] or 0) * self.width > (measure_width(module, spec.side) or math.inf):
            return f"{spec.module} of block {block} has no such channels"
        return None if spec.gate is None else self._find_missing(block, spec.gate)

    def _why_no_control(self, block: int, spec: PointSpec) -> str | None:
        """Why nothing is added after a block."""
        stack, index = self._blocks[block]
        if not self.controlled or spec.slot not in parameters_of(type(self.transformer).forward):
            return "no ControlNet is in this pipeline"
        last = index == len(self.stacks[stack.name]) - 1
        return f"nothing is added after the last block of {self.family.name}" if last and stack.ends_without else None

    def blocks(self, stack: Stack) -> list[nn.Module]:
        """The blocks of a stack; one that stands twice in it is there twice."""
        blocks: Any = self.modules.get(stack.path)
        return list(blocks)

    def _find_inner(self, block: int, path: str) -> nn.Module | None:
        """A module of a block by its path within it."""
        stack, index = self._blocks[block]
        return self.modules.find(f"{stack.path}.{index}{'.' if path else ''}{path}")

    def _streams_after(self, block: int) -> set[str]:
        """The streams a block returns."""
        stack, index = self._blocks[block]
        last = index == len(self.stacks[stack.name]) - 1
        return set(stack.outputs) - set(stack.ends_without if last else ())

    @checked
    def site(self, name: str) -> Site:
        """The site of a full name, as :attr:`sites` lists it."""
        if name not in self._by_name:
            raise SiteError(f"no site is called {name!r}.{nearest(name, self._by_name)}")
        return self._by_name[name]

    @checked
    def find_site(self, pattern: str) -> Site:
        """The one site that a full name or a pattern means; SiteError where it means none or several."""
        if pattern in self._by_name:
            return self._by_name[pattern]
        found = match(pattern, self.sites, self.stacks, self.why_not)
        if len(found) != 1:
            raise SiteError(f"{pattern!r} means {len(found)} sites. Name one of them, such as {found[0].name!r}.")
        return found[0]

    @cached_property
    def _by_name(self) -> dict[str, Site]:
        return {site.name: site for site in self.sites}

    @cached_property
    def patch(self) -> tuple[int, int, int]:
        """Latent frames, rows and columns of an image token."""
        sides = self.family.grid.patch
        value = read_entry(self.transformer.config, sides, self.family.name) if isinstance(sides, str) else sides
        sizes = [value] * 2 if isinstance(value, int) else list(value)
        f, h, w = (1, *sizes)[-3:]
        return f, h, w

    def time_rule(self, time: Time | None = None, noise: Noise | None = None) -> TimeRule:
        """What the executor needs to tell the time of a forward pass, and what its prediction is.

        time: the family's own by default.
        noise: as the scheduler has it; by default a flow's.
        """
        noise = noise or Noise()
        time = self.family.pipelines[0].time if time is None else time
        return {
            "argument": time.argument,
            "position": self.modules.find_parameter("", time.argument)[1],
            "offset": time.offset,
            "scale": time.scale,
            "levels": noise.levels,
            "data": noise.data,
            "kind": noise.kind,
            "sign": self.family.prediction.sign * noise.sign,
        }

    @cached_property
    def grid_rule(self) -> GridRule:
        """What the executor needs to find image tokens in a forward pass."""
        grid = self.family.grid
        return {
            "rule": grid.rule,
            "axes": grid.axes,
            "argument": grid.argument,
            "position": self.modules.find_parameter("", grid.argument)[1],
            "latents": grid.latents,
            "latents_position": self.modules.find_parameter("", grid.latents)[1],
            "patch": list(self.patch),
            "target": grid.target,
            "pad": grid.pad,
            "pad_to": None if grid.pad_to is None else self.modules.measure(grid.pad_to),
            "mask": grid.mask,
            "layout": grid.layout,
            "marks": grid.marks,
            "marked": grid.marked,
            "coordinates": grid.coordinates,
        }

    @cached_property
    def text_rule(self) -> TextRule:
        """What the executor needs to find the text, and the tokens of it that take part in attention."""
        prompts = self.family.prompts
        paths = [name.split(".") for name in prompts.masks]
        return {
            "texts": list(prompts.text),
            "text_positions": [self.modules.find_parameter("", name)[1] for name in prompts.text],
            "masks": paths,
            "positions": [self.modules.find_parameter("", path[0])[1] for path in paths],
            "masked_by": prompts.masked_by,
            "multiple": prompts.multiple,
        }

    def plan_grid(self, pipe: DiffusionPipeline, call: Mapping[str, Any]) -> tuple[int, int] | None:
        """(h, w) image tokens that a call will have, or None where the pipeline chooses its own size."""
        defaults = call_parameters(type(pipe))
        pipeline = self.family.pipeline(type(pipe))
        if pipeline.chooses_size or "num_frames" in defaults or "height" not in defaults:
            return None
        if "use_resolution_binning" in defaults and call.get("use_resolution_binning", True):
            return None
        factor = getattr(pipe, "vae_scale_factor", None)
        sizes = [call.get(side) or defaults[side].default for side in ("height", "width")]
        if None in sizes and call.get("image") is not None and pipeline.size_from_image:
            return None
        usual = getattr(pipe, "default_sample_size", None)
        if factor is None or (None in sizes and not isinstance(usual, int)):
            return None
        h, w = (int(size or usual * factor) // (factor * self.family.latents.patch) for size in sizes)
        return h, w

    def channels(self, site: Site) -> int:
        """The number of channels at a site."""
        if site.point in ("velocity", "x0"):
            return self.out_width if site.point == "velocity" else self.latent_width
        if site.point == "mod.final":
            asked = self.family.final.mod_width
            return self.width if asked is None else self.modules.measure(asked)
        if site.point in CALLED:
            return self.channels(replace(site, point=site.point.removesuffix("_rot")))
        if site.point in PATTERNS:
            return self.channels(replace(site, point=f"{site.point.partition('.')[0]}.q"))
        spec = self._spec_of(site)
        if spec is None or spec.half is not None:
            return self.width
        whole = measure_width(self._find_inner(site.block or 0, spec.module), spec.side) or self.width
        if spec.span is None:
            return whole
        start, stop = spec.span
        return (whole if stop is None else stop * self.width) - start * self.width

    def heads(self, site: Site) -> list[range]:
        """The channels of every head at a point of attention; SiteError elsewhere."""
        spec = self._spec_of(site) if site.point in HEADED else None
        own = [spec.module] if spec is not None and spec.side == "attention" else []
        paths = [] if spec is None else [*own, spec.module.rpartition(".")[0], spec.module.split(".")[0]]
        modules = [self._find_inner(site.block or 0, path) for path in paths]
        count = next(filter(None, map(count_heads, modules)), None)
        if count is None:
            raise SiteError(
                f"{site} is not made of heads that its module counts. Heads are at {', '.join(HEADED)}, for instance "
                f"blocks.{site.block or 0}.img.attn.z."
            )
        module = site.point.partition(".")[0]
        queries = Site(site.block, "img" if module == "cross" else site.stream, f"{module}.q")
        size = self.channels(queries) // count
        return [range(start, start + size) for start in range(0, self.channels(site), size)]

    @cached_property
    def latent_width(self) -> int:
        """The size of one token of latents: what is predicted, without a learned variance."""
        channels = self.transformer.config.get("in_channels")
        if self.family.prediction.axes == "tokens" or channels is None:
            return self.out_width
        return min(self.out_width, channels * math.prod(self.patch))

    def _spec_of(self, site: Site) -> PointSpec | None:
        if site.block is None or site.point in ("resid_pre", "resid_post", "x0"):
            return None
        spec = find_point(self._blocks[site.block][0], site.stream, site.point)
        if not isinstance(spec, PointSpec):
            raise FamilyError(f"{self.family.name}: {site} does not exist: {spec}.")
        return spec

    def _is_once(self, site: Site) -> bool:
        return (self.stack_name(site), site.stream, site.point) in self.once

    def stack_name(self, site: Site) -> str:
        """The stack of a site's block; "" for the whole model."""
        return "" if site.block is None else self._blocks[site.block][0].name

    def block_name(self, block: int) -> str:
        """A block's name within its stack, such as "single.4"."""
        stack, index = self._blocks[block]
        return f"{stack.name}.{index}"

    def locate(self, site: Site) -> TensorLocation:
        """Where the tensor of a site is."""
        family = self.family
        if site.block is None and site.point in ("velocity", "x0"):
            return TensorLocation(
                "transformer",
                "output",
                0,
                layout=family.prediction.layout,
                axes=family.prediction.axes,
                patch=self.patch,
                x0=site.point == "x0",
            )
        if site.block is None and site.point == "mod.final":
            return replace(self._locate_modulation(), once=self._is_once(site))
        if site.block is None:
            name, position = self.modules.find_parameter(family.final.module, 0)
            return TensorLocation(
                f"transformer.{family.final.module}",
                "input",
                name,
                position,
                layout=family.final.layout,
                axes=family.final.axes,
                sequence_first=family.final.sequence_first,
            )
        stack, index = self._blocks[site.block]
        path = f"{stack.path}.{index}"
        tokens: dict[str, Any] = {"stream": site.stream, "layout": stack.layout, "sequence_first": stack.sequence_first}
        if site.point == "resid_pre":
            name, position = self.modules.find_parameter(path, stack.inputs[site.stream])
            return TensorLocation(f"transformer.{path}", "input", name, position, **tokens)
        spec = self._spec_of(site)
        if spec is not None:
            return replace(self._locate_spec(site.block, site.stream, spec), once=self._is_once(site))
        return TensorLocation(f"transformer.{path}", "output", stack.outputs[site.stream], **tokens)

    def _locate_modulation(self) -> TensorLocation:
        """Where what modulates the final norm is."""
        spec, final = self.family.final.mod, self.family.final.module
        if not isinstance(spec, PointSpec):
            raise FamilyError(f"{self._why_no_modulation()}.")
        path, slot, position = spec.module or final, spec.slot, None
        self.modules.get(path)
        if (path, spec.side) not in self._ends:
            raise FamilyError(
                f"{self.family.name}: mod= of its Final names the {spec.side} of {path}, which is none of what follows "
                f"the blocks: {', '.join(f'the {side} of {module}' for module, side in self._ends[:-1])}."
            )
        if spec.side == "input":
            slot, position = self.modules.find_parameter(path, 0 if slot is None else slot)
        return TensorLocation(f"transformer.{path}", spec.side, slot, position, layout="whole")

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
        self.modules.get(module)
        return TensorLocation(f"transformer.{module}", "output", slot, layout="whole")

    @cached_property
    def readout_rule(self) -> ReadoutRule | None:
        """What the executor needs to read image tokens out."""
        readout = self.family.readout
        if readout is None:
            return None
        for module in readout.modules:
            self.modules.get(module)
        return {
            "modules": [f"transformer.{module}" for module in readout.modules],
            "order": readout.order,
            "table": readout.table,
            "passes_temb": readout.passes_temb,
            "projection": readout.projection and f"transformer.{readout.projection}",
            "axes": self.family.prediction.axes,
            "patch": list(self.patch),
        }

    def _locate_spec(self, block: int, stream: str, spec: PointSpec) -> TensorLocation:
        stack, index = self._blocks[block]
        if spec.entry is not None:
            name, position = self.modules.find_parameter("", spec.slot or 0)
            entry = (spec.entry, index, len(self.stacks[stack.name]))
            layout = spec.layout or stack.layout
            return TensorLocation("transformer", "input", name, position, stream, layout, entry=entry)
        path = f"{stack.path}.{index}{'.' if spec.module else ''}{spec.module}"
        slot, position = (
            self.modules.find_parameter(path, spec.slot)
            if spec.side == "input" and spec.slot is not None
            else (spec.slot, None)
        )
        table = None if spec.table is None else (spec.table, (spec.span or (0, None))[0])
        return TensorLocation(
            f"transformer.{path}",
            spec.side,
            slot,
            position,
            stream=stream,
            layout=spec.layout or stack.layout,
            axes=spec.axes,
            sequence_first=stack.sequence_first and not spec.batch_first and spec.layout != "whole",
            span=None if spec.table is not None else self._in_channels(spec.span),
            half=self._in_channels(spec.half),
            gate=None if spec.gate is None else self._locate_spec(block, stream, spec.gate),
            tanh=spec.tanh,
            table=table,
        )

    def _in_channels(self, units: tuple[int, int | None] | None) -> tuple[int, int | None] | None:
        """A span in units of the hidden size, in channels."""
        if units is None:
            return None
        start, stop = units
        return start * self.width, None if stop is None else stop * self.width

    def rank(self, location: TensorLocation) -> tuple[int, int]:
        """Sorts locations as the model computes them: blocks by their number, modules of a block as they were seen."""
        if location.entry is not None:
            return -2, 0  # given to the transformer
        for number, (stack, index) in enumerate(self._blocks):
            path = f"transformer.{stack.path}.{index}"
            if location.module == path or location.module.startswith(f"{path}."):
                if location.slot == "result" and location.side == "attention":
                    return number, self.order[stack.name, location.module[len(path) :], "output"]
                if location.side == "attention":  # after its queries and keys, and before its output is projected
                    streams = (location.stream, *STREAMS)  # text that the last block only reads is projected nowhere
                    last = next(one for one in streams if self.why_not(number, one, "attn.z") is None)
                    return self.rank(self.locate(Site(number, last, "attn.z")))
                return number, self.order[stack.name, location.module[len(path) :], location.side]
        if self.family.readout and self.family.readout.shift and location == self.shift:
            return -1, 0  # what all blocks are given is computed before them
        return self.depth, self._ends.index((location.module.removeprefix("transformer").lstrip("."), location.side))

    def place(self, site: Site) -> tuple:
        """Sorts sites of blocks as the model computes them."""
        return (*self.rank(self.locate(site)), *site.order[1:], site.name)

    @cached_property
    def _ends(self) -> list[tuple[str, str]]:
        """(module, side) of what has a name after the blocks, in the order in which the model computes it."""
        final, readout = self.family.final.module, self.family.readout
        before = [] if readout is None or readout.projection is None else [(readout.projection, "output")]
        after = [] if readout is None else [(module, "input") for module in readout.modules]
        return [*before, (final, "input"), *after, ("", "output")]


def _describe_blocks(stack: Stack) -> str:
    return "blocks" if stack.name == "block" else f"{stack.name} blocks"
