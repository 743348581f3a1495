"""Hooks of others on modules that a run reads or edits: they see what is edited, and may not change it.

A trace reads and writes what a module's forward returns, before torch calls hooks with it, and what its forward is
given, after torch has called those. A hook that only looks, as most do, is no harm; one that returns something else, or
writes into the tensor, makes the reading untrue.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor
from torch.nn.modules.module import _global_forward_hooks, register_module_forward_hook
from torch.utils._pytree import tree_leaves

from dit_lens.errors import ExecutionError
from dit_lens.families.layout import argument

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import nn

    from dit_lens.core.plan.program import Program

ALL: OrderedDict[int, Any] = cast("Any", _global_forward_hooks)  # hooks on all modules; torch offers no public way


@contextmanager
def refuse_changes(pipe: DiffusionPipeline, program: Program) -> Generator[None]:
    """One run; ExecutionError at its end if a hook changed what the run reads or edits before it, or after.

    Of what the transformer itself is given, the time and the noisy latents are compared, in every run: residuals of a
    ControlNet may come from a hook.
    """
    whole = (program["denoiser"], "input")
    visits = {(visit["module"], visit["side"]): None for forward in program["forwards"] for visit in forward["visits"]}
    changed: dict[tuple[str, str], None] = {}
    with ExitStack() as stack:
        for name, side in visits.keys() - {whole}:
            module = pipe.transformer.get_submodule(name.removeprefix("transformer").removeprefix("."))
            hooks = (module._forward_hooks or ALL) if side == "output" else module._forward_pre_hooks  # noqa: SLF001
            if hooks:
                stack.enter_context(_watching(module, (name, side), changed, _identify))
        stack.enter_context(_watching(pipe.transformer, whole, changed, lambda given: _identify_time(given, program)))
        yield
    for name, side in changed:
        what, when = ("returns", "after") if side == "output" else ("is given", "before")
        raise ExecutionError(
            f"a forward{'' if side == 'output' else ' pre'} hook that is not of this library changes what pipe.{name} "
            f"{what}, {when} the run has read or edited it there. Nothing was kept of this run. Remove the hook, make "
            "it a forward of the module's class, or make the change with Apply."
        )


@contextmanager
def _watching(
    module: nn.Module, place: tuple[str, str], changed: dict[tuple[str, str], None], identify: Callable[[Any], Any]
) -> Generator[None]:
    """Compares what a module's hooks are given with what leaves the last of them.

    place: name of the module and side; ``changed`` receives it.
    identify: tells tensors apart.
    """
    given: list[Any] = []  # the tensors too, so that no other comes to lie in their place

    inwards = place[1] == "input"

    def first(called: nn.Module, *value: Any) -> None:
        if called is module:
            given[:] = [value, identify(value if inwards else value[-1])]

    def last(_module: nn.Module, *value: Any) -> None:
        if given[1] != identify(value if inwards else value[-1]):
            changed[place] = None
        given.clear()

    if inwards:
        register: Any = functools.partial(module.register_forward_pre_hook, with_kwargs=True)
        handles = [register(first, prepend=True), register(last)]
    else:  # hooks on all modules come before those on this one
        handles = [register_module_forward_hook(first), module.register_forward_hook(last)]
        ALL.move_to_end(handles[0].id, last=False)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _identify_time(arguments: Any, program: Program) -> list[Any]:
    """The time and the latents among the arguments of the transformer."""
    time, grid = program["time"], program["grid"]
    asked = ((time["argument"], time["position"]), (grid["latents"], grid["latents_position"]))
    found = [argument(arguments, *one) for one in asked]
    return [one if isinstance(one, int | float) else _identify(one) for one in found]


def _identify(output: Any) -> list[Any]:
    """Where tensors lie, and how often each was written; a detached one counts as the same."""
    return [
        (leaf.data_ptr(), leaf.shape, leaf.stride(), None if leaf.is_inference() else leaf._version)  # noqa: SLF001
        for leaf in tree_leaves(output)
        if isinstance(leaf, Tensor)
    ]
