"""One transformer under plain torch hooks, tried on one small call: what the checks of a family look at."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dit_lens.errors import FamilyError
from dit_lens.families.anatomy import Anatomy
from dit_lens.families.example_call import ROWS
from dit_lens.families.layout import (
    find_image_tokens,
    from_tokens,
    replace_tensor,
    select_stream,
    select_tensor,
    to_tokens,
)
from dit_lens.families.stack import CALLED
from dit_lens.families.tensors import apply_to_part, compute_gate, read_out

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.hooks import RemovableHandle

    from dit_lens.families.locations import TensorLocation
    from dit_lens.families.sites import Site

# What a hook meets when a block's inputs or outputs are others than the row says.
MISFITS = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


class HookedClone:
    """A transformer, the anatomy a family gives it, and a call."""

    def __init__(self, anatomy: Anatomy, call: dict[str, Any]):
        self.anatomy, self.call, self.name = anatomy, call, anatomy.family.name
        self.rule = anatomy.grid_rule
        self.image = find_image_tokens(((), call), self.rule)
        self.timed_once = False
        self.points = [site for site in anatomy.sites if site.point != "x0" and site.point not in CALLED]

    @cached_property
    def locations(self) -> dict[Site, TensorLocation]:
        """Where the tensor of every site is."""
        return {site: self.anatomy.locate(site) for site in self.points}

    @cached_property
    def seen(self) -> dict[str, Tensor]:
        """The tokens of every site."""
        return self.watch(self.call)

    @cached_property
    def last(self) -> str:
        """The output of the last block that holds image tokens."""
        streams = [site for site in self.points if site.block is not None and site.stream == "img"]
        if not streams:
            raise FamilyError(f"{self.name}: none of its stacks holds image tokens.")
        return streams[-1].name

    def find_once(self) -> frozenset[tuple[str, str, str]]:
        """(stack, stream, point) of what has one row for all where the call has one time for all."""
        time = self.anatomy.time_rule()["argument"]
        if not isinstance(self.call[time], Tensor):
            return frozenset()
        self.timed_once = True
        try:
            found = self.watch({**self.call, time: self.call[time][:1]})
        except FamilyError:  # this transformer wants a time for every row
            return frozenset()
        finally:
            self.timed_once = False
        return frozenset(
            (self.anatomy.stack_name(site), site.stream, site.point)
            for site in self.points
            if site.name in found and len(found[site.name]) == 1
        )

    def watch(self, call: dict[str, Any], *hooks: RemovableHandle) -> dict[str, Tensor]:
        """The tokens of every site in one forward pass."""
        found: dict[str, Tensor] = {}
        gates: dict[TensorLocation, Tensor] = {}
        handles = list(hooks)
        for site, location in self.locations.items():
            if location.gate is not None:
                handles.append(self._keep_gate(location.gate, gates))
            handles.append(self._keep(site, location, gates, found))
        self.run(call, handles)
        return found

    def order(self) -> dict[tuple[str, str, str], int]:
        """When the modules of a block are entered and left: (stack, path, side) -> position."""
        lines: dict[tuple[str, int], dict[tuple[str, str], None]] = {}
        handles = []
        for stack in self.anatomy.family.stacks:
            for number, block in enumerate(self.anatomy.blocks(stack)):
                line = lines.setdefault((stack.name, number), {})
                for name, module in block.named_modules():
                    path = f".{name}" if name else ""
                    handles.append(module.register_forward_pre_hook(_note(line, (path, "input"))))
                    handles.append(module.register_forward_hook(_note(line, (path, "output"))))
        self.run(self.call, handles)
        order: dict[tuple[str, str, str], int] = {}
        for (stack, _), line in sorted(lines.items(), key=lambda item: -len(item[1])):
            for position, (path, side) in enumerate(line):
                order.setdefault((stack, path, side), position)
        return order

    def read_out(self, tokens: Tensor) -> Tensor:
        """The prediction that the final norm and what follows make of image tokens."""
        final, shift = self.anatomy.final, self.anatomy.shift
        caught: dict[str, Any] = {}

        def keep_inputs(_: nn.Module, args: tuple, kwargs: dict) -> None:
            caught["inputs"] = (args, kwargs)

        handles = [self._module(final).register_forward_pre_hook(keep_inputs, with_kwargs=True)]
        if shift is not None:
            plain = shift.plain()

            def keep_shift(_module: nn.Module, _args: tuple, output: Any) -> None:
                caught["conditioning"] = to_tokens(select_tensor(output, "output", plain), plain)

            handles.append(self._module(shift).register_forward_hook(keep_shift))
        self.run(self.call, handles)
        rule = self.anatomy.readout_rule
        if rule is None:
            raise FamilyError(f"{self.name}: its row does not say how tokens are read out.")
        norm, conditioning = self._module(final), caught.get("conditioning")
        with torch.no_grad():
            return read_out(self, norm, caught["inputs"], final.plain(), tokens, conditioning, self.image, rule)

    def changing(self, location: TensorLocation, fn: Callable[[Any], Any]) -> RemovableHandle:
        """A hook that replaces a module's whole output."""
        return self._module(location).register_forward_hook(lambda _module, _args, output: fn(output))

    def entering(self, location: TensorLocation, fn: Callable[[Tensor], Tensor]) -> RemovableHandle:
        """A hook that replaces the tensor [row, token, channel] at a location, whatever side it is on."""
        plain, side = location.plain(), location.side

        def change(value: Any) -> Any:
            whole = select_tensor(value, side, plain)
            return replace_tensor(value, side, plain, from_tokens(fn(to_tokens(whole, plain)), whole, plain))

        if side == "output":
            return self.changing(location, change)
        return self._module(location).register_forward_pre_hook(
            lambda _module, args, kwargs: change((args, kwargs)), with_kwargs=True
        )

    def run(self, call: dict[str, Any], handles: list[RemovableHandle]) -> None:
        """One forward pass under hooks, which are removed; FamilyError where a block is not as the family says."""
        try:
            with torch.no_grad():
                self.anatomy.transformer(**call)
        except MISFITS as problem:
            raise FamilyError(
                f"{self.name}: a block of {self.anatomy.family.transformer} has another output or other arguments than "
                f"the family says ({problem})."
            ) from problem
        finally:
            for handle in handles:
                handle.remove()

    def _keep(
        self, site: Site, location: TensorLocation, gates: dict[TensorLocation, Tensor], found: dict[str, Tensor]
    ) -> RemovableHandle:
        plain = location.plain()

        def keep(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            if site.name in found:  # a module that is called again for the other stream
                return
            value = select_tensor(output if location.side == "output" else (args, kwargs), location.side, plain)
            if location.half is not None:
                value = apply_to_part(module.forward, value, plain)
            tensor = to_tokens(value, plain) if location.table is None else compute_gate(value, plain, module)
            if tensor.shape[0] != ROWS and not (self.timed_once and tensor.shape[0] == 1):
                raise ValueError(f"{site} has {tensor.shape[0]} rows in a call of {ROWS}")
            if location.gate is not None:
                tensor = tensor * gates[location.gate]
            found[site.name] = select_stream(tensor, plain, self.image, range(len(tensor)))[0].clone()

        return self._module(location).register_forward_hook(keep, with_kwargs=True)

    def _keep_gate(self, gate: TensorLocation, gates: dict[TensorLocation, Tensor]) -> RemovableHandle:
        plain = gate.plain()

        def keep(module: nn.Module, value: Any) -> None:
            gates[gate] = compute_gate(select_tensor(value, gate.side, plain), plain, module)

        if gate.side == "output":
            return self._module(gate).register_forward_hook(lambda module, _args, output: keep(module, output))
        # An argument of the block is known before its parts are called.
        return self._module(gate).register_forward_pre_hook(
            lambda module, args, kwargs: keep(module, (args, kwargs)), with_kwargs=True
        )

    def _module(self, location: TensorLocation) -> nn.Module:
        return self.get(location.module)

    def get(self, path: str) -> nn.Module:
        """A module by its path from the pipeline."""
        return self.anatomy.transformer.get_submodule(path.removeprefix("transformer").removeprefix("."))


def _note(line: dict[tuple[str, str], None], event: tuple[str, str]) -> Callable[..., None]:
    return lambda *_: line.setdefault(event)
