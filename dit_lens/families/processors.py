"""What computes the attentions of a live transformer, given to a clone, so that it can be tried."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn

from dit_lens.errors import FamilyError
from dit_lens.families.example_call import CallSizes, make_argument
from dit_lens.families.module_tree import class_names

if TYPE_CHECKING:
    from dit_lens.families.anatomy import Anatomy
    from dit_lens.families.stack import Adapter


def put_processors(anatomy: Anatomy, processors: Iterable[tuple[tuple[str, str], Any]], text: int) -> dict[str, Any]:
    """Puts processors of other classes into the attentions of a clone; returns the arguments that they ask for.

    anatomy: of the clone. Where blocks of one stack have several classes, its blocks take turns.
    processors: those of the live model, by stack and path within a block.
    text: text tokens of the call that tries them.

    Raises FamilyError where one has weights of its own, and the family's row does not say how to make it.
    """
    wanted: dict[tuple[str, str], dict[type, Any]] = defaultdict(dict)
    for key, processor in processors:
        wanted[key].setdefault(type(processor), processor)
    used: dict[str, Adapter] = {}
    for stack in anatomy.family.stacks:
        for number, block in enumerate(anatomy.blocks(stack)):
            for path, module in block.named_modules():
                others = list(wanted.get((stack.name, path), {}).values())
                own = getattr(module, "processor", None)
                if own is None or not others:
                    continue
                chosen = others[number % len(others)]
                if type(chosen) is not type(own):
                    adapter = _find_adapter(anatomy, chosen)
                    module.set_processor(_copy(chosen) if adapter is None else _make(chosen, adapter, anatomy))
                    used |= {} if adapter is None else {adapter.processor: adapter}
    sizes = CallSizes.of(anatomy, text)
    return {name: make_argument(value, sizes) for adapter in used.values() for name, value in adapter.call.items()}


def _find_adapter(anatomy: Anatomy, processor: Any) -> Adapter | None:
    """What the row says of a processor; None where it has no weights, and needs nothing said."""
    names = class_names(processor)
    found = next((adapter for adapter in anatomy.family.adapters if adapter.processor in names), None)
    if found is None and isinstance(processor, nn.Module) and any(True for _ in processor.parameters()):
        raise FamilyError(
            f"{anatomy.family.name}: an attention is computed by a {type(processor).__name__}, an adapter's processor "
            "that this family's row does not describe, so what it writes has no name. Unload it "
            "(pipe.unload_ip_adapter()), or describe it: dit_lens.register_family(dataclasses.replace(row, "
            "adapters=(...)))."
        )
    return found


def _copy(processor: Any) -> Any:
    """A processor of one's own, so that trying it leaves no trace in the live one."""
    try:
        return copy.deepcopy(processor)
    except Exception as problem:  # what stops a copy is anybody's guess
        raise FamilyError(
            f"an attention is computed by a {type(processor).__name__}, which cannot be copied to try it ({problem}). "
            "Put the usual processor back: pipe.transformer.set_attn_processor(...)."
        ) from problem


def _make(processor: Any, adapter: Adapter, anatomy: Anatomy) -> Any:
    """A processor of the same class, of the clone's sizes."""
    sizes = {name: anatomy.modules.measure(size) for name, size in adapter.arguments.items()}
    return type(processor)(**sizes)
