"""Forward hooks of others on modules that a run reads or edits: they see what is edited, and may not change it.

A trace reads and writes what a module's forward returns, before torch calls hooks with it. A hook that only looks, as
most do, is no harm; one that returns something else, or writes into the tensor, makes the reading untrue.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from dit_lens.errors import ExecutionError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import nn

    from dit_lens.core.plan.program import Program


@contextmanager
def refuse_changes(pipe: DiffusionPipeline, program: Program) -> Generator[None]:
    """One run; ExecutionError at its end if a hook changed what a module returned that the run reads or edits."""
    names = {
        visit["module"]: None
        for forward in program["forwards"]
        for visit in forward["visits"]
        if visit["side"] == "output"
    }
    changed: dict[str, None] = {}
    with ExitStack() as stack:
        for name in names:
            module = pipe.transformer.get_submodule(name.removeprefix("transformer").removeprefix("."))
            if module._forward_hooks:  # noqa: SLF001 torch has no public way to list them
                stack.enter_context(_watching(module, name, changed))
        yield
    if changed:
        raise ExecutionError(
            f"a forward hook that is not of this library changes what pipe.{next(iter(changed))} returns, after "
            "the run has read or edited it there. Nothing was kept of this run. Remove the hook, make it a forward of "
            "the module's class, or make the change with Apply."
        )


@contextmanager
def _watching(module: nn.Module, name: str, changed: dict[str, None]) -> Generator[None]:
    """Compares what a module's hooks are given with what leaves the last of them. changed: receives the name."""
    given: list[Any] = []  # the tensors too, so that no other comes to lie in their place

    def first(_module: nn.Module, _args: Any, output: Any) -> None:
        given[:] = [output, _identify(output)]

    def last(_module: nn.Module, _args: Any, output: Any) -> None:
        if given[1] != _identify(output):
            changed[name] = None
        given.clear()

    handles = [module.register_forward_hook(first, prepend=True), module.register_forward_hook(last)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _identify(output: Any) -> list[Any]:
    """Where tensors lie, and how often each was written; a detached one counts as the same."""
    return [
        (leaf.data_ptr(), leaf.shape, leaf.stride(), None if leaf.is_inference() else leaf._version)  # noqa: SLF001
        for leaf in tree_leaves(output)
        if isinstance(leaf, Tensor)
    ]
